"""Steps of the tracker alone: `TrackerSteps`, functions of its parameters, and `TrackerNetwork`, which compiles them.

Axes: O objects, T frames, A anchor slots, N slots of clicks, R side of the tracker's image, L mask side, I, J tile.
"""

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import Compute, Sam2Config
from virst_jax.data.transforms import MEAN, STD
from virst_jax.inference.compiled import Compiled, Context
from virst_jax.inference.resizing import HOST, Pixels, make_resizer, stack_frames
from virst_jax.models.sam2.prompted import ObjectAnchors, ObjectBank, PromptedTracker, PromptTokens
from virst_jax.models.sam2.sam2 import Features, Sam2
from virst_jax.models.sam2.tracker import Tracked
from virst_jax.types import PyTree

Scale = Sequence[np.ndarray | jax.Array]  # float32[] and twice float32[3]: divisor, mean and deviation of pixels
# anchors, memories, number of the frame, direction, frames of the video; see PromptedTracker.propagate
Past = tuple[ObjectAnchors, ObjectBank, jax.Array, jax.Array, jax.Array]

SCALE: Scale = (np.array(255, np.float32), MEAN, STD)  # of 8-bit pixels
UNIT_SCALE: Scale = (np.ones((), np.float32), np.zeros(3, np.float32), np.ones(3, np.float32))  # of normalised ones


