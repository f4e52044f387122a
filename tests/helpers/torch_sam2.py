"""SAM 2 as `transformers` implements it: the second opinion that our tracker is compared with.

`TorchSam2` builds a small `Sam2VideoModel` with random weights and the parameter tree of our `Sam2` with the same
weights. Its names are first turned into the release's (`release_name`), so that the conversion table is tested too.

Where VIRST differs from SAM 2 by design, the model is made to follow VIRST: the memory of a prompted frame is encoded
from its logits, not from its binary mask. Both store memories in bfloat16; a value on the edge between two of its
numbers can fall on either side, so memories are kept in float32 here, unless a test asks for rounded ones.

PyTorch and transformers are imported when they are used: that takes seconds, which other tests need not pay.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from conversion.assemble import assemble
from conversion.rules import sam2_rules
from virst_jax.config import Compute, HieraConfig, Sam2Config
from virst_jax.models.sam2.sam2 import Features, Sam2

# The windows of 6 do not divide the grid of 8: they are padded, also where the queries are pooled.
SMALL = Sam2Config(
    hiera=HieraConfig(embed_dim=16, num_heads=1, stages=(1, 2, 4, 1), global_att_blocks=(4,), window_spec=(8, 4, 6, 4)),
    image_size=128,
    hidden_size=128,
    memory_dim=64,  # transformers knows no other width
    memory_layers=2,
    memory_mlp_dim=96,
    decoder_heads=4,
    decoder_mlp_dim=96,
    iou_head_dim=48,
    stability_threshold=0.97,
)

# Of names below `prompt_encoder.` and so on: (transformers, release), applied in order, all that match.
NAMES = [
    (r"^vision_encoder\.backbone\.patch_embed\.projection", "image_encoder.trunk.patch_embed.proj"),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^(image_encoder\.trunk\.blocks\.\d+)\.layer_norm(\d)", r"\1.norm\2"),
    (r"^(image_encoder\.trunk\.blocks\.\d+\.mlp)\.proj_in", r"\1.layers.0"),
    (r"^(image_encoder\.trunk\.blocks\.\d+\.mlp)\.proj_out", r"\1.layers.1"),
    (r"^vision_encoder\.neck\.convs\.(\d+)\.", r"image_encoder.neck.convs.\1.conv."),
    (
        r"^prompt_encoder\.shared_embedding\.positional_embedding",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"^prompt_encoder\.mask_embed\.conv1", "prompt_encoder.mask_downscaling.0"),
    (r"^prompt_encoder\.mask_embed\.layer_norm1", "prompt_encoder.mask_downscaling.1"),
    (r"^prompt_encoder\.mask_embed\.conv2", "prompt_encoder.mask_downscaling.3"),
    (r"^prompt_encoder\.mask_embed\.layer_norm2", "prompt_encoder.mask_downscaling.4"),
    (r"^prompt_encoder\.mask_embed\.conv3", "prompt_encoder.mask_downscaling.6"),
    (r"^prompt_encoder\.", "sam_prompt_encoder."),
    (r"^mask_decoder\.upscale_conv1", "mask_decoder.output_upscaling.0"),
    (r"^mask_decoder\.upscale_layer_norm", "mask_decoder.output_upscaling.1"),
    (r"^mask_decoder\.upscale_conv2", "mask_decoder.output_upscaling.3"),
    (r"^mask_decoder\.transformer\.layer_norm_final_attn", "mask_decoder.transformer.norm_final_attn"),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.layer_norm(\d)", r"\1.norm\2"),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.proj_in", r"\1.layers.0"),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.proj_out", r"\1.layers.1"),
    (r"^object_pointer_proj\.", "obj_ptr_proj."),
    # heads of three layers
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d|\w+_head)|obj_ptr_proj)\.layers\.0\.", r"\1.layers.1."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d|\w+_head)|obj_ptr_proj)\.proj_in", r"\1.layers.0"),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d|\w+_head)|obj_ptr_proj)\.proj_out", r"\1.layers.2"),
    (r"^mask_decoder\.", "sam_mask_decoder."),
    (r"^memory_attention\.layer_norm", "memory_attention.norm"),
    (r"^(memory_attention\.layers\.\d+)\.layer_norm(\d)", r"\1.norm\2"),
    (r"^memory_encoder\.mask_downsampler\.final_conv", "memory_encoder.mask_downsampler.encoder.12"),
    (r"^memory_encoder\.feature_projection", "memory_encoder.pix_feat_proj"),
    (r"^memory_encoder\.projection", "memory_encoder.out_proj"),
    (r"^memory_encoder\.memory_fuser\.", "memory_encoder.fuser."),
    (r"^(memory_encoder\.fuser\.layers\.\d+)\.depthwise_conv", r"\1.dwconv"),
    (r"^(memory_encoder\.fuser\.layers\.\d+)\.layer_norm", r"\1.norm"),
    (r"^(memory_encoder\.fuser\.layers\.\d+)\.pointwise_conv(\d)", r"\1.pwconv\2"),
    (r"^(memory_encoder\.fuser\.layers\.\d+)\.scale", r"\1.gamma"),
    (r"^no_memory_embedding", "no_mem_embed"),
    (r"^no_memory_positional_encoding", "no_mem_pos_enc"),
    (r"^memory_temporal_positional_encoding", "maskmem_tpos_enc"),
    (r"^no_object_pointer", "no_obj_ptr"),
    (r"^occlusion_spatial_embedding_parameter", "no_obj_embed_spatial"),
    (r"^temporal_positional_encoding_projection_layer", "obj_ptr_tpos_proj"),
    (r"\.o_proj\.", ".out_proj."),
]
MASK_CONV = re.compile(r"^memory_encoder\.mask_downsampler\.layers\.(\d)\.(conv|layer_norm)\.")
POINT_EMBED = "prompt_encoder.point_embed.weight"  # a table where the release has four modules
SHARED = "shared_image_embedding.positional_embedding"  # the prompt encoder's, a second time


def release_name(name: str) -> str:
    """A parameter's name in the release, without the prefix that the release gives to all of the tracker."""
    if match := MASK_CONV.match(name):
        index = 3 * int(match[1]) + (match[2] == "layer_norm")
        return f"memory_encoder.mask_downsampler.encoder.{index}.{name[match.end() :]}"
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def release_state(state: dict[str, Any]) -> dict[str, np.ndarray]:
    """A state dict of `Sam2VideoModel` under the release's names."""
    arrays = {name: value.numpy() for name, value in state.items() if name != SHARED}
    rows = arrays.pop(POINT_EMBED)
    named = {release_name(name): value for name, value in arrays.items()}
    named |= {f"sam_prompt_encoder.point_embeddings.{i}.weight": rows[i : i + 1] for i in range(len(rows))}
    return {f"model.seg_model.{name}": value for name, value in named.items()}


