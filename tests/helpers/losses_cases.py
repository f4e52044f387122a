"""A network small enough for tests of losses, and a batch for it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helpers import network
from virst_jax.config import IGNORE, VirstConfig, tiny
from virst_jax.data.sequence import pack
from virst_jax.training.losses import VideoBatch

SHARED, TAIL, ROWS = 40, 20, 3  # 32 visual tokens stand in the prefix


def small() -> VirstConfig:
    base = tiny()
    llm = dataclasses.replace(base.llm, vocab_size=64, num_layers=2, hidden_size=32, intermediate_size=48)
    vision = dataclasses.replace(base.vision, hidden_size=32, depth=2, image_size=48, tokens_per_frame=8)
    hiera = dataclasses.replace(base.sam2.hiera, embed_dim=8, stages=(1, 1, 1, 1), global_att_blocks=(2,))
    sam2 = dataclasses.replace(
        base.sam2,
        hiera=hiera,
        image_size=128,
        hidden_size=32,
        memory_dim=8,
        memory_layers=1,
        memory_mlp_dim=32,
        decoder_mlp_dim=32,
        decoder_heads=2,
    )
    return dataclasses.replace(base, llm=llm, vision=vision, sam2=sam2, seg_token_id=63)


CFG = small()


@functools.cache
def random_params() -> Any:
    made = jax.tree.map(np.array, network.random_params(CFG))
    # an absent object has no mask to learn from; of one that is surely there, nothing is left to learn
    made["sam2"]["mask_decoder"]["object_head"]["layer2"]["bias"][:] = 3.0
    return made


def make_batch(cfg: VirstConfig, prefix_len: int, used: Sequence[int] = (0, 1, 2), slots: int = 3) -> VideoBatch:
    rng = np.random.default_rng(0)
    length = SHARED + TAIL
    index = np.full((ROWS, length), -1, np.int32)
    index[:, 4:36] = np.arange(32)
    ids = rng.integers(0, 60, (ROWS, length)).astype(np.int32)
    ids[:, :SHARED] = ids[0, :SHARED]
    labels = np.where(index >= 0, IGNORE, ids)
    seg = np.array([[SHARED + 6 + row, SHARED + 9 + row] for row in range(ROWS)], np.int32)
    np.put_along_axis(labels, seg, cfg.seg_token_id, 1)
    mask = np.arange(length) < length - 2 * np.arange(ROWS)[:, None]
    labels = np.where(mask, labels, IGNORE)
    size = cfg.sam2.image_size
    valid = np.arange(slots) < len(used)
    arrays: dict[str, Any] = {  # steps take NumPy arrays as well
        "clips": rng.integers(0, 255, (1, 4, 48, 48, 3), dtype=np.uint8),
        "token_ids": ids,
        "visual_index": index,
        "labels": labels,
        "mask": mask,
        "seg_positions": seg,
        "frames": rng.integers(0, 255, (4, size, size, 3), dtype=np.uint8),
        "targets": rng.random((ROWS, slots, size, size)) > 0.7,
        "anchors": np.array([0, 2], np.int32),
        "frames_used": np.pad(np.array(used, np.int32), (0, slots - len(used))),
        "used_valid": valid,
        "conversation_valid": np.array([True, True, True]),
    }
    return VideoBatch(**arrays, prefix_len=prefix_len)


def with_filler(batch: Any) -> Any:
    """A VideoBatch with one conversation more, which repeats the first without labels."""
    arrays = {name: getattr(batch, name) for name in ("token_ids", "visual_index", "labels", "mask", "seg_positions")}
    arrays = {name: np.concatenate([x, x[:1]]) for name, x in (arrays | {"targets": batch.targets}).items()}
    arrays["labels"][-1] = IGNORE
    return batch.replace(**arrays, conversation_valid=np.append(np.asarray(batch.conversation_valid), False))


def packed(batch: Any, count: int, length: int) -> Any:
    """A VideoBatch with its first `count` conversations packed into so many positions behind the prefix."""
    names = ("token_ids", "visual_index", "labels", "mask", "seg_positions")
    return batch.replace(**pack({name: getattr(batch, name) for name in names}, count, SHARED, length))


def assert_same(ours: Any, theirs: Any, tolerance: float = 2e-4) -> None:
    for path, (a, b) in zip(
        jax.tree_util.tree_leaves_with_path(ours), zip(jax.tree.leaves(ours), jax.tree.leaves(theirs))
    ):
        scale = float(jnp.abs(b).max()) + 1e-6
        np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=0, err_msg=str(path[0]))
