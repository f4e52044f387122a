"""Configuration of the network: frozen dataclasses and named presets. Imports no JAX module.

Every size of the network (image sizes, feature grids, widths, depths, frame counts) follows from here.
The numbers of `virst_7b` are those of the release: model/config.json, model/sam2/configs/
sam2.1_hiera_l_virst.yaml, utils/argument.py, model/videochat/vision_tower_builder.py.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from virst_jax.errors import UserError

Config = TypeVar("Config")

IMAGE_TOKEN = -200  # in input_ids: the visual tokens go here
IGNORE = -100  # in labels: no loss here
PIXEL_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in 0..1
PIXEL_STD = (0.229, 0.224, 0.225)
# "late": after as much as possible was computed in float32; "release": at every operation, as PyTorch does
ROUNDINGS = ("late", "release")
# what of a layer waits for the backward pass, which makes the rest again: everything; its input; its input and what its
# linear layers gave; its input, in the host's memory
REMAT = ("none", "full", "dots", "offload")
FLOAT = "float"
WEIGHTS = (FLOAT, "int8", "int4")  # kernels of linear layers, see ops.quantized
PARTS = ("llm", "vision", "hiera")  # of the network, whose kernels can be integers
FRAME_BY_FRAME = 512  # image side from which on training encodes frames one after another


def _check_weights(weights: str) -> None:
    if weights not in WEIGHTS:
        raise UserError(f"unknown weights {weights!r}: choose one of {', '.join(WEIGHTS)}")


@dataclass(frozen=True)
class Compute:
    """How to compute, as opposed to what: precision, attention kernels, rematerialisation."""

    dtype: str = "float32"  # of activations
    param_dtype: str = "float32"
    attention: str = "auto"  # see ops.attention.IMPLEMENTATIONS
    remat: str = "none"  # of REMAT
    # where the language model rounds to `dtype`, see ROUNDINGS
    rounding: str = "late"

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise UserError(f"unknown rounding {self.rounding!r}: choose {' or '.join(ROUNDINGS)}")
        if self.remat not in REMAT:
            raise UserError(f"unknown remat {self.remat!r}: choose one of {', '.join(REMAT)}")


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 64  # 0: no adapters
    alpha: float = 16.0
    dropout: float = 0.05

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0


@dataclass(frozen=True)
class QwenConfig:
    """Qwen2 decoder."""

    vocab_size: int = 151647  # 152064 rows cut to the tokenizer's length with `[SEG]`
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    lora: LoraConfig = LoraConfig()
    weights: str = FLOAT  # of the layers' kernels, one of WEIGHTS; the output head's are int8 at least

    def __post_init__(self) -> None:
        _check_weights(self.weights)
        if self.weights != FLOAT and self.lora.rank:
            raise UserError(f"adapters of rank {self.lora.rank} on {self.weights} kernels: merge them first")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class VisionConfig:
    """UMT video encoder and the token-merging projector behind it (umt-hd-large, tome16_mlp_hd64)."""

    hidden_size: int = 1024
    depth: int = 24
    select_layer: int = -2  # the layer whose output is used; later ones are never built
    num_heads: int = 16
    mlp_ratio: float = 4.0
    image_size: int = 448
    patch_size: int = 16
    clip_frames: int = 4
    pretrained_grid: int = 14  # position tables are interpolated from this grid ...
    pretrained_frames: int = 4  # ... and this clip length
    tokens_per_frame: int = 16  # of a clip, after merging
    tokens_per_image: int = 64  # of a still image, after merging
    weights: str = FLOAT  # of the blocks' kernels, one of WEIGHTS

    def __post_init__(self) -> None:
        _check_weights(self.weights)

    @property
    def num_layers(self) -> int:
        return self.depth + self.select_layer + 1

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class HieraConfig:
    embed_dim: int = 144
    num_heads: int = 2
    stages: tuple[int, ...] = (2, 6, 36, 4)
    global_att_blocks: tuple[int, ...] = (23, 33, 43)
    window_spec: tuple[int, ...] = (8, 4, 16, 8)
    window_pos_embed_bkg_spatial_size: tuple[int, int] = (7, 7)
    q_pool: int = 3  # how many stage changes halve the grid
    mlp_ratio: float = 4.0
    weights: str = FLOAT  # of the blocks' kernels, one of WEIGHTS

    def __post_init__(self) -> None:
        _check_weights(self.weights)

    @property
    def stage_dims(self) -> tuple[int, ...]:
        return tuple(self.embed_dim * 2**i for i in range(len(self.stages)))


@dataclass(frozen=True)
class Sam2Config:
    """SAM 2.1: image encoder, prompt encoder, mask decoder, memory attention, memory encoder."""

    hiera: HieraConfig = HieraConfig()
    image_size: int = 1024
    hidden_size: int = 256
    memory_dim: int = 64
    fpn_top_down_levels: tuple[int, ...] = (2, 3)
    # memory attention
    memory_layers: int = 4
    memory_mlp_dim: int = 2048
    memory_heads: int = 1
    memory_dropout: float = 0.1  # in training
    rope_theta: float = 10000.0
    # mask decoder
    decoder_layers: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    num_multimask: int = 3
    iou_head_dim: int = 256
    mask_prompt_channels: int = 16
    stability_delta: float = 0.05
    stability_threshold: float = 0.98
    # which mask evaluation takes: "multimask", the best of three, as the release does, though it trains "single", the
    # first; a network trained from nothing has no other
    evaluated_mask: str = "multimask"
    # memory bank
    num_maskmem: int = 7  # temporal codes: six previous frames and the anchors
    max_anchors_attended: int = 3  # -1: all
    max_pointers: int = 16
    mem_sigmoid_scale: float = 20.0
    mem_sigmoid_bias: float = -10.0
    memory_kernel: int = 7  # of the memory encoder's depthwise convolutions
    memory_fuser_layers: int = 2

    @property
    def feature_size(self) -> int:
        """Side of the stride-16 feature map."""
        return self.image_size // 16

    @property
    def low_res_size(self) -> int:
        """Side of the mask logits."""
        return self.image_size // 4


@dataclass(frozen=True)
class FusionConfig:
    """Spatio-temporal fusion: both its initial (embedding side) and second (prompt side) half."""

    num_heads: int = 8
    num_layers: int = 2
    max_frames: int = 100
    dropout: float = 0.1
    initial: bool = False  # the release's evaluation leaves the initial fusion off


@dataclass(frozen=True)
class LossConfig:
    ce: float = 1.0
    bce: float = 2.0
    dice: float = 0.5
    iou: float = 0.05
    occ: float = 0.05


@dataclass(frozen=True)
class PromptLossConfig:
    """Weights of the losses of training from prompts; the defaults are SAM 2's."""

    focal: float = 20.0
    focal_alpha: float = 0.25  # share of the pixels on the object; below 0: as many as there are
    focal_gamma: float = 2.0  # 0, with alpha below 0: cross-entropy
    dice: float = 1.0
    iou: float = 1.0
    score: float = 1.0


