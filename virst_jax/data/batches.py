"""Training examples: samples drawn, worded, resized and brought to fixed shapes, in numpy.

Makers of the core's kinds of batch stand here; virst_jax/training/tasks.py lists all kinds.

Axes: B samples of a batch, O conversations, L positions, N [SEG] tokens, T segmentation frames, U frames used,
A anchors, S, R sides of the video encoder's and the tracker's image.
Source: data/rvos_dataset.py, data/reason_seg_dataset.py, data/video_vqa_dataset.py of the release.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from virst_jax.config import IGNORE, IMAGE_TOKEN, VirstConfig
from virst_jax.data.datasets.mixtures import EXPLANATORY
from virst_jax.data.frames import flex_frames, segmentation_frames, training_anchors, training_frames
from virst_jax.data.prompts import Prompt, Tokenizer, build_prompt
from virst_jax.data.samples import Question, Video
from virst_jax.data.sequence import pack, splice
from virst_jax.data.transforms import masks_to_size, resize_frames
from virst_jax.errors import UserError

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[tuple[int, ...], type[np.generic]]]  # shape and dtype by the array's name

POLICIES = ("uniform", "random", "flex")


@dataclass(frozen=True)
class BatchConfig:
    """The shape of a batch, and how its samples are drawn. A kind reads what concerns it."""

    kind: str = "video"  # a name in training.tasks
    batch_size: int = 1  # of all processes together
    conversations: int = 3  # O, expressions or questions of a sample
    seg_tokens: int = 0  # N; 0: as many as the network's evaluation uses
    text_length: int = 160  # positions after the video: the rest of the question, and the answer
    # positions after the video that all conversations of a sample share, one behind the other; 0: text_length for each
    packed_length: int = 0
    vlm_frames: int = 8  # that the language model sees; a multiple of a clip's
    policy: str = "uniform"  # how they are drawn: uniform (one of each interval), random or flex, as the release's
    seg_frames: int = 8  # T, at most vlm_frames
    anchors: int = 3
    propagate: bool = False  # also track the anchors' neighbours
    after: int = 5
    before: int = 2
    # label the positions after [SEG] with the words of the expression's answer, in place of the fixed sentence around
    # [SEG]: without this, a network of random weights takes long to depend on the expression
    name_targets: bool = False
    # Of batches whose objects are prompted by clicks, boxes and masks; the defaults are SAM 2's. There `conversations`
    # are objects, `seg_frames` frames, and `anchors` the most frames that have a first prompt.
    max_stride: int = 1  # the most frames from one to the next
    click_share: float = 0.5  # of the videos begin with clicks or boxes, the others with masks
    box_share: float = 0.5  # of the former begin with boxes
    corrected_frames: int = 2  # the most, with those of the first prompts
    corrections: int = 7  # clicks of each
    truth_share: float = 0.1  # of them lie on the object, whatever the mask looks like
    central_share: float = 0.0  # of them lie in the middle of what is wrong, the others anywhere in it
    absent_share: float = 0.0  # of the objects are nowhere: negative clicks say so, and the object score learns it

    def __post_init__(self) -> None:
        most = self.conversations * self.text_length
        if self.packed_length and not self.text_length <= self.packed_length <= most:
            raise UserError(
                f"packed_length of {self.kind!r} batches must be 0, or from text_length ({self.text_length}), so that "
                f"any conversation fits, to {most}, what {self.conversations} of them take at most; "
                f"it is {self.packed_length}"
            )


@dataclass(frozen=True)
class ExampleSizes:
    """The sizes of one example that follow from network and batch."""

    clips: int
    clip_frames: int
    visual_tokens: int  # of all clips
    seg_tokens: int  # N
    seg_frames: int  # T
    anchors: int  # A
    frames_used: int  # U

    @classmethod
    def of(cls, cfg: VirstConfig, batch: BatchConfig, is_image: bool) -> "ExampleSizes":
        vision, seg_tokens = cfg.vision, batch.seg_tokens or cfg.num_seg_tokens
        if is_image:
            return cls(1, 1, min(vision.tokens_per_image, vision.grid**2), seg_tokens, 1, min(batch.anchors, 1), 1)
        frames = vision.clip_frames
        clips = batch.vlm_frames // frames
        visual_tokens = clips * min(vision.tokens_per_frame * frames, vision.grid**2 * frames)
        seg_frames = min(batch.seg_frames, batch.vlm_frames)
        anchors = min(batch.anchors, seg_frames)
        around = batch.after + batch.before if batch.propagate else 0
        used = min(seg_frames, anchors * (1 + around))
        return cls(clips, frames, visual_tokens, seg_tokens, seg_frames, anchors, used)


class DoesNotFit(UserError):
    """No expression or question of a sample fits the batch's text_length; another sample may."""


