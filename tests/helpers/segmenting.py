"""The small network that segments, and a result of it that tests compare with."""

import functools

import numpy as np

from helpers.network import CFG, params
from helpers.places import TOKENIZER
from virst_jax.api import Model, Segmentation
from virst_jax.data.prompts import load_tokenizer

DOG, CAT, CAR = "the dog", "A red cat   that runs", "what scared the seal?"


@functools.cache
def small_model() -> Model:
    return Model(CFG, params(), load_tokenizer(TOKENIZER, CFG.seg_token_id), chunk=2, group_size=2)


def video(count: int, height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@functools.cache
def three_expressions() -> Segmentation:
    """Three expressions at once, in two groups."""
    return small_model().segment(video(11), [DOG, CAT, CAR])
