"""Cases of single modules: qwen2, umt, token_merge, hiera, memory, mask_decoder, st_fusion, losses.

Outputs are channels first, ours channels last: `channels_first` and `channels_last` move between them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import (
    Compute,
    FusionConfig,
    HieraConfig,
    LoraConfig,
    QwenConfig,
    Sam2Config,
    VirstConfig,
    VisionConfig,
)
from virst_jax.models.projector import Projector
from virst_jax.models.qwen2 import Qwen2
from virst_jax.models.sam2.mask_decoder import multimask, single_mask
from virst_jax.models.sam2.memory import MemoryAttention, MemoryEncoder, memory_position
from virst_jax.models.sam2.sam2 import Features, Sam2
from virst_jax.models.st_fusion import InitialFusion, SecondFusion
from virst_jax.models.umt import VideoEncoder
from virst_jax.ops.position import sine_2d, sinusoid_table
from virst_jax.ops.token_merge import merge_tokens
from virst_jax.training import losses

from ..rules import fusion_rules, llm_rules, sam2_rules, vision_rules
from .case import Case, close

SEG_MODEL = "model.seg_model."


def channels_first(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, -3)


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


def compute_of(case: Case) -> Compute:
    return Compute(dtype=case.dtype, rounding=case.rounding)


def qwen_config(sizes: dict[str, Any]) -> QwenConfig:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "rope_theta", "rms_norm_eps")
    return QwenConfig(
        **{key: sizes[key] for key in keys if key in sizes},
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        lora=LoraConfig(rank=0),
    )


def vision_config(sizes: dict[str, Any]) -> VisionConfig:
    optional = {"patch_size": "patch_size", "num_frames": "clip_frames", "select_layer": "select_layer"}
    optional["tokens_per_frame"] = "tokens_per_frame"
    return VisionConfig(
        hidden_size=sizes["dim"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        image_size=sizes["image"],
        **{ours: sizes[theirs] for theirs, ours in optional.items() if theirs in sizes},
    )


def sam2_config(
    manifest: dict[str, list[int]], prefix: str, image_size: int, hiera: dict[str, Any] | None
) -> Sam2Config:
    """Reads the tracker's widths and depths off a manifest; what it does not show keeps its default."""
    default = Sam2Config()

    def size(name: str, axis: int, otherwise: int) -> int:
        return manifest[prefix + name][axis] if prefix + name in manifest else otherwise

    def count(name: str, otherwise: int) -> int:
        return sum(prefix + name.format(i) in manifest for i in range(1000)) or otherwise

    decoder, attention = (
        "sam_mask_decoder.transformer.layers.{}.norm1.weight",
        "memory_attention.layers.{}.norm1.weight",
    )
    trunk = HieraConfig()
    if hiera is not None:
        sequences: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in hiera.items()}
        trunk = HieraConfig(**{k: v for k, v in sequences.items() if k in HieraConfig.__dataclass_fields__})
    return Sam2Config(
        hiera=trunk,
        image_size=image_size,
        hidden_size=size("sam_mask_decoder.conv_s0.weight", 1, size("memory_attention.norm.weight", 0, 256)),
        memory_dim=size("memory_encoder.out_proj.weight", 0, size("obj_ptr_tpos_proj.weight", 0, 64)),
        memory_layers=count(attention, default.memory_layers),
        memory_mlp_dim=size("memory_attention.layers.0.linear1.weight", 0, default.memory_mlp_dim),
        decoder_layers=count(decoder, default.decoder_layers),
        decoder_mlp_dim=size("sam_mask_decoder.transformer.layers.0.mlp.layers.0.weight", 0, default.decoder_mlp_dim),
        iou_head_dim=size("sam_mask_decoder.iou_prediction_head.layers.0.weight", 0, default.iou_head_dim),
        num_maskmem=size("maskmem_tpos_enc", 0, default.num_maskmem),
        memory_fuser_layers=count("memory_encoder.fuser.layers.{}.gamma", default.memory_fuser_layers),
        memory_kernel=size("memory_encoder.fuser.layers.0.dwconv.weight", 2, default.memory_kernel),
    )


