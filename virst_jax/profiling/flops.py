"""Floating-point operations of a training step by formula, and what devices can do.

A product of an m x k and a k x n matrix is 2 m k n operations; only products and convolutions are counted. Attention
counts the whole matrix, causal or not.
"""

import functools
import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from virst_jax.config import FRAME_BY_FRAME, FusionConfig, QwenConfig, Sam2Config, VirstConfig, VisionConfig
from virst_jax.models.sam2.hiera import block_specs
from virst_jax.ops.cross_entropy import piece_size
from virst_jax.ops.token_merge import merge_schedule

# Forward passes of single parts


def video_encoder(cfg: VisionConfig, frames: int) -> float:
    """One clip of `frames` frames."""
    tokens, width = frames * cfg.grid**2, cfg.hidden_size
    layer = 2 * tokens * width * width * (4 + 2 * cfg.mlp_ratio) + 4 * tokens**2 * width
    return 2 * tokens * 3 * cfg.patch_size**2 * width + cfg.num_layers * layer


def projector(cfg: VisionConfig, features: int, frames: int, merge: bool = True) -> float:
    """One clip of `frames` frames: similarities of token merging (or none is merged), two linear layers."""
    tokens = frames * cfg.grid**2
    target = cfg.tokens_per_image if frames == 1 else cfg.tokens_per_frame * frames
    merging = 0.0
    if not merge:
        target = tokens
    if tokens > target:
        left = tokens
        for removed in merge_schedule(tokens, target):
            merging += 2 * math.ceil(left / 2) * (left // 2) * (cfg.hidden_size // cfg.num_heads)
            left -= removed
    tokens = min(tokens, target)
    return merging + 2 * tokens * features * (cfg.hidden_size + features)


def llm_weights(cfg: QwenConfig) -> float:
    """One token through the matrices of all layers, without adapters."""
    width, heads, kv = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    return cfg.num_layers * 2 * width * (2 * heads + 2 * kv + 3 * cfg.intermediate_size)


def llm_adapters(cfg: QwenConfig) -> float:
    """One token through the adapters of all layers."""
    width, heads, kv = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    ends = 2 * (width + heads) + 2 * (width + kv) + 3 * (width + cfg.intermediate_size)
    return cfg.num_layers * 2 * cfg.lora.rank * ends


def llm_attention(cfg: QwenConfig, queries: int, keys: int) -> float:
    """One row of `queries` tokens that attend to `keys` tokens, all layers."""
    return cfg.num_layers * 4 * queries * keys * cfg.num_heads * cfg.head_dim


def lm_head(cfg: QwenConfig) -> float:
    """One token."""
    return 2 * cfg.hidden_size * cfg.vocab_size


def _spatial_reduce(cfg: Sam2Config, frames: int) -> float:
    sides = (cfg.feature_size // 2, cfg.feature_size // 4, cfg.feature_size // 8)
    return frames * sum(2 * 9 * cfg.hidden_size**2 * side**2 for side in sides)


def initial_fusion(sam: Sam2Config, features: int, seg_tokens: int, frames: int, rows: int = 1) -> float:
    """All conversations (rows) of a video; `features` is the width of the language model."""
    keys, width = frames * (sam.feature_size // 8) ** 2, features
    attention = 2 * width**2 * (2 * seg_tokens + 2 * keys) + 4 * seg_tokens * keys * width
    return _spatial_reduce(sam, frames) + 2 * keys * sam.hidden_size * width + rows * attention


def second_fusion(
    cfg: FusionConfig, sam: Sam2Config, features: int, seg_tokens: int, frames: int, rows: int = 1
) -> float:
    """All conversations (rows) of a video."""
    keys, width, queries = frames * (sam.feature_size // 8) ** 2, sam.hidden_size, seg_tokens * frames
    self_attention = 8 * queries * width**2 + 4 * queries**2 * width
    cross_attention = 4 * (queries + keys) * width**2 + 4 * queries * keys * width
    layer = self_attention + cross_attention + 16 * queries * width**2
    return _spatial_reduce(sam, frames) + rows * (2 * seg_tokens * features * width + cfg.num_layers * layer)


def image_encoder(cfg: Sam2Config) -> float:
    """One frame: Hiera, its pyramid, the decoder's high-resolution projections."""
    hiera, side = cfg.hiera, cfg.image_size // 4
    total = 2.0 * 7 * 7 * 3 * hiera.embed_dim * side**2
    ends, sides = {sum(hiera.stages[: i + 1]) - 1 for i in range(len(hiera.stages))}, []
    for index, spec in enumerate(block_specs(hiera)):
        if spec.dim != spec.dim_out:
            total += 2 * side**2 * spec.dim * spec.dim_out
        window = spec.window or side
        padded = math.ceil(side / window) * window
        keys, shrink = window**2, 4 if spec.pool else 1
        total += 2 * padded**2 * spec.dim * 3 * spec.dim_out
        total += 4 * padded**2 / shrink * keys * spec.dim_out + 2 * padded**2 / shrink * spec.dim_out**2
        side = side // 2 if spec.pool else side
        total += 4 * side**2 * spec.dim_out**2 * hiera.mlp_ratio
        if index in ends:
            sides.append(side)
    width = cfg.hidden_size
    total += sum(2 * side**2 * dim * width for side, dim in zip(sides, hiera.stage_dims))
    return total + 2 * width**2 * (sides[0] ** 2 / 8 + sides[1] ** 2 / 4)


def _attended(cfg: Sam2Config, anchors: int) -> int:
    """Of so many anchors, those that a frame attends to."""
    return anchors if cfg.max_anchors_attended == -1 else min(anchors, cfg.max_anchors_attended)


def memories_seen(cfg: Sam2Config, frames: int, anchors: int) -> float:
    """Memories that a tracked frame of a training sample attends to, as the mean over all places of its anchors.

    Anchors that come later have no memory yet, except the first. Of other frames, those of the last num_maskmem - 1
    are remembered.

    Args:
      frames: of the sample, with its anchors; all have the same chance to be one.
      anchors: fewer than frames.
    """
    others, ring = frames - 1, cfg.num_maskmem - 1
    total = 0.0
    for number in range(frames):  # the tracked frame, and how many of the anchors lie before it
        for passed in range(min(number, anchors) + 1):
            chance = math.comb(number, passed) * math.comb(others - number, anchors - passed)
            total += chance / math.comb(others, anchors) * _attended(cfg, max(1, passed))
        total += min(ring, number) * (1 - anchors / others)
    return total / frames


def memory_attention(cfg: Sam2Config, anchors: int, memories: float | None = None) -> float:
    """One frame of one object, whose one head weighs memories before they are projected.

    memories: that are there, of anchors and other frames; None: as many as there can be.
    """
    size, width = cfg.feature_size**2, cfg.hidden_size
    attended = _attended(cfg, anchors)
    if memories is None:
        memories = attended + cfg.num_maskmem - 1
    keys = memories * size + (attended + cfg.max_pointers - 1) * (width // cfg.memory_dim)
    self_attention = 8 * size * width**2 + 4 * size**2 * width
    queries = 4 * size * width**2 + 2 * size * cfg.memory_dim * width
    cross_attention = queries + 2 * keys * cfg.memory_dim * width + 2 * size * keys * (width + cfg.memory_dim)
    return cfg.memory_layers * (self_attention + cross_attention + 4 * size * width * cfg.memory_mlp_dim)


def mask_decoder(cfg: Sam2Config, prompt_tokens: int) -> float:
    """One frame of one object."""
    size, width, masks = cfg.feature_size**2, cfg.hidden_size, 1 + cfg.num_multimask
    inner, tokens = width // 2, 2 + masks + prompt_tokens

    def narrow(queries: int, keys: int) -> float:
        return 4 * (queries + keys) * width * inner + 4 * queries * keys * inner

    block: float = 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * cfg.decoder_mlp_dim
    block += narrow(tokens, size) + narrow(size, tokens)
    upscale = 2 * size * width * width + 2 * 4 * size * (width // 4) * (width // 2)
    heads = masks * (4 * width**2 + 2 * width * (width // 8)) + 2 * masks * 16 * size * (width // 8)
    return cfg.decoder_layers * block + narrow(tokens, size) + upscale + heads


def mask_prompt(cfg: Sam2Config) -> float:
    """One mask of one object through the prompt encoder."""
    side, channels = cfg.low_res_size, cfg.mask_prompt_channels
    first = 2 * 4 * (channels // 4) * (side // 2) ** 2
    return (
        first
        + 2 * 4 * (channels // 4) * channels * (side // 4) ** 2
        + 2 * channels * cfg.hidden_size * (side // 4) ** 2
    )


def full_size_mask(cfg: Sam2Config) -> float:
    """One mask resized to the image."""
    return 2 * cfg.image_size * cfg.low_res_size**2 + 2 * cfg.image_size**2 * cfg.low_res_size


def memory_encoder(cfg: Sam2Config) -> float:
    """One frame of one object, the mask's resize included."""
    size, width = cfg.feature_size**2, cfg.hidden_size
    downsample = sum(2 * 9 * 4**i * 4 ** (i + 1) * (cfg.image_size // 2 ** (i + 1)) ** 2 for i in range(4))
    projections = 2 * size * 4**4 * width + 2 * size * width**2
    fuser = cfg.memory_fuser_layers * (2 * cfg.memory_kernel**2 * size * width + 16 * size * width**2)
    return full_size_mask(cfg) + downsample + projections + fuser + 2 * size * width * cfg.memory_dim


# A step


HEAD = "its head"  # the language model's, among the parts of a step


@dataclass(frozen=True)
class StepShape:
    """The sizes of a batch of conversations that decide its cost."""

    videos: int
    clips: int
    clip_frames: int
    conversations: int
    length: int
    prefix_len: int = 0
    frames: int = 0  # 0: text alone
    used: int = 0
    anchors: int = 0
    seg_tokens: int = 0
    packed: int = 0  # positions behind the prefix of all conversations together; 0: each has length - prefix_len

    @property
    def positions(self) -> int:
        """What the language model's products with weights run over, of one video."""
        return self.prefix_len + (self.packed or self.conversations * (self.length - self.prefix_len))


@dataclass(frozen=True)
class Part:
    forward: float
    backward: float = 0.0
    recomputed: float = 0.0  # by rematerialisation


@dataclass(frozen=True)
class StepFlops:
    """Operations of one step on all devices together, by part of the network."""

    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def forward(self) -> float:
        return sum(part.forward for part in self.parts.values())

    @property
    def model(self) -> float:
        """Forward and backward, what the mathematics needs: the numerator of MFU."""
        return sum(part.forward + part.backward for part in self.parts.values())

    def shared_by(self, devices: int, examples: int) -> "StepFlops":
        """The same step on devices with several examples each, which apply the head to the labels of all at once."""
        parts, share = dict(self.parts), min(1.0, devices / examples)
        if HEAD in parts:
            head = parts[HEAD]
            parts[HEAD] = Part(share * head.forward, share * head.backward, share * head.recomputed)
        return StepFlops(parts)


class StepCount:
    """Adds up a step's operations, part by part in the order of computation.

    Args:
      cfg: `compute.remat` decides what is computed twice.
      videos: of the batch.
      trained: paths of the trained parameters, such as llm/layers/attn/q_proj/lora_a; None: all are trained. A part
        whose parameters are frozen has gradients with respect to its inputs only, or none if nothing before it is
        trained.
    """

    def __init__(self, cfg: VirstConfig, videos: int, trained: Iterable[str] | None = None):
        self.cfg, self.videos = cfg, videos
        self.paths = None if trained is None else tuple(trained)
        self.remat = cfg.compute.remat in ("full", "offload")
        self.parts: dict[str, Part] = {}

    def trains(self, *prefixes: str, last: tuple[str, ...] = ()) -> bool:
        """Whether a parameter is trained whose path begins so, and ends with one of `last` if that is given."""
        if self.paths is None:
            return True
        return any(p.startswith(prefixes) and (not last or p.rsplit("/", 1)[-1] in last) for p in self.paths)

    def add(self, name: str, forward: float, *, weights: bool, inputs: bool, again: bool = False) -> None:
        """Adds a part.

        Args:
          forward: its forward pass for one video.
          weights, inputs: whether the gradients of its weights and of its inputs are computed.
          again: whether the backward pass repeats the forward pass.
        """
        forward *= self.videos
        needed = weights or inputs
        self.parts[name] = Part(forward, forward * (weights + inputs), forward if again and needed else 0.0)

    def add_visual_tokens(self, clips: int, clip_frames: int, merge: bool = True) -> bool:
        """The video encoder and the projector; whether their output has a gradient."""
        cfg, vision, projecting = self.cfg, self.trains("vision/"), self.trains("projector/")
        encoding = clips * video_encoder(cfg.vision, clip_frames)
        self.add("video encoder", encoding, weights=vision, inputs=vision, again=self.remat)
        projecting_all = clips * projector(cfg.vision, cfg.llm.hidden_size, clip_frames, merge)
        self.add("projector", projecting_all, weights=projecting, inputs=vision or projecting)
        return vision or projecting

    def add_language_model(self, s: StepShape, embeds: bool) -> bool:
        """The language model with its head, whose inputs have a gradient or not; whether its output has."""
        llm = self.cfg.llm
        adapters = bool(llm.lora.rank) and self.trains("llm/layers/", last=("lora_a", "lora_b"))
        weights = self.trains("llm/layers/", last=("kernel",))
        through = embeds or adapters or weights or self.trains("llm/layers/")
        tail = s.length - s.prefix_len  # positions that every conversation has for itself in attention
        tokens = s.positions
        attended = llm_attention(llm, s.prefix_len, s.prefix_len) + s.conversations * llm_attention(llm, tail, s.length)
        self.add("language model", tokens * llm_weights(llm), weights=weights, inputs=through, again=self.remat)
        # both factors of a product of activations have gradients
        self.add("its attention", attended, weights=through, inputs=through, again=self.remat)
        if llm.lora.rank:
            self.add("its adapters", tokens * llm_adapters(llm), weights=adapters, inputs=through, again=self.remat)
        predicted = tokens - 1 if s.prefix_len else tokens - s.conversations
        # only labels count; those of a device are taken to fit one piece, here of one example (see StepFlops.shared_by)
        predicted = piece_size(predicted, llm.vocab_size)
        head = self.trains("llm/lm_head")
        self.add(HEAD, predicted * lm_head(llm), weights=head, inputs=through, again=True)
        return through

    def add_segmentation(self, s: StepShape, seg_hidden: bool) -> None:
        """Image encoder, fusions and tracker; `seg_hidden`: whether hidden states of [SEG] have a gradient."""
        llm, sam = self.cfg.llm, self.cfg.sam2
        encoder, again = self.trains("sam2/image_encoder/"), self.remat or sam.image_size >= FRAME_BY_FRAME
        self.add("image encoder", s.frames * image_encoder(sam), weights=encoder, inputs=encoder, again=again)
        if self.cfg.fusion.initial and s.length:
            fused = initial_fusion(sam, llm.hidden_size, s.seg_tokens, s.frames, s.conversations)
            inputs = self.trains("llm/embed_tokens", "initial_fusion/")
            self.add("initial fusion", fused, weights=self.trains("initial_fusion/"), inputs=inputs)
        fused = second_fusion(self.cfg.fusion, sam, llm.hidden_size, s.seg_tokens, s.frames, s.conversations)
        second = self.trains("second_fusion/")
        prompts = seg_hidden or second
        self.add("second fusion", fused, weights=second, inputs=prompts)
        tracked = s.used - s.anchors
        memories = memories_seen(sam, s.used, s.anchors) if tracked else 0
        attending = tracked * s.conversations * memory_attention(sam, s.anchors, memories)
        attention = self.trains("sam2/memory_attention/")
        self.add("memory attention", attending, weights=attention, inputs=prompts, again=True)
        decoding = s.anchors * (mask_decoder(sam, s.seg_tokens) + mask_prompt(sam)) + tracked * mask_decoder(sam, 2)
        decoder = self.trains("sam2/mask_decoder/")
        self.add("mask decoder", s.conversations * decoding, weights=decoder, inputs=prompts, again=True)
        if tracked:
            encoding = s.conversations * s.used * memory_encoder(sam)
            memory = self.trains("sam2/memory_encoder/")
            self.add("memory encoder", encoding, weights=memory, inputs=prompts, again=True)
        self.add("full-size masks", s.conversations * s.used * full_size_mask(sam), weights=False, inputs=True)

    def total(self) -> StepFlops:
        return StepFlops(self.parts)


@dataclass(frozen=True)
class PromptedShape:
    """The sizes of a video whose objects are prompted that decide its cost."""

    objects: int
    frames: int
    firsts: int  # frames with a first prompt
    anchors: int  # with those that are corrected later
    steps: int  # predictions of a frame: the first, and one a click


def prompted_flops(count: StepCount, s: PromptedShape) -> StepFlops:
    """One training step of the tracker from prompts; see training.prompted."""
    sam = count.cfg.sam2
    large = sam.image_size >= FRAME_BY_FRAME
    encoder, again = count.trains("sam2/image_encoder/"), count.remat or large
    masks = 1 + sam.num_multimask if sam.evaluated_mask == "multimask" else 1
    tracked = s.frames if s.frames > 1 else 0
    decoded = (s.firsts + tracked) * s.steps
    tokens = s.steps + 2  # a box or a point and none, a click for each further step, and the one that SAM appends
    count.add("image encoder", s.frames * image_encoder(sam), weights=encoder, inputs=encoder, again=again)
    attention, decoder = count.trains("sam2/memory_attention/"), count.trains("sam2/mask_decoder/")
    through = encoder or count.trains("sam2/")  # memories have gradients
    if tracked:
        memories = memories_seen(sam, s.frames, min(s.anchors, s.frames - 1))
        attending = tracked * s.objects * memory_attention(sam, s.anchors, memories)
        count.add("memory attention", attending, weights=attention, inputs=through, again=large)
    decoding = decoded * (mask_decoder(sam, tokens) + mask_prompt(sam))
    if tracked:  # given masks are decoded, too, for their pointers
        decoding += s.firsts * mask_decoder(sam, 2)
        encoding = s.objects * (s.firsts + tracked) * memory_encoder(sam)
        memory = count.trains("sam2/memory_encoder/")
        count.add("memory encoder", encoding, weights=memory, inputs=through, again=large)
    count.add("mask decoder", s.objects * decoding, weights=decoder, inputs=through, again=large)
    full = s.objects * decoded * masks * full_size_mask(sam)
    count.add("full-size masks", full, weights=False, inputs=True)
    return count.total()


def step_flops(cfg: VirstConfig, shape: StepShape, trained: Iterable[str] | None = None) -> StepFlops:
    """One training step over all conversations of a batch, with segmentation if `shape` has frames.

    cfg, trained: see StepCount.
    """
    count = StepCount(cfg, shape.videos, trained)
    embeds = count.add_visual_tokens(shape.clips, shape.clip_frames) or count.trains("llm/embed_tokens")
    embeds = embeds or (cfg.fusion.initial and count.trains("initial_fusion/"))
    hidden = count.add_language_model(shape, embeds)
    if shape.frames:
        count.add_segmentation(shape, hidden)
    return count.total()


# Devices


@dataclass(frozen=True)
class Device:
    """Data sheet of a device: one chip, or one GPU."""

    flops: float  # a second, dense bfloat16 products
    memory: float  # bytes
    bandwidth: float  # of memory, bytes a second
    kinds: tuple[str, ...]  # how jax.Device.device_kind begins
    vector: float = 0.0  # float32 operations a second without matrix units, of GPUs; 0: not looked up


PEAKS = {
    "v4": Device(275e12, 32 * 2**30, 1228e9, ("TPU v4",)),
    "v5e": Device(197e12, 16 * 2**30, 819e9, ("TPU v5 lite", "TPU v5e")),
    "v5p": Device(459e12, 95 * 2**30, 2765e9, ("TPU v5p", "TPU v5")),
    "v6e": Device(918e12, 32 * 2**30, 1640e9, ("TPU v6 lite", "TPU v6e")),
    # NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, L4, and the Ada white paper's RTX 4090
    "a100": Device(312e12, 85100068864, 2039040000000, ("NVIDIA A100",), 19.5e12),
    "h100": Device(989.4e12, 84942979072, 3352320000000, ("NVIDIA H100",), 66.9e12),
    "h200": Device(989.4e12, 151397597184, 4800000000000, ("NVIDIA H200",), 66.9e12),
    "l4": Device(121e12, 24152899584, 300e9, ("NVIDIA L4",), 30.3e12),
    "rtx4090": Device(165.2e12, 25757220864, 1008e9, ("NVIDIA GeForce RTX 4090",), 82.6e12),
}


def device_peak(device: jax.Device | None = None) -> tuple[float, str]:
    """Operations a second that a device can do, and where the figure is from: its data sheet, or a measurement.

    device: a jax.Device; None: the first.
    """
    device = jax.devices()[0] if device is None else device
    kind = device.device_kind
    if name := device_name(kind):
        return PEAKS[name].flops, f"{kind}, data sheet, bfloat16"
    peak = measured_matmul_peak()
    return peak, f"{kind}, measured on a matrix product, float32"


def device_name(kind: str) -> str:
    """The name in PEAKS of a jax.Device.device_kind; empty: it is not there."""
    for name in ("v5e", *PEAKS):  # "TPU v5 lite" also begins like a v5p
        if any(re.match(rf"{re.escape(begin)}(?!\w)", kind) for begin in PEAKS[name].kinds):
            return name
    return ""


@functools.cache
def measured_matmul_peak(size: int = 1024, seconds: float = 0.3) -> float:
    """Operations a second of the default device in float32 products of size x size: the fastest of several."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    product(x, x).block_until_ready()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def utilisation(flops: float, seconds: float, num_devices: int, peak: float) -> float:
    """Share of what the devices could have done: MFU where `flops` is StepFlops.model.

    Args:
      flops: of the steps on all devices together.
      seconds: that they took.
      peak: of one device, a second.
    """
    return flops / (seconds * num_devices * peak)
