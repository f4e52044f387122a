"""The recorded outputs of the release, through the parity runner."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from conversion import parity
from conversion.cases.case import case_names

CASES = Path(__file__).parent / "data" / "parity"
TABLES = {"prompt_variants"}  # fixtures of other tests, not cases
HEAVY = ("e2e_", "train_loss")
NAMES = [name for name in case_names(CASES) if name not in TABLES]


def failures(name: str, folder: Path = CASES) -> list[str]:
    checks, _ = parity.run_case(folder, name, tokenizer=CASES.parent / "tokenizer")
    return [f"{c.output}: {c.note or c.relative}" for c in checks if not c.passed]


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(HEAVY)])
def test_module_equals_the_release(name):
    assert failures(name) == []


@pytest.mark.heavy
@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(HEAVY)])
def test_network_equals_the_release(name):
    assert failures(name) == []


def copy_case(name: str, target: Path) -> None:
    for path in CASES.glob(f"{name}.*"):
        shutil.copy(path, target)


def test_a_changed_output_fails(tmp_path, capsys):
    copy_case("losses", tmp_path)
    arrays = dict(np.load(tmp_path / "losses.npz"))
    np.savez(tmp_path / "losses.npz", **{**arrays, "bce": arrays["bce"] * np.float32(1.001)})
    report = tmp_path / "report.json"
    assert parity.main([str(tmp_path), "--case", "losses", "--json", str(report)]) == 1
    assert "FAIL" in capsys.readouterr().out
    (case,) = json.loads(report.read_text())
    assert {c["output"]: c["passed"] for c in case["checks"]} == {
        "dice": True,
        "bce": False,
        "dice_empty": True,
        "bce_empty": True,
    }


def test_another_salt_fails(tmp_path):
    copy_case("token_merge", tmp_path)
    meta = json.loads((tmp_path / "token_merge.json").read_text())
    (tmp_path / "token_merge.json").write_text(json.dumps({**meta, "salt": 1}))
    assert len(failures("token_merge", tmp_path)) == 5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "losses.npz").write_bytes(b"PK\3\4 no zip"), "damaged"),
        (lambda d: (d / "losses.npz").write_bytes((d / "losses.npz").read_bytes()[:200]), "damaged"),
        (lambda d: (d / "losses.json").write_text("{"), "damaged"),
        (lambda d: (d / "losses.npz").unlink(), "does not fit its kind"),
        (lambda d: [p.rename(d / p.name.replace("losses", "riddle")) for p in d.iterdir()], "unknown kind"),
    ],
)
def test_damaged_and_unknown_cases_fail(tmp_path, capsys, spoil, message):
    copy_case("losses", tmp_path)
    spoil(tmp_path)
    assert parity.main([str(tmp_path)]) == 1
    assert message in " ".join(capsys.readouterr().out.split())


def test_bad_arguments(tmp_path, capsys):
    assert parity.main([str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in capsys.readouterr().err
    assert parity.main([str(tmp_path)]) == 2
    assert "no cases" in capsys.readouterr().err
    copy_case("losses", tmp_path)
    assert parity.main([str(tmp_path), "--case", "missing"]) == 1
    assert "no case" in " ".join(capsys.readouterr().out.split())
