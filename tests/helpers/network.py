"""Small networks of random parameters, and the one that tests of whole programs share."""

import dataclasses
import functools
import math
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helpers.places import TOKENIZER
from virst_jax.config import (
    FusionConfig,
    HieraConfig,
    LoraConfig,
    QwenConfig,
    Sam2Config,
    VirstConfig,
    VisionConfig,
    to_json,
)
from virst_jax.io import model_folder
from virst_jax.io.model_folder import parameter_shapes

SMALL = VirstConfig(
    llm=QwenConfig(30, 16, 24, num_layers=2, num_heads=4, num_kv_heads=2, lora=LoraConfig(rank=2)),
    vision=VisionConfig(hidden_size=8, depth=3, num_heads=2, image_size=64),
    sam2=Sam2Config(
        hiera=HieraConfig(8, 1, (1, 2, 3, 1), global_att_blocks=(4,), window_spec=(8, 4, 4, 2)),
        image_size=128,
        hidden_size=32,
        memory_dim=8,
        memory_layers=2,
        memory_mlp_dim=16,
        decoder_mlp_dim=16,
        iou_head_dim=16,
    ),
    seg_token_id=29,
)

# with the words of the tokenizer: for whole programs
CFG = dataclasses.replace(
    SMALL,
    llm=dataclasses.replace(SMALL.llm, vocab_size=151647, num_layers=1, lora=LoraConfig(rank=0)),
    vision=dataclasses.replace(SMALL.vision, depth=2),
    sam2=dataclasses.replace(
        SMALL.sam2,
        hiera=HieraConfig(8, 1, (1, 1, 1, 1), global_att_blocks=(2,), window_spec=(8, 4, 4, 2)),
        memory_layers=1,
        decoder_layers=1,
        memory_fuser_layers=1,
    ),
    fusion=FusionConfig(num_layers=1),
    seg_token_id=151646,
    max_video_frames=8,
    max_seg_frames=8,
    num_seg_tokens=3,
)


@functools.cache
def random_params(cfg: VirstConfig) -> Any:
    """Kernels of unit gain, so that nothing fades or grows."""

    def draw(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name, rng = path[-1].key, np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
        x = rng.standard_normal(shape.shape)
        if "kernel" in name or "lora" in name:
            inputs = shape.shape[-3] if "qkv" in str(path) else shape.shape[-2]
            x /= math.sqrt(max(1, inputs))
        elif name in ("scale", "gamma"):
            x = 1 + 0.1 * x
        x = 0.3 * x if name == "bias" else x
        # objects are there: an absent one's mask is constant
        x = x + 30 if jax.tree_util.keystr(path).endswith("['object_head']['layer2']['bias']") else x
        return jnp.asarray(x, shape.dtype)

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(cfg))


@functools.cache
def params() -> Any:
    """Of CFG."""
    given = random_params(CFG)
    fusion = dict(given["second_fusion"])
    # expressions matter: they are heard above the image, and the prompts above the features
    fusion["seg_proj"] = jax.tree.map(lambda x: 20 * x, fusion["seg_proj"])
    fusion["layer0"] = {**fusion["layer0"], "norm3": jax.tree.map(lambda x: 10 * x, fusion["layer0"]["norm3"])}
    return {**given, "second_fusion": fusion}


def write_model(path: Path) -> Path:
    """The folder of a model with CFG and its parameters."""
    path.mkdir()
    model_folder.write_parameters(path / model_folder.PARAMS, jax.tree.map(np.asarray, params()))
    (path / model_folder.CONFIG).write_text(to_json(CFG))
    model_folder.copy_tokenizer(TOKENIZER, path / model_folder.TOKENIZER)
    return path
