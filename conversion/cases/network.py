"""Cases of the whole network on a short video (e2e_*) and of the training losses (train_loss*).

Axes: T frames, F segmentation frames, A anchors, R side of the tracker's image.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conversion.assemble import take_apart
from conversion.cases.case import Case, Check, close, exact, same_masks, within
from conversion.cases.modules import compute_of, qwen_config, sam2_config, vision_config
from conversion.rules import rule_table
from conversion.weights_rule import make_video
from virst_jax.config import FusionConfig, VirstConfig
from virst_jax.data.frames import eval_anchors
from virst_jax.data.sequence import splice
from virst_jax.data.transforms import sam_pixels
from virst_jax.inference import Network
from virst_jax.losses import VideoBatch, video_losses
from virst_jax.models.virst import Virst
from virst_jax.ops.resize import resize_maps

SEG_MODEL = "model.seg_model."


def network_config(case: Case) -> VirstConfig:
    """The config of a case's small network, from its sizes and its manifest."""
    given, manifest = case.meta["config"], case.meta["manifest"]
    sizes = given["tiny"]
    sam2 = sam2_config(manifest, SEG_MODEL, given.get("image_size", 1024), sizes["hiera"])
    attended = given.get("max_cond_frames_in_attn", sam2.max_anchors_attended)
    return VirstConfig(
        name=case.name,
        llm=qwen_config(sizes),
        vision=vision_config(sizes["umt"]),
        sam2=dataclasses.replace(sam2, max_anchors_attended=attended),
        fusion=FusionConfig(initial=given.get("initial_seg_fusion", False)),
        seg_token_id=given.get("seg_token_id", sizes["vocab_size"] - 1),
        compute=compute_of(case),
    )


def _params(case: Case, cfg: VirstConfig) -> dict[str, Any]:
    params = case.params(list(rule_table(cfg).items()))
    return jax.tree.map(jnp.asarray, case.complete(params, Virst(cfg)))


def _clips(case: Case, name: str, cfg: VirstConfig, count: int) -> np.ndarray:
    side = cfg.vision.image_size
    frames = case.input(name, (1, count, 3, side, side))[0].transpose(0, 2, 3, 1)
    return frames.reshape(-1, cfg.vision.clip_frames, side, side, 3)


def run_e2e(case: Case) -> None:
    meta = case.meta
    cfg = network_config(case)
    network = Network(cfg, _params(case, cfg))
    video = make_video(meta["n_frames"], meta["hw"][0], meta["hw"][1], salt=meta.get("video_salt", case.salt))
    clips = _clips(case, f"{case.name}.clip", cfg, meta["t_vlm"])
    compare_network(case, cfg, network, video, clips)


def compare_network(case: Case, cfg: VirstConfig, network: Network, video: np.ndarray, clips: np.ndarray) -> None:
    """Runs a video uint8[T, H, W, 3] with normalised clips through the network and compares stage by stage."""
    meta, out, image = case.meta, case.outputs, cfg.sam2.image_size
    seg_frames = meta["sam_idx"]
    anchors = eval_anchors(len(seg_frames), cfg.frames_per_anchor)
    anchor_frames = [seg_frames[i] for i in anchors]
    case.checks.append(exact("cond_frames", sorted(set(anchor_frames)), meta["cond_frames"]))

    # one frame at a time: float32 pixels of a long video would not fit
    def pixels(indices: Any, resample: str) -> Any:
        return (sam_pixels(video[i : i + 1], image, resample)[0] for i in indices)

    maps = network.encode_frames(pixels(seg_frames, "bilinear")).top
    visual = clips.shape[0] * clips.shape[1] * cfg.vision.tokens_per_frame
    sequence = splice(meta["input_ids"], meta["labels"], visual, cfg.seg_token_id)
    rows = (sequence.token_ids, sequence.visual_index, sequence.mask, sequence.seg_positions)
    understood = network.understand(clips, maps, *(row[None] for row in rows))
    case.checks.append(close("visual_tokens", understood.visual_tokens, out["visual_tokens"]))
    case.checks.append(close("inputs_embeds", understood.inputs_embeds, out["inputs_embeds"]))
    case.checks.append(close("seg_hidden", understood.seg_hidden, out["seg_hidden"]))
    case.checks.append(close("prompts", understood.prompts, out["prompts"]))
    case.checks.append(close("frame_scores", understood.frame_scores, out["frame_scores"]))

    features = network.encode_frames(pixels(anchor_frames, "bicubic"))
    prompts = understood.prompts[:, :, np.asarray(anchors)]
    state = network.prompt_anchors(features, np.asarray(anchor_frames), prompts, len(anchors))
    low_res, pointers, scores, video_masks, memories = [], [], [], [], {}
    tracked = network.track(state, pixels(range(len(video)), "bicubic"), len(video), keep_memory=True)
    for t, frame in enumerate(tracked):
        prediction = frame.prediction
        stride = cfg.sam2.low_res_size // out["low_res_masks"].shape[-1]
        low_res.append(np.asarray(prediction.low_res[0, ::stride, ::stride]))
        pointers.append(np.asarray(prediction.pointer[0], np.float32))
        scores.append(float(prediction.object_score[0]))
        video_masks.append(np.asarray(resize_maps(prediction.low_res[0], video.shape[1:3]) > 0))
        if f"memory_{t}" in out:
            size = cfg.sam2.feature_size
            memory = np.asarray(frame.memory[0], np.float32).reshape(size, size, -1).transpose(2, 0, 1)
            memories[t] = memory[::8, ::8, ::8]
    case.checks.append(close("low_res_masks", np.stack(low_res), out["low_res_masks"], 1e-3))
    case.checks.append(close("obj_ptr", np.stack(pointers), out["obj_ptr"], 1e-3))
    case.checks.append(_same_scores("object_score_logits", np.asarray(scores), out["object_score_logits"]))
    bits = np.unpackbits(out["video_mask_bits"], axis=-1)[..., : video.shape[2]].astype(bool)
    case.checks.append(same_masks("video_mask_bits", np.stack(video_masks), bits))
    for t, memory in memories.items():
        # stored in bfloat16: values on the border of two of its steps may fall on either side
        case.checks.append(close(f"memory_{t}", memory, out[f"memory_{t}"], 1e-3))


