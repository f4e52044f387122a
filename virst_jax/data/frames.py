"""Which frames are used: those that the video VLM reads, those that the tracker is shown, and the anchors.

A video has `num_frames` frames, numbered from 0. Every choice is a sorted list of int; one that is drawn takes
its generator or seed from the caller, so the same input gives the same frames. `release_random` arguments take
the generator that the release used and follow its draws one by one.
"""

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from virst_jax.errors import UserError


def get_frame_indices(
    num_frames: int,
    video_len: int,
    sample: str = "middle",
    *,
    fps: float = 1.0,
    min_num_frames: int = 1,
    max_num_frames: int = -1,
    local_num_frames: int = 8,
    rng: np.random.Generator | None = None,
) -> list[int]:
    """Frames of a video for the VLM.

    Follows utils/video_utils.py, get_frame_indices.

    Args:
      num_frames: how many are wanted; unused by 'dynamic_fps1' and 'fpsN'.
      video_len: frames of the video.
      sample: 'middle' takes the middle of each of `num_frames` equal intervals, 'rand' one frame drawn from each,
        'dynamic_fps1' one frame a second in whole clips of `local_num_frames`, placed as by 'middle',
        'fpsN' (N a number) N frames a second.
      fps: of the video, frames a second.
      min_num_frames: a shorter choice is filled up with its last frame ('fpsN' excepted).
      max_num_frames: upper limit of 'dynamic_fps1' and 'fpsN', or -1.
      rng: generator of 'rand'.

    Returns:
      Sorted frame numbers; 'fpsN' may give none for a short video.

    Raises:
      UserError: the video is empty, a number is out of range or `sample` is unknown.
    """
    _check_video(video_len)
    if not fps > 0:
        raise UserError(f"the video's frame rate must be positive, not {fps}")
    if sample.startswith("fps"):
        return _frames_at_rate(_parse_rate(sample), video_len, fps, max_num_frames)
    if sample not in ("middle", "rand", "dynamic_fps1"):
        raise UserError(f"unknown frame sampling {sample!r}: choose middle, rand, dynamic_fps1 or fpsN (as fps0.5)")

    dynamic = sample == "dynamic_fps1"
    if min_num_frames > video_len:
        min_num_frames = video_len // local_num_frames * local_num_frames if dynamic else video_len
    if dynamic:
        num_frames = local_num_frames * max(1, int(video_len / fps // local_num_frames))
        if max_num_frames > 0:
            num_frames = min(num_frames, max_num_frames)
    num_frames = max(min_num_frames, num_frames)
    if num_frames < 1:
        raise UserError(f"the number of frames to sample must be at least 1, not {num_frames}")

    edges = np.linspace(0, video_len, num=min(num_frames, video_len) + 1).astype(int)
    first, last = edges[:-1], edges[1:] - 1
    if sample != "rand":
        chosen = (first + last) // 2
    elif rng is None:
        raise UserError("frame sampling 'rand' needs a random generator (rng)")
    elif np.all(first < last):
        chosen = rng.integers(first, last)  # the release never draws an interval's last frame
    else:
        chosen = np.sort(rng.permutation(video_len)[: len(first)])
    return _fill_up(chosen.tolist(), num_frames)


def flex_frames(
    num_frames: int,
    seed: int | Sequence[int] = 0,
    *,
    max_frames: int = 64,
    min_frames: int = 8,
    clip_frames: int = 4,
    release_random: np.random.RandomState | None = None,
) -> list[int]:
    """The 'flex' choice of evaluation: one frame drawn from each of min(max_frames, num_frames) equal intervals.

    The number of intervals is a multiple of `clip_frames`. A video of at most `min_frames` frames is taken whole
    and filled up with its last frame. Follows data/rvos_dataset.py, sample_data_eval.

    Args:
      num_frames: frames of the video.
      seed: of the draws.
      release_random: a legacy generator to draw from in the release's order, in place of `seed`.

    Returns:
      Sorted frame numbers.

    Raises:
      UserError: the video is empty, or a limit is not a multiple of `clip_frames`.
    """
    _check_video(num_frames)
    if min_frames < 1 or min_frames % clip_frames or max_frames < clip_frames or max_frames % clip_frames:
        raise UserError(
            f"the fewest and the most frames of a sample ({min_frames}, {max_frames}) must be multiples of a clip's "
            f"{clip_frames} frames"
        )
    if num_frames <= min_frames:
        return _fill_up(list(range(num_frames)), min_frames)
    count = min(max_frames, num_frames) // clip_frames * clip_frames
    edges = np.linspace(0, num_frames, num=count + 1, dtype=int)
    if release_random is not None:
        # one by one: a vectorised call takes other draws from the legacy stream
        return [int(release_random.randint(low, high)) for low, high in pairwise(edges)]
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:]).tolist()


