"""Makers of the pretraining batches: examples of synthetic videos, whose objects and their words are known.

Axes: B samples of a batch, O rows, P patches of a clip or cells of a frame, W words, N [SEG] tokens, T frames,
A anchors, V visual tokens, R side of the tracker's image.
"""

from collections.abc import Sequence

import numpy as np

from virst_jax.config import IGNORE, VirstConfig
from virst_jax.data.batches import (
    Arrays,
    BatchConfig,
    ExampleMaker,
    ExampleSizes,
    ExpressionMaker,
    Shapes,
    conversation_shapes,
    resized,
)
from virst_jax.data.prompts import Tokenizer
from virst_jax.data.samples import Question, Video
from virst_jax.errors import UserError
from virst_jax.pretraining.patches import PATCH_WORDS, objects_of_patches, paths_in_words

MIXED = 0.3  # share of the rows that pair one object's colour with any object's form, so that often nothing fits
NOWHERE = "nothing"  # the word of a patch of bare background


def patch_words(
    tokenizer: Tokenizer, video: Video, sampled: Sequence[int], clip_frames: int, grid: int, paths: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The words of the object that covers most of a patch; none where it covers too little.

    Args:
      sampled: numbers of the frames, clip after clip.
      grid: patches of a side.
      paths: whether the words of an object's path follow its own, see patches.paths_in_words.

    Returns:
      int32[clips, P, W], IGNORE where there are fewer, and weights float32[clips, P]: those of all background patches
      sum to 1, and so do those of all patches with an object.
    """
    assert video.read_objects is not None
    order, where = np.unique(sampled, return_inverse=True)
    labels = video.read_objects(order.tolist())[where]
    count = len(video.objects)
    word_ids = [[tokenizer.encode(f" {word}")[0] for word in words] for words in video.objects]
    words, numbers = [], []
    for frames in labels.reshape(-1, clip_frames, *labels.shape[1:]):
        table = np.full((count + 2, PATCH_WORDS), IGNORE, np.int32)  # the last row: too little to tell
        for row, ids in zip(table, [tokenizer.encode(f" {NOWHERE}"), *word_ids]):
            row[: len(ids)] = ids
        for row, ids, path in zip(table[1:], word_ids, paths_in_words(frames, count) if paths else []):
            row[len(ids) : len(ids) + len(path)] = [tokenizer.encode(letter)[0] for letter in path]
        number = objects_of_patches(frames, count, grid)
        words.append(table[number].reshape(-1, PATCH_WORDS))
        numbers.append(number.ravel())
    number = np.stack(numbers)
    back, front = number == 0, (number > 0) & (number <= count)
    weights = back / max(1, back.sum()) + front / max(1, front.sum())
    return np.stack(words), weights.astype(np.float32)


class ObjectMaker(ExampleMaker):
    """An ExampleMaker that needs to know the objects of a video."""

    def __call__(self, sample: Video | Question, rng: np.random.Generator) -> Arrays:
        if isinstance(sample, Question) or sample.read_objects is None:
            kind = self.batch.kind
            raise UserError(f"{sample.name}: no words for the objects of its frames; {kind} needs synthetic data")
        return super().__call__(sample, rng)


class PatchMaker(ObjectMaker):
    """The arrays of losses.PatchBatch."""

    def make(self, sample: Video | Question, sampled: list[int], rng: np.random.Generator) -> Arrays:
        assert isinstance(sample, Video)
        _, clips = self.read_clips(sample, sampled)
        frames, grid = self.sizes.clip_frames, self.cfg.vision.grid
        words, weights = patch_words(self.tokenizer, sample, sampled, frames, grid, paths=True)
        return {"clips": clips, "words": words, "weights": weights}


class CellMaker(ObjectMaker):
    """The arrays of losses.CellBatch."""

    def make(self, sample: Video | Question, sampled: list[int], rng: np.random.Generator) -> Arrays:
        assert isinstance(sample, Video)
        sam2 = self.cfg.sam2
        words, weights = patch_words(self.tokenizer, sample, sampled, 1, sam2.feature_size, paths=False)
        frames = resized(sample.read_frames(sampled), sam2.image_size, "bicubic")
        return {"frames": frames, "words": words, "weights": weights}


class NamedMaker(ObjectMaker):
    """The arrays of losses.NamedBatch: objects given by colour and form, or by one of both, and all that fits."""

    def make(self, sample: Video | Question, sampled: list[int], rng: np.random.Generator) -> Arrays:
        assert isinstance(sample, Video)
        assert sample.read_objects is not None
        size, (count, num_anchors) = self.cfg.sam2.image_size, named_frames(self.batch, self.is_image)
        if sample.num_frames < count:
            raise UserError(f"{sample.name}: {sample.num_frames} frames, seg_frames is {count}; take longer videos")
        step = int(rng.integers(1, max(1, (sample.num_frames - 1) // max(1, count - 1)), endpoint=True))
        numbers = int(rng.integers(sample.num_frames - (count - 1) * step)) + step * np.arange(count)
        labels = resized_labels(sample.read_objects(numbers.tolist()), size)
        visible = [k for k in range(len(sample.objects)) if (labels == k + 1).any()]
        words = np.full((self.batch.conversations, self.sizes.seg_tokens), IGNORE, np.int32)
        targets = np.zeros((self.batch.conversations, *labels.shape), bool)
        for row in range(self.batch.conversations if visible else 0):
            color, form = sample.objects[int(rng.choice(visible))][:2]
            given = rng.choice(3, p=(0.4, 0.2, 0.4))  # both, the colour, the form
            if rng.random() < MIXED:
                form, given = sample.objects[int(rng.choice(visible))][1], 0
            query = [None if given == 2 else color, None if given == 1 else form]
            for slot, word in enumerate(query):
                if word is not None:
                    words[row, slot] = self.tokenizer.encode(f" {word}")[0]
            fits = [k + 1 for k in visible if all(w in (None, own) for w, own in zip(query, sample.objects[k]))]
            targets[row] = np.isin(labels, fits)
        return {
            "frames": resized(sample.read_frames(numbers.tolist()), size, "bilinear"),
            "words": words,
            "targets": targets,
            "anchors": np.sort(rng.choice(count, num_anchors, replace=False)).astype(np.int32),
        }


class ReadMaker(ObjectMaker, ExpressionMaker):
    """The arrays of losses.ReadBatch; the labels are the words of the expressions' answers."""

    def make(self, sample: Video | Question, sampled: list[int], rng: np.random.Generator) -> Arrays:
        assert isinstance(sample, Video)
        frames, grid = self.sizes.clip_frames, self.cfg.vision.grid
        every, _ = patch_words(self.tokenizer, sample, sampled, frames, grid, paths=True)
        words = self.choose_patches(every, rng)
        out, _, _ = self.expressions(sample, rng, name_targets=True)
        del out["seg_positions"]
        return {"words": words, **out}

    def choose_patches(self, words: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Words of all patches int32[clips, P, W] -> of as many as there are visual tokens, int32[V, W].

        Background is left out first, as token merging merges it first.
        """
        rows = []
        for clip in words:
            plain = (clip[:, 0] == IGNORE) | (clip == self.tokenizer.encode(f" {NOWHERE}")[0]).any(1)
            order = np.argsort(plain + rng.random(len(clip)))[: self.sizes.visual_tokens // len(words)]
            rows.append(clip[np.sort(order)])
        return np.concatenate(rows)


def named_frames(batch: BatchConfig, is_image: bool) -> tuple[int, int]:
    """T and A of a NamedBatch."""
    count = 1 if is_image else batch.seg_frames
    return count, min(batch.anchors, count)


def resized_labels(labels: np.ndarray, size: int) -> np.ndarray:
    """uint8[n, H, W] -> uint8[n, size, size], nearest neighbours."""
    y, x = (np.arange(size) * length // size for length in labels.shape[1:])
    return labels[:, y[:, None], x]


# Shapes of the batches' arrays, as in data/batches.py


def patch_shapes(cfg: VirstConfig, batch: BatchConfig, prefix_len: int, is_image: bool) -> Shapes:
    sizes, vision = ExampleSizes.of(cfg, batch, is_image), cfg.vision
    clips = (batch.batch_size, sizes.clips, sizes.clip_frames, vision.image_size, vision.image_size, 3)
    patches = (batch.batch_size, sizes.clips, sizes.clip_frames * vision.grid**2)
    return {
        "clips": (clips, np.uint8),
        "words": ((*patches, PATCH_WORDS), np.int32),
        "weights": (patches, np.float32),
    }


def cell_shapes(cfg: VirstConfig, batch: BatchConfig, prefix_len: int, is_image: bool) -> Shapes:
    size, cells = cfg.sam2.image_size, (batch.batch_size, 1, cfg.sam2.feature_size**2)
    return {
        "frames": ((batch.batch_size, 1, size, size, 3), np.uint8),
        "words": ((*cells, PATCH_WORDS), np.int32),
        "weights": (cells, np.float32),
    }


def named_shapes(cfg: VirstConfig, batch: BatchConfig, prefix_len: int, is_image: bool) -> Shapes:
    rows, size, (frames, anchors) = batch.batch_size, cfg.sam2.image_size, named_frames(batch, is_image)
    return {
        "frames": ((rows, frames, size, size, 3), np.uint8),
        "words": ((rows, batch.conversations, ExampleSizes.of(cfg, batch, is_image).seg_tokens), np.int32),
        "targets": ((rows, batch.conversations, frames, size, size), np.bool_),
        "anchors": ((rows, anchors), np.int32),
    }


def read_shapes(cfg: VirstConfig, batch: BatchConfig, prefix_len: int, is_image: bool) -> Shapes:
    visual = ExampleSizes.of(cfg, batch, is_image).visual_tokens
    return {
        "words": ((batch.batch_size, visual, PATCH_WORDS), np.int32),
        **conversation_shapes(batch, prefix_len),
    }
