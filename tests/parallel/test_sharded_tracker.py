"""A tracker alone on several devices."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from helpers.network import CFG, params
from virst_jax import load_tracker
from virst_jax.config import TrackerConfig
from virst_jax.errors import UserError
from virst_jax.io import tracker_folder
from virst_jax.models.tree import flatten
from virst_jax.parallel import sharding

from .test_sharding import finish, start


@pytest.mark.heavy
def test_four_devices_equal_one(tmp_path: Path) -> None:
    """A training step and a session, the parameters in two parts."""
    finish(start(tmp_path, ["1x1x1", "2x2x1"], 4, program="sharded_tracker.py"))
    expected = dict(np.load(tmp_path / "1x1x1.npz"))
    found = dict(np.load(tmp_path / "2x2x1.npz"))
    assert found.pop("devices") == 4
    assert found.pop("share") == 1 / 2
    assert found.keys() == expected.keys() - {"devices", "share"}
    for key, value in found.items():
        # memories of a session are bfloat16: where rounding decides between two neighbours, they are 2^-8 apart
        scale = np.abs(expected[key]).max()
        tolerance = 2e-3 * scale if key.startswith("session/") else 2e-6
        np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=tolerance, err_msg=key)
    assert any(np.ptp(x) > 0 for key, x in expected.items() if key.startswith("session/"))


def test_rules_of_a_tracker_are_those_of_a_whole_network() -> None:
    alone = flatten(sharding.logical_axes(TrackerConfig(sam2=CFG.sam2))[1])
    whole = flatten(sharding.logical_axes(CFG)[1])
    assert alone == {path: names for path, names in whole.items() if path.startswith("sam2/")}


def test_a_tracker_is_loaded_onto_a_mesh(tmp_path: Path) -> None:
    folder = tmp_path / "tracker"
    tracker_folder.save_tracker(folder, CFG.sam2, params()["sam2"])
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    tracker = load_tracker(folder, mesh=mesh, compilation_cache=False)
    assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(tracker.network.params))
    frame = np.zeros((1, 40, 56, 3), np.uint8)
    assert tracker.session(frame).add_points(1, 0, [(3, 3)]).masks.shape == (1, 40, 56)
    with pytest.raises(UserError, match="mesh and device exclude each other"):
        load_tracker(folder, mesh=mesh, device="cpu")
    stored, again = tracker_folder.load_tracker(folder)
    assert dataclasses.asdict(stored) == dataclasses.asdict(CFG.sam2)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params()["sam2"])))