class ExampleMaker(ABC):
    """Turns samples into examples of one shape. A plain object, so that worker processes can have copies.

    Args:
      cfg: the network's sizes.
      tokenizer: the network's.
      batch: the shape.
      is_image: whether samples are still images.

    Raises:
      UserError: frames that do not make whole clips, or an unknown way of drawing them.
    """

    sample_type: type[Video] | type[Question] = Video
    prefix_len = 0  # so many first positions are the same in all conversations of a sample: the prompt up to the video

    def __init__(self, cfg: VirstConfig, tokenizer: Tokenizer, batch: BatchConfig, *, is_image: bool = False):
        clip = cfg.vision.clip_frames
        if batch.policy not in POLICIES:
            raise UserError(f"unknown policy {batch.policy!r} of drawing frames: choose uniform, random or flex")
        if not is_image and (batch.vlm_frames < clip or batch.vlm_frames % clip):
            raise UserError(f"vlm_frames must be a multiple of {clip}, a clip's frames, not {batch.vlm_frames}")
        self.cfg, self.tokenizer, self.batch, self.is_image = cfg, tokenizer, batch, is_image
        self.sizes = ExampleSizes.of(cfg, batch, is_image)

    def __call__(self, sample: Video | Question, rng: np.random.Generator) -> Arrays:
        """The arrays of one example; `rng` decides all that is drawn.

        Raises:
          UserError: the sample is of another kind.
          DoesNotFit: no expression or question of it fits.
        """
        if not isinstance(sample, self.sample_type) or sample.is_image != self.is_image:
            kind = self.batch.kind
            raise UserError(f"{sample.name}: a sample of another kind than the batch ({kind}); check the recipe")
        return self.make(sample, self.draw_frames(sample, rng), rng)

    @abstractmethod
    def make(self, sample: "Video | Question", sampled: list[int], rng: np.random.Generator) -> Arrays:
        """The arrays of a sample of the right type, of which the frames `sampled` were drawn."""

    def draw_frames(self, sample: Video | Question, rng: np.random.Generator) -> list[int]:
        """Numbers of the frames that the language model sees; the last one is repeated to fill up."""
        if self.is_image:
            return [0]
        count = self.batch.vlm_frames
        if self.batch.policy == "flex":
            clip = self.cfg.vision.clip_frames
            seed = int(rng.integers(2**31))
            drawn = flex_frames(sample.num_frames, seed, max_frames=count, min_frames=min(8, count), clip_frames=clip)
        else:
            drawn = training_frames(self.batch.policy, sample.num_frames, rng, sample_range=(count, count))
        return drawn + [drawn[-1]] * (count - len(drawn))

    def read_clips(self, sample: Video | Question, sampled: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The frames sampled, uint8[n, H, W, 3], and the same as clips uint8[clips, frames, S, S, 3]."""
        unique = sorted(set(sampled))
        frames = sample.read_frames(unique)[np.searchsorted(unique, sampled)]
        pixels = resized(frames, self.cfg.vision.image_size, "bicubic")
        return frames, pixels.reshape(-1, self.sizes.clip_frames, *pixels.shape[1:])


class ConversationMaker(ExampleMaker):
    """An ExampleMaker of conversations, which all begin with the same prompt and the video."""

    def __init__(self, cfg: VirstConfig, tokenizer: Tokenizer, batch: BatchConfig, *, is_image: bool = False):
        super().__init__(cfg, tokenizer, batch, is_image=is_image)
        self.prefix_len = _image_position(self.example_prompt()) + self.sizes.visual_tokens
        self.length = self.prefix_len + batch.text_length

    @abstractmethod
    def example_prompt(self) -> Prompt:
        """Any prompt of this kind."""

    def fits(self, prompt: Prompt) -> bool:
        """Whether a prompt begins as all others do and is not too long."""
        visual = self.sizes.visual_tokens
        begins_alike = _image_position(prompt) + visual == self.prefix_len
        return begins_alike and len(prompt.input_ids) - 1 + visual <= self.length

    def has_room(self, taken: Sequence[Prompt], prompt: Prompt) -> bool:
        """Whether a prompt fits, also beside those that were taken of a sample."""
        if len(taken) == self.batch.conversations or not self.fits(prompt):
            return False
        visual = self.sizes.visual_tokens
        needed = sum(len(p.input_ids) - 1 + visual - self.prefix_len for p in (*taken, prompt))
        return not self.batch.packed_length or needed <= self.batch.packed_length

    def packed(self, out: Arrays, count: int) -> Arrays:
        """What `conversations` made of `count` prompts, packed if the batch is to be."""
        length = self.batch.packed_length
        return pack(out, count, self.prefix_len, length) if length else out

    def conversations(self, prompts: Sequence[Prompt], name: str, seg_positions: bool = False) -> Arrays:
        """The arrays of up to O conversations, filled up to O; not packed yet.

        Args:
          name: the sample's, for the error.
          seg_positions: whether to say where [SEG] stands; -1 in conversations without it.

        Raises:
          DoesNotFit: there is none.
        """
        if not prompts:
            raise DoesNotFit(
                f"{name}: no expression or question fits {self.batch.text_length} positions; raise text_length"
            )
        visual = self.sizes.visual_tokens
        rows = [splice(p.input_ids, p.labels, visual, self.cfg.seg_token_id, self.length) for p in prompts]
        out = {
            field: np.stack([getattr(row, field) for row in rows])
            for field in ("token_ids", "visual_index", "labels", "mask")
        }
        if seg_positions:
            nowhere = np.full(self.sizes.seg_tokens, -1, np.int32)  # in answers in text alone
            out["seg_positions"] = np.stack([row.seg_positions if len(row.seg_positions) else nowhere for row in rows])
        missing = self.batch.conversations - len(rows)
        if missing:  # repeat the first, without labels
            out = {field: np.concatenate([x, np.repeat(x[:1], missing, 0)]) for field, x in out.items()}
            out["labels"][len(rows) :] = IGNORE
        return out


class ExpressionMaker(ConversationMaker):
    """A ConversationMaker of a video's expressions."""

    def example_prompt(self) -> Prompt:
        return self.prompt("it", 0, 0)

    def prompt(self, text: str, question: int, answer: int, explanation: str = "", text_only: bool = False) -> Prompt:
        """An expression in the wordings of these numbers."""
        return build_prompt(
            self.tokenizer,
            " ".join(text.split()),
            question_index=question,
            answer_index=answer,
            num_seg_tokens=self.sizes.seg_tokens,
            explanation=explanation or None,
            text_only=text_only and bool(explanation),
        )

    def expressions(self, video: Video, rng: np.random.Generator, name_targets: bool) -> tuple[Arrays, list[int], bool]:
        """Conversations of a video's expressions, numbers of the expressions, whether answers are text alone."""
        chosen: list[int] = []
        prompts: list[Prompt] = []
        explained, text_only = _draw_explained(video, rng)
        for i in rng.permutation(len(video.expressions)):
            given = video.expressions[i]
            explanation = given.explanation if explained else ""
            question, answer = rng.integers(12, size=2).tolist()
            prompt = self.prompt(given.text, question, answer, explanation, text_only)
            if self.has_room(prompts, prompt):
                chosen.append(int(i))
                prompts.append(prompt)
        out = self.conversations(prompts, video.name, seg_positions=True)
        if name_targets:
            self.label_with_answers(out, [video.expressions[i].answer for i in chosen])
        return self.packed(out, len(chosen)), chosen, text_only

    def label_with_answers(self, out: Arrays, answers: Sequence[str]) -> None:
        """Makes the words of the answers the only labels: one after the first [SEG], one after the second, ..."""
        out["labels"][:] = IGNORE
        for row, answer in enumerate(answers):
            words = self.tokenizer.encode(f" {answer}") if answer else []
            for position, word in zip(out["seg_positions"][row], words):
                if position >= 0:
                    out["labels"][row, position + 1] = word


class SegmentationMaker(ExpressionMaker):
    """Videos or images whose expressions are segmented: the arrays of training.losses.VideoBatch."""

    def make(self, sample: Video | Question, sampled: list[int], rng: np.random.Generator) -> Arrays:
        assert isinstance(sample, Video)
        cfg, batch, sizes = self.cfg, self.batch, self.sizes
        kept = [0] if self.is_image else segmentation_frames(len(sampled), batch.seg_frames, rng=rng)
        if sample.read_masks is None:
            raise UserError(f"{sample.name}: its masks are not public; train on a split that has them")
        out, chosen, text_only = self.expressions(sample, rng, batch.name_targets)
        anchors, used = training_anchors(
            rng, len(kept), sizes.anchors, batch.after, batch.before, propagate=batch.propagate
        )
        numbers, where = np.unique([sampled[kept[i]] for i in used], return_inverse=True)
        frames, clips = self.read_clips(sample, sampled)
        size = cfg.sam2.image_size
        targets = np.zeros((batch.conversations, sizes.frames_used, size, size), bool)
        for row, i in enumerate(chosen):
            masks = sample.read_masks(i, numbers.tolist())
            masks = masks if masks.shape[-2:] == (size, size) else masks_to_size(masks, size) > 0
            targets[row, : len(used)] = masks[where]
        return out | {
            "clips": clips,
            "frames": resized(frames[kept], size, "bilinear"),
            "targets": targets,
            "anchors": np.array(anchors, np.int32),
            "frames_used": np.pad(np.array(used, np.int32), (0, sizes.frames_used - len(used))),
            "used_valid": np.arange(sizes.frames_used) < len(used),
            # an answer in text alone has no masks to learn from
            "conversation_valid": np.arange(batch.conversations) < (0 if text_only else len(chosen)),
        }


class QuestionMaker(ConversationMaker):
    """Videos or images with questions that are answered in text: the arrays of training.losses.TextBatch."""

    sample_type = Question

    def example_prompt(self) -> Prompt:
        return self.prompt("what", "it")

    def prompt(self, question: str, answer: str) -> Prompt:
        return build_prompt(self.tokenizer, question, text_only=True, explanation=answer)

    def make(self, sample: Video | Question, sampled: list[int], rng: np.random.Generator) -> Arrays:
        assert isinstance(sample, Question)
        prompts: list[Prompt] = []
        for i in rng.permutation(len(sample.turns)):
            prompt = self.prompt(*sample.turns[i])
            if self.has_room(prompts, prompt):
                prompts.append(prompt)
        out = self.packed(self.conversations(prompts, sample.name), len(prompts))
        _, clips = self.read_clips(sample, sampled)
        return {"clips": clips, **out}


def _image_position(prompt: Prompt) -> int:
    return int(np.flatnonzero(prompt.input_ids == IMAGE_TOKEN)[0])


def _draw_explained(video: Video, rng: np.random.Generator) -> tuple[bool, bool]:
    """Whether a sample's answers are explained, and whether in text alone: drawn for those that have explanations."""
    if not any(expression.explanation for expression in video.expressions):
        return False, False
    text_only = bool(rng.random() < EXPLANATORY)
    return text_only or bool(rng.integers(2)), text_only


# Shapes of a batch's arrays, without data or tokenizer. prefix_len: see ExampleMaker.


def question_shapes(cfg: VirstConfig, batch: BatchConfig, prefix_len: int, is_image: bool) -> Shapes:
    """What QuestionMaker's examples have, with a leading axis B."""
    sizes, side = ExampleSizes.of(cfg, batch, is_image), cfg.vision.image_size
    clips = (batch.batch_size, sizes.clips, sizes.clip_frames, side, side, 3)
    return {"clips": (clips, np.uint8), **conversation_shapes(batch, prefix_len)}


def segmentation_shapes(cfg: VirstConfig, batch: BatchConfig, prefix_len: int, is_image: bool) -> Shapes:
    """What SegmentationMaker's examples have, with a leading axis B."""
    sizes, size = ExampleSizes.of(cfg, batch, is_image), cfg.sam2.image_size
    rows, conversations, used = batch.batch_size, batch.conversations, sizes.frames_used
    return question_shapes(cfg, batch, prefix_len, is_image) | {
        "seg_positions": ((rows, conversations, sizes.seg_tokens), np.int32),
        "frames": ((rows, sizes.seg_frames, size, size, 3), np.uint8),
        "targets": ((rows, conversations, used, size, size), np.bool_),
        "anchors": ((rows, sizes.anchors), np.int32),
        "frames_used": ((rows, used), np.int32),
        "used_valid": ((rows, used), np.bool_),
        "conversation_valid": ((rows, conversations), np.bool_),
    }


def conversation_shapes(batch: BatchConfig, prefix_len: int) -> Shapes:
    """What ConversationMaker.packed gives, with a leading axis B."""
    rows, packed = (batch.batch_size, batch.conversations), batch.packed_length
    positions = (batch.batch_size, 1, prefix_len + packed) if packed else (*rows, prefix_len + batch.text_length)
    shapes: Shapes = {
        "token_ids": (positions, np.int32),
        "visual_index": (positions, np.int32),
        "labels": (positions, np.int32),
        "mask": (positions, np.bool_),
    }
    return shapes | ({"places": ((*rows, batch.text_length), np.int32)} if packed else {})


def resized(frames: np.ndarray, size: int, resample: str) -> np.ndarray:
    """As transforms.resize_frames; frames of the right size are not copied."""
    return frames if frames.shape[1:3] == (size, size) else resize_frames(frames, size, resample)


def stack(examples: Sequence[Arrays]) -> Arrays:
    """Examples of one shape as a batch with a leading axis B."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
