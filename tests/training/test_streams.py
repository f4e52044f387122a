"""Which batches a stage's steps take."""

import dataclasses
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from helpers.train_cases import recipe as small_recipe
from virst_jax.api import EMBEDDED
from virst_jax.config import override, tiny
from virst_jax.data.pipeline import SKIPPED
from virst_jax.data.prompts import load_tokenizer
from virst_jax.errors import UserError
from virst_jax.io.model_folder import TOKENIZER
from virst_jax.parallel import sharding
from virst_jax.training import recipe
from virst_jax.training.streams import ENOUGH, Stream, choose_stream, open_streams, stage_seed
from virst_jax.training.tasks import get_task


def two_streams() -> recipe.Stage:
    stage = recipe.stages(small_recipe())[0]
    (data,) = stage.data
    other = dataclasses.replace(data, name="others", weight=3.0)
    return dataclasses.replace(stage, data=(data, other))


def opened(stage, seed, step=0) -> dict[str, Stream]:
    cfg = override(tiny(), small_recipe().model.overrides.to_dict())
    tokenizer = load_tokenizer(Path(EMBEDDED["tiny"]) / TOKENIZER, cfg.seg_token_id)
    return open_streams(stage, cfg, tokenizer, sharding.make_mesh(devices=jax.devices()[:1]), seed=seed, step=step)


def test_stages_draw_their_own_batches():
    one, two = (stage_seed(0, name) for name in ("stage1", "stage2"))
    stage = two_streams()
    first, second = (opened(stage, seed)["shapes"].next()["clips"] for seed in (one, two))
    assert (first != second).any()
    np.testing.assert_array_equal(first, opened(stage, one)["shapes"].next()["clips"])
    assert [choose_stream(stage, one, i) for i in range(40)] != [choose_stream(stage, two, i) for i in range(40)]


def test_streams_are_drawn_by_weight():
    stage = two_streams()
    drawn = Counter(choose_stream(stage, 5, step) for step in range(400))
    assert 70 < drawn["shapes"] < 130
    assert drawn.total() == 400


def test_a_run_goes_on_from_any_step():
    """What a step takes follows from its number: no position is stored."""
    stage = two_streams()
    streams = opened(stage, 7)
    taken = [streams[choose_stream(stage, 7, step)].next() for step in range(8)]
    later = opened(stage, 7, step=5)
    for step in range(5, 8):
        arrays = later[choose_stream(stage, 7, step)].next()
        for name, value in taken[step].items():
            np.testing.assert_array_equal(arrays[name], value, err_msg=f"{step} {name}")


def test_too_many_samples_that_do_not_fit_end_the_run():
    def stream(share: float) -> Stream:
        arrays = {"x": np.zeros(10), SKIPPED: np.array([0] * 9 + [round(10 * share)], np.int32)}
        batch = recipe.stages(small_recipe())[0].data[0].batch
        return Stream("long", get_task("image_text"), batch, 0, iter([arrays] * ENOUGH))

    def take_all(stream: Stream) -> None:
        for _ in range(ENOUGH):
            assert set(stream.next()) == {"x"}

    few = stream(0.2)
    take_all(few)
    assert (few.shown, few.skipped) == (10 * ENOUGH, 2 * ENOUGH)
    with pytest.raises(UserError, match="long: 60 of 210 samples do not fit text_length 80, more than 20%"):
        take_all(stream(0.4))