@dataclass(frozen=True)
class VirstConfig:
    name: str = "virst_7b"
    llm: QwenConfig = QwenConfig()
    vision: VisionConfig = VisionConfig()
    sam2: Sam2Config = Sam2Config()
    fusion: FusionConfig = FusionConfig()
    loss: LossConfig = LossConfig()
    prompt_loss: PromptLossConfig = PromptLossConfig()
    compute: Compute = Compute()
    seg_token_id: int = 151646
    num_seg_tokens: int = 10
    max_video_frames: int = 64
    max_seg_frames: int = 32
    frames_per_anchor: int = 4  # at evaluation: one anchor for so many segmentation frames

    @property
    def max_anchors(self) -> int:
        """Anchor slots that a tracker needs at evaluation."""
        return max(1, self.max_seg_frames // self.frames_per_anchor)


@dataclass(frozen=True)
class TrackerConfig(VirstConfig):
    """SAM 2.1 alone, in the place of a whole network: of the other parts' sizes nothing is built."""

    name: str = "tracker"
    seg_token_id: int = 617  # of the small model's tokenizer: batches are made with one, though these do not read it


def virst_7b() -> VirstConfig:
    return VirstConfig()


def tiny() -> VirstConfig:
    """The same structure, small enough to train on a CPU; the model that comes with the package."""
    return VirstConfig(
        name="tiny",
        llm=QwenConfig(
            vocab_size=640,
            hidden_size=128,
            intermediate_size=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            lora=LoraConfig(rank=0),
        ),
        vision=VisionConfig(hidden_size=128, depth=4, num_heads=4, image_size=96, pretrained_grid=6),
        sam2=Sam2Config(
            hiera=HieraConfig(
                embed_dim=16,
                num_heads=1,
                stages=(1, 2, 3, 1),
                global_att_blocks=(4, 5),
                window_spec=(8, 4, 8, 4),
            ),
            image_size=128,
            hidden_size=64,
            memory_dim=16,
            memory_layers=2,
            memory_mlp_dim=256,
            memory_dropout=0.0,
            decoder_heads=4,
            decoder_mlp_dim=256,
            iou_head_dim=64,
            evaluated_mask="single",
        ),
        fusion=FusionConfig(num_heads=4, dropout=0.0),
        seg_token_id=617,
        num_seg_tokens=2,
        max_video_frames=8,
        max_seg_frames=8,
        frames_per_anchor=2,
    )


RETIRED = ("train_anchors",)  # keys that decided nothing; config files of earlier versions hold them
# The published SAM 2.1 models: sam2/configs/sam2.1/sam2.1_hiera_{t,s,b+,l}.yaml of facebookresearch/sam2.
_SMALL_HIERA = HieraConfig(embed_dim=96, num_heads=1, window_spec=(8, 4, 14, 7))
SAM2_SIZES: dict[str, HieraConfig] = {
    "tiny": dataclasses.replace(_SMALL_HIERA, stages=(1, 2, 7, 2), global_att_blocks=(5, 7, 9)),
    "small": dataclasses.replace(_SMALL_HIERA, stages=(1, 2, 11, 2), global_att_blocks=(7, 10, 13)),
    "base_plus": HieraConfig(
        embed_dim=112,
        num_heads=2,
        stages=(2, 3, 16, 3),
        global_att_blocks=(12, 16, 20),
        window_spec=(8, 4, 14, 7),
        window_pos_embed_bkg_spatial_size=(14, 14),
    ),
    "large": HieraConfig(),
}


def sam2_preset(size: str) -> Sam2Config:
    """SAM 2.1 as published, in one of SAM2_SIZES: unlike VIRST, it attends to all prompted frames."""
    return Sam2Config(hiera=SAM2_SIZES[size], max_anchors_attended=-1)


PRESETS: dict[str, Callable[[], VirstConfig]] = {"virst_7b": virst_7b, "tiny": tiny}


def get_preset(name: str) -> VirstConfig:
    """A preset by its name.

    Raises:
      UserError: the name is unknown.
    """
    if name not in PRESETS:
        raise UserError(f"unknown config {name!r}: choose one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


def weights_of(cfg: VirstConfig) -> dict[str, str]:
    """The kernels of every part of PARTS, each one of WEIGHTS."""
    return {"llm": cfg.llm.weights, "vision": cfg.vision.weights, "hiera": cfg.sam2.hiera.weights}


def quantized(cfg: VirstConfig, kind: str, parts: Sequence[str]) -> VirstConfig:
    """The network with integer kernels in some of PARTS. Hiera's are int8 whatever `kind` is.

    Raises:
      UserError: an unknown part or kind, adapters that are not merged, or a network that has integer kernels already.
    """
    if kind not in WEIGHTS[1:]:
        raise UserError(f"cannot quantize to {kind!r}: choose {' or '.join(WEIGHTS[1:])}")
    if not parts or not set(parts) <= set(PARTS):
        raise UserError(f"parts to quantize {', '.join(parts)!r}: choose some of {','.join(PARTS)}")
    if already := {part: weights for part, weights in weights_of(cfg).items() if weights != FLOAT}:
        shown = ", ".join(f"{part} {weights}" for part, weights in already.items())
        raise UserError(f"is quantized already ({shown}): give the model that it was made of")
    if "llm" in parts and cfg.llm.lora.rank:
        raise UserError(f"has adapters of rank {cfg.llm.lora.rank}: merge them first (virst convert --lora merge)")
    llm, vision, hiera = cfg.llm, cfg.vision, cfg.sam2.hiera
    if "llm" in parts:
        llm = dataclasses.replace(llm, weights=kind)
    if "vision" in parts:
        vision = dataclasses.replace(vision, weights=kind)
    if "hiera" in parts:
        hiera = dataclasses.replace(hiera, weights="int8")
    return dataclasses.replace(cfg, llm=llm, vision=vision, sam2=dataclasses.replace(cfg.sam2, hiera=hiera))


def to_json(config: Any) -> str:
    """A config as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def from_json(text: str, where: str = "config.json") -> VirstConfig:
    """The config that `to_json` wrote, now or in an earlier version.

    Raises:
      UserError: not JSON, an unknown key, or a value of another type; names `where`.
    """
    return kind_from_json(VirstConfig, text, where)


def kind_from_json(kind: type[Config], text: str, where: str) -> Config:
    """As `from_json`, of a config of another kind.

    Raises:
      UserError: not JSON, an unknown key, or a value of another type; names `where`.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise UserError(
            f"{where}: not valid JSON ({str(error)[:200]}); write it again or copy it from a preset"
        ) from error
    if isinstance(data, dict):
        data = {key: value for key, value in data.items() if key not in RETIRED}
    return _build(kind, data, where, "")


def override(config: Any, changes: Mapping[str, Any], where: str = "config") -> Any:
    """A copy of a config dataclass with some values changed: nested dictionaries, as {"llm": {"lora": {"rank": 8}}}.

    Raises:
      UserError: an unknown key, or a value of another type; names `where`.
    """
    return _build(type(config), changes, where, "", config)


def _build(cls: type, data: Any, where: str, path: str, default: Any = None) -> Any:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: {path or 'the file'} must be an object, not {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise UserError(f"{where}: unknown key {path + unknown[0]!r}: known are {', '.join(sorted(fields))}")
    default = cls() if default is None else default
    values = {}
    for name, value in data.items():
        old = getattr(default, name)
        if dataclasses.is_dataclass(old):
            values[name] = _build(type(old), value, where, f"{path}{name}.", old)
        elif isinstance(old, tuple) and isinstance(value, list):
            if not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
                raise UserError(f"{where}: {path + name!r} must be integers, not {str(value)[:80]}")
            values[name] = tuple(value)
        elif isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
            values[name] = float(value)
        elif type(value) is type(old):
            values[name] = value
        else:
            raise UserError(
                f"{where}: {path + name!r} must be {type(old).__name__}, not {type(value).__name__} {value!r}"
            )
    return dataclasses.replace(default, **values)
