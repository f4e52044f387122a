"""The small model that comes with the package, on scenes that it has not seen."""

import numpy as np
import pytest

import virst_jax
from virst_jax.api import EMBEDDED
from virst_jax.commands import demo
from virst_jax.data.synthetic.videos import SyntheticVideos
from virst_jax.errors import UserError
from virst_jax.evaluation.held_out import score_videos, summarize
from virst_jax.io.video import open_video


@pytest.fixture(scope="module")
def model():
    return virst_jax.load("tiny")


def iou(mask, truth):
    return (mask & truth).sum() / max(1, (mask | truth).sum())


def test_it_is_small():
    sizes = [path.stat().st_size for path in EMBEDDED["tiny"].rglob("*") if path.is_file()]
    assert 1e6 < sum(sizes) < 8e6


def test_it_does_not_pretend_to_answer(model):
    with pytest.raises(UserError, match=r"it cannot answer questions: .*knows nothing of the real world"):
        model.chat(np.zeros((4, 8, 8, 3), np.uint8), "what happens?")


def test_it_segments_what_the_sentence_says(model):
    source = SyntheticVideos(6, 10**6, expressions=4, categories=("appearance",))

    def segment(video, texts):
        return model.segment(video, texts).masks

    said, exchanged = (
        summarize([score for scores in score_videos(segment, source, exchange=exchange) for score in scores])["j_and_f"]
        for exchange in (False, True)
    )
    assert said > 0.7
    assert exchanged < said / 2


def drawing():
    """An image of three shapes, and their masks by what they are called."""
    y, x = np.mgrid[:128, :128]
    shapes = {
        "the red square": (abs(y - 40) < 16) & (abs(x - 40) < 16),
        "the blue square": (abs(y - 40) < 16) & (abs(x - 92) < 16),
        "the red circle": (y - 92) ** 2 + (x - 64) ** 2 < 16**2,
    }
    drawn = np.full((128, 128, 3), 90, np.uint8)
    for text, mask in shapes.items():
        drawn[mask] = (220, 40, 40) if "red" in text else (40, 70, 220)
    return drawn, shapes


def test_it_tells_colours_and_forms_in_an_image(model):
    drawn, shapes = drawing()
    masks = model.segment_image(drawn, list(shapes)).masks
    for found, (text, truth) in zip(masks, shapes.items()):
        assert iou(found, truth) > 0.6, text


def test_it_segments_what_is_pointed_at(model):
    """By a click in the middle, and by a box."""
    drawn, shapes = drawing()
    session = model.session(drawn[None])
    for number, truth in enumerate(shapes.values(), 1):
        rows, columns = np.nonzero(truth)
        clicked = session.add_points(number, 0, [(columns.mean(), rows.mean())]).of(number)
        assert iou(clicked, truth) > 0.6
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert iou(session.add_points(number + 3, 0, box=box).of(number + 3), truth) > 0.6


def test_it_segments_the_sample_clip(model):
    frames = np.stack(list(open_video(demo.CLIP))).astype(int)
    cyan = (frames[..., 1] > frames[..., 0] + 60) & (frames[..., 2] > frames[..., 0] + 60)
    result = model.segment(demo.CLIP, ["the cyan cross", "the cyan shapes", "the green circle"])
    cross, shapes, nothing = result.masks
    assert result.masks.shape == (3, *frames.shape[:3])
    assert iou(shapes, cyan) > 0.7
    assert (cross & cyan).sum() > 0.9 * cross.sum()
    assert 0.5 * cyan.sum() < cross.sum() < 0.95 * cyan.sum()  # there is a star, too
    assert nothing.sum() < 0.05 * cyan.sum()
