import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.qwen2 import SMALL, prompt, random_params
from virst_jax.config import Compute
from virst_jax.errors import UserError
from virst_jax.models.generate import filter_logits, generate
from virst_jax.models.qwen2 import Qwen2

CFG = dataclasses.replace(SMALL, vocab_size=23)
MODEL = Qwen2(CFG, Compute())
LENGTHS, STEPS = (6, 3, 4), 7


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return random_params(CFG)


def without_cache(params: dict[str, Any], embeds: jax.Array, mask: jax.Array, steps: int) -> np.ndarray:
    """The most probable tokens, everything computed anew for each, a row at a time."""
    run = jax.jit(lambda e, m: MODEL.apply({"params": params}, e, m))
    rows = []
    for row in range(embeds.shape[0]):
        length = int(mask[row].sum())
        sequence, tokens = embeds[row : row + 1, :length], []
        sequence = jnp.pad(sequence, ((0, 0), (0, max(LENGTHS) + steps - length), (0, 0)))
        for _ in range(steps):
            hidden = run(sequence, jnp.arange(sequence.shape[1])[None] < length)
            logits = MODEL.apply({"params": params}, hidden[0, length - 1], method=Qwen2.logits)
            tokens.append(int(np.argmax(logits)))
            sequence = sequence.at[0, length].set(params["embed_tokens"]["embedding"][tokens[-1]])
            length += 1
        rows.append(tokens)
    return np.array(rows)


@pytest.fixture(scope="module")
def expected(params: dict[str, Any]) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return without_cache(params, *prompt(CFG, LENGTHS, 6), STEPS)


def test_equals_reading_everything_anew(params: dict[str, Any], expected: np.ndarray) -> None:
    tokens, lengths = generate(MODEL, params, *prompt(CFG, LENGTHS, 6), max_new_tokens=STEPS, eos_ids=())
    assert len(set(map(tuple, expected))) > 1
    np.testing.assert_array_equal(tokens, expected)
    assert lengths.tolist() == [STEPS] * 3


def test_a_row_alone_equals_the_row_in_a_batch(params: dict[str, Any], expected: np.ndarray) -> None:
    embeds, mask = prompt(CFG, LENGTHS, 6)
    alone, _ = generate(MODEL, params, embeds[1:2, :3], mask[1:2, :3], max_new_tokens=STEPS, eos_ids=())
    np.testing.assert_array_equal(alone[0], expected[1])


def test_rows_end_on_their_own(params: dict[str, Any], expected: np.ndarray) -> None:
    embeds, mask = prompt(CFG, LENGTHS, 6)
    ends = (int(expected[0, 1]), int(expected[1, 4]))
    tokens, lengths = generate(MODEL, params, embeds, mask, max_new_tokens=STEPS, eos_ids=ends)
    for row in range(3):
        hits = np.flatnonzero(np.isin(expected[row], ends))
        length = hits[0] + 1 if hits.size else STEPS
        assert lengths[row] == length
        np.testing.assert_array_equal(tokens[row, :length], expected[row, :length])
        assert (tokens[row, length:] == ends[0]).all()
    assert len(set(lengths.tolist())) > 1


def test_drawing(params: dict[str, Any], expected: np.ndarray) -> None:
    embeds, mask = prompt(CFG, LENGTHS, 6)

    def draw(rows: slice = slice(None), seed: int = 0, **kwargs: Any) -> np.ndarray:
        key = jax.random.key(seed)
        options = {"max_new_tokens": STEPS, "eos_ids": (), "temperature": 1.0, "top_p": 0.99, "rng": key, **kwargs}
        return np.asarray(generate(MODEL, params, embeds[rows], mask[rows], **options)[0])

    tokens = draw()
    np.testing.assert_array_equal(tokens, draw())
    assert (tokens != draw(seed=1)).any()
    np.testing.assert_array_equal(draw(slice(0, 1))[0], tokens[0])
    np.testing.assert_array_equal(draw(top_k=1), expected)
    np.testing.assert_array_equal(draw(top_p=1e-6), expected)
    np.testing.assert_array_equal(draw(temperature=1e-6), expected)


def test_tokens_are_drawn_by_their_probability(params: dict[str, Any]) -> None:
    rows, temperature = 4000, 2.0
    embeds, mask = prompt(CFG, (2,), 2)
    hidden = MODEL.apply({"params": params}, embeds, mask)
    logits = MODEL.apply({"params": params}, hidden[0, -1], method=Qwen2.logits)
    probabilities = np.asarray(jax.nn.softmax(logits / temperature))
    tokens, _ = generate(
        MODEL,
        params,
        jnp.repeat(embeds, rows, 0),
        jnp.repeat(mask, rows, 0),
        max_new_tokens=1,
        eos_ids=(),
        temperature=temperature,
        rng=jax.random.key(0),
    )
    frequencies = np.bincount(np.asarray(tokens[:, 0]), minlength=CFG.vocab_size) / rows
    assert np.abs(frequencies - probabilities).max() < 5 * np.sqrt(0.25 / rows)


def test_filters() -> None:
    probabilities = np.array([[0.1, 0.4, 0.05, 0.3, 0.15], [0.2, 0.2, 0.2, 0.2, 0.2]], np.float32)
    logits = jnp.log(probabilities)

    def kept(top_k: int | None = None, top_p: float | None = None) -> list[list[int]]:
        out = filter_logits(logits, top_k, top_p)
        np.testing.assert_array_equal(jnp.where(jnp.isfinite(out), out, logits), logits)
        return [np.flatnonzero(row).tolist() for row in np.isfinite(out)]

    assert kept() == [[0, 1, 2, 3, 4]] * 2
    assert kept(top_k=2)[0] == [1, 3]
    assert kept(top_k=99)[0] == [0, 1, 2, 3, 4]
    assert kept(top_p=0.39)[0] == [1]
    assert kept(top_p=0.41)[0] == [1, 3]
    assert kept(top_p=0.75)[0] == [1, 3, 4]
    assert kept(top_p=1.0)[0] == [0, 1, 2, 3, 4]
    assert kept(top_k=2, top_p=0.5)[0] == [1]  # 0.4 of the 0.7 that top_k leaves
    assert kept(top_k=1)[1] == [0, 1, 2, 3, 4]  # ties


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens is 0; give at least 1"),
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"temperature": 1.0}, r"needs rng"),
        ({"top_k": 0}, r"top_k is 0"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"mask": jnp.array([[True], [False]])}, r"at least one token"),
    ],
)
def test_bad_arguments(params: dict[str, Any], options: dict[str, Any], message: str) -> None:
    arguments = {"mask": jnp.ones((2, 1), bool), "max_new_tokens": 2, "eos_ids": (), **options}
    mask = arguments.pop("mask")
    with pytest.raises(UserError, match=message):
        generate(MODEL, params, jnp.zeros((2, 1, CFG.hidden_size)), mask, **arguments)