TRAINING_POLICIES = ("uniform", "random", "all", "flex")


def training_frames(
    policy: str,
    num_frames: int,
    rng: np.random.Generator | None = None,
    *,
    sample_range: tuple[int, int] = (8, 12),
    max_frames: int = 64,
    clip_frames: int = 4,
    release_random: np.random.RandomState | None = None,
) -> list[int]:
    """Frames of a video for a training sample.

    A number of frames is drawn from `sample_range`. A video that is not longer is taken whole; of a longer one,
    'uniform' draws one frame from each of so many equal intervals, 'random' so many frames, 'all' takes every frame,
    and 'flex' draws one from each of min(max_frames, num_frames) intervals, made a multiple of `clip_frames`.
    Follows data/rvos_dataset.py, sample_data; data/video_vqa_dataset.py is the same with 32 for `max_frames`.

    Args:
      policy: one of TRAINING_POLICIES.
      num_frames: frames of the video.
      rng: of the draws.
      sample_range: fewest and most frames, both included.
      release_random: a legacy generator to draw from in the release's order, in place of `rng`.

    Returns:
      Sorted frame numbers, none twice; a video is not filled up.

    Raises:
      UserError: the video is empty, the policy is unknown, a limit is out of range, or there is no generator.
    """
    _check_video(num_frames)
    low, high = sample_range
    if policy not in TRAINING_POLICIES:
        raise UserError(f"unknown frame policy {policy!r}: choose one of {', '.join(TRAINING_POLICIES)}")
    if not 1 <= low <= high:
        raise UserError(f"the range of frames of a sample must be 1 or more and ascending, not {low} to {high}")
    if max_frames < clip_frames or clip_frames < 1:
        raise UserError(f"the most frames of a sample ({max_frames}) must be at least a clip's {clip_frames} frames")
    if release_random is not None:
        count = int(release_random.randint(low, high + 1))
    elif rng is not None:
        count = int(rng.integers(low, high, endpoint=True))
    else:
        raise UserError("the frames of a training sample are drawn: give a random generator (rng)")
    if num_frames <= count or policy == "all":
        return list(range(num_frames))
    if policy == "random":
        source = release_random or rng
        assert source is not None
        return sorted(source.choice(num_frames, count, replace=False).tolist())
    if policy == "flex":
        count = min(max_frames, num_frames) // clip_frames * clip_frames
        if count == 0:  # shorter than a clip, which the release's fewest frames rule out
            return list(range(num_frames))
    edges = np.linspace(0, num_frames, num=count + 1, dtype=int)
    if release_random is not None:
        # one by one: a vectorised call takes other draws from the legacy stream
        return [int(release_random.randint(first, last)) for first, last in pairwise(edges)]
    assert rng is not None
    return rng.integers(edges[:-1], edges[1:]).tolist()


