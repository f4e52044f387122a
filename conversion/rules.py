"""The table that maps the release's parameter names to our parameter tree, and the layout changes between both.

A rule is one name: (target path, slot of a stacked target, transform). The table is written per module; expanded,
every source name and every target slot occur exactly once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from virst_jax.config import HieraConfig, QwenConfig, Sam2Config, VirstConfig, VisionConfig
from virst_jax.models.sam2.hiera import block_runs, block_specs


@dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse. Neither changes a value."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def _permute(*order: int) -> Transform:
    inverse = tuple(np.argsort(order))
    return Transform(lambda x: x.transpose(order), lambda x: x.transpose(inverse))


def _drop_ones(jax_axes: tuple[int, ...], torch_ndim: int) -> Transform:
    """Removes all axes but `jax_axes`, which must have length one."""
    ones = tuple(i for i in range(torch_ndim) if i not in jax_axes)
    return Transform(lambda x: x.squeeze(ones), lambda x: np.expand_dims(x, ones))


TRANSFORMS: dict[str, Transform] = {
    "same": Transform(lambda x: x, lambda x: x),
    "linear": _permute(1, 0),  # [out, in] -> [in, out]
    "conv": _permute(2, 3, 1, 0),  # [out, in, h, w] -> [h, w, in, out]
    "upscale": _permute(0, 2, 3, 1),  # [in, out, h, w] -> [in, h, w, out]
    # [3 * out, in] -> [in, 3, out]
    "qkv": Transform(
        lambda x: x.reshape(3, -1, x.shape[1]).transpose(2, 0, 1),
        lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
    ),
    "qkv_bias": Transform(lambda x: x.reshape(3, -1), lambda x: x.reshape(-1)),
    # [out, 3, 1, p, p] -> [p * p * 3, out]
    "patch": Transform(
        lambda x: x[:, :, 0].transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: _patch_to_torch(x),
    ),
    "table": Transform(lambda x: x[0].transpose(1, 2, 0), lambda x: x.transpose(2, 0, 1)[None]),  # [1, C, h, w]
    "row": _drop_ones((1,), 2),  # [1, C] -> [C]
    "frame": _drop_ones((2,), 3),  # [1, 1, C] -> [C]
    "time": _drop_ones((0, 3), 4),  # [T, 1, 1, C] -> [T, C]
}


def _patch_to_torch(x: np.ndarray) -> np.ndarray:
    side = round((x.shape[0] // 3) ** 0.5)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)[:, :, None]


@dataclass(frozen=True)
class Target:
    path: str  # keys of the parameter tree, joined by "/"
    slot: int | None  # index on the leading axis of a stacked target
    transform: str


Rule = tuple[str, Target]

# What a module of a kind consists of: (leaf of the release, our leaf, transform).
KINDS: dict[str, list[tuple[str, str, str]]] = {
    "linear": [(".weight", "/kernel", "linear"), (".bias", "/bias", "same")],
    "linear_no_bias": [(".weight", "/kernel", "linear")],
    "conv": [(".weight", "/kernel", "conv"), (".bias", "/bias", "same")],
    "upscale": [(".weight", "/kernel", "upscale"), (".bias", "/bias", "same")],
    "norm": [(".weight", "/scale", "same"), (".bias", "/bias", "same")],
    "rms_norm": [(".weight", "/scale", "same")],
    "qkv": [(".weight", "/kernel", "qkv"), (".bias", "/bias", "qkv_bias")],
    "qkv_no_bias": [(".weight", "/kernel", "qkv")],
    "fused_attention": [
        (".in_proj_weight", "/kernel", "qkv"),
        (".in_proj_bias", "/bias", "qkv_bias"),
        (".out_proj.weight", "/out_proj/kernel", "linear"),
        (".out_proj.bias", "/out_proj/bias", "same"),
    ],
    "patch": [(".weight", "/kernel", "patch"), (".bias", "/bias", "same")],
    "lora": [(".lora_A.weight", "/lora_a", "linear"), (".lora_B.weight", "/lora_b", "linear")],
    "embedding": [(".weight", "/embedding", "same")],
}


def _module(source: str, target: str, kind: str, slot: int | None = None) -> Iterator[Rule]:
    for leaf, our_leaf, transform in KINDS[kind]:
        yield source + leaf, Target(target + our_leaf, slot, transform)


def _modules(source: str, target: str, slot: int | None, table: list[tuple[str, str, str]]) -> Iterator[Rule]:
    for theirs, ours, kind in table:
        yield from _module(f"{source}.{theirs}", f"{target}/{ours}", kind, slot)


def _mlp(source: str, target: str, layers: int, slot: int | None = None) -> Iterator[Rule]:
    for i in range(layers):
        yield from _module(f"{source}.layers.{i}", f"{target}/layer{i}", "linear", slot)


LLM_PROJECTIONS = [
    ("self_attn.q_proj", "attn/q_proj", "linear"),
    ("self_attn.k_proj", "attn/k_proj", "linear"),
    ("self_attn.v_proj", "attn/v_proj", "linear"),
    ("self_attn.o_proj", "attn/o_proj", "linear_no_bias"),
    ("mlp.gate_proj", "mlp/gate_proj", "linear_no_bias"),
    ("mlp.up_proj", "mlp/up_proj", "linear_no_bias"),
    ("mlp.down_proj", "mlp/down_proj", "linear_no_bias"),
]


def llm_rules(cfg: QwenConfig) -> Iterator[Rule]:
    yield from _module("model.embed_tokens", "llm/embed_tokens", "embedding")
    for i in range(cfg.num_layers):
        layer = f"model.layers.{i}"
        yield from _modules(layer, "llm/layers", i, LLM_PROJECTIONS)
        yield from _module(f"{layer}.input_layernorm", "llm/layers/input_norm", "rms_norm", i)
        yield from _module(f"{layer}.post_attention_layernorm", "llm/layers/post_norm", "rms_norm", i)
        if cfg.lora.rank:
            table = [(theirs, ours, "lora") for theirs, ours, _ in LLM_PROJECTIONS]
            yield from _modules(layer, "llm/layers", i, table)
    yield from _module("model.norm", "llm/norm", "rms_norm")
    yield from _module("lm_head", "llm/lm_head", "linear_no_bias")


def vision_rules(cfg: VisionConfig) -> Iterator[Rule]:
    encoder = "model.vision_tower.vision_tower.encoder"
    yield from _module(f"{encoder}.patch_embed.proj", "vision/patch_embed", "patch")
    for i in range(cfg.num_layers):
        block = f"{encoder}.blocks.{i}"
        yield from _modules(
            block,
            "vision/layers",
            i,
            [
                ("norm1", "norm1", "norm"),
                ("attn.qkv", "attn/qkv", "qkv_no_bias"),
                ("attn.proj", "attn/proj", "linear"),
                ("norm2", "norm2", "norm"),
                ("mlp.fc1", "fc1", "linear"),
                ("mlp.fc2", "fc2", "linear"),
            ],
        )
        for name in ("q_bias", "v_bias"):
            yield f"{block}.attn.{name}", Target(f"vision/layers/attn/{name}", i, "same")
    yield from _module(f"{encoder}.vision_layernorm", "vision/norm", "norm")
    yield from _module("model.mm_projector.mlp.0", "projector/fc1", "linear")
    yield from _module("model.mm_projector.mlp.2", "projector/fc2", "linear")


def hiera_rules(cfg: HieraConfig, source: str, target: str) -> Iterator[Rule]:
    yield f"{source}.pos_embed", Target(f"{target}/pos_embed", None, "table")
    yield f"{source}.pos_embed_window", Target(f"{target}/pos_embed_window", None, "table")
    yield from _module(f"{source}.patch_embed.proj", f"{target}/patch_embed", "conv")
    specs = block_specs(cfg)
    for run in block_runs(cfg):
        for k in range(run.count):
            index, slot = run.start + k, k if run.count > 1 else None
            block, ours = f"{source}.blocks.{index}", f"{target}/{run.name}"
            table = [
                ("norm1", "norm1", "norm"),
                ("attn.qkv", "attn/qkv", "qkv"),
                ("attn.proj", "attn/proj", "linear"),
                ("norm2", "norm2", "norm"),
            ]
            if specs[index].dim != specs[index].dim_out:
                table.append(("proj", "proj", "linear"))
            yield from _modules(block, ours, slot, table)
            yield from _mlp(f"{block}.mlp", f"{ours}/mlp", 2, slot)


def _attention(source: str, target: str, slot: int | None = None) -> Iterator[Rule]:
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    yield from _modules(source, target, slot, [(name, name, "linear") for name in names])


def sam2_rules(cfg: Sam2Config, source: str = "model.seg_model", target: str = "sam2") -> Iterator[Rule]:
    for theirs, ours, transform in (
        ("maskmem_tpos_enc", "time_embed", "time"),
        ("no_mem_embed", "no_memory_embed", "frame"),
        ("no_mem_pos_enc", "no_memory_position", "frame"),
        ("no_obj_ptr", "no_object_pointer", "row"),
        ("no_obj_embed_spatial", "no_object_memory", "row"),
    ):
        yield f"{source}.{theirs}", Target(f"{target}/{ours}", None, transform)
    yield from hiera_rules(cfg.hiera, f"{source}.image_encoder.trunk", f"{target}/image_encoder/trunk")
    levels = len(cfg.hiera.stages)
    for i in range(levels):
        yield from _module(
            f"{source}.image_encoder.neck.convs.{i}.conv", f"{target}/image_encoder/lateral{levels - 1 - i}", "conv"
        )
    yield from _module(f"{source}.mask_downsample", f"{target}/mask_downsample", "conv")
    yield from _mlp(f"{source}.obj_ptr_proj", f"{target}/pointer_proj", 3)
    yield from _module(f"{source}.obj_ptr_tpos_proj", f"{target}/pointer_time_proj", "linear")
    yield from _memory_rules(cfg, source, target)
    yield from _prompt_encoder_rules(f"{source}.sam_prompt_encoder", f"{target}/prompt_encoder")
    yield from _mask_decoder_rules(cfg, f"{source}.sam_mask_decoder", target)


def _memory_rules(cfg: Sam2Config, source: str, target: str) -> Iterator[Rule]:
    for i in range(cfg.memory_layers):
        layer, ours = f"{source}.memory_attention.layers.{i}", f"{target}/memory_attention/layers"
        yield from _attention(f"{layer}.self_attn", f"{ours}/self_attn", i)
        yield from _attention(f"{layer}.cross_attn_image", f"{ours}/cross_attn", i)
        table = [(name, name, "linear") for name in ("linear1", "linear2")]
        table += [(f"norm{k}", f"norm{k}", "norm") for k in (1, 2, 3)]
        yield from _modules(layer, ours, i, table)
    yield from _module(f"{source}.memory_attention.norm", f"{target}/memory_attention/norm", "norm")
    encoder, ours = f"{source}.memory_encoder", f"{target}/memory_encoder"
    for i in range(4):
        yield from _module(f"{encoder}.mask_downsampler.encoder.{3 * i}", f"{ours}/mask_conv{i}", "conv")
        yield from _module(f"{encoder}.mask_downsampler.encoder.{3 * i + 1}", f"{ours}/mask_norm{i}", "norm")
    yield from _module(f"{encoder}.mask_downsampler.encoder.12", f"{ours}/mask_proj", "conv")
    yield from _module(f"{encoder}.pix_feat_proj", f"{ours}/image_proj", "conv")
    for i in range(cfg.memory_fuser_layers):
        block = f"{encoder}.fuser.layers.{i}"
        yield f"{block}.gamma", Target(f"{ours}/fuser{i}/gamma", None, "same")
        table = [("dwconv", "dwconv", "conv"), ("norm", "norm", "norm")]
        table += [("pwconv1", "pwconv1", "linear"), ("pwconv2", "pwconv2", "linear")]
        yield from _modules(block, f"{ours}/fuser{i}", None, table)
    yield from _module(f"{encoder}.out_proj", f"{ours}/out_proj", "conv")


def _prompt_encoder_rules(source: str, target: str) -> Iterator[Rule]:
    yield f"{source}.pe_layer.positional_encoding_gaussian_matrix", Target(f"{target}/gaussian", None, "same")
    for i in range(4):
        yield f"{source}.point_embeddings.{i}.weight", Target(f"{target}/point_embed", i, "row")
    yield f"{source}.not_a_point_embed.weight", Target(f"{target}/not_a_point_embed", None, "row")
    yield f"{source}.no_mask_embed.weight", Target(f"{target}/no_mask_embed", None, "row")
    for theirs, ours, kind in (
        (0, "mask_conv0", "conv"),
        (1, "mask_norm0", "norm"),
        (3, "mask_conv1", "conv"),
        (4, "mask_norm1", "norm"),
        (6, "mask_conv2", "conv"),
    ):
        yield from _module(f"{source}.mask_downscaling.{theirs}", f"{target}/{ours}", kind)


def _mask_decoder_rules(cfg: Sam2Config, source: str, sam: str) -> Iterator[Rule]:
    target = f"{sam}/mask_decoder"
    for theirs, ours in (
        ("iou_token", "iou_token"),
        ("mask_tokens", "mask_tokens"),
        ("obj_score_token", "object_token"),
    ):
        yield f"{source}.{theirs}.weight", Target(f"{target}/{ours}", None, "same")
    for i in range(cfg.decoder_layers):
        block, ours = f"{source}.transformer.layers.{i}", f"{target}/blocks_{i}"
        yield from _attention(f"{block}.self_attn", f"{ours}/self_attn")
        yield from _attention(f"{block}.cross_attn_token_to_image", f"{ours}/token_to_image")
        yield from _attention(f"{block}.cross_attn_image_to_token", f"{ours}/image_to_token")
        yield from _modules(block, ours, None, [(f"norm{k}", f"norm{k}", "norm") for k in (1, 2, 3, 4)])
        yield from _mlp(f"{block}.mlp", f"{ours}/mlp", 2)
    yield from _attention(f"{source}.transformer.final_attn_token_to_image", f"{target}/final_attn")
    yield from _module(f"{source}.transformer.norm_final_attn", f"{target}/final_norm", "norm")
    for index, ours, kind in ((0, "upscale0", "upscale"), (1, "upscale_norm", "norm"), (3, "upscale1", "upscale")):
        yield from _module(f"{source}.output_upscaling.{index}", f"{target}/{ours}", kind)
    for i in range(2):
        yield from _module(f"{source}.conv_s{i}", f"{sam}/high_res{i}", "conv")
    for i in range(1 + cfg.num_multimask):
        yield from _mlp(f"{source}.output_hypernetworks_mlps.{i}", f"{target}/hyper_mlps_{i}", 3)
    yield from _mlp(f"{source}.iou_prediction_head", f"{target}/iou_head", 3)
    yield from _mlp(f"{source}.pred_obj_score_head", f"{target}/object_head", 3)


def fusion_rules(cfg: VirstConfig) -> Iterator[Rule]:
    source, target = "model.seg_prompter", "second_fusion"
    for i in range(3):
        yield from _module(f"{source}.spatial_down.{2 * i}", f"{target}/reduce/conv{i}", "conv")
    yield from _module(f"{source}.memory_norm", f"{target}/key_norm", "norm")
    yield from _module(f"{source}.seg_proj", f"{target}/seg_proj", "linear")
    for i in range(cfg.fusion.num_layers):
        layer, ours = f"{source}.decoder.{i}", f"{target}/layer{i}"
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        yield from _modules(f"{layer}.cross_attn", f"{ours}/cross_attn", None, [(n, n, "linear") for n in names])
        yield from _module(f"{layer}.self_attn", f"{ours}/self_attn", "fused_attention")
        table = [("ff.0", "fc1", "linear"), ("ff.2", "fc2", "linear")]
        yield from _modules(layer, ours, None, table + [(f"norm{k}", f"norm{k}", "norm") for k in (1, 2, 3)])
    yield from _module("model.occ_predictor", "occ_predictor", "linear")
    source, target = "model.initial_seg_fusion_module", "initial_fusion"
    yield f"{source}.gate", Target(f"{target}/gate", None, "same")
    for i in range(3):
        yield from _module(f"{source}.spatial_down.{2 * i}", f"{target}/reduce/conv{i}", "conv")
    table = [("spatial_norm", "key_norm", "norm"), ("vision_proj", "image_proj", "linear")]
    table += [("norm_q", "norm_q", "norm"), ("norm_kv", "norm_kv", "norm")]
    yield from _modules(source, target, None, [*table, ("cross_attn", "attn", "fused_attention")])


def rule_table(cfg: VirstConfig) -> dict[str, Target]:
    """Every parameter name of the release for a config, with the place it goes to.

    LoRA names are plain: `...q_proj.lora_A.weight`.
    """
    table: dict[str, Target] = {}
    filled: set[tuple[str, int | None]] = set()
    for rules in (llm_rules(cfg.llm), vision_rules(cfg.vision), sam2_rules(cfg.sam2), fusion_rules(cfg)):
        for source, target in rules:
            place = (target.path, target.slot)
            if source in table or place in filled:
                raise AssertionError(f"the rules use {source} or fill {target.path}[{target.slot}] twice")
            table[source] = target
            filled.add(place)
    return table
