"""The outcomes of a session: in memory up to a budget, the rest in a file."""

import gc
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from helpers.network import CFG, params
from helpers.segmenting import video
from virst_jax.errors import UserError
from virst_jax.inference.outcomes import Outcome, OutcomeStore
from virst_jax.tracking import TrackerModel


def outcome(seed: int) -> Outcome:
    rng = np.random.default_rng(seed)
    memory = np.asarray(jnp.asarray(rng.normal(size=(6, 4)), jnp.bfloat16))
    return Outcome(rng.normal(size=(8, 8)).astype(np.float32), np.float32(rng.normal(size=5)), memory, 1.0, 0.5)


SIZE = 8 * 8 * 4 + 5 * 4 + 6 * 4 * 2


def same(one: Outcome, other: Outcome) -> bool:
    return all((getattr(one, x) == getattr(other, x)).all() for x in ("low_res", "pointer", "memory"))


def test_what_the_budget_has_no_room_for_is_read_back() -> None:
    store = OutcomeStore(3 * SIZE)
    kept = [store.keep(outcome(i)) for i in range(10)]
    assert store.num_bytes == 3 * SIZE
    assert store.num_bytes_on_disk == 7 * SIZE
    for i in (0, 9, 4, 4, 0, 7):
        assert same(kept[i], outcome(i))
        assert kept[i].memory.dtype == jnp.bfloat16
        assert store.num_bytes == 3 * SIZE
    assert store.keep(kept[2]) is kept[2]  # a second time
    assert store.num_bytes == 3 * SIZE


def test_places_of_what_is_forgotten_are_used_again() -> None:
    store = OutcomeStore(SIZE)
    kept = [store.keep(outcome(i)) for i in range(6)]
    assert store._file is not None
    length = store._file.seek(0, 2)
    for i in range(6, 12):
        del kept[1]
        gc.collect()
        kept.append(store.keep(outcome(i)))
        assert store.num_bytes + store.num_bytes_on_disk <= 7 * SIZE
    assert store._file.seek(0, 2) <= length + SIZE
    assert all(same(x, outcome(i)) for x, i in zip(kept, [0, *range(7, 12)]))
    del kept
    gc.collect()
    assert store.num_bytes == store.num_bytes_on_disk == 0


def test_a_full_disk_takes_one_line_and_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    store = OutcomeStore(SIZE)
    kept = [store.keep(outcome(0))]
    kept.append(outcome(1))
    with pytest.raises(UserError, match=r"cannot be written to .*gone.*set TMPDIR") as failure:
        store.keep(kept[1])
    assert "\n" not in str(failure.value)
    assert all(same(x, outcome(i)) for i, x in enumerate(kept))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept.append(store.keep(outcome(2)))
    assert store.num_bytes == SIZE
    assert all(same(x, outcome(i)) for i, x in enumerate(kept))
    assert not list(tmp_path.iterdir())  # the file has no name


def test_a_session_within_a_small_budget_computes_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tracking, a correction and undo, with room for a single outcome; and what a full disk leaves."""
    tracker = TrackerModel(CFG.sam2, params()["sam2"])
    frames, found = video(9), []
    for budget in (1 << 30, 1):
        session = tracker.session(frames, host_budget=budget)
        session.add_points(1, 2, [(20, 30)])
        session.add_points(2, 4, box=(3, 3, 30, 30))
        out = [shown.masks for shown in session.propagate()]
        session.add_points(1, 6, [(5, 5)], [0])
        out += [shown.masks for shown in session.propagate(6, direction="forward")]
        session.undo()
        out += [session.masks(t).masks for t in range(9)]
        found.append(np.concatenate([x.reshape(-1) for x in out]))
        one = next(iter(session._objects[1].anchors.values())).num_bytes
        assert session.num_bytes <= max(budget, one)
        assert (session.num_bytes_on_disk > 0) == (budget == 1)
    assert (found[0] == found[1]).all()

    session = tracker.session(frames, host_budget=1)
    session.add_points(1, 0, [(20, 30)])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="What was tracked is kept"):
        list(session.propagate())
    before = session.masks(0).masks
    assert np.isfinite(session.masks(1).scores).all()
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert len(list(session.propagate())) == 9
    assert (session.masks(0).masks == before).all()


@pytest.mark.parametrize("given", [-1, 0.5, "1 GB", True])
def test_budgets_that_are_none(given: Any) -> None:
    with pytest.raises(UserError, match="the host_budget is"):
        TrackerModel(CFG.sam2, params()["sam2"]).session(video(2), host_budget=given)
