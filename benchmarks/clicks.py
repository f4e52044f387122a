"""How much clicks improve a result of a sentence: J&F on synthetic videos after 0, 1, 2, ... simulated corrections.

    python -m benchmarks.clicks --model tiny --videos 40 --corrections 3 --out clicks.csv

A correction is made where the masks are worst: on the frame with the lowest J, a click in the middle of the largest
region that is missing (positive) or too much (negative), as SAM's authors simulate them; or with --prompt mask, the
true mask of that frame. Then all frames are tracked again. The videos' seed is that of the held-out ones in the tests.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage

import virst_jax
from virst_jax.data.samples import Video
from virst_jax.data.synthetic.videos import SyntheticVideos
from virst_jax.evaluation.metrics import boundary_f, region_similarity
from virst_jax.inference.text_session import TextSession

SEED = 10**6


def correct_click(pred: np.ndarray, truth: np.ndarray) -> tuple[tuple[float, float], int]:
    """A click (x, y) and its label, in the middle of the largest wrong region of masks bool[H, W]."""
    best, click = 0, ((0.0, 0.0), 1)
    for wrong, label in ((truth & ~pred, 1), (pred & ~truth, 0)):
        regions, count = ndimage.label(wrong)
        if not count:
            continue
        areas = ndimage.sum_labels(wrong, regions, range(1, count + 1))
        if areas.max() <= best:
            continue
        best = areas.max()
        # beyond the frame's edge nothing is wrong: the middle lies inside
        depth = ndimage.distance_transform_edt(np.pad(regions == 1 + areas.argmax(), 1))[1:-1, 1:-1]
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        click = ((float(x), float(y)), label)
    return click


def tracked(session: TextSession) -> np.ndarray:
    """The masks of object 1, bool[T, H, W]."""
    return np.stack([shown.of(1) for shown in session.propagate(0, direction="forward")])


def curve(model: virst_jax.Model, video: Video, corrections: int, prompt: str) -> Iterator[float]:
    """J&F of the first expression of a video after 0, 1, ... corrections."""
    numbers = range(video.num_frames)
    assert video.read_masks is not None
    truth = video.read_masks(0, numbers)
    session = model.session(video.read_frames(numbers))
    session.add_text(video.expressions[0].text)
    for step in range(corrections + 1):
        pred = tracked(session)
        overlap = region_similarity(pred, truth)
        yield float((overlap.mean() + boundary_f(pred, truth).mean()) / 2)
        if step == corrections:
            return
        worst = int(overlap.argmin())
        if prompt == "mask":
            session.add_mask(1, worst, truth[worst])
        else:
            point, label = correct_click(pred[worst], truth[worst])
            session.add_points(1, worst, [point], [label], replace=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--corrections", type=int, default=3)
    parser.add_argument("--prompt", choices=["click", "mask"], default="click")
    parser.add_argument("--out", type=Path, help="CSV file of the means")
    args = parser.parse_args()
    model = virst_jax.load(args.model)
    source = SyntheticVideos(args.videos, SEED, expressions=1, categories=("appearance", "motion"))
    rows = []
    for index in range(len(source)):
        rows.append(list(curve(model, source[index], args.corrections, args.prompt)))
        print(index, " ".join(f"{100 * x:.1f}" for x in np.mean(rows, 0)), flush=True)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["corrections", "j_and_f", "videos"])
            writer.writerows([i, f"{100 * x:.2f}", len(rows)] for i, x in enumerate(np.mean(rows, 0)))


if __name__ == "__main__":
    main()
