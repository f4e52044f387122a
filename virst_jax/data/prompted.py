"""Examples for training the tracker alone: frames of a video, true masks of objects, and how they shall be prompted.

Axes: B samples of a batch, O objects, T frames, A frames with a first prompt, C frames that are corrected after
tracking, K clicks of a correction, R side of the tracker's image.
Source: training/dataset/vos_sampler.py and training/model/sam2.py (prepare_prompt_inputs) of facebookresearch/sam2.
"""

import numpy as np

from virst_jax.config import VirstConfig
from virst_jax.data.batches import Arrays, BatchConfig, ExampleMaker, Shapes, resized
from virst_jax.data.samples import Question, Video
from virst_jax.data.transforms import masks_to_size
from virst_jax.errors import UserError

MASK, POINT, BOX = range(3)  # first prompts


class PromptedMaker(ExampleMaker):
    """The arrays of training.prompted.PromptedBatch."""

    def draw_frames(self, sample: Video | Question, rng: np.random.Generator) -> list[int]:
        """Numbers of T frames at equal distances, rising or falling; the last one is repeated to fill up."""
        count, length = frames_of(self.batch, self.is_image), sample.num_frames
        most = min(self.batch.max_stride, max(1, (length - 1) // max(1, count - 1)))
        stride = int(rng.integers(1, most, endpoint=True))
        first = int(rng.integers(max(1, length - (count - 1) * stride)))
        numbers = [min(first + stride * i, length - 1) for i in range(count)]
        return numbers[::-1] if rng.random() < 0.5 else numbers

    def make(self, sample: Video | Question, sampled: list[int], rng: np.random.Generator) -> Arrays:
        assert isinstance(sample, Video)
        batch, size = self.batch, self.cfg.sam2.image_size
        masks = self.read_masks(sample, sampled)
        # an object that is not on the first frame cannot be pointed at
        there = np.flatnonzero(masks[:, 0].any((1, 2))) if len(masks) else np.zeros(0, int)
        chosen = rng.permutation(there)[: batch.conversations]
        targets = np.zeros((batch.conversations, len(sampled), size, size), bool)
        targets[: len(chosen)] = masks[chosen]
        if batch.absent_share:
            targets[rng.random(batch.conversations) < batch.absent_share] = False
        unique, where = np.unique(sampled, return_inverse=True)
        return {
            "frames": resized(sample.read_frames(unique.tolist()), size, "bicubic")[where],
            "targets": targets,
            "object_valid": np.arange(batch.conversations) < len(chosen),
            **self.draw_prompts(len(sampled), rng),
        }

    def read_masks(self, sample: Video, sampled: list[int]) -> np.ndarray:
        """True masks of all objects bool[n, T, R, R]: of those that are known, or else of the expressions."""
        numbers, where = np.unique(sampled, return_inverse=True)
        size = self.cfg.sam2.image_size
        if sample.read_objects is not None:
            labels = sample.read_objects(numbers.tolist())
            masks = np.stack([labels == k + 1 for k in range(len(sample.objects))])
        elif sample.read_masks is not None:
            read = sample.read_masks
            masks = np.stack([read(i, numbers.tolist()) for i in range(len(sample.expressions))])
        else:
            raise UserError(f"{sample.name}: its masks are not public; train on a split that has them")
        if masks.shape[-2:] != (size, size):
            masks = np.stack([masks_to_size(of_object, size) > 0 for of_object in masks])
        return masks[:, where]

    def draw_prompts(self, count: int, rng: np.random.Generator) -> Arrays:
        """Which of `count` frames have a first prompt, of what kind, and which are corrected."""
        batch, (firsts, later) = self.batch, prompted_frames(self.batch, self.is_image)
        clicked = self.is_image or rng.random() < batch.click_share
        number = int(rng.integers(1, firsts, endpoint=True))
        most = min(batch.corrected_frames, count) - number  # corrected frames without a first prompt
        # the first frame, and others at random; those that are corrected come from the rest
        order = np.concatenate([[0], 1 + rng.permutation(count - 1)]).astype(np.int32)
        boxes = rng.random(firsts) < batch.box_share
        kinds = np.where(boxes, BOX, POINT) if clicked else np.full(firsts, MASK)
        corrected = int(rng.integers(0, max(0, most), endpoint=True)) if clicked else 0
        slots = (firsts + later, 1 + batch.corrections)
        out = {
            "first": order[:firsts],
            "first_valid": np.arange(firsts) < number,
            "kinds": kinds.astype(np.int32),
            "corrected": np.resize(order[number:] if count > number else order, later).astype(np.int32),
            "corrected_valid": np.arange(later) < corrected,
            "from_truth": rng.random(slots) < batch.truth_share,
            "seed": np.array(rng.integers(2**31), np.int32),
        }
        if batch.central_share:
            out["central"] = rng.random(slots) < batch.central_share
        return out


def frames_of(batch: BatchConfig, is_image: bool) -> int:
    """T of a PromptedBatch."""
    return 1 if is_image else batch.seg_frames


def prompted_frames(batch: BatchConfig, is_image: bool) -> tuple[int, int]:
    """A and C of a PromptedBatch."""
    count = frames_of(batch, is_image)
    firsts = max(1, min(batch.anchors, count))
    return firsts, max(0, min(batch.corrected_frames, count) - 1)


def prompted_shapes(cfg: VirstConfig, batch: BatchConfig, prefix_len: int, is_image: bool) -> Shapes:
    """What PromptedMaker's examples have, with a leading axis B."""
    rows, size, count = batch.batch_size, cfg.sam2.image_size, frames_of(batch, is_image)
    firsts, later = prompted_frames(batch, is_image)
    slots = (rows, firsts + later, 1 + batch.corrections)
    shapes: Shapes = {
        "frames": ((rows, count, size, size, 3), np.uint8),
        "targets": ((rows, batch.conversations, count, size, size), np.bool_),
        "object_valid": ((rows, batch.conversations), np.bool_),
        "first": ((rows, firsts), np.int32),
        "first_valid": ((rows, firsts), np.bool_),
        "kinds": ((rows, firsts), np.int32),
        "corrected": ((rows, later), np.int32),
        "corrected_valid": ((rows, later), np.bool_),
        "from_truth": (slots, np.bool_),
        "seed": ((rows,), np.int32),
    }
    return shapes | ({"central": (slots, np.bool_)} if batch.central_share else {})
