"""Bisecting: a run like the recorded one has no difference, and a fault is named where it was put in."""

import dataclasses
import json

import numpy as np
import pytest

from conversion import parity
from conversion.bisect import load_blocks
from conversion.bisection.operation import Operation, conditioning, explained, jitter, relative_error
from conversion.bisection.walk import Walk, first_difference
from helpers.bisect_case import NAME, write_case
from helpers.mutants import DECODER, ENCODER, MUTANTS, Mutant, first_named, open_recorded

QUICK = ("layer norm's epsilon 1e-5 for 1e-6", "mean pooling")
BEGINNING = 5  # operations: up to the image encoder's third block


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("bisect"), BEGINNING)


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name in QUICK], ids=lambda m: m.name)
def test_a_fault_is_named(path, mutant):
    row = first_named(mutant, open_recorded(path), BEGINNING)
    assert row is not None
    assert row.operation == mutant.expected


def stage_of(operation: str) -> str:
    """What the first operation of a stage begins with: modules and parameters of a stage are in none before it.

    Frames are tracked by what encodes the memories of anchors, which no stage before the anchors has.
    """
    first = {"frame": "anchors"}.get(operation.split()[0], operation.split()[0])
    return next((part for part in (DECODER, ENCODER) if operation.startswith(part)), first)


@pytest.mark.heavy
def test_every_fault_is_named(tmp_path):
    recorded = open_recorded(write_case(tmp_path))
    assert first_named(Mutant("none", ""), recorded) is None
    assert len(MUTANTS) >= 30
    wrong = {}
    for mutant in MUTANTS:
        row = first_named(mutant, recorded, begin=stage_of(mutant.expected))
        if row is None or row.operation != mutant.expected:
            wrong[mutant.name] = row
    assert not wrong
    # recorded before the parts were
    parts = (".decoder", ".encoder")
    older = {name: x for name, x in recorded.tensors.items() if not any(part in name for part in parts)}
    before = dataclasses.replace(recorded, tensors=older)
    cases = (("upscaling kernel flipped", DECODER, "anchors / masks"), ("depthwise kernel flipped", ENCODER, ENCODER))
    for name, begin, whole in cases:
        (mutant,) = (m for m in MUTANTS if m.name == name)
        row = first_named(mutant, before, begin=begin)
        assert row is not None
        assert row.operation == whole


def test_without_a_fault_there_is_no_difference(path):
    assert first_named(Mutant("none", ""), open_recorded(path), BEGINNING) is None


def test_command_names_a_changed_tensor(path, tmp_path, capsys):
    tensors = load_blocks(path.parent / f"{NAME}.blocks.npz")
    changed, out, page = tmp_path / "other.npz", tmp_path / "out.json", tmp_path / "out.html"
    block = tensors["image.block1"]
    np.savez(changed, **{**tensors, "image.block1": block * np.float32(1.0001)})
    given = ["bisect", str(path), "--blocks", str(changed), "--first", "--json", str(out), "--report", str(page)]
    assert parity.main(given) == 1
    told = capsys.readouterr().out
    assert "image / block 0" in told.splitlines()[3]
    assert told.splitlines()[-1].startswith("first difference: image / block 1 (image.block1): relative error 1.0e-04")
    rows = json.loads(out.read_text())["operations"]
    assert [row["passed"] for row in rows] == [True, True, True, False]
    assert rows[3]["conditioning"] == pytest.approx(0.7, abs=0.6)
    text = page.read_text()
    assert "first difference: image / block 1" in text
    assert "http" not in text.replace("http://www.w3.org", "")


def test_bad_arguments(path, tmp_path, capsys):
    def told(*given):
        assert parity.main(["bisect", *map(str, given)]) == 2
        return capsys.readouterr().err

    assert "no such directory" in told(tmp_path / "nowhere" / "e2e_a")
    assert "no case" in told(tmp_path / "e2e_a")
    assert "no such file; record the case with --blocks" in told(path, "--blocks", tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\3\4 no zip")
    assert "damaged" in told(path, "--blocks", tmp_path / "bad.npz")
    (tmp_path / "losses.json").write_text('{"inputs": ""}')
    assert "walks cases of the whole network" in told(tmp_path / "losses")


# operations


def _add(size):
    return Operation("add", ("x",), ("y",), lambda bias, x: (np.asarray(x) + bias,), np.float32(size))


def test_conditioning_of_a_difference():
    x = np.linspace(1, 2, 100, dtype=np.float32)
    (y,) = _add(-1).run(-1, x)
    assert conditioning(_add(-1), [x], (y,), 1e-7) == pytest.approx(np.linalg.norm(x) / np.linalg.norm(y), rel=0.3)
    assert conditioning(Operation("none", (), ("y",), lambda _: (y,)), [], (y,), 1e-7) is None


def test_cancellation_explains_more():
    x = np.ones(50, np.float32)
    little, much = (explained(_add(size), [x], _add(size).run(np.float32(size), x), 1e-7)[0] for size in (1, -0.999))
    assert little < 1e-5 < 1e-4 < much


def test_relative_error():
    assert relative_error([1.0, 2.0], [1.0, 2.0]) == 0
    assert relative_error([0.0, 0.0], [3.0, 4.0]) == 1
    assert relative_error([1.0], [1.0, 2.0]) == np.inf
    assert relative_error(np.array([1]), np.array([2])) == np.inf
    assert relative_error([np.nan], [1.0]) == np.inf


def test_jitter_leaves_integers_alone():
    tree = jitter({"a": np.arange(3), "b": np.ones(1000, np.float32)}, 2.0**-10, seed=0)
    np.testing.assert_array_equal(tree["a"], np.arange(3))
    assert set(np.unique(tree["b"]).tolist()) == {1 - 2.0**-10, 1 + 2.0**-10}


def test_walk_without_recorded_inputs_tells_accumulated_errors_only():
    steps = [
        Operation("one", (), ("a",), lambda _: (np.ones(2),)),
        Operation("two", ("a",), ("b",), lambda _, a: (2 * a,)),
    ]
    rows = list(Walk({"b": np.full(2, 2.5)}, 1e-7).rows(steps))
    assert [row.accumulated for row in rows] == [None, pytest.approx(0.2)]
    assert first_difference(rows) is None
    rows = list(Walk({"a": np.ones(2), "b": np.full(2, 2.5)}, 1e-7).rows(steps))
    wrong = first_difference(rows)
    assert wrong is not None
    assert (wrong.operation, wrong.output, wrong.alone) == ("two", "b", pytest.approx(0.2))
