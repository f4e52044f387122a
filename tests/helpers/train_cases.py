"""A recipe small enough to train in a test: questions about images, and images to segment."""

import csv
import dataclasses
import sys
from pathlib import Path

from ml_collections import ConfigDict

from virst_jax.training.tasks import TASKS

SMALL = {
    "llm": {"num_layers": 2, "hidden_size": 32, "intermediate_size": 48},
    "vision": {"hidden_size": 32, "depth": 2, "image_size": 48, "tokens_per_frame": 4, "tokens_per_image": 4},
    "sam2": {
        "hiera": {"embed_dim": 8, "stages": (1, 1, 1, 1), "global_att_blocks": (2,)},
        "hidden_size": 32,
        "memory_dim": 8,
        "memory_layers": 1,
        "memory_mlp_dim": 32,
        "decoder_mlp_dim": 32,
        "decoder_heads": 2,
        "iou_head_dim": 32,
    },
}
GROUPS = (("(occ_predictor|initial_fusion)/.*", 0.0), ("sam2/image_encoder/.*", 0.0), (".*", 1.0))


def recipe(kind: str = "image_text", steps: int = 6, **optim: float) -> ConfigDict:
    """A recipe of one stage; its batches of two samples are of one kind."""
    c = ConfigDict()
    c.model = {"preset": "tiny", "init": "", "tokenizer": "", "overrides": SMALL}
    c.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    c.seed, c.threads, c.workers, c.data_root, c.distributed = 0, 1, 0, "", False
    c.checkpoint = {"every": 2, "keep": 2}
    c.profile = {"first": 1, "steps": 0, "folder": ""}
    c.eval = {"source": {"kind": "synthetic", "num_videos": 1, "seed": 9, "expressions": 2}, "videos": 0, "every": 0}
    c.stages = ("stage",)
    source = {"kind": "synthetic", "num_videos": 50, "seed": 1, "expressions": 2}
    c.stage = {
        "steps": steps,
        "optim": {"learning_rate": 3e-3, "warmup_steps": 1, "ema": 0.5, "schedule": "cosine", **optim},
        "groups": GROUPS if kind in ("image", "video") else (("(llm|vision|projector)/.*", 1.0), (".*", 0.0)),
        "data": {
            "shapes": {
                "kind": kind,
                "batch_size": 2,
                "conversations": 2,
                "text_length": 80,
                "vlm_frames": 4,
                "seg_frames": 4,
                "sources": {"synthetic": source},
            }
        },
    }
    return c


def get_config(kind: str = "image_text") -> ConfigDict:
    """For --config=tests/helpers/train_cases.py:KIND.

    With KIND,evaluated held-out videos are scored though batches of this kind do not teach to segment: steps of those
    that do take minutes to compile.
    """
    kind, _, evaluated = kind.partition(",")
    if evaluated:
        TASKS[kind] = dataclasses.replace(TASKS[kind], evaluated=True)
    return recipe(kind)


def command(workdir: Path, *extra: str, config: str = "tests/helpers/train_cases.py") -> list[str]:
    return [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *extra]


def losses(workdir: Path) -> dict[int, str]:
    """The losses of a run of `recipe`, by step, as they are logged."""
    with (workdir / "stage" / "metrics.csv").open() as file:
        return {int(row["step"]): row["shapes/loss"] for row in csv.DictReader(file)}
