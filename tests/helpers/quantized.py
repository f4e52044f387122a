"""A network for integer kernels, and what its parts give on fixed inputs."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from helpers.network import SMALL
from virst_jax.config import HieraConfig, LoraConfig
from virst_jax.models.qwen2 import Qwen2
from virst_jax.models.sam2.hiera import ImageEncoder
from virst_jax.models.umt import VideoEncoder

NONE = LoraConfig(rank=0)
CFG = dataclasses.replace(
    SMALL,
    # groups of 128 and of 96 input rows
    llm=dataclasses.replace(SMALL.llm, hidden_size=256, intermediate_size=192, lora=NONE),
    sam2=dataclasses.replace(
        SMALL.sam2,
        image_size=64,
        hiera=HieraConfig(8, 1, (1, 1, 2, 1), global_att_blocks=(2,), window_spec=(8, 4, 4, 2)),
    ),
)


def run(cfg, part, params):
    """The outputs of a part on fixed inputs."""
    rng = np.random.default_rng(0)
    if part == "llm":
        embeds = jnp.asarray(rng.standard_normal((2, 6, cfg.llm.hidden_size)), jnp.float32)
        llm, variables = Qwen2(cfg.llm, cfg.compute), {"params": params["llm"]}
        hidden = llm.apply(variables, embeds, None)
        return llm.apply(variables, hidden, method=Qwen2.logits)
    side = cfg.vision.image_size if part == "vision" else cfg.sam2.image_size
    pixels = jnp.asarray(rng.standard_normal((1, 4, side, side, 3)), jnp.float32)
    if part == "vision":
        return VideoEncoder(cfg.vision, cfg.compute).apply({"params": params["vision"]}, pixels)
    encoder = ImageEncoder(cfg.sam2, cfg.compute)
    return encoder.apply({"params": params["sam2"]["image_encoder"]}, pixels[:, 0])[0]
