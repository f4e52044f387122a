"""Video and expressions through the language model and the fusion: the prompts of the anchors.

Axes: O expressions of a batch, F segmentation frames, A anchors, N [SEG] tokens, C fusion width.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from virst_jax.config import VirstConfig
from virst_jax.data.prompts import Tokenizer
from virst_jax.inference.plan import Options, Plan, padded_rows
from virst_jax.inference.steps import Network
from virst_jax.inference.texts import build_texts


def read_expressions(
    network: Network,
    tokenizer: Tokenizer,
    expressions: Sequence[str],
    options: Options,
    visual: Sequence[jax.Array],
    num_clips: int,
    maps: Sequence[jax.Array],
    anchors: np.ndarray,
    progress: Callable[[str, int, int], None],
) -> list[tuple[int, jax.Array]]:
    """Reads a video once, and then all expressions in batches.

    Args:
      visual: of `Network.encode_visual`, of which the first `num_clips` are clips.
      maps: the tracker's top maps of the F segmentation frames.
      anchors: of `anchor_positions`.

    Returns:
      How many expressions each batch holds, and their prompts dtype[O, A, N, C].
    """
    tokens, total = visual[0].shape[0], len(expressions)
    texts = build_texts(network.cfg, tokenizer, expressions, num_clips * tokens, len(visual) * tokens, options)
    cache = network.read_video(visual, texts.prefix_ids, texts.prefix_visual, texts.prefix_mask).cache
    prompts: list[tuple[int, jax.Array]] = []
    for first in range(0, total, options.group_size):
        progress("read", first, total)
        count = min(options.group_size, total - first)
        ids, mask, seg = texts.batch(first, count, padded_rows(count))
        hidden = network.read_text(cache, ids, mask, seg, maps).seg_hidden
        prompts.append((count, network.fuse(hidden, maps, anchors)[0]))
    jax.block_until_ready(prompts)
    progress("read", total, total)
    return prompts


def anchor_positions(cfg: VirstConfig, plan: Plan) -> np.ndarray:
    """The anchors' positions among the segmentation frames, int32[cfg.max_anchors]: 0 where there is none."""
    return np.pad(np.asarray(plan.anchors, np.int32), (0, cfg.max_anchors - len(plan.anchors)))
