"""Training batches: samples drawn, worded, resized and brought to fixed shapes, in numpy.

Axes: B samples of a batch, O conversations, L positions, N [SEG] tokens, T segmentation frames, U frames used,
A anchors, P patches of a clip, W words, S, R sides of the video encoder's and the tracker's image.
Source: data/rvos_dataset.py, data/reason_seg_dataset.py, data/video_vqa_dataset.py of the release.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from virst_jax.config import IGNORE, IMAGE_TOKEN, VirstConfig
from virst_jax.data.datasets.mixtures import EXPLANATORY
from virst_jax.data.frames import flex_frames, segmentation_frames, training_anchors, training_frames
from virst_jax.data.prompts import Prompt, Tokenizer, build_prompt
from virst_jax.data.samples import Question, Video
from virst_jax.data.sequence import splice
from virst_jax.data.transforms import masks_to_size, resize_frames
from virst_jax.errors import UserError
from virst_jax.pretraining.patches import PATCH_WORDS, objects_of_patches, paths_in_words

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class BatchConfig:
    """The shape of a kind of batch, and how its samples are drawn."""

    # video | image: to be segmented; video_text | image_text: questions; video_patches | image_patches: what each patch
    # shows, in words; image_cells: what each cell of the tracker's features shows; video_named | image_named: masks of
    # what is given by some of its words; video_read | image_read: naming targets, with words in place of pixels
    kind: str = "video"
    batch_size: int = 1  # of all processes together
    conversations: int = 3  # O, expressions or questions of a sample
    seg_tokens: int = 0  # N; 0: as many as the network's evaluation uses
    text_length: int = 160  # positions behind the video: the rest of the question, and the answer
    vlm_frames: int = 8  # that the language model reads; a multiple of a clip's
    policy: str = "uniform"  # how they are drawn: uniform (one of each interval), random or flex, as the release's
    seg_frames: int = 8  # T; of video_named, all tracked
    anchors: int = 3
    propagate: bool = False  # also track the anchors' neighbours
    after: int = 5
    before: int = 2
    # teach the language model to say an expression's answer at [SEG], word by word, in place of the fixed sentence
    # around it: without this a network of random weights is slow to find out that the sentence matters
    name_targets: bool = False

    @property
    def is_image(self) -> bool:
        return self.kind.startswith("image")

    @property
    def is_text(self) -> bool:
        return self.kind.endswith("_text")

    @property
    def is_patches(self) -> bool:
        return self.kind.endswith("_patches")

    @property
    def is_cells(self) -> bool:
        return self.kind.endswith("_cells")

    @property
    def is_named(self) -> bool:
        return self.kind.endswith("_named")

    @property
    def is_read(self) -> bool:
        return self.kind.endswith("_read")

    @property
    def num_frames(self) -> int:
        """T"""
        read = self.seg_frames if self.is_named else self.vlm_frames
        return 1 if self.is_image else min(self.seg_frames, read)

    @property
    def num_anchors(self) -> int:
        """A"""
        return min(self.anchors, self.num_frames)

    @property
    def num_used(self) -> int:
        """U"""
        each = 1 + self.after + self.before if self.propagate else 1
        return min(self.num_frames, self.num_anchors * each)


KINDS = tuple(f"{what}{kind}" for kind in ("", "_text", "_patches", "_read") for what in ("video", "image"))
KINDS += ("image_cells", "video_named", "image_named")
MIXED = 0.3  # of what is named in words: the colour of one object and the form of any, so that often nothing fits
NOWHERE = "nothing"  # what a patch of the background shows


class ExampleMaker:
    """Turns samples into examples of one shape. A plain object, so that worker processes can have copies.

    Args:
      cfg: the network's sizes.
      tokenizer: the network's.
      batch: the shape.

    Raises:
      UserError: an unknown kind, or frames that do not make whole clips.
    """

    def __init__(self, cfg: VirstConfig, tokenizer: Tokenizer, batch: BatchConfig):
        if batch.kind not in KINDS:
            raise UserError(f"unknown kind of batch {batch.kind!r}: choose one of {', '.join(KINDS)}")
        clip = cfg.vision.clip_frames
        if batch.policy not in ("uniform", "random", "flex"):
            raise UserError(f"unknown policy {batch.policy!r} of drawing frames: choose uniform, random or flex")
        if not batch.is_image and (batch.vlm_frames < clip or batch.vlm_frames % clip):
            raise UserError(f"vlm_frames must be a multiple of {clip}, a clip's frames, not {batch.vlm_frames}")
        self.cfg, self.tokenizer, self.batch = cfg, tokenizer, batch
        self.num_visual, self.num_seg = visual_tokens(cfg, batch), batch.seg_tokens or cfg.num_seg_tokens
        probe = self._question("what", "it") if batch.is_text else self._segment("it", 0, 0)
        head = probe.input_ids
        self.shared = int(np.flatnonzero(head == IMAGE_TOKEN)[0]) + self.num_visual
        self.length = self.shared + batch.text_length

    def _segment(self, text: str, question: int, answer: int, **explained: Any) -> Prompt:
        return build_prompt(
            self.tokenizer,
            " ".join(text.split()),
            question_index=question,
            answer_index=answer,
            num_seg_tokens=self.num_seg,
            **explained,
        )

    def _question(self, question: str, answer: str) -> Prompt:
        return build_prompt(self.tokenizer, question, text_only=True, explanation=answer)

    def __call__(self, sample: Video | Question, rng: np.random.Generator) -> Arrays:
        """A sample with its draws -> the arrays of its kind of batch (see virst_jax.training.losses).

        Raises:
          UserError: the sample is of the other kind, or no expression of it fits.
        """
        batch = self.batch
        if isinstance(sample, Question) != batch.is_text or sample.is_image != batch.is_image:
            raise UserError(f"{sample.name}: a sample of another kind than the batch ({batch.kind}); check the recipe")
        worded = batch.is_patches or batch.is_cells or batch.is_named or batch.is_read
        if worded and (isinstance(sample, Question) or sample.read_objects is None):
            raise UserError(f"{sample.name}: no words for the objects of its frames; {batch.kind} needs synthetic data")
        sampled = self._frames(sample, rng)
        clip = 1 if batch.is_image else self.cfg.vision.clip_frames
        if batch.is_cells:
            assert isinstance(sample, Video)
            size = self.cfg.sam2.image_size
            cells = self._patches(sample, sampled, clip, self.cfg.sam2.feature_size)
            return {"frames": resized(sample.read_frames([0]), size, "bicubic"), **cells}
        if batch.is_named:
            assert isinstance(sample, Video)
            return self._named(sample, rng)
        if batch.is_read:
            assert isinstance(sample, Video)
            words = self._patches(sample, sampled, clip)["words"]
            return {"words": self._thin(words, rng), **self._sentences(sample, rng, naming=True)[0]}
        kept = [0] if batch.is_image else segmentation_frames(len(sampled), batch.seg_frames, rng=rng)
        frames = sample.read_frames(sorted(set(sampled)))
        frames = frames[np.searchsorted(sorted(set(sampled)), sampled)]
        clips = resized(frames, self.cfg.vision.image_size, "bicubic")
        out: Arrays = {"clips": clips.reshape(-1, clip, *clips.shape[1:])}
        if isinstance(sample, Question):
            return {**out, **self._questions(sample, rng)}
        if batch.is_patches:
            return {**out, **self._patches(sample, sampled, clip)}
        return {**out, **self._expressions(sample, rng, frames, sampled, kept)}

    def _frames(self, sample: Video | Question, rng: np.random.Generator) -> list[int]:
        if self.batch.is_image:
            return [0]
        count = self.batch.vlm_frames
        if self.batch.policy == "flex":
            clip = self.cfg.vision.clip_frames
            seed = int(rng.integers(2**31))
            drawn = flex_frames(sample.num_frames, seed, max_frames=count, min_frames=min(8, count), clip_frames=clip)
        else:
            drawn = training_frames(self.batch.policy, sample.num_frames, rng, sample_range=(count, count))
        return drawn + [drawn[-1]] * (count - len(drawn))

    def _questions(self, sample: Question, rng: np.random.Generator) -> Arrays:
        prompts: list[Prompt] = []
        for i in rng.permutation(len(sample.turns)):
            prompt = self._question(*sample.turns[i])
            if self._fits(prompt):
                prompts.append(prompt)
        return self._conversations(prompts[: self.batch.conversations], sample.name)

    def _expressions(
        self, video: Video, rng: np.random.Generator, frames: np.ndarray, sampled: list[int], kept: list[int]
    ) -> Arrays:
        cfg, batch = self.cfg, self.batch
        if video.read_masks is None:
            raise UserError(f"{video.name}: its masks are not public; train on a split that has them")
        out, chosen, in_text = self._sentences(video, rng, batch.name_targets)
        anchors, used = training_anchors(
            rng, len(kept), batch.num_anchors, batch.after, batch.before, propagate=batch.propagate
        )
        numbers = [sampled[kept[i]] for i in used]
        size, targets = cfg.sam2.image_size, np.zeros((batch.conversations, batch.num_used, 1, 1), bool)
        targets = np.broadcast_to(targets, (*targets.shape[:2], size, size)).copy()
        order, where = np.unique(numbers, return_inverse=True)
        for row, i in enumerate(chosen):
            masks = video.read_masks(i, order.tolist())
            masks = masks if masks.shape[-2:] == (size, size) else masks_to_size(masks, size) > 0
            targets[row, : len(used)] = masks[where]
        return out | {
            "frames": resized(frames[kept], size, "bilinear"),
            "targets": targets,
            "anchors": np.array(anchors, np.int32),
            "frames_used": np.pad(np.array(used, np.int32), (0, batch.num_used - len(used))),
            "used_valid": np.arange(batch.num_used) < len(used),
            # an answer in text alone has no masks to learn from
            "conversation_valid": np.arange(batch.conversations) < (0 if in_text else len(chosen)),
        }

    def _sentences(self, video: Video, rng: np.random.Generator, naming: bool) -> tuple[Arrays, list[int], bool]:
        """Conversations of a video's expressions, which of them, and whether they are answered in text alone."""
        chosen: list[int] = []
        prompts: list[Prompt] = []
        explain, in_text = _explains(video, rng)
        for i in rng.permutation(len(video.expressions)):
            given = video.expressions[i]
            extra = {"explanation": given.explanation, "text_only": in_text} if explain and given.explanation else {}
            prompt = self._segment(given.text, *rng.integers(12, size=2), **extra)
            if self._fits(prompt) and len(prompts) < self.batch.conversations:
                chosen.append(int(i))
                prompts.append(prompt)
        out = self._conversations(prompts, video.name)
        if naming:
            self._name_targets(out, [video.expressions[i].answer for i in chosen])
        if self.batch.is_read:
            del out["seg_positions"]
        return out, chosen, in_text

    def _thin(self, words: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Words of all patches int32[clips, P, W] -> of as many as there are visual tokens, int32[V, W].

        Background is left out first, as it is merged first.
        """
        rows = []
        for clip in words:
            plain = (clip[:, 0] == IGNORE) | (clip == self.tokenizer.encode(f" {NOWHERE}")[0]).any(1)
            order = np.argsort(plain + rng.random(len(clip)))[: self.num_visual // len(words)]
            rows.append(clip[np.sort(order)])
        return np.concatenate(rows)

    def _name_targets(self, out: Arrays, answers: Sequence[str]) -> None:
        """Makes the words of the answers the only labels: what follows the first [SEG], the second, ..."""
        out["labels"][:] = IGNORE
        for row, answer in enumerate(answers):
            words = self.tokenizer.encode(f" {answer}") if answer else []
            for position, word in zip(out["seg_positions"][row], words):
                out["labels"][row, position + 1] = word

    def _patches(self, video: Video, sampled: list[int], clip: int, grid: int = 0) -> Arrays:
        """Words of the object that covers most of a patch, none where it covers too little; background and objects
        weigh the same in sum. `grid`: cells of a side, which are told no paths; 0: the video encoder's patches."""
        assert video.read_objects is not None
        order, where = np.unique(sampled, return_inverse=True)
        shown = video.read_objects(order.tolist())[where]
        named = [[self.tokenizer.encode(f" {word}")[0] for word in thing] for thing in video.objects]
        nowhere = self.tokenizer.encode(f" {NOWHERE}")
        words, weights = [], []
        for frames in shown.reshape(-1, clip, *shown.shape[1:]):
            places = [""] * len(named) if grid else paths_in_words(frames, len(named))
            table = np.full((len(named) + 2, PATCH_WORDS), IGNORE, np.int32)
            for row, ids in zip(table, [nowhere, *named]):
                row[: len(ids)] = ids
            for row, ids, place in zip(table[1:], named, places):
                row[len(ids) : len(ids) + len(place)] = [self.tokenizer.encode(letter)[0] for letter in place]
            number = objects_of_patches(frames, len(named), grid or self.cfg.vision.grid)
            words.append(table[number].reshape(-1, PATCH_WORDS))
            weights.append(number.ravel())
        number = np.stack(weights)
        back, front = number == 0, (number > 0) & (number <= len(named))
        share = back / max(1, back.sum()) + front / max(1, front.sum())
        return {"words": np.stack(words), "weights": share.astype(np.float32)}

    def _named(self, video: Video, rng: np.random.Generator) -> Arrays:
        """Things given by colour and form as answers give them, or by one of both alone, and all that it fits; some
        fit nothing."""
        assert video.read_objects is not None
        size, count = self.cfg.sam2.image_size, self.batch.num_frames
        if video.num_frames < count:
            raise UserError(f"{video.name}: {video.num_frames} frames, seg_frames is {count}; take longer videos")
        step = int(rng.integers(1, max(1, (video.num_frames - 1) // max(1, count - 1)), endpoint=True))
        numbers = int(rng.integers(video.num_frames - (count - 1) * step)) + step * np.arange(count)
        shown = resized_labels(video.read_objects(numbers.tolist()), size)
        there = [k for k in range(len(video.objects)) if (shown == k + 1).any()]
        words = np.full((self.batch.conversations, self.num_seg), IGNORE, np.int32)
        targets = np.zeros((self.batch.conversations, *shown.shape), bool)
        for row in range(self.batch.conversations if there else 0):
            meant = video.objects[int(rng.choice(there))][:2]
            told = rng.choice(3, p=(0.4, 0.2, 0.4))  # both, the colour, the form
            if rng.random() < MIXED:
                meant, told = (meant[0], video.objects[int(rng.choice(there))][1]), 0
            given = [None if told == 2 else meant[0], None if told == 1 else meant[1]]
            for slot, word in enumerate(given):
                if word is not None:
                    words[row, slot] = self.tokenizer.encode(f" {word}")[0]
            fits = [k + 1 for k in there if all(w in (None, own) for w, own in zip(given, video.objects[k]))]
            targets[row] = np.isin(shown, fits)
        return {
            "frames": resized(video.read_frames(numbers.tolist()), size, "bilinear"),
            "words": words,
            "targets": targets,
            "anchors": np.sort(rng.choice(count, self.batch.num_anchors, replace=False)).astype(np.int32),
        }

    def _fits(self, prompt: Prompt) -> bool:
        before = int(np.flatnonzero(prompt.input_ids == IMAGE_TOKEN)[0])
        return before + self.num_visual == self.shared and len(prompt.input_ids) - 1 + self.num_visual <= self.length

    def _conversations(self, prompts: Sequence[Prompt], name: str) -> Arrays:
        if not prompts:
            raise UserError(
                f"{name}: no expression or question fits {self.batch.text_length} positions; raise text_length"
            )
        rows = [splice(p.input_ids, p.labels, self.num_visual, self.cfg.seg_token_id, self.length) for p in prompts]
        out = {
            field: np.stack([getattr(row, field) for row in rows])
            for field in ("token_ids", "visual_index", "labels", "mask")
        }
        if not self.batch.is_text:
            # without [SEG], as in answers in text alone, some position
            some = np.full(self.num_seg, self.shared, np.int32)
            out["seg_positions"] = np.stack([row.seg_positions if len(row.seg_positions) else some for row in rows])
        missing = self.batch.conversations - len(rows)
        if missing:  # fill up with the first, which then teaches nothing
            out = {field: np.concatenate([x, np.repeat(x[:1], missing, 0)]) for field, x in out.items()}
            out["labels"][len(rows) :] = IGNORE
        return out


def _explains(video: Video, rng: np.random.Generator) -> tuple[bool, bool]:
    """Whether a sample's answers are explained, and whether in text alone: drawn for those that have explanations."""
    if not any(expression.explanation for expression in video.expressions):
        return False, False
    in_text = bool(rng.random() < EXPLANATORY)
    return in_text or bool(rng.integers(2)), in_text


def visual_tokens(cfg: VirstConfig, batch: BatchConfig) -> int:
    """Visual tokens of a sample."""
    vision = cfg.vision
    if batch.is_image:
        return min(vision.tokens_per_image, vision.grid**2)
    clip = vision.clip_frames
    return batch.vlm_frames // clip * min(vision.tokens_per_frame * clip, vision.grid**2 * clip)


def batch_shapes(
    cfg: VirstConfig, batch: BatchConfig, shared: int
) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Shape and dtype of all arrays of a batch, without data or tokenizer.

    Args:
      shared: ExampleMaker.shared: visual tokens and the text before them.
    """
    rows, conversations, length = batch.batch_size, batch.conversations, shared + batch.text_length
    frames = 1 if batch.is_image else cfg.vision.clip_frames
    clips = 1 if batch.is_image else batch.vlm_frames // frames
    side, size = cfg.vision.image_size, cfg.sam2.image_size
    pixels = ((rows, clips, frames, side, side, 3), np.uint8)
    if batch.is_cells:
        cells = (rows, 1, cfg.sam2.feature_size**2)
        return {
            "frames": ((rows, 1, size, size, 3), np.uint8),
            "words": ((*cells, PATCH_WORDS), np.int32),
            "weights": (cells, np.float32),
        }
    if batch.is_named:
        return {
            "frames": ((rows, batch.num_frames, size, size, 3), np.uint8),
            "words": ((rows, conversations, batch.seg_tokens or cfg.num_seg_tokens), np.int32),
            "targets": ((rows, conversations, batch.num_frames, size, size), np.bool_),
            "anchors": ((rows, batch.num_anchors), np.int32),
        }
    if batch.is_patches:
        patches = (rows, clips, frames * cfg.vision.grid**2)
        return {"clips": pixels, "words": ((*patches, PATCH_WORDS), np.int32), "weights": (patches, np.float32)}
    words = (rows, conversations, length)
    seen: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {"clips": pixels}
    if batch.is_read:
        seen = {"words": ((rows, visual_tokens(cfg, batch), PATCH_WORDS), np.int32)}
    shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
        **seen,
        "token_ids": (words, np.int32),
        "visual_index": (words, np.int32),
        "labels": (words, np.int32),
        "mask": (words, np.bool_),
    }
    if batch.is_text or batch.is_read:
        return shapes
    used = batch.num_used
    return shapes | {
        "seg_positions": ((rows, conversations, batch.seg_tokens or cfg.num_seg_tokens), np.int32),
        "frames": ((rows, batch.num_frames, size, size, 3), np.uint8),
        "targets": ((rows, conversations, used, size, size), np.bool_),
        "anchors": ((rows, batch.num_anchors), np.int32),
        "frames_used": ((rows, used), np.int32),
        "used_valid": ((rows, used), np.bool_),
        "conversation_valid": ((rows, conversations), np.bool_),
    }


def resized(frames: np.ndarray, size: int, resample: str) -> np.ndarray:
    """As transforms.resize_frames, for nothing where the size is right."""
    return frames if frames.shape[1:3] == (size, size) else resize_frames(frames, size, resample)


def resized_labels(labels: np.ndarray, size: int) -> np.ndarray:
    """uint8[n, H, W] -> uint8[n, size, size], the nearest."""
    y, x = (np.arange(size) * length // size for length in labels.shape[1:])
    return labels[:, y[:, None], x]


def stack(examples: Sequence[Arrays]) -> Arrays:
    """Examples of one shape as a batch with a leading axis B."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
