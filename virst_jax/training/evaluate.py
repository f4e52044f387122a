"""J&F on held-out videos while a network trains."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from virst_jax.data.samples import Source, Video
from virst_jax.evaluation.benchmarks import Subset
from virst_jax.evaluation.held_out import Segment, score_videos, summarize
from virst_jax.evaluation.scoring import Row
from virst_jax.io.visualize import overlay
from virst_jax.training.log import TrainLog
from virst_jax.training.streams import open_source
from virst_jax.training.tasks import get_task

OVERLAYS = 4  # held-out videos of which an evaluation keeps an image


def held_out_videos(source: Mapping[str, Any], count: int, data_root: str) -> Source:
    """The first videos of the source that a recipe's eval names."""
    arguments = dict(source)
    whole = open_source(arguments.pop("kind"), get_task("video"), data_root, **arguments)
    return Subset(whole, tuple(range(min(count, len(whole)))))


def evaluate(
    segment: Segment, videos: Source, step: int, log: TrainLog | None, stopped: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Means over the expressions of all videos, logged with overlays of the first few.

    Args:
      segment: a video and texts -> masks bool[N, T, H, W].
      step: for the log.
      log: None: another process logs.
      stopped: asked before every video, whether to give up.

    Returns:
      See held_out.summarize; nothing if it was stopped.
    """
    shown = 0

    def segment_and_show(video: Video, texts: Sequence[str]) -> np.ndarray:
        nonlocal shown
        masks = segment(video, texts)
        if log and shown < OVERLAYS:
            middle = video.num_frames // 2
            frame = video.read_frames([middle])[0]
            log.image(step, f"held_out/{shown}", overlay(frame, masks[:, middle]))
            shown += 1
        return masks

    rows: list[Row] = []
    scored = score_videos(segment_and_show, videos)
    for _ in tqdm(range(len(videos)), desc="held-out videos", leave=False, dynamic_ncols=True):
        if stopped():
            return {}
        rows += next(scored, ())
    summary = summarize(rows)
    if log:
        log.write(step, {f"eval/{key}": value for key, value in summary.items()})
    if jax.process_index() == 0:
        tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in summary.items()))
    return summary
