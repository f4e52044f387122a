"""The table of batch kinds: how examples are made, what shapes they have, what is minimised and what it costs.

A kind is one entry of TASKS; everything that depends on it looks there. Another package adds its own with `register`,
as virst_jax/pretraining/tasks.py does.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from virst_jax.config import VirstConfig
from virst_jax.data import batches
from virst_jax.data.batches import BatchConfig, ExampleMaker, Shapes
from virst_jax.data.prompts import Tokenizer
from virst_jax.data.samples import Question
from virst_jax.errors import UserError
from virst_jax.profiling import flops
from virst_jax.profiling.flops import StepFlops, StepShape
from virst_jax.training.losses import Losses, TextBatch, VideoBatch, text_loss, video_losses
from virst_jax.types import PyTree

Batch = Any  # one of the tasks' batch classes, a pytree of arrays or ShapeDtypeStructs with a leading axis B


class LossFunction(Protocol):
    """The loss of one example: a batch without its leading axis. No dropout where `dropout_rng` is None."""

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
    """

    name: str
    maker: type[ExampleMaker]
    array_shapes: Callable[[VirstConfig, BatchConfig, int, bool], Shapes]
    batch: Callable[[Mapping[str, Any], int], Batch]
    loss: LossFunction
    count_flops: Callable[[VirstConfig, Batch, Iterable[str] | None], StepFlops]
    is_image: bool = False
    evaluated: bool = False

    @property
    def takes_questions(self) -> bool:
        """Whether samples are Questions, not Videos."""
        return self.maker.sample_type is Question

    def make_examples(self, cfg: VirstConfig, tokenizer: Tokenizer, batch: BatchConfig) -> ExampleMaker:
        """The maker of a batch's examples."""
        return self.maker(cfg, tokenizer, batch, is_image=self.is_image)

    def shapes(self, cfg: VirstConfig, batch: BatchConfig, prefix_len: int) -> Shapes:
        """Shape and dtype of a batch's arrays, without data or tokenizer."""
        return self.array_shapes(cfg, batch, prefix_len, self.is_image)


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


def visual_tokens(cfg: VirstConfig, batch: BatchConfig) -> int:
    """Visual tokens of an example."""
    return batches.ExampleSizes.of(cfg, batch, get_task(batch.kind).is_image).visual_tokens


# The core's kinds: videos and images that are segmented, and questions about both


def text_shape(batch: TextBatch) -> StepShape:
    """The sizes of a batch of conversations, with leading axis B."""
    videos, clips, clip_frames = batch.clips.shape[:3]
    _, conversations, length = batch.token_ids.shape
    return StepShape(videos, clips, clip_frames, conversations, length, batch.prefix_len)


def video_shape(batch: VideoBatch) -> StepShape:
    """The sizes of a batch that is segmented, with leading axis B."""
    text = text_shape(batch)
    return StepShape(
        *(text.videos, text.clips, text.clip_frames, text.conversations, text.length, text.prefix_len),
        frames=batch.frames.shape[1],
        used=batch.frames_used.shape[1],
        anchors=batch.anchors.shape[1],
        seg_tokens=batch.seg_positions.shape[2],
    )


register(
    *for_both(
        "video",
        "image",
        maker=batches.SegmentationMaker,
        array_shapes=batches.segmentation_shapes,
        batch=lambda arrays, prefix_len: VideoBatch(**arrays, prefix_len=prefix_len),
        loss=video_losses,
        count_flops=lambda cfg, batch, trained: flops.step_flops(cfg, video_shape(batch), trained),
        evaluated=True,
    ),
    *for_both(
        "video_text",
        "image_text",
        maker=batches.QuestionMaker,
        array_shapes=batches.question_shapes,
        batch=lambda arrays, prefix_len: TextBatch(**arrays, prefix_len=prefix_len),
        loss=text_loss,
        count_flops=lambda cfg, batch, trained: flops.step_flops(cfg, text_shape(batch), trained),
    ),
)
