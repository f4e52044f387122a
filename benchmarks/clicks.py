"""How much clicks improve a result: J&F on synthetic videos after 0, 1, 2, ... simulated corrections.

    python -m benchmarks.clicks --model tiny --videos 24 --corrections 3 --out clicks.csv --plot clicks.png

An object is begun by the video's first sentence, by a click in its middle, or by a box around it; the latter two on the
first frame where it is seen. A correction is made where the masks are worst: on the frame with the lowest J, a click in
the middle of the largest region that is missing (positive) or too much (negative), as SAM's authors simulate them; or
the true mask of that frame. After each, all frames are tracked again. The videos' seed is that of the held-out ones in
the tests.
"""

import argparse
import csv
import itertools
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
BEGINNINGS = {"text": "a sentence", "click": "one click", "box": "a box"}


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
    masks = {shown.index: shown.of(1) for shown in session.propagate()}
    return np.stack([masks[index] for index in sorted(masks)])


def begin(session: TextSession, how: str, text: str, truth: np.ndarray) -> None:
    """Begins object 1; see BEGINNINGS."""
    if how == "text":
        session.add_text(text)
        return
    first = int(truth.any((1, 2)).argmax())
    if how == "click":
        point, _ = correct_click(np.zeros_like(truth[first]), truth[first])
        session.add_points(1, first, [point])
    else:
        rows, columns = np.flatnonzero(truth[first].any(1)), np.flatnonzero(truth[first].any(0))
        session.add_points(1, first, box=(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


def curve(model: virst_jax.Model, video: Video, how: str, corrections: int, prompt: str) -> Iterator[float]:
    """J&F of the first expression of a video after 0, 1, ... corrections."""
    numbers = range(video.num_frames)
    assert video.read_masks is not None
    truth = video.read_masks(0, numbers)
    session = model.session(video.read_frames(numbers))
    begin(session, how, video.expressions[0].text, truth)
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


def plot(path: Path, curves: dict[tuple[str, str], np.ndarray], videos: int) -> None:
    """Draws J&F over the number of corrections."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), dpi=120)
    for (how, prompt), values in curves.items():
        axes.plot(100 * values, marker="o", label=f"{BEGINNINGS[how]}, then {prompt}s")
    axes.set_xticks(range(len(next(iter(curves.values())))))
    axes.set(xlabel="corrections", ylabel="J&F", title=f"Held-out synthetic videos ({videos})")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--corrections", type=int, default=3)
    parser.add_argument("--begin", nargs="+", choices=list(BEGINNINGS), default=["text", "click"])
    parser.add_argument("--prompt", nargs="+", choices=["click", "mask"], default=["click", "mask"])
    parser.add_argument("--out", type=Path, help="CSV file of the means")
    parser.add_argument("--plot", type=Path, help="PNG file of the curves")
    args = parser.parse_args()
    model = virst_jax.load(args.model)
    source = SyntheticVideos(args.videos, SEED, expressions=1, categories=("appearance", "motion"))
    curves: dict[tuple[str, str], np.ndarray] = {}
    for how, prompt in itertools.product(args.begin, args.prompt):
        rows = []
        for index in range(len(source)):
            rows.append(list(curve(model, source[index], how, args.corrections, prompt)))
            print(how, prompt, index, " ".join(f"{100 * x:.1f}" for x in np.mean(rows, 0)), flush=True)
        curves[how, prompt] = np.mean(rows, 0)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["begin", "prompt", "corrections", "j_and_f", "videos"])
            for (how, prompt), values in curves.items():
                writer.writerows([how, prompt, i, f"{100 * x:.2f}", len(source)] for i, x in enumerate(values))
    if args.plot:
        plot(args.plot, curves, len(source))


if __name__ == "__main__":
    main()
