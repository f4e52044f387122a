"""Frozen kernels that training holds as integers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from helpers.losses_cases import CFG, SHARED, make_batch
from helpers.network import random_params
from helpers.train_cases import recipe
from virst_jax.config import LoraConfig
from virst_jax.errors import UserError
from virst_jax.io.model_folder import load_model
from virst_jax.models.tree import flatten, unflatten
from virst_jax.ops.quantized import dequantize, quantize
from virst_jax.training.integers import to_floats, to_integers
from virst_jax.training.losses import TextBatch, text_parts
from virst_jax.training.optim import OptimConfig
from virst_jax.training.step import init_state, make_train_step

ADAPTERS = (("llm/layers/.*/lora_[ab]", 1.0), (".*", 0.0))
WITH_ADAPTERS = dataclasses.replace(CFG, llm=dataclasses.replace(CFG.llm, lora=LoraConfig(rank=4, dropout=0.0)))


def kernels(tree: Any) -> dict[str, Any]:
    return {path: x for path, x in flatten(tree).items() if path.startswith("llm/layers/") and path.endswith("kernel")}


def test_kernels_are_rounded_as_those_of_quantized_models() -> None:
    frozen = random_params(WITH_ADAPTERS)
    held = jax.jit(to_integers)(frozen)
    assert len(kernels(held)) == 7
    floats = to_floats(held)
    assert flatten(floats).keys() == flatten(frozen).keys()
    for path, kernel in kernels(frozen).items():
        values, scale = quantize(np.asarray(kernel), "int8", leading=1)
        np.testing.assert_array_equal(kernels(held)[path], values)
        np.testing.assert_allclose(kernels(floats)[path], dequantize(values, scale, leading=1), rtol=1e-6)
    again = to_integers(floats)
    for path, values in kernels(again).items():
        np.testing.assert_array_equal(values, kernels(held)[path])


def test_steps_are_those_of_the_rounded_kernels() -> None:
    """In float32: losses and trained parameters after two steps."""
    batch = make_batch(CFG, SHARED)
    text = TextBatch(batch.clips, batch.token_ids, batch.visual_index, batch.labels, batch.mask, prefix_len=SHARED)
    of_two = jax.tree.map(lambda x: np.stack([x, x]), text)
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=0)
    held = init_state(WITH_ADAPTERS, optim, ADAPTERS, random_params(WITH_ADAPTERS), "int8")
    floats = held.replace(frozen=to_floats(held.frozen))
    step = jax.jit(make_train_step(WITH_ADAPTERS, optim, ADAPTERS, text_parts, dropout=False))
    found = []
    for state in (held, floats):
        for _ in range(2):
            state, metrics = step(state, of_two)
        found.append((metrics["loss"], flatten(state.params)))
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-5)
    for path, leaf in found[1][1].items():
        scale = float(jnp.abs(leaf).max())
        # Adam divides the rounding of small gradients by their size: 1e-5
        np.testing.assert_allclose(found[0][1][path], leaf, rtol=0, atol=1e-4 * scale, err_msg=path)
    assert any((leaf != flatten(held.params)[path]).any() for path, leaf in found[1][1].items())


def test_without_frozen_kernels_there_is_nothing_to_hold() -> None:
    with pytest.raises(UserError, match=r"frozen_weights: int8 holds frozen kernels .* this stage has none"):
        to_integers(unflatten({"vision/blocks/fc1/kernel": jnp.ones((2, 3, 4))}))


@pytest.mark.heavy
def test_a_stage_leaves_the_kernels_that_it_was_trained_with(tmp_path: Any) -> None:
    config = recipe(steps=2)
    config.model.overrides = {**config.model.overrides.to_dict(), "llm": {"lora": {"rank": 4}, "num_layers": 2}}
    config.stage.groups = ADAPTERS
    train.train(config, tmp_path / "floats")
    config.model.init = str(tmp_path / "floats" / "stage" / train.EXPORT)
    with config.unlocked():
        config.stage.frozen_weights = "int8"
    train.train(config, tmp_path / "held")
    (_, before), (_, after) = (load_model(tmp_path / name / "stage" / train.EXPORT) for name in ("floats", "held"))
    for path, kernel in kernels(before).items():
        rounded = dequantize(*quantize(np.asarray(kernel), "int8", leading=1), leading=1)
        np.testing.assert_allclose(kernels(after)[path], rounded, rtol=1e-6)
    assert flatten(before).keys() == flatten(after).keys()
    changed = {path for path, x in flatten(after).items() if (np.asarray(x) != np.asarray(flatten(before)[path])).any()}
    assert all(path in kernels(after) or "/lora_" in path for path in changed)
    assert any("/lora_b" in path for path in changed)
