"""The dispatcher `virst`: help, spelling, and what is told of errors."""

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.dataset_layouts import write_layout
from virst_jax import cli
from virst_jax.commands import demo, failures
from virst_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def status_of(*arguments: str) -> int:
    try:
        return cli.main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_help_by_every_name(capsys):
    assert status_of("help") == status_of("--help") == 0
    whole = capsys.readouterr().out
    assert whole[: len(whole) // 2] == whole[len(whole) // 2 :]
    assert status_of("help", "segment") == status_of("segment", "--help") == 0
    one = capsys.readouterr().out
    assert one[: len(one) // 2] == one[len(one) // 2 :]
    assert status_of("help", "segmnt") == 2
    assert "did you mean segment?" in capsys.readouterr().err
    assert start("-m", "virst_jax", "--version").stdout.startswith("virst_jax ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["xyzzy"], "unknown command 'xyzzy': choose one of segment, "),
        (["segment", "a.mp4", "x", "--out", "o", "--evry", "2"], "unknown option '--evry'; did you mean --every?"),
        (["segment", "--modle", "x"], "unknown option '--modle'; did you mean --model?"),
        (["data", "check", "x", "--qick"], "unknown option '--qick'; did you mean --quick?"),
        (["demo", "a"], "unexpected argument 'a'"),
        (["train", "--config=stage1", "--stpes=2"], "unknown option '--stpes'; did you mean --steps?"),
    ],
)
def test_mistyped(capsys, arguments, message):
    assert status_of(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "--sam2", "https://example.org/sam2.pt", "--out", "x"],
        ["convert", "--sam2", "x.pt", "--out", "https://example.org/x"],
        ["data", "check", "https://example.org/set"],
        ["metrics", "https://example.org/masks", "--dataset", "mevis", "--data-root", "x"],
        ["submit", "--check", "https://example.org/a.zip", "--dataset", "mevis", "--data-root", "x"],
        ["train", "--config=synthetic", "--workdir=https://example.org/runs"],
        ["segment", "a.mp4", "the dog", "--out", "https://example.org/masks"],
        ["parity", "https://example.org/cases"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_an_address_in_place_of_a_path_keeps_its_form(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status_of(*arguments) == 2
    error = capsys.readouterr().err
    assert "https://example.org/" in error
    assert "is an address, where a path is needed" in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_empty_path_is_not_the_folder_where_one_is(capsys):
    assert status_of("data", "check", "") == 2
    assert "is empty, where a path is needed" in capsys.readouterr().err
    assert status_of("segment", "a.mp4", "the dog", "--out", "") == 2
    assert "argument --out: is empty" in capsys.readouterr().err
    assert status_of("segment", "", "the dog", "--out", "o") == 2
    assert "the video's name is empty" in capsys.readouterr().err


def test_options_are_spelled_with_hyphens_and_taken_with_underscores(capsys):
    def options(parser: argparse.ArgumentParser) -> list[str]:
        nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        below = [name for a in nested for child in a.choices.values() for name in options(child)]
        return [*parser._option_string_actions, *below]

    names = options(cli.whole_parser())
    assert "--data-root" in names
    assert not [name for name in names if "_" in name]
    assert status_of("metrics", "masks", "--dataset=mevis", "--data_root=/nowhere") == 2
    assert "/nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell, capsys):
    pytest.importorskip("shtab")
    assert status_of("completion", shell) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in cli.COMMANDS)
    assert "compile-only" in script
    assert "thorough" in script  # of a command within another
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        script += """
        for line in "parity " "record tr" "parity ratio --lo"; do
            COMP_LINE="virst $line"; COMP_WORDS=($COMP_LINE); [[ $line == *" " ]] && COMP_WORDS+=("")
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); _shtab_virst; echo "${COMPREPLY[@]}"
        done"""
        shown = subprocess.run(["bash"], input=script, text=True, check=True, capture_output=True).stdout
        assert shown.splitlines() == ["bisect ratio", "training", "--low"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a.mp4: no such video"), "a.mp4: no such video"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), "/out: permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: not a directory"),
        (OSError(errno.ENOSPC, "No space left on device", "x.png"), "x.png: no space left on the disk; free some"),
        (OSError("cannot read"), "cannot read"),
        (MemoryError(), "the host is out of memory"),
        (ModuleNotFoundError("No module named 'grain'", name="grain"), "grain is not installed; pip install 'virst-j"),
        (RuntimeError("Unable to initialize backend 'tpu': no\nTPU"), "JAX finds no device of the kind 'tpu' here"),
        (type("XlaRuntimeError", (RuntimeError,), {})("RESOURCE_EXHAUSTED: 9 GB"), "the device is out of memory"),
    ],
)
def test_an_error_is_one_line(monkeypatch, capsys, error, line):
    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(demo, "run", run)
    assert status_of("demo") == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {line}")
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize("fault", [ZeroDivisionError("1/0"), RuntimeError("?"), ModuleNotFoundError("x", name="x")])
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, fault):
    def run(args: argparse.Namespace) -> int:
        raise fault

    monkeypatch.setattr(demo, "run", run)
    assert failures.one_line(fault) is None
    with pytest.raises(type(fault)):
        cli.main(["demo"])


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_device_that_is_not_there(platform):
    done = start("-m", "virst_jax", "info", JAX_PLATFORMS=platform)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: JAX finds no device of the kind {platform!r} here; set JAX_PLATFORMS=cpu")
    assert len(done.stderr.splitlines()) == 1


def test_a_terminal_that_cannot_show_a_name(tmp_path):
    write_layout("custom", tmp_path, num_videos=1, seed=0)
    out = tmp_path / "caf\u00e9.png"
    done = start("-m", "virst_jax", "data", "show", str(tmp_path), "--out", str(out), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "caf\\xe9.png: 1 of 1 samples" in done.stdout
    assert out.is_file()


def test_nobody_reads_the_output():
    """As in `virst ... | true`: quiet."""
    script = "import sys\nfrom virst_jax import cli\nsys.exit(cli.guarded(lambda: print('x' * 10**6) or 0))"
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(writing)
    os.close(reading)
    _, error = process.communicate(timeout=60)
    assert error == ""
    assert process.returncode == 1
