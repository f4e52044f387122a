"""The table of batch kinds: how examples are made, what shapes they have, what is minimised and what it costs.

A kind is one entry of TASKS; everything that depends on it looks there. Another package adds its own with `register`,
as virst_jax/pretraining/tasks.py does.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from virst_jax.config import TrackerConfig, VirstConfig
from virst_jax.data import batches, prompted
from virst_jax.data.batches import BatchConfig, ConversationMaker, ExampleMaker, Shapes
from virst_jax.data.prompts import Tokenizer
from virst_jax.data.samples import Question
from virst_jax.errors import UserError
from virst_jax.profiling import flops
from virst_jax.profiling.flops import StepFlops, StepShape
from virst_jax.training.losses import Conversations, Losses, TextBatch, VideoBatch, text_parts, video_parts
from virst_jax.training.prompted import PromptedBatch, prompted_loss
from virst_jax.types import PyTree

Batch = Any  # one of the tasks' batch classes, a pytree of arrays or ShapeDtypeStructs with a leading axis B


class LossFunction(Protocol):
    """The loss of one example: a batch without its leading axis. No dropout where `dropout_rng` is None.

    It may be unfinished: see losses.finish.
    """

    def __call__(
        self, cfg: VirstConfig, params: PyTree, batch: Any, dropout_rng: jax.Array | None = None, /
    ) -> Losses: ...


@dataclass(frozen=True)
class Task:
    """A kind of batch.

    maker: the ExampleMaker of its samples.
    array_shapes: network, batch, prefix_len (see ExampleMaker) and is_image -> shape and dtype of a batch's arrays.
    batch: arrays by name and prefix_len -> a batch.
    loss: of one example.
    count_flops: network, batch and paths of the trained parameters (None: all) -> operations of a step.
    is_image: whether samples are still images.
    evaluated: whether J&F on held-out videos tells how training goes.
    needs_language: whether it needs more than the tracker; a tracker alone is trained by the others only.
    """

    name: str
    maker: type[ExampleMaker]
    array_shapes: Callable[[VirstConfig, BatchConfig, int, bool], Shapes]
    batch: Callable[[Mapping[str, Any], int], Batch]
    loss: LossFunction
    count_flops: Callable[[VirstConfig, Batch, Iterable[str] | None], StepFlops]
    is_image: bool = False
    evaluated: bool = False
    needs_language: bool = True

    @property
    def takes_questions(self) -> bool:
        """Whether samples are Questions, not Videos."""
        return self.maker.sample_type is Question

    def make_examples(self, cfg: VirstConfig, tokenizer: Tokenizer, batch: BatchConfig) -> ExampleMaker:
        """The maker of a batch's examples.

        Raises:
          UserError: settings that this kind does not take.
        """
        self._check(batch)
        return self.maker(cfg, tokenizer, batch, is_image=self.is_image)

    def shapes(self, cfg: VirstConfig, batch: BatchConfig, prefix_len: int) -> Shapes:
        """Shape and dtype of a batch's arrays, without data or tokenizer.

        Raises:
          UserError: settings that this kind does not take.
        """
        self._check(batch)
        return self.array_shapes(cfg, batch, prefix_len, self.is_image)

    def _check(self, batch: BatchConfig) -> None:
        if batch.packed_length and not issubclass(self.maker, ConversationMaker):
            raise UserError(f"batches of kind {self.name!r} have no conversations to pack: leave packed_length at 0")


TASKS: dict[str, Task] = {}


def register(*tasks: Task) -> None:
    """Adds kinds of batch to the table.

    Raises:
      ValueError: a name is taken by another task.
    """
    for task in tasks:
        if TASKS.setdefault(task.name, task) != task:
            raise ValueError(f"a kind of batch {task.name!r} is registered already")


def for_both(video: str, image: str, **values: Any) -> tuple[Task, Task]:
    """A kind of batch of videos, and the same kind of still images: two tasks that differ in name and `is_image`."""
    return Task(name=video, is_image=False, **values), Task(name=image, is_image=True, **values)


def get_task(name: str) -> Task:
    """A kind of batch by its name.

    Raises:
      UserError: the name is unknown.
    """
    if name not in TASKS:
        raise UserError(f"unknown kind of batch {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def check_kind(cfg: VirstConfig, name: str) -> None:
    """Raises UserError: an unknown kind of batch, or one that a tracker alone cannot be trained with."""
    if get_task(name).needs_language and isinstance(cfg, TrackerConfig):
        others = ", ".join(task.name for task in TASKS.values() if not task.needs_language)
        raise UserError(
            f"batches of kind {name!r} need a language model, and the model to start from is SAM 2.1 alone: "
            f"take {others}, or start from a VIRST model"
        )


def visual_tokens(cfg: VirstConfig, batch: BatchConfig) -> int:
    """Visual tokens of an example."""
    return batches.ExampleSizes.of(cfg, batch, get_task(batch.kind).is_image).visual_tokens


# The core's kinds: videos and images that are segmented, questions about both, and objects that are pointed at


def conversations_shape(batch: Conversations, clips: int, clip_frames: int) -> StepShape:
    """The sizes of conversations about so many clips, with leading axis B."""
    videos, conversations, length = batch.token_ids.shape
    packed = 0
    if batch.places is not None:
        packed = length - batch.prefix_len
        conversations, own = batch.places.shape[1:]
        length = batch.prefix_len + own
    return StepShape(videos, clips, clip_frames, conversations, length, batch.prefix_len, packed=packed)


def text_shape(batch: TextBatch) -> StepShape:
    """The sizes of a batch of conversations, with leading axis B."""
    return conversations_shape(batch, *batch.clips.shape[1:3])


def video_shape(batch: VideoBatch) -> StepShape:
    """The sizes of a batch that is segmented, with leading axis B."""
    return dataclasses.replace(
        text_shape(batch),
        frames=batch.frames.shape[1],
        used=batch.frames_used.shape[1],
        anchors=batch.anchors.shape[1],
        seg_tokens=batch.seg_positions.shape[2],
    )


def prompted_flops(cfg: VirstConfig, batch: PromptedBatch, trained: Iterable[str] | None = None) -> StepFlops:
    """Operations of a step with a PromptedBatch; arguments as of flops.StepCount.

    Every frame is tracked and corrected: of those that need not be the outcome is thrown away.
    """
    videos, frames = batch.frames.shape[:2]
    objects, firsts, steps = batch.targets.shape[1], batch.first.shape[1], batch.from_truth.shape[2]
    return flops.prompted_flops(
        flops.StepCount(cfg, videos, trained),
        flops.PromptedShape(objects, frames, firsts, firsts + batch.corrected.shape[1], steps),
    )


register(
    *for_both(
        "video",
        "image",
        maker=batches.SegmentationMaker,
        array_shapes=batches.segmentation_shapes,
        batch=lambda arrays, prefix_len: VideoBatch(**arrays, prefix_len=prefix_len),
        loss=video_parts,
        count_flops=lambda cfg, batch, trained: flops.step_flops(cfg, video_shape(batch), trained),
        evaluated=True,
    ),
    *for_both(
        "video_text",
        "image_text",
        maker=batches.QuestionMaker,
        array_shapes=batches.question_shapes,
        batch=lambda arrays, prefix_len: TextBatch(**arrays, prefix_len=prefix_len),
        loss=text_parts,
        count_flops=lambda cfg, batch, trained: flops.step_flops(cfg, text_shape(batch), trained),
    ),
    *for_both(
        "video_prompted",
        "image_prompted",
        maker=prompted.PromptedMaker,
        array_shapes=prompted.prompted_shapes,
        batch=lambda arrays, prefix_len: PromptedBatch(**arrays),
        loss=prompted_loss,
        count_flops=prompted_flops,
        needs_language=False,
    ),
)
