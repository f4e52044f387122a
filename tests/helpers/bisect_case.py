"""A small case of the whole network that takes seconds, whose recorded tensors are those of the network as it is.

The sizes are below those of the release's own small cases, since the release fixes its images to 1024 pixels.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from conversion.assemble import take_apart
from conversion.bisect import plain
from conversion.bisection.operation import epsilon
from conversion.bisection.walk import Walk, operations
from conversion.cases.case import BLOCKS, load_case
from conversion.cases.network import open_network
from conversion.rules import rule_table
from virst_jax.config import FusionConfig, HieraConfig, LoraConfig, QwenConfig, Sam2Config, VirstConfig, VisionConfig
from virst_jax.io import atomic
from virst_jax.io.model_folder import parameter_shapes
from virst_jax.models.tree import flatten

NAME = "e2e_small"
FRAMES, SEG_FRAMES, CLIPS = 7, 8, 2
SEG, IMAGE = 29, -200
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30,
    "umt": {"dim": 32, "depth": 4, "heads": 4, "image": 112},
    "hiera": {
        "embed_dim": 8,
        "num_heads": 1,
        "stages": [1, 2, 3, 1],
        "global_att_blocks": [4],
        "window_pos_embed_bkg_spatial_size": [7, 7],
        "window_spec": [8, 4, 4, 2],
    },
}
CONFIG: dict[str, Any] = {
    "tiny": TINY,
    "num_maskmem": 4,  # so that a memory is forgotten, and an anchor left out, within a few frames
    "max_cond_frames_in_attn": 1,
    "image_size": 128,
    "initial_seg_fusion": True,
    "seg_token_id": SEG,
    "image_token": IMAGE,
}


def _config() -> VirstConfig:
    """The sizes of TINY and those that a case's manifest tells."""
    umt: dict[str, Any] = TINY["umt"]
    hiera: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in TINY["hiera"].items()}
    return VirstConfig(
        llm=QwenConfig(30, 32, 48, num_layers=3, num_heads=4, num_kv_heads=2, lora=LoraConfig(rank=0)),
        vision=VisionConfig(umt["dim"], umt["depth"], num_heads=umt["heads"], image_size=umt["image"]),
        sam2=Sam2Config(
            hiera=HieraConfig(**hiera),
            image_size=CONFIG["image_size"],
            hidden_size=64,
            memory_dim=16,
            memory_layers=2,
            memory_mlp_dim=32,
            decoder_mlp_dim=32,
            iou_head_dim=16,
            num_maskmem=CONFIG["num_maskmem"],
        ),
        fusion=FusionConfig(initial=True),
        seg_token_id=SEG,
    )


def _manifest(cfg: VirstConfig) -> dict[str, list[int]]:
    shapes = flatten(parameter_shapes(cfg))
    zeros = ((path, np.zeros(x.shape, np.int8)) for path, x in shapes.items())
    return {name: list(tensor().shape) for name, tensor in take_apart(rule_table(cfg), zeros)}


def write_case(folder: Path, count: int | None = None) -> Path:
    """Writes the case, and beside it the tensors of its first `count` operations, or of all.

    Returns its path without a suffix.
    """
    text = [1, 2, 3, IMAGE, 4, 5, 6, *[7, SEG] * 3, 8]
    meta: dict[str, Any] = {
        "case": NAME,
        "salt": 1,  # of which the object is there on every frame
        "config": CONFIG,
        "n_frames": FRAMES,
        "sam_idx": [0, 0, 1, 2, 3, 4, 5, 6],
        "hw": [48, 64],
        "input_ids": text,
        "labels": [SEG if x == SEG else -100 for x in text],
        "t_vlm": 4 * CLIPS,
        "cond_frames": [0, 6],
        "manifest": _manifest(_config()),
        "video_salt": 0,
        "clip": {"name": f"{NAME}.clip"},
    }
    path = folder / NAME
    path.with_suffix(".json").write_text(json.dumps(meta))
    case = load_case(folder, NAME)
    with jax.default_matmul_precision("highest"):
        walk = Walk({}, epsilon("float32"), keep=True)
        for _ in walk.rows(itertools.islice(operations(case, open_network(case)), count)):
            pass
    atomic.write_npz(folder / f"{NAME}{BLOCKS}", {name: plain(value) for name, value in walk.own.items()})
    return path