def hiera_config(cfg: HieraConfig, image_size: int = 1024) -> Any:
    import transformers

    return transformers.Sam2HieraDetConfig(
        hidden_size=cfg.embed_dim,
        num_attention_heads=cfg.num_heads,
        image_size=[image_size, image_size],
        num_query_pool_stages=cfg.q_pool,
        blocks_per_stage=list(cfg.stages),
        embed_dim_per_stage=list(cfg.stage_dims),
        num_attention_heads_per_stage=[cfg.num_heads * 2**i for i in range(len(cfg.stages))],
        window_size_per_stage=list(cfg.window_spec),
        window_positional_embedding_background_size=list(cfg.window_pos_embed_bkg_spatial_size),
        global_attention_blocks=list(cfg.global_att_blocks),
        mlp_ratio=cfg.mlp_ratio,
    )


def video_config(cfg: Sam2Config) -> Any:
    """The same network in the words of `transformers`; multimask output on every frame, as VIRST has it."""
    import transformers
    from transformers.models.sam2_video import configuration_sam2_video as parts

    width, size = cfg.hidden_size, cfg.feature_size
    return transformers.Sam2VideoConfig(
        vision_config=transformers.Sam2VisionConfig(
            backbone_config=hiera_config(cfg.hiera, cfg.image_size),
            backbone_channel_list=list(reversed(cfg.hiera.stage_dims)),
            backbone_feature_sizes=[[4 * size, 4 * size], [2 * size, 2 * size], [size, size]],
            fpn_hidden_size=width,
            fpn_top_down_levels=list(cfg.fpn_top_down_levels),
        ),
        prompt_encoder_config=parts.Sam2VideoPromptEncoderConfig(
            hidden_size=width, image_size=cfg.image_size, mask_input_channels=cfg.mask_prompt_channels
        ),
        mask_decoder_config=parts.Sam2VideoMaskDecoderConfig(
            hidden_size=width,
            mlp_dim=cfg.decoder_mlp_dim,
            num_hidden_layers=cfg.decoder_layers,
            num_attention_heads=cfg.decoder_heads,
            num_multimask_outputs=cfg.num_multimask,
            iou_head_hidden_dim=cfg.iou_head_dim,
            dynamic_multimask_stability_delta=cfg.stability_delta,
            dynamic_multimask_stability_thresh=cfg.stability_threshold,
        ),
        image_size=cfg.image_size,
        num_maskmem=cfg.num_maskmem,
        sigmoid_scale_for_mem_enc=cfg.mem_sigmoid_scale,
        sigmoid_bias_for_mem_enc=cfg.mem_sigmoid_bias,
        multimask_max_pt_num=100,
        max_object_pointers_in_encoder=cfg.max_pointers,
        max_cond_frame_num=cfg.max_anchors_attended,
        memory_attention_hidden_size=width,
        memory_attention_num_layers=cfg.memory_layers,
        memory_attention_num_attention_heads=cfg.memory_heads,
        memory_attention_feed_forward_hidden_size=cfg.memory_mlp_dim,
        memory_attention_rope_feat_sizes=[size, size],
        rope_parameters={"rope_type": "axial", "rope_theta": cfg.rope_theta},
        memory_encoder_hidden_size=width,
        memory_encoder_output_channels=cfg.memory_dim,
        mask_downsampler_embed_dim=width,
        memory_fuser_num_layers=cfg.memory_fuser_layers,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=4 * width,
        memory_fuser_kernel_size=cfg.memory_kernel,
        memory_fuser_padding=cfg.memory_kernel // 2,
    )


