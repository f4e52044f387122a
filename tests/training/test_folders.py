"""Training that starts from a tracker alone, and leaves one."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from helpers.losses_cases import CFG, random_params
from helpers.places import ROOT
from helpers.train_cases import recipe
from virst_jax import load_tracker
from virst_jax.errors import UserError
from virst_jax.io import tracker_folder
from virst_jax.models.tree import flatten

sys.path.insert(0, str(ROOT))
import train


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "tracker"
    tracker_folder.save_tracker(folder, CFG.sam2, random_params()["sam2"])
    return folder


@pytest.mark.heavy
def test_a_tracker_alone_is_trained(start: Path, tmp_path: Path) -> None:
    config = recipe("image_prompted", steps=2)
    config.model.init, config.model.overrides = str(start), {}
    config.stage.groups = (("sam2/prompt_encoder/.*", 1.0), (".*", 0.0))
    train.train(config, tmp_path)
    folder = tmp_path / "stage" / train.EXPORT
    (before_cfg, before), (after_cfg, after) = (tracker_folder.load_tracker(x) for x in (start, folder))
    assert before_cfg == after_cfg
    changed = {p for p, x in flatten(after).items() if (np.asarray(x) != np.asarray(flatten(before)[p])).any()}
    assert "prompt_encoder/point_embed" in changed
    assert all(path.startswith("prompt_encoder/") for path in changed)
    masks = load_tracker(folder, compilation_cache=False).session(np.zeros((1, 40, 56, 3), np.uint8))
    assert masks.add_points(1, 0, [(3, 3)]).masks.shape == (1, 40, 56)
    train.train(config, tmp_path)  # the stage is there: nothing is done
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), after, tracker_folder.load_tracker(folder)[1]))


def test_kinds_that_need_sentences_are_refused(start: Path, tmp_path: Path) -> None:
    config = recipe("video")
    config.model.init, config.model.overrides = str(start), {}
    with pytest.raises(UserError, match="'video' need a language model"):
        train.train(config, tmp_path)
    assert not list(tmp_path.iterdir())
