"""The notebooks' sources: jupytext reads them, and they run from the first cell to the last."""

import os
import subprocess
import sys

import pytest

from helpers.places import DATA, ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def run(name: str, folder, **settings: object) -> str:
    environment = {**os.environ, **{key: str(value) for key, value in settings.items()}}
    # as a notebook would be, from a folder of its own
    done = subprocess.run(
        [sys.executable, ROOT / "notebooks" / name], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_jupytext_reads_it(path):
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.read(path)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown"
    assert kinds.count("code") >= 3
    assert notebook.cells[0].source.startswith("# ")
    assert notebook.metadata["kernelspec"]["name"] == "python3"


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"quickstart", "correct_by_clicks", "convert_and_check", "fine_tune"}


@pytest.mark.heavy
def test_convert_and_check(tmp_path):
    """On a checkpoint in the release's three files."""
    from helpers.small_checkpoint import small, write_checkpoint
    from virst_jax.config import to_json

    write_checkpoint(tmp_path, trained_only=False)
    (tmp_path / "small.json").write_text(to_json(small(4)))
    printed = run(
        "convert_and_check.py",
        tmp_path,
        VIRST_CHECKPOINT=tmp_path,
        VIRST_CONFIG=tmp_path / "small.json",
        VIRST_CASES=DATA / "parity",
    )
    assert "mask_decoder" in printed
    assert "bytes" in printed


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["quickstart.py", "correct_by_clicks.py"])
def test_it_runs(name, tmp_path):
    assert run(name, tmp_path)


@pytest.mark.heavy
def test_fine_tune(tmp_path):
    """A folder of one's own videos without JSON, checked, trained on for two steps, and scored."""
    printed = run("fine_tune.py", tmp_path)
    assert "J&F" in printed