def random_tensor(name: str, shape: tuple[int, ...], rng: np.random.RandomState) -> np.ndarray:
    """A value for a parameter, large enough for outputs to depend on inputs, small enough not to amplify rounding."""
    x = rng.standard_normal(shape).astype(np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "positional_embedding":
        return x
    if leaf == "bias":
        return 0.1 * x
    if len(shape) == 1:  # scales
        return 1 + 0.2 * x
    if re.search(r"(tokens?|embed|window|embedding|encoding|pointer|parameter)$", name.removesuffix(".weight")):
        return 0.5 * x
    return np.float32(1.4) * x / np.float32(np.sqrt(np.prod(shape[1:])))


def fill(module: Any, seed: int) -> None:
    """Gives a torch module random weights: no parameter stays at zero or one, as some do when they are initialised."""
    import torch

    rng = np.random.RandomState(seed)
    state = {
        name: torch.from_numpy(np.asarray(random_tensor(name, tuple(value.shape), rng), np.float32))
        for name, value in sorted(module.state_dict().items())
    }
    if SHARED in state:
        state[SHARED] = state["prompt_encoder.shared_embedding.positional_embedding"]
    module.load_state_dict(state)


def quick_jit(function: Callable[..., Any]) -> Any:
    """`jax.jit` for what runs but once: compiling takes half the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def compiled_method(sam: Sam2, method: Any, *static: tuple[str, Any]) -> Any:
    apply: Any = functools.partial(sam.apply, method=method, **dict(static))
    return quick_jit(lambda params, *args: apply({"params": params}, *args))


class TorchSam2:
    """One set of weights on both sides.

    Args:
      cfg: the network.
      object_bias: added to the object score; at +3 every object is there.
      interactive: as SAM 2's video predictor: several masks for one click only, binary masks into memory where a person
        has prompted. Otherwise as VIRST: several masks always, memories from logits.
    """

    def __init__(self, cfg: Sam2Config = SMALL, object_bias: float = 3.0, interactive: bool = False):
        import transformers

        import torch

        self.cfg = cfg
        self.round_memory, self.interactive = False, interactive
        self.model: Any = transformers.Sam2VideoModel(video_config(cfg)).eval()
        if interactive:
            self.model.config.multimask_max_pt_num = 1
        fill(self.model, seed=0)
        with torch.no_grad():
            self.model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(object_bias)
        self._encode_memory = self.model._encode_new_memory
        self.model._encode_new_memory = self.encode_memory
        state = release_state(self.model.state_dict())
        self.sam = Sam2(cfg, Compute())
        table = dict(sam2_rules(cfg))
        self.params = assemble(table, state, state.__getitem__, where="transformers")["sam2"]

    def ours(self, method: Any, *args: Any, **static: Any) -> Any:
        """A method of our module (or a function of it) on these weights, compiled once."""
        return compiled_method(self.sam, method, *static.items())(self.params, *args)

    def features(self, pixels: np.ndarray) -> Features:
        """Our features of frames float32[T, R, R, 3]."""
        return self.ours(Sam2.encode_image, pixels)

    def encode_memory(self, **kwargs: Any) -> tuple[Any, Any]:
        """Their memory of a frame and its positions, [S, O, D]; arguments as of `_encode_new_memory`."""
        kept: list[Any] = []
        hook = self.model.memory_encoder.register_forward_hook(lambda module, args, output: kept.append(output[0]))
        given = kwargs["is_mask_from_pts"] if self.interactive else False
        rounded, position = self._encode_memory(**kwargs | {"is_mask_from_pts": given})
        hook.remove()
        # what stands for an absent object was added to this in place
        return (rounded if self.round_memory else kept[0].flatten(2).permute(2, 0, 1)), position

    def open_video(self, pixels: np.ndarray) -> Any:
        """Their state of a video, of frames float32[T, R, R, 3]."""
        import transformers

        import torch

        count, height, width, _ = pixels.shape
        return transformers.Sam2VideoInferenceSession(
            video=channels_first(pixels),
            video_height=height,
            video_width=width,
            dtype=torch.float32,
            max_vision_features_cache_size=count,
        )


def frames(count: int, size: int, seed: int = 0) -> np.ndarray:
    """A normalised video float32[T, R, R, 3] of blobs that drift over waves."""
    rng = np.random.RandomState(seed)
    y, x = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size), indexing="ij")
    phase, speed = rng.uniform(0, 6, (3, 2)), rng.uniform(-0.08, 0.08, (3, 2))
    video = np.zeros((count, size, size, 3), np.float32)
    for t in range(count):
        for c in range(3):
            waves = np.sin(9 * x + phase[c, 0] + 0.2 * t) + np.cos(7 * y + phase[c, 1] - 0.15 * t)
            center = 0.5 + 0.3 * np.sin(phase[c] + t * speed[c] * 4)
            blob = np.exp(-(((y - center[0]) / 0.13) ** 2 + ((x - center[1]) / 0.18) ** 2))
            video[t, :, :, c] = 0.5 * waves + 2 * blob
    return video + 0.1 * rng.standard_normal(video.shape).astype(np.float32)


def to_numpy(x: Any) -> np.ndarray:
    """float64, of a torch tensor or of an array."""
    return np.asarray(x.float().numpy() if hasattr(x, "numpy") else x, np.float64)


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` times the largest value of theirs."""
    ours, theirs = to_numpy(ours), to_numpy(theirs)
    assert ours.shape == theirs.shape
    scale, error = np.abs(theirs).max(), np.abs(ours - theirs).max()
    assert error <= tolerance * scale, f"largest error {error:.2e} at scale {scale:.2e}"


def tensor(x: Any) -> Any:
    """A torch tensor of an array, which it does not share."""
    import torch

    return torch.from_numpy(np.array(x))


def channels_first(x: Any) -> Any:
    """An array [..., H, W, C] as a torch tensor [..., C, H, W]."""
    return tensor(np.moveaxis(np.asarray(x), -1, -3))


def channels_last(x: Any) -> np.ndarray:
    """A torch tensor [..., C, H, W] as an array [..., H, W, C]."""
    return np.moveaxis(x.numpy(), -3, -1)


@contextlib.contextmanager
def inference(threads: int = 1) -> Iterator[None]:
    """Full precision on both sides, no gradients; several threads wait for each other where tests share cores."""
    torch = pytest.importorskip("torch", reason="needs the test extra")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with jax.default_matmul_precision("highest"), torch.inference_mode():
        yield
    torch.set_num_threads(before)


@functools.cache
def small(object_bias: float = 3.0) -> TorchSam2:
    return TorchSam2(object_bias=object_bias)
