"""A model folder that several processes write together."""

import jax
import numpy as np
import pytest

from helpers.places import PROGRAMS
from helpers.process_cases import Group
from virst_jax.api import EMBEDDED
from virst_jax.io.model_folder import load_model


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.heavy)])
def test_a_folder_written_by_two_processes_is_whole(tmp_path, killed):
    folder = tmp_path / "models" / "model"
    with Group(tmp_path / "killed", 2, [PROGRAMS / "export.py", folder, killed]) as group:
        assert 0 not in group.wait(90)
    assert not folder.exists()
    with Group(tmp_path / "again", 2, [PROGRAMS / "export.py", folder]) as group:
        group.until("exported", 0)
        group.until("exported", 1)
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]
    cfg, ours = load_model(folder)
    _, theirs = load_model(EMBEDDED["tiny"])
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