def run_qwen2(case: Case) -> None:
    cfg, out = qwen_config(case.meta["config"]), case.outputs
    params = case.params(list(llm_rules(cfg)))["llm"]
    embeds = case.input("qwen2.embeds", out["layer0_in"].shape)
    mask = out["mask"].astype(bool)
    model = Qwen2(cfg, compute_of(case))

    def run(params: Any) -> Any:
        hidden, layers = model.apply({"params": params}, embeds, mask, return_layers=True)
        return hidden, layers, model.apply({"params": params}, hidden, method=Qwen2.logits)

    hidden, layers, logits = jax.jit(run)(params)
    for i in range(2):
        case.checks.append(close(f"layer{i}_in", layers[i][mask], out[f"layer{i}_in"][mask]))
    case.checks.append(close("last_hidden", hidden[mask], out["last_hidden"][mask]))
    case.checks.append(close("logits", logits[mask], out["logits"][mask]))


def run_umt(case: Case) -> None:
    sizes, out = case.meta["config"], case.outputs
    cfg, compute = vision_config(sizes), compute_of(case)
    params = case.params(list(vision_rules(cfg)))
    clips, images = out["video_features"].shape[0], out["image_features"].shape[0]
    video = case.input("umt.video", (clips, cfg.clip_frames, 3, cfg.image_size, cfg.image_size))
    image = case.input("umt.image", (images, 1, 3, cfg.image_size, cfg.image_size))
    encode = jax.jit(lambda x: VideoEncoder(cfg, compute).apply({"params": params["vision"]}, x))
    features = encode(channels_last(video))
    case.checks.append(close("video_features", features, out["video_features"]))
    case.checks.append(close("image_features", encode(channels_last(image)), out["image_features"]))
    project = Projector(cfg, compute, sizes["llm_hidden"])
    tokens = project.apply({"params": params["projector"]}, features, cfg.clip_frames)
    case.checks.append(close("video_tokens", tokens, out["video_tokens"]))
    for name, frames in (("pos_embed", cfg.clip_frames), ("img_pos_embed", 1)):
        pretrained = cfg.pretrained_frames if frames > 1 else 1
        table = sinusoid_table(cfg.grid, frames, cfg.hidden_size, cfg.pretrained_grid, pretrained)
        case.checks.append(close(name, table[None], out[name]))