def _same_scores(output: str, ours: np.ndarray, theirs: np.ndarray) -> Check:
    check = close(output, ours, theirs, 1e-3)
    if not np.array_equal(ours > 0, theirs > 0):
        return dataclasses.replace(check, passed=False, note="signs differ")
    return check


def ellipse_targets(count: int, size: int = 1024) -> np.ndarray:
    """The targets of the training cases, bool[T, R, R]: a drifting ellipse, absent on the sixth frame."""
    y, x = np.mgrid[:size, :size]
    masks = [((y - 400 - 20 * t) / 180) ** 2 + ((x - 300 - 60 * t) / 240) ** 2 < 1 for t in range(count)]
    return np.stack([mask & (t != 5) for t, mask in enumerate(masks)])


def run_train_loss(case: Case) -> None:
    meta, out = case.meta, case.outputs
    cfg = network_config(case)
    weights = meta["config"].get("weights")
    if weights:
        cfg = dataclasses.replace(cfg, loss=dataclasses.replace(cfg.loss, **weights))
    params = _params(case, cfg)
    count = case.number(r"make_video\((\d+)", 6)
    hw = (case.number(r"make_video\(\d+, (\d+)", 96), case.number(r"make_video\(\d+, \d+, (\d+)", 128))
    video = make_video(count, hw[0], hw[1], salt=meta.get("video_salt", case.salt))
    clips = _clips(case, "train.clip", cfg, case.number(r"\(1,(\d+),3", 4))
    visual = clips.shape[0] * clips.shape[1] * cfg.vision.tokens_per_frame
    sequence = splice(meta["input_ids"], meta["labels"], visual, cfg.seg_token_id)
    batch = VideoBatch(
        clips=jnp.asarray(clips),
        token_ids=jnp.asarray(sequence.token_ids)[None],
        visual_index=jnp.asarray(sequence.visual_index)[None],
        labels=jnp.asarray(sequence.labels)[None],
        mask=jnp.asarray(sequence.mask)[None],
        seg_positions=jnp.asarray(sequence.seg_positions)[None],
        frames=jnp.asarray(sam_pixels(video, cfg.sam2.image_size, "bilinear")),
        targets=jnp.asarray(ellipse_targets(count, cfg.sam2.image_size))[None],
        anchors=jnp.asarray(meta["cond_frames"]),
        frames_used=jnp.asarray(meta["frames_used"]),
    )

    def loss(params: Any, batch: VideoBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return video_losses(cfg, params, batch)

    (total, parts), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    for key, expected in meta["losses"].items():
        ours = total if key == "loss" else parts[key]
        case.checks.append(close(key, ours, expected))
    stride = cfg.sam2.image_size // out["pred_mask"].shape[-1]
    probability = jax.nn.sigmoid(parts["masks"][0, :, ::stride, ::stride])
    case.checks.append(close("pred_mask", probability, out["pred_mask"], 1e-3))
    case.checks.append(_gradient_norms(case, cfg, gradients))


def _gradient_norms(case: Case, cfg: VirstConfig, gradients: Any) -> Check:
    """Every parameter's gradient norm within 1e-3; parameters without a gradient in the release are passed over."""
    norms = {
        name: float(np.linalg.norm(read().astype(np.float64))) for name, read in take_apart(rule_table(cfg), gradients)
    }
    names = [name for name, value in case.meta["grad_norms"].items() if value is not None]
    theirs, ours = case.outputs["grad_norms"], np.array([norms[name] for name in names])
    # a sum that cancels (a bias before a softmax) leaves rounding of the size of its terms
    error = np.abs(ours - theirs) / np.maximum(theirs, 1e-6 * theirs.max())
    worst = int(error.argmax())
    check = within("grad_norms", error, np.zeros_like(error), 1e-3, f"{len(names)} parameters, worst {names[worst]}")
    return dataclasses.replace(check, max_abs=float(np.abs(ours - theirs).max()), relative=float(error.max()))
