"""SAM 2.1 as one module with a method for every step that the tracker takes.

Axes: T frames, B objects, N prompt tokens, H, W feature grid, S = H*W, C width, D memory width, L mask side (4H).
Source: model/sam2/modeling/sam2_base.py, model/sam2/sam2_virst.py.
"""

from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from virst_jax.config import Compute, Sam2Config
from virst_jax.models.layers import Mlp, conv, dense, with_axes
from virst_jax.models.sam2.hiera import ImageEncoder
from virst_jax.models.sam2.mask_decoder import MaskDecoder, Masks, best_mask, multimask, single_mask
from virst_jax.models.sam2.memory import MemoryAttention, MemoryEncoder
from virst_jax.models.sam2.prompt_encoder import PromptEncoder
from virst_jax.ops.position import sine_1d, sine_2d
from virst_jax.ops.resize import resize_maps

NO_OBJECT_LOGIT = -1024.0
PYRAMID = "pyramid"  # of jax.checkpoint_policies: the image encoder's maps


@flax.struct.dataclass
class Features:
    """What the image encoder gives for frames; leading axis T, or none for a single frame."""

    high0: jax.Array  # dtype[T, 4H, 4W, C/8]
    high1: jax.Array  # dtype[T, 2H, 2W, C/4]
    top: jax.Array  # dtype[T, H, W, C]


@flax.struct.dataclass
class Prediction:
    """The chosen mask of every object on one frame."""

    low_res: jax.Array  # float32[B, L, L], logits; all -1024 where the object is absent
    pointer: jax.Array  # dtype[B, C]
    object_score: jax.Array  # float32[B], logit
    iou: jax.Array  # float32[B], predicted