def run_token_merge(case: Case) -> None:
    sizes, out = case.meta["config"], case.outputs
    rules = list(vision_rules(VisionConfig()))
    params = case.params(rules, "model.mm_projector.")["projector"]
    heads, width = sizes["heads"], sizes["dim"]
    patches = case.shape("tome.x", (3, 784, width))[1]
    odd = case.shape("tome.z", (1, 100, width))[1]
    frames = case.number("clip_frames", r"clips of (\d+) frames", 4)
    clips = out["video_merged"].shape[0]
    inputs = {
        "image": case.input("tome.x", (out["image_merged"].shape[0], patches, width)),
        "video": case.input("tome.y", (clips * frames, patches, width)).reshape(clips, frames * patches, width),
        "odd": case.input("tome.z", (out["odd_merged"].shape[0], odd, width)),
    }
    for name, x in inputs.items():
        target = out[f"{name}_merged"].shape[1]
        merged = merge_tokens(jnp.asarray(x, case.dtype), target, heads)
        case.checks.append(close(f"{name}_merged", merged, out[f"{name}_merged"]))
        if f"{name}_tokens" in out:
            cfg = VisionConfig(num_heads=heads, tokens_per_image=target, tokens_per_frame=target // frames)
            project = Projector(cfg, compute_of(case), sizes["hidden"])
            tokens = project.apply({"params": params}, x, 1 if name == "image" else frames)
            case.checks.append(close(f"{name}_tokens", tokens, out[f"{name}_tokens"]))


def _sam(case: Case, hiera: dict[str, Any] | None) -> tuple[Sam2, dict[str, Any]]:
    image = case.meta["config"]["image_size"]
    cfg = sam2_config(case.meta["manifest"], "", image, hiera)
    sam = Sam2(cfg, compute_of(case))
    params = case.params(list(sam2_rules(cfg)), SEG_MODEL)["sam2"]
    return sam, case.complete(params, sam, jnp.zeros((image, image, 3)))


def run_hiera(case: Case) -> None:
    sam, params = _sam(case, case.meta["config"])
    out, side = case.outputs, sam.cfg.image_size
    pixels = channels_last(case.input("hiera.x", (out["trunk0"].shape[0], 3, side, side)))

    def run(params: Any) -> Any:
        return sam.apply({"params": params}, pixels, method=Sam2.encode_image, mutable=["intermediates"])

    features, kept = jax.jit(run)(params)
    for i, stage in enumerate(kept["intermediates"]["image_encoder"]["stages"][0]):
        case.checks.append(close(f"trunk{i}", channels_first(stage), out[f"trunk{i}"]))
    for i, level in enumerate((features.high0, features.high1, features.top)):
        case.checks.append(close(f"fpn{i}", channels_first(level), out[f"fpn{i}"]))
        theirs = out[f"pos{i}"]
        ours = channels_first(sine_2d(*theirs.shape[2:], theirs.shape[1]))
        case.checks.append(close(f"pos{i}", np.broadcast_to(ours, theirs.shape), theirs))
    case.checks.append(close("vision_features", channels_first(features.top), out["vision_features"]))


def run_memory(case: Case) -> None:
    out = case.outputs
    cfg = sam2_config(case.meta["manifest"], "", case.meta["config"]["image_size"], None)
    params, compute = case.params(list(sam2_rules(cfg)), SEG_MODEL)["sam2"], compute_of(case)
    positions, batch, width = out["attended"].shape
    pointers = case.number("pointer_tokens", r"(\d+) pointer tokens", 8)
    keys = case.number("memory_frames", r"(\d+)\*HW", 3) * positions + pointers
    size = cfg.feature_size

    def batch_first(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return case.input(name, shape).swapaxes(0, 1)

    current = (batch_first(name, (positions, batch, width)) for name in ("mem.curr", "mem.pos"))
    memory = (batch_first(name, (keys, batch, cfg.memory_dim)) for name in ("mem.mem", "mem.mpos"))
    attend = jax.jit(MemoryAttention(cfg, compute).apply, static_argnums=6)
    attended = attend({"params": params["memory_attention"]}, *current, *memory, None, pointers)
    case.checks.append(close("attended", attended.swapaxes(0, 1), out["attended"]))
    features = channels_last(case.input("mem.pix", (batch, width, size, size)))
    logits = case.input("mem.mask", (batch, 1, cfg.image_size, cfg.image_size), 3.0)[:, 0]
    mask = jax.nn.sigmoid(logits) * cfg.mem_sigmoid_scale + cfg.mem_sigmoid_bias
    encoded = jax.jit(MemoryEncoder(cfg, compute).apply)({"params": params["memory_encoder"]}, features, mask)
    case.checks.append(close("encoded", channels_first(encoded), out["encoded"]))
    position = channels_first(memory_position(cfg).reshape(size, size, -1))
    case.checks.append(close("encoded_pos", np.broadcast_to(position, out["encoded_pos"].shape), out["encoded_pos"]))


def run_mask_decoder(case: Case) -> None:
    sam, params = _sam(case, None)
    cfg, out = sam.cfg, case.outputs
    batch, size, width = out["ious_True"].shape[0], cfg.feature_size, cfg.hidden_size
    image = channels_last(case.input("dec.feat", (batch, width, size, size)))
    tokens = case.input("dec.toks", (batch, case.shape("dec.toks", (batch, 5, width))[1], width))
    high0 = channels_last(case.input("dec.s0", (batch, width // 8, 4 * size, 4 * size)))
    high1 = channels_last(case.input("dec.s1", (batch, width // 4, 2 * size, 2 * size)))
    prompt = case.input("dec.mlog", (batch, 1, 4 * size, 4 * size), 4.0)[:, 0]
    points, labels = np.asarray(case.meta["points"], np.float32), np.asarray(case.meta["labels"])

    def run(params: Any) -> dict[str, Any]:
        def apply(method: Any, *args: Any) -> Any:
            return sam.apply({"params": params}, *args, method=method)

        decode = lambda sam: sam.mask_decoder(  # noqa: E731
            image, sam.prompt_encoder.dense_position(), tokens, sam.prompt_encoder.no_mask(batch), (high0, high1)
        )
        masks = apply(decode)
        chosen = {"True": multimask(masks), "False": single_mask(masks, cfg)}
        one = [
            apply(Sam2.predict, image[i : i + 1], Features(high0[i], high1[i], image[i]), tokens[i : i + 1])
            for i in range(batch)
        ]
        heads = jax.tree.map(lambda *x: jnp.concatenate(x), *one)
        results = {
            "sparse_points": apply(Sam2.embed_points, points, labels),
            "dense_none": jnp.moveaxis(apply(lambda sam: sam.prompt_encoder.no_mask(batch)), -1, 1)[..., :1, :1],
            "dense_mask": jnp.moveaxis(apply(lambda sam: sam.prompt_encoder.masks(prompt)), -1, 1),
            "dense_pe": jnp.moveaxis(apply(lambda sam: sam.prompt_encoder.dense_position()), -1, 0)[None],
            "heads_low": heads.low_res[:, None, ::2, ::2],
            "heads_high": sam.high_res(heads.low_res)[:, None, ::8, ::8],
            "heads_ptr": heads.pointer,
            "heads_obj": heads.object_score[:, None],
        }
        for key, value in chosen.items():
            results[f"masks_{key}"] = value.logits[..., ::2, ::2]
            results |= {f"ious_{key}": value.ious, f"tokens_{key}": value.tokens, f"obj_{key}": value.object_score}
        return results

    for key, value in jax.jit(run)(params).items():
        case.checks.append(close(key, value, out[key]))


def run_st_fusion(case: Case) -> None:
    sizes, out = case.meta["config"], case.outputs
    fusion = FusionConfig(num_heads=sizes["heads"], num_layers=sizes["layers"])
    params, compute = case.params(list(fusion_rules(VirstConfig(fusion=fusion)))), compute_of(case)
    width, side = sizes["token_dim"], 8 * sizes["grid"]
    channels = case.meta["manifest"]["model.seg_prompter.spatial_down.0.weight"][1]
    batch, count, frames, _ = out["prompts"].shape
    seg = case.input("stf.tok", (batch, count, sizes["hidden"]))
    maps = channels_last(case.input("stf.img", (batch, frames, channels, side, side)))
    second = jax.jit(SecondFusion(fusion, compute, width).apply)
    prompts, scores = second({"params": params["second_fusion"]}, seg, maps)
    case.checks += [close("prompts", prompts, out["prompts"]), close("frame_scores", scores, out["frame_scores"])]
    batch, count, hidden = out["initial"].shape
    seg = case.input("stf.seg", (batch, count, hidden))
    frames = case.shape("stf.img2", (batch, frames))[1]
    maps = channels_last(case.input("stf.img2", (batch, frames, channels, side, side)))
    initial = jax.jit(InitialFusion(fusion, compute, width).apply)({"params": params["initial_fusion"]}, seg, maps)
    case.checks.append(close("initial", initial, out["initial"]))


def run_losses(case: Case) -> None:
    shape = case.shape("loss.x", (1, 40, 50))
    logits = jnp.asarray(case.input("loss.x", shape, 3.0))
    target = jnp.asarray(case.input("loss.y", shape) > 0.3)
    for suffix, mask in (("", target), ("_empty", jnp.zeros_like(target))):
        case.checks.append(close(f"dice{suffix}", losses.dice_loss(logits, mask)[0], case.outputs[f"dice{suffix}"]))
        case.checks.append(close(f"bce{suffix}", losses.bce_loss(logits, mask)[0], case.outputs[f"bce{suffix}"]))
