"""Clicks, boxes, masks and corrections against `transformers`' port of SAM 2's video predictor.

What `transformers` does otherwise, and how the comparison meets it:
- It does not read the mask so far together with new clicks, as the original does: `keep_previous=False`.
- It has no option to make a corrected frame an anchor: the test moves its outcome among the anchors.
- Of a given mask it takes the pointer from the best of three masks and the memory from the full-size mask, the original
  from the first mask and the quarter-size one: `as_original` makes it follow the original.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from helpers.torch_sam2 import SMALL, TorchSam2, assert_close, frames, inference, tensor
from virst_jax.config import PIXEL_MEAN, PIXEL_STD, Compute
from virst_jax.data.transforms import normalize
from virst_jax.inference.session import Session
from virst_jax.inference.tracker_steps import TrackerNetwork, TrackerSteps
from virst_jax.io.video import open_video

pytestmark = pytest.mark.torch

CFG = dataclasses.replace(SMALL, max_anchors_attended=-1)
SIDE, COUNT, TOLERANCE = CFG.image_size, 10, 1e-4


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with inference():
        yield


@functools.cache
def pair() -> TorchSam2:
    return TorchSam2(CFG, interactive=True)


@functools.cache
def network() -> TrackerNetwork:
    return TrackerNetwork(TrackerSteps(CFG, Compute(), memory_dtype="float32"), pair().params)


@functools.cache
def video() -> np.ndarray:
    return ((frames(COUNT, SIDE) * PIXEL_STD + PIXEL_MEAN).clip(0, 1) * 255).astype(np.uint8)


class Both:
    """A session of ours and one of theirs, which get the same prompts."""

    def __init__(self) -> None:
        self.ours = Session(network(), open_video(video()), keep_previous=False, chunk=4, group_size=2)
        self.theirs = pair().open_video(normalize(video()))

    def _run_theirs(self, index: int, frame: int, reverse: bool = False) -> None:
        self.theirs.obj_with_new_inputs.append(self.theirs.obj_idx_to_id(index))
        pair().model(self.theirs, frame_idx=frame, reverse=reverse)

    def click(
        self,
        object_id: int,
        frame: int,
        points: list[tuple[float, float]],
        labels: list[int],
        box: tuple[float, ...] | None = None,
        correct: bool = False,
    ) -> None:
        self.ours.add_points(object_id, frame, points, labels, box=box)
        index = self.theirs.obj_id_to_idx(object_id)
        if box is not None:
            points, labels = [box[:2], box[2:], *points], [2, 3, *labels]  # type: ignore[list-item]
        coords = tensor(np.array(points, np.float32))[None, None]
        inputs = {"point_coords": coords, "point_labels": tensor(np.array(labels, np.int32))[None, None]}
        self.theirs.add_point_inputs(index, frame, inputs)
        tracked = self.theirs.frames_tracked_per_obj[index].get(frame, {"reverse": False})
        self._run_theirs(index, frame, tracked["reverse"])
        if correct:
            kept = self.theirs.output_dict_per_obj[index]
            kept["cond_frame_outputs"][frame] = kept["non_cond_frame_outputs"].pop(frame)

    def mask(self, object_id: int, frame: int, mask: np.ndarray) -> None:
        self.ours.add_mask(object_id, frame, mask)
        index = self.theirs.obj_id_to_idx(object_id)
        self.theirs.add_mask_inputs(index, frame, tensor(mask.astype(np.float32))[None, None])
        self._run_theirs(index, frame)

    def propagate(self, start: int, backward: bool = False) -> list[int]:
        """The frames that both have passed."""
        ours = [out.index for out in self.ours.propagate(start, direction="backward" if backward else "forward")]
        iterator = pair().model.propagate_in_video_iterator(self.theirs, start, reverse=backward)
        assert ours == [out.frame_idx for out in iterator]
        return ours

    def compare(self, numbers: list[int]) -> None:
        scores: list[list[float]] = []
        for object_id in self.ours.object_ids:
            kept = self.theirs.output_dict_per_obj[self.theirs.obj_id_to_idx(object_id)]
            for number in numbers:
                conditioned = number in kept["cond_frame_outputs"]
                assert conditioned == (number in self.ours.anchors[object_id])
                out = kept["cond_frame_outputs" if conditioned else "non_cond_frame_outputs"][number]
                mine = self.ours._objects[object_id].on(number)
                assert mine is not None
                assert_close(mine.low_res, out["pred_masks"][0, 0], TOLERANCE)
                assert_close(mine.pointer, out["object_pointer"][0, 0], TOLERANCE)
                assert_close(mine.memory, out["maskmem_features"][:, 0], TOLERANCE)
                scores.append([mine.score, float(out["object_score_logits"][0, 0, 0])])
        mine, theirs = np.array(scores).T
        assert_close(mine, theirs, TOLERANCE)  # on the scale of the whole video: one may be next to 0


def test_clicks_and_boxes_of_several_objects_forward_and_backward() -> None:
    """One click (the best of three masks), a positive and a negative one, a box, a box with a click; three objects make
    two groups, whose second is half empty."""
    both = Both()
    both.click(1, 0, [(40, 50)], [1])
    both.click(2, 0, [(70, 30), (100, 90)], [1, 0])
    both.click(7, 0, [], [], box=(20, 30, 90, 100))
    both.click(2, 4, [(60, 60)], [0], box=(30.5, 40, 80, 90))
    both.compare([0])
    both.compare(both.propagate(0))
    both.compare(both.propagate(COUNT - 1, backward=True))


def test_corrections_in_mid_video() -> None:
    """A tracked frame is corrected, with its memories, and becomes an anchor; from there both ways; then a frame that
    was tracked backward is corrected."""
    both = Both()
    both.click(1, 2, [(40, 50)], [1])
    both.compare(both.propagate(2))
    both.click(1, 6, [(50, 60), (90, 20)], [1, 0], correct=True)
    both.compare(both.propagate(6))
    both.compare(both.propagate(6, backward=True))
    both.click(1, 3, [(30, 30)], [0], correct=True)
    both.compare(both.propagate(3, backward=True))


def as_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """See the head of this file."""
    from torch.nn import functional

    model = pair().model
    given = model._use_mask_as_output

    def use_mask(features: Any, high_res: Any, mask: Any) -> Any:
        out = given(features, high_res, mask)
        decoded = model._single_frame_forward(
            input_masks=model.mask_downsample(mask), image_embeddings=[*high_res, features], multimask_output=False
        )
        if mask.any():
            out.object_pointer = decoded.object_pointer
        out.high_res_masks = functional.interpolate(
            out.pred_masks, size=(SIDE, SIDE), mode="bilinear", align_corners=False
        )
        return out

    monkeypatch.setattr(model, "_use_mask_as_output", use_mask)


def test_given_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask in place of clicks; an empty one says that the object is not there."""
    as_original(monkeypatch)
    both = Both()
    y, x = np.mgrid[:SIDE, :SIDE]
    both.mask(1, 1, (y - 60) ** 2 + (x - 50) ** 2 < 900)
    both.mask(1, 5, np.zeros((SIDE, SIDE), bool))
    both.compare([1, 5])
    both.compare(both.propagate(1))