class TrackerSteps:
    """The steps as functions: parameters of `Sam2` first (None for `resize_masks`), then arrays."""

    def __init__(self, cfg: Sam2Config, compute: Compute, memory_dtype: str = "bfloat16"):
        self.sam = Sam2(cfg, compute)
        self.prompted = PromptedTracker(self.sam, memory_dtype)

    def encode_batch(self, params: PyTree, pixels: jax.Array, scale: Scale) -> tuple[Features, ...]:
        """Frames number[T, R, R, 3] -> the features of each."""
        pixels = normalize(pixels, scale)
        features = self.sam.apply({"params": params}, pixels, method=Sam2.encode_image)
        return tuple(jax.tree.map(lambda x, i=i: x[i], features) for i in range(pixels.shape[0]))

    def prompt_objects(
        self,
        params: PyTree,
        frame: Features,
        tokens: PromptTokens,
        mask_prompt: jax.Array,
        has_mask_prompt: jax.Array,
        past: Past | None,
    ) -> Tracked:
        """See PromptedTracker.prompt."""
        return self.prompted.prompt(params, frame, tokens, mask_prompt, has_mask_prompt, past)

    def use_masks(self, params: PyTree, frame: Features, masks: jax.Array) -> Tracked:
        """See PromptedTracker.use_mask."""
        return self.prompted.use_mask(params, frame, masks)

    def every_mask(self, params: PyTree, frame: Features, points: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See PromptedTracker.every_mask."""
        return self.prompted.every_mask(params, frame, points)

    def measure_masks(
        self, params: None, logits: jax.Array, index: jax.Array, rows: jax.Array, columns: jax.Array, offset: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A tile of some masks, and how many of its pixels lie above +offset and above -offset.

        Args:
          logits: float32[O, M, L, L].
          index: int32[K, 2], which of them.
          rows, columns: of `tiles.MaskTiles`.

        Returns:
          Packed masks uint8[K, I, J / 8], int32[K] and int32[K].
        """
        chosen = logits[index[:, 0], index[:, 1]]
        tile = jnp.einsum("ih,khw,jw->kij", rows, chosen, columns, precision=jax.lax.Precision.HIGHEST)
        there = rows.any(1)[:, None] & columns.any(1)  # the others lie beyond the image's edge
        inner, outer = (((tile > edge) & there).sum((-2, -1)) for edge in (offset, -offset))
        return jnp.packbits(tile > 0, axis=-1), inner, outer

    def propagate(
        self,
        params: PyTree,
        anchors: ObjectAnchors,
        bank: ObjectBank,
        features: Sequence[Features],
        frames: jax.Array,
        valid: jax.Array,
        sign: jax.Array,
        num_frames: jax.Array,
    ) -> tuple[ObjectBank, Tracked]:
        """See PromptedTracker.propagate; the features of each frame apart."""
        return self.prompted.propagate(params, anchors, bank, stack(features), frames, valid, sign, num_frames)

    def resize_masks(
        self, params: None, low_res: jax.Array, rows: jax.Array, columns: jax.Array, exclusive: bool = False
    ) -> jax.Array:
        """A tile of masks, packed: float32[..., L, L], float32[I, L], float32[J, L] -> uint8[..., I, J / 8].

        exclusive: a pixel belongs to the one object with the largest logit (axis -3), if to any.
        """
        # as ops.resize.resize_maps, and at the same precision
        logits = jnp.einsum("ih,...hw,jw->...ij", rows, low_res, columns, precision=jax.lax.Precision.HIGHEST)
        masks = logits > 0
        if exclusive:
            largest = logits.argmax(-3)
            masks &= jnp.arange(logits.shape[-3])[:, None, None] == largest[..., None, :, :]
        return jnp.packbits(masks, axis=-1)

    def soften_masks(self, params: None, low_res: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """A tile of probabilities: float32[..., L, L], float32[I, L], float32[J, L] -> uint8[..., I, J] of 0 to 255."""
        logits = jnp.einsum("ih,...hw,jw->...ij", rows, low_res, columns, precision=jax.lax.Precision.HIGHEST)
        return jnp.round(255 * jax.nn.sigmoid(logits)).astype(jnp.uint8)


class TrackerNetwork(Compiled):
    """The compiled steps of SAM 2.1 for one set of parameters.

    Args:
      steps: of the network.
      params: of `Sam2`.
      context: entered around every step, such as a mesh.
      resize: where frames are resized, "host" or "device".

    Attributes:
      resize: makes of a frame uint8[H, W, 3] the image uint8[S, S, 3] that a network reads; see `resizing.Resize`.
    """

    def __init__(
        self, steps: TrackerSteps, params: PyTree, context: Context = contextlib.nullcontext, resize: str = HOST
    ):
        super().__init__(context)
        self.tracker_steps, self.params = steps, params
        self.resize = make_resizer(resize, context)

    @property
    def tracker_params(self) -> PyTree:
        """Of `Sam2`; those of a whole network hold others beside them."""
        return self.params

    @property
    def tracker_cfg(self) -> Sam2Config:
        """Of SAM 2.1."""
        return self.tracker_steps.sam.cfg

    def encode_batch(self, frames: Sequence[Pixels] | np.ndarray, batch: int, scale: Scale = SCALE) -> list[Features]:
        """Frames uint8[R, R, 3], at most `batch`, to which they are padded -> the features of each."""
        count = len(frames)
        padded = [*frames, *[frames[-1]] * (batch - count)]
        on_host = [frame for frame in padded if isinstance(frame, np.ndarray)]
        pixels = np.stack(on_host) if len(on_host) == batch else self._run(stack_frames, None, tuple(padded))
        return list(self._run(self.tracker_steps.encode_batch, self.tracker_params, pixels, scale)[:count])

    def prompt_objects(
        self,
        frame: Features,
        tokens: PromptTokens,
        mask_prompt: np.ndarray,
        has_mask_prompt: bool,
        past: Past | None = None,
    ) -> Tracked:
        """Segments objects on one frame from clicks and boxes; see PromptedTracker.prompt."""
        given = np.bool_(has_mask_prompt)
        step = self.tracker_steps.prompt_objects
        tracked: Tracked = self._run(step, self.tracker_params, frame, tokens, mask_prompt, given, past)
        return tracked

    def use_masks(self, frame: Features, masks: np.ndarray) -> Tracked:
        """Takes given masks float32[O, R, R] of 0 and 1 for the outcome of a frame."""
        tracked: Tracked = self._run(self.tracker_steps.use_masks, self.tracker_params, frame, masks)
        return tracked

    def every_mask(self, frame: Features, points: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """The masks of single clicks; see PromptedTracker.every_mask."""
        logits, ious = self._run(self.tracker_steps.every_mask, self.tracker_params, frame, points)
        return logits, ious

    def measure_masks(
        self, logits: jax.Array, index: np.ndarray, rows: jax.Array, columns: jax.Array, offset: float
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See TrackerSteps.measure_masks."""
        step = self.tracker_steps.measure_masks
        packed, inner, outer = self._run(step, None, logits, index, rows, columns, np.float32(offset))
        return packed, inner, outer

    def propagate(
        self,
        anchors: ObjectAnchors,
        bank: ObjectBank,
        features: Sequence[Features],
        frames: Sequence[int],
        sign: int,
        num_frames: int,
        chunk: int,
    ) -> tuple[ObjectBank, Tracked]:
        """Tracks objects through consecutive frames, at most `chunk`; see PromptedTracker.propagate.

        Returns:
          The memories behind them, and the outcome of `chunk` frames, of which those behind the last mean nothing.
        """
        count = len(frames)
        padding = chunk - count
        bank, out = self._run(
            self.tracker_steps.propagate,
            self.tracker_params,
            anchors,
            bank,
            (*features, *[features[-1]] * padding),
            np.pad(np.asarray(frames, np.int32), (0, padding)),
            np.arange(chunk) < count,
            np.int32(sign),
            np.int32(num_frames),
        )
        return bank, out

    def resize_masks(
        self, low_res: jax.Array, rows: jax.Array, columns: jax.Array, *, exclusive: bool = False
    ) -> jax.Array:
        """A tile of masks, packed: float32[..., L, L] and two matrices of `tiles.MaskTiles` -> uint8[..., I, J / 8]."""
        step = self.tracker_steps.resize_masks
        packed: jax.Array = self._run(step, None, low_res, rows, columns, exclusive=exclusive)
        return packed

    def soften_masks(self, low_res: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """A tile of probabilities: float32[..., L, L] and two matrices of `tiles.MaskTiles` -> uint8[..., I, J]."""
        soft: jax.Array = self._run(self.tracker_steps.soften_masks, None, low_res, rows, columns)
        return soft


def stack(features: Sequence[Features]) -> Features:
    """Features of single frames with a leading axis T."""
    stacked: Features = jax.tree.map(lambda *x: jnp.stack(x), *features)
    return stacked


def normalize(pixels: jax.Array, scale: Scale) -> jax.Array:
    """Pixels as the networks read them, float32."""
    # the constants are arguments: a compiler may replace the division by a constant by a rounded product
    return (pixels.astype(jnp.float32) / scale[0] - scale[1]) / scale[2]