def segmentation_frames(
    num_sampled: int,
    max_frames: int = 32,
    *,
    rng: np.random.Generator | None = None,
    release_random: random.Random | None = None,
) -> list[int]:
    """Which of the sampled frames are segmentation frames: all, or `max_frames` of them.

    Follows data/rvos_dataset.py, _get_item (which draws them).

    Args:
      num_sampled: number of sampled frames.
      rng: draws the frames; without it they are evenly spaced.
      release_random: a generator of the standard library to draw from as the release does.

    Returns:
      Sorted positions among the sampled frames.

    Raises:
      UserError: no frame was sampled, or `max_frames` is below 1.
    """
    _check_video(num_sampled)
    if max_frames < 1:
        raise UserError(f"the number of segmentation frames must be at least 1, not {max_frames}")
    count = min(max_frames, num_sampled)
    if release_random is not None:
        return sorted(release_random.sample(range(num_sampled), count))
    if rng is not None:
        return np.sort(rng.permutation(num_sampled)[:count]).tolist()
    return [(2 * i + 1) * num_sampled // (2 * count) for i in range(count)]


def eval_anchors(num_frames: int, frames_per_anchor: int = 4) -> list[int]:
    """Anchors at evaluation: num_frames // frames_per_anchor of them (at least 1), evenly spaced from first to last.

    Halves are rounded to even, in float32 and counted from the nearer end, as torch.linspace does.
    Follows model/VIRST.py, select_keyframes.

    Args:
      num_frames: number of segmentation frames.

    Returns:
      Sorted positions among the segmentation frames.

    Raises:
      UserError: a number is below 1.
    """
    _check_video(num_frames)
    if frames_per_anchor < 1:
        raise UserError(f"the number of frames per anchor must be at least 1, not {frames_per_anchor}")
    count = max(1, num_frames // frames_per_anchor)
    if count == 1:
        return [0]
    end = np.float32(num_frames - 1)
    step = end / np.float32(count - 1)
    i = np.arange(count)
    from_start = step * i.astype(np.float32)
    from_end = end - step * (count - 1 - i).astype(np.float32)
    return np.rint(np.where(i < count // 2, from_start, from_end)).astype(int).tolist()


def training_anchors(
    rng: np.random.Generator,
    num_frames: int,
    count: int = 3,
    after: int = 5,
    before: int = 2,
    propagate: bool = False,
) -> tuple[list[int], list[int]]:
    """Anchors drawn for a training step, and all frames that its losses use.

    Follows model/VIRST.py, select_keyframes and its use in forward.

    Args:
      rng: generator of the draw.
      num_frames: number of segmentation frames.
      count: anchors, at most num_frames.
      after, before: neighbours of an anchor that are tracked where `propagate` is set.

    Returns:
      Anchors and frames used, sorted positions among the segmentation frames; without `propagate` they are equal.

    Raises:
      UserError: a number is below 1.
    """
    _check_video(num_frames)
    if count < 1:
        raise UserError(f"the number of anchors must be at least 1, not {count}")
    anchors = sorted(rng.permutation(num_frames)[:count].tolist())
    if not propagate:
        return anchors, list(anchors)
    used = {a + d for a in anchors for d in range(-before, after + 1)}
    return anchors, sorted(frame for frame in used if 0 <= frame < num_frames)


def _check_video(num_frames: int) -> None:
    if num_frames < 1:
        raise UserError(f"the video has {num_frames} frames: at least one is needed")


def _fill_up(indices: list[int], count: int) -> list[int]:
    return indices + [indices[-1]] * (count - len(indices))


def _parse_rate(sample: str) -> float:
    try:
        rate = float(sample[3:])
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise UserError(f"frame sampling {sample!r} must be 'fps' and a positive number, as fps0.5")
    return rate


def _frames_at_rate(rate: float, video_len: int, fps: float, max_num_frames: int) -> list[int]:
    period = 1 / rate
    seconds = np.arange(period / 2, video_len / fps + period / 2, period)
    indices = np.around(seconds * fps).astype(int)
    indices = indices[indices < video_len]
    return (indices[:max_num_frames] if max_num_frames > 0 else indices).tolist()