class Sam2(nn.Module):
    cfg: Sam2Config
    compute: Compute

    def setup(self) -> None:
        cfg, compute, width = self.cfg, self.compute, self.cfg.hidden_size
        dtype = jnp.dtype(compute.param_dtype)
        small = nn.initializers.truncated_normal(0.02)
        self.image_encoder = ImageEncoder(cfg, compute)
        self.prompt_encoder = PromptEncoder(cfg, compute)
        self.mask_decoder = MaskDecoder(cfg, compute)
        self.memory_attention = MemoryAttention(cfg, compute)
        self.memory_encoder = MemoryEncoder(cfg, compute)
        # the release keeps these two within the decoder, but applies them once a frame
        self.high_res0 = conv(compute, width // 8, 1)
        self.high_res1 = conv(compute, width // 4, 1)
        self.pointer_proj = Mlp(compute, (width, width, width))
        self.pointer_time_proj = dense(compute, cfg.memory_dim, ("embed", "heads"))
        self.mask_downsample = conv(compute, 1, 4, stride=4)
        self.time_embed = self.param(
            "time_embed", with_axes(small, "token", "embed"), (cfg.num_maskmem, cfg.memory_dim), dtype
        )
        self.no_memory_embed = self.param("no_memory_embed", with_axes(small, "embed"), (width,), dtype)
        # unused by this configuration, kept because checkpoints hold it
        self.no_memory_position = self.param("no_memory_position", with_axes(small, "embed"), (width,), dtype)
        self.no_object_pointer = self.param("no_object_pointer", with_axes(small, "embed"), (width,), dtype)
        self.no_object_memory = self.param("no_object_memory", with_axes(small, "embed"), (cfg.memory_dim,), dtype)

    def encode_image(self, pixels: jax.Array) -> Features:
        """Normalised pixels float[T, R, R, 3] -> features of T frames."""
        # named, so that a backward pass that starts here need not run the encoder again
        return self.refine([checkpoint_name(x, PYRAMID) for x in self.image_encoder(pixels)])

    def refine(self, maps: Sequence[jax.Array]) -> Features:
        """The image encoder's maps dtype[T, H, W, C], the finest first -> features of T frames."""
        high0, high1, top = maps
        return Features(self.high_res0(high0), self.high_res1(high1), top)

    def image_position(self) -> jax.Array:
        """Sine position encoding float32[S, C] of the top feature map."""
        size = self.cfg.feature_size
        return jnp.asarray(sine_2d(size, size, self.cfg.hidden_size).reshape(size * size, -1))

    def without_memory(self, frame: Features, batch: int) -> jax.Array:
        """The features of one frame for objects that have no memory: dtype[B, H, W, C]."""
        x = frame.top + self.no_memory_embed.astype(frame.top.dtype)
        return jnp.broadcast_to(x, (batch, *x.shape))

    def with_memory(
        self,
        frame: Features,
        memory: jax.Array,
        memory_age: jax.Array,
        memory_mask: jax.Array,
        pointers: jax.Array,
        pointer_time: jax.Array,
        pointer_mask: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """The features of one frame conditioned on memories and object pointers.

        Args:
          frame: features of one frame.
          memory: [B, F, S, D], any float type.
          memory_age: int[F] or int[B, F], index of the temporal code: frames ago less one, the last code for anchors.
          memory_mask: bool[F] or bool[B, F], which memories exist.
          pointers: [B, P, C].
          pointer_time: float32[P] or float32[B, P], signed distance in frames over the largest one.
          pointer_mask: bool[P] or bool[B, P].
          deterministic: False: with dropout, which draws from the "dropout" rng.

        Returns:
          dtype[B, H, W, C].
        """
        cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
        batch, _, positions, _ = memory.shape
        split = cfg.hidden_size // cfg.memory_dim  # a pointer makes so many tokens
        space = jnp.asarray(sine_2d(cfg.feature_size, cfg.feature_size, cfg.memory_dim), jnp.float32)
        space = space.reshape(positions, -1) + self.time_embed[memory_age][..., None, :].astype(jnp.float32)
        time = self.pointer_time_proj(sine_1d(pointer_time, cfg.hidden_size))
        keys = jnp.concatenate(
            [
                rearrange(memory, "b f s d -> b (f s) d").astype(dtype),
                rearrange(pointers, "b p (n d) -> b (p n) d", n=split).astype(dtype),
            ],
            axis=1,
        )
        space = rearrange(space, "... f s d -> ... (f s) d").astype(dtype)
        keys_pos = jnp.concatenate([space, jnp.repeat(time, split, -2)], axis=-2)
        key_mask = jnp.concatenate([jnp.repeat(memory_mask, positions, -1), jnp.repeat(pointer_mask, split, -1)], -1)
        image = rearrange(frame.top, "h w c -> 1 (h w) c")
        out = self.memory_attention(
            jnp.broadcast_to(image, (batch, *image.shape[1:])),
            self.image_position(),
            keys,
            jnp.broadcast_to(keys_pos, keys.shape),
            jnp.broadcast_to(key_mask, keys.shape[:2]),
            pointers.shape[1] * split,
            deterministic,
        )
        return rearrange(out, "b (h w) c -> b h w c", h=cfg.feature_size)

    def predict(
        self,
        image: jax.Array,
        frame: Features,
        sparse: jax.Array,
        mask_prompt: jax.Array | None = None,
        has_mask_prompt: jax.Array | None = None,
        *,
        mode: str = "multimask",
        sparse_mask: jax.Array | None = None,
        ambiguous: jax.Array | None = None,
    ) -> Prediction:
        """Decodes the masks of one frame and chooses one for every object: `decode`, then `choose`."""
        masks = self.decode(image, frame, sparse, mask_prompt, has_mask_prompt, sparse_mask)
        return self.choose(masks, mode=mode, ambiguous=ambiguous)

    def decode(
        self,
        image: jax.Array,
        frame: Features,
        sparse: jax.Array,
        mask_prompt: jax.Array | None = None,
        has_mask_prompt: jax.Array | None = None,
        sparse_mask: jax.Array | None = None,
    ) -> Masks:
        """All masks of one frame.

        Args:
          image: dtype[B, H, W, C] from `with_memory` or `without_memory`.
          frame: features of the frame.
          sparse: dtype[B, N, C], prompt tokens.
          mask_prompt: float32[B, L, L], logits.
          has_mask_prompt: bool[], whether the mask prompt counts; None: it does where it is given.
          sparse_mask: bool[B, N], which prompt tokens exist; None: all.
        """
        dense_prompt = self.prompt_encoder.no_mask(image.shape[0])
        if mask_prompt is not None:
            prompted = self.prompt_encoder.masks(mask_prompt)
            dense_prompt = prompted if has_mask_prompt is None else jnp.where(has_mask_prompt, prompted, dense_prompt)
        masks: Masks = self.mask_decoder(
            image,
            self.prompt_encoder.dense_position(),
            sparse,
            dense_prompt,
            (frame.high0[None], frame.high1[None]),
            sparse_mask,
        )
        return masks

    def choose(
        self, masks: Masks, *, mode: str = "multimask", ambiguous: jax.Array | None = None, clear: str = "stable"
    ) -> Prediction:
        """One of the decoded masks for every object.

        Args:
          mode: "multimask": the best of three by predicted IoU, as the release evaluates; "single": the first, as
            it trains; "stable": the first unless it is unstable, SAM 2's fallback.
          ambiguous: bool[B], takes the place of `mode`: "multimask" where it is True, elsewhere `clear`.
          clear: "stable" as at inference, or "single" as in training.
        """
        choose = {
            "multimask": lambda: best_mask(multimask(masks)),
            "single": lambda: single_mask(masks),
            "stable": lambda: single_mask(masks, self.cfg),
        }
        if ambiguous is None:
            chosen = choose[mode]()
        else:
            several, one = choose["multimask"](), choose[clear]()
            pick = lambda a, b: jnp.where(ambiguous.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
            chosen = jax.tree.map(pick, several, one)
        present = chosen.object_score > 0
        pointer = self.pointer_proj(chosen.tokens[:, 0])
        return Prediction(
            low_res=jnp.where(present[..., None], chosen.logits[:, 0], NO_OBJECT_LOGIT),
            pointer=jnp.where(present, pointer, self.no_object_pointer.astype(pointer.dtype)),
            object_score=chosen.object_score[:, 0],
            iou=chosen.ious[:, 0],
        )

    def high_res(self, low_res: jax.Array) -> jax.Array:
        """Mask logits float32[B, L, L] at the model's image size."""
        return resize_maps(low_res, (self.cfg.image_size, self.cfg.image_size))

    def encode_memory(self, frame: Features, prediction: Prediction, binary: bool = False) -> jax.Array:
        """Encodes a prediction into a memory dtype[B, S, D].

        binary: from the mask that a person has seen, of 0 and 1, as SAM 2 does on frames with clicks or a given mask;
        otherwise from the logits.
        """
        cfg, logits = self.cfg, self.high_res(prediction.low_res)
        share = (logits > 0).astype(logits.dtype) if binary else nn.sigmoid(logits)
        mask = share * cfg.mem_sigmoid_scale + cfg.mem_sigmoid_bias
        memory = self.memory_encoder(frame.top[None], mask)
        absent = (prediction.object_score <= 0)[:, None, None, None]
        memory = memory + jnp.where(absent, self.no_object_memory.astype(memory.dtype), 0)
        return rearrange(memory, "b h w d -> b (h w) d")

    def embed_points(self, coords: jax.Array, labels: jax.Array) -> jax.Array:
        """Point prompts as prompt tokens; see PromptEncoder.points."""
        return self.prompt_encoder.points(coords, labels)

    def embed_boxes(self, boxes: jax.Array) -> jax.Array:
        """Box prompts as prompt tokens; see PromptEncoder.boxes."""
        return self.prompt_encoder.boxes(boxes)

    def no_prompt(self, batch: int) -> jax.Array:
        """Prompt tokens of a frame without prompts; see PromptEncoder.no_points."""
        return self.prompt_encoder.no_points(batch)

    def use_mask(self, frame: Features, mask: jax.Array) -> Prediction:
        """Takes a given mask float32[B, R, R] of 0 and 1 for the prediction; only the pointer is computed.

        Source: sam2_base.py, _use_mask_as_output.
        """
        cfg = self.cfg
        scaled = mask * 20.0 - 10.0
        prompt = self.mask_downsample(mask[..., None])[..., 0]
        image = jnp.broadcast_to(frame.top, (mask.shape[0], *frame.top.shape))
        decoded = self.predict(image, frame, self.no_prompt(mask.shape[0]), prompt, mode="stable")
        present = (mask > 0).any((-2, -1))
        pointer = jnp.where(present[:, None], decoded.pointer, self.no_object_pointer.astype(decoded.pointer.dtype))
        return Prediction(
            low_res=resize_maps(scaled, (cfg.low_res_size, cfg.low_res_size), "antialias"),
            pointer=pointer,
            object_score=jnp.where(present, 10.0, -10.0),
            iou=jnp.ones(mask.shape[0]),
        )

    def __call__(self, pixels: jax.Array) -> Prediction:
        """Runs every part once on one frame, pixels float[R, R, 3]: what `init` traces."""
        cfg = self.cfg
        features = self.encode_image(pixels[None])
        frame = jax.tree.map(lambda x: x[0], features)
        mask = jnp.zeros((1, cfg.image_size, cfg.image_size))
        prediction = self.use_mask(frame, mask)
        image = self.with_memory(
            frame,
            self.encode_memory(frame, prediction)[:, None],
            jnp.zeros(1, int),
            jnp.ones(1, bool),
            prediction.pointer[:, None],
            jnp.zeros(1),
            jnp.ones(1, bool),
        )
        return self.predict(image + self.without_memory(frame, 1), frame, self.embed_boxes(jnp.zeros((1, 4))))
