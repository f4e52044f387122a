"""Cases of the whole network on a short video: e2e_*, with rule weights or recorded from a checkpoint.

Axes: T frames, F segmentation frames, A anchors, D width of the language model, R side of the tracker's image.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import FusionConfig, LoraConfig, VirstConfig, virst_7b
from virst_jax.data.frames import eval_anchors
from virst_jax.data.sequence import splice
from virst_jax.data.transforms import normalize, resize_frames, sam_pixels
from virst_jax.errors import UserError
from virst_jax.inference.plan import Plan
from virst_jax.inference.reading import anchor_positions
from virst_jax.inference.steps import SCALE, UNIT_SCALE, Network, Scale, TextReading
from virst_jax.inference.stream import Chunk, propagate
from virst_jax.inference.texts import cut_behind_video
from virst_jax.io.model_folder import load_model
from virst_jax.models.sam2.sam2 import Features
from virst_jax.models.virst import Virst

from ..rules import rule_table
from ..weights_rule import make_input, make_video
from .case import Case, Check, Detail, close, detail, exact, same_masks, within
from .modules import channels_first, compute_of, qwen_config, sam2_config, vision_config

SEG_MODEL = "model.seg_model."
LOW_PRECISION = 5e-2  # relative L2 error that bfloat16 explains over a network of this depth
BY_FRAME = ("low_res_masks", "obj_ptr", "object_score_logits")  # outputs whose first axis is frames
SHOWN_FRAMES = 4  # of a report's masks
BFLOAT16_STEP = 2.0**-8  # memories are stored in bfloat16: a value on the border falls to either side


def network_config(case: Case) -> VirstConfig:
    """The config of a case's network, from its sizes and its manifest."""
    given, manifest = case.meta["config"], case.meta["manifest"]
    sizes, full = given["tiny"], virst_7b()
    image = given.get("image_size") or case.number("image_size", r"BILINEAR (\d+)", 1024)
    sam2 = sam2_config(manifest, SEG_MODEL, image, sizes and sizes["hiera"])
    attended = given.get("max_cond_frames_in_attn", sam2.max_anchors_attended)
    remembered = given.get("num_maskmem", sam2.num_maskmem)
    cfg = dataclasses.replace(
        full,
        name=case.name,
        sam2=dataclasses.replace(sam2, max_anchors_attended=attended, num_maskmem=remembered),
        fusion=FusionConfig(initial=given.get("initial_seg_fusion", False)),
        compute=compute_of(case),
    )
    if sizes is None:  # the release's own
        rows = manifest["lm_head.weight"][0]
        llm = dataclasses.replace(full.llm, vocab_size=rows, lora=LoraConfig(rank=0))
        return dataclasses.replace(cfg, llm=llm, seg_token_id=given.get("seg_token_id", full.seg_token_id))
    llm, vision = qwen_config(sizes), vision_config(sizes["umt"])
    seg = given.get("seg_token_id", llm.vocab_size - 1)
    return dataclasses.replace(cfg, llm=llm, vision=vision, seg_token_id=seg)


def rule_params(case: Case, cfg: VirstConfig) -> dict[str, Any]:
    """The parameters that the rule gives for the case's manifest."""
    params = case.params(list(rule_table(cfg).items()))
    # a tracker with fewer memory frames than its checkpoint has temporal codes uses the first of these
    params["sam2"]["time_embed"] = params["sam2"]["time_embed"][: cfg.sam2.num_maskmem]
    return jax.tree.map(jnp.asarray, case.complete(params, Virst(cfg)))


def rule_clips(case: Case, name: str, cfg: VirstConfig, count: int, salt: int) -> np.ndarray:
    """Normalised clips that the rule gives, float32[clips, frames, S, S, 3]."""
    side = cfg.vision.image_size
    frames = make_input(name, (1, count, 3, side, side), salt)[0].transpose(0, 2, 3, 1)
    return frames.reshape(-1, cfg.vision.clip_frames, side, side, 3)


def open_network(case: Case) -> Network:
    """The case's network with its parameters: by rule, or of the checkpoint that the case was given.

    Raises:
      UserError: no checkpoint was given where one is needed, or it is another network.
    """
    if case.meta.get("state", {}).get("from") != "checkpoint":
        cfg = network_config(case)
        return Network(cfg, rule_params(case, cfg))
    if case.checkpoint is None:
        raise UserError("recorded from a checkpoint: convert that checkpoint and name its folder with --checkpoint")
    cfg, params = load_model(case.checkpoint, case.dtype)
    given = case.meta["config"]
    cfg = dataclasses.replace(
        cfg,
        fusion=dataclasses.replace(cfg.fusion, initial=given["initial_seg_fusion"]),
        sam2=dataclasses.replace(cfg.sam2, max_anchors_attended=given["max_cond_frames_in_attn"]),
        compute=compute_of(case),
    )
    if (given["image_size"], given["seg_token_id"]) != (cfg.sam2.image_size, cfg.seg_token_id):
        raise UserError(f"{case.checkpoint}: another network than the case was recorded with (config.json differs)")
    return Network(cfg, params)


def video_of(case: Case) -> np.ndarray:
    """The case's video, uint8[T, H, W, 3]."""
    meta = case.meta
    if meta.get("video", {}).get("from") == "npz":
        return case.outputs["frames"]
    salt = meta.get("video_salt", case.salt)
    return make_video(meta["n_frames"], meta["hw"][0], meta["hw"][1], salt=salt)


def video_clips(case: Case, cfg: VirstConfig, video: np.ndarray) -> tuple[np.ndarray, Scale]:
    """Clips number[clips, frames, S, S, 3], and what normalises them."""
    meta, clip = case.meta, case.meta.get("clip", {})
    if clip.get("from") == "frames":
        pixels = resize_frames(video[meta["vlm_idx"]], cfg.vision.image_size, "bicubic")
        return pixels.reshape(-1, cfg.vision.clip_frames, *pixels.shape[1:]), SCALE
    return rule_clips(
        case, case.clip_name(f"{case.name}.clip"), cfg, meta["t_vlm"], clip.get("salt", case.salt)
    ), UNIT_SCALE


class Comparison:
    """Compares values with a case's outputs, thinned as those are; outputs that a case lacks are passed over."""

    def __init__(self, case: Case):
        self.case = case
        self.low = {case.dtype, case.meta.get("dtype", "float32")} != {"float32"}

    def __contains__(self, output: str) -> bool:
        return output in self.case.outputs

    def thin(self, output: str, value: Any) -> np.ndarray:
        value = np.asarray(value)
        strides = self.case.meta.get("strides", {}).get(output)
        if strides is None:  # cases that do not say: as many values as there are
            wanted = self.case.outputs[output].shape
            strides = [max(1, -(-have // want)) for have, want in zip(value.shape, wanted)]
        return value[tuple(slice(None, None, step) for step in strides)]

    def close(self, output: str, value: Any, relative: float = 1e-4, thinned: bool = False) -> None:
        if output in self:
            bound = LOW_PRECISION if self.low else relative
            ours, theirs = value if thinned else self.thin(output, value), self.case.outputs[output]
            self.add(close(output, ours, theirs, bound))
            self.tell(output, ours, theirs)

    def pixels(self, output: str, value: np.ndarray) -> None:
        if output in self:
            ours = self.thin(output, channels_first(value))
            self.add(within(output, ours, self.case.outputs[output], 1e-5, "the same PIL call"))

    def tell(self, output: str, ours: Any, theirs: Any) -> None:
        if self.case.kept is not None:
            self.case.kept[output] = np.asarray(ours)
        if self.case.detailed:
            self.case.details.append(detail(output, ours, theirs, by_frame=output in BY_FRAME))

    def add(self, check: Check) -> None:
        self.case.checks.append(check)


def run_e2e(case: Case) -> None:
    """Drives the steps that `segment` runs, in its exact mode, and compares what they compute on the way."""
    network = open_network(case)
    cfg, meta, compare = network.cfg, case.meta, Comparison(case)
    video = video_of(case)
    clips, scale = video_clips(case, cfg, video)
    seg_frames = meta["sam_idx"]
    plan = Plan(tuple(range(clips.shape[0] * clips.shape[1])), tuple(seg_frames), anchors_of(cfg, seg_frames))
    compare.add(exact("cond_frames", sorted(set(plan.anchor_frames)), meta["cond_frames"]))

    # one frame at a time: pixels of a long video would not fit
    def encode(number: int, resample: str) -> Features:
        pixels = resize_frames(video[number : number + 1], cfg.sam2.image_size, resample)
        (features,) = network.encode_batch(pixels, 1)
        return features

    normalised = clips if scale is UNIT_SCALE else normalize(clips)
    compare.pixels("clip_pixels", normalised.reshape(-1, *clips.shape[2:]))
    compare.pixels("sam_pixels", sam_pixels(video[seg_frames[:1]], cfg.sam2.image_size, "bilinear")[0])
    compare.pixels("track_pixels", sam_pixels(video[:1], cfg.sam2.image_size, "bicubic")[0])

    tops = {}
    for number in dict.fromkeys(seg_frames):
        features = encode(number, "bilinear")
        if number == seg_frames[0]:
            _levels(compare, "seg", features)
        tops[number] = features.top
    prompts = _language(network, compare, clips, scale, [tops[number] for number in seg_frames])
    known = {number: encode(number, "bicubic") for number in plan.anchor_frames}
    if plan.anchor_frames[0] == 0:
        _levels(compare, "track", known[0])
    chosen = jnp.asarray(prompts)[:, anchor_positions(cfg, plan)]
    batch = network.start([known[n] for n in plan.anchor_frames], plan.anchor_frames, chosen, cfg.max_anchors)
    frames = (known.pop(n) if n in known else encode(n, "bicubic") for n in range(len(video)))
    size = (video.shape[1], video.shape[2])
    _tracking(compare, cfg, propagate(network, [batch], frames, len(video), size, keep_tracked=True), size)


def anchors_of(cfg: VirstConfig, seg_frames: list[int]) -> tuple[int, ...]:
    """The anchors' positions among the segmentation frames."""
    return tuple(eval_anchors(len(seg_frames), cfg.frames_per_anchor))


def _telling_frames(ours: list[np.ndarray], theirs: np.ndarray) -> tuple[tuple[int, np.ndarray, np.ndarray], ...]:
    """The frames whose masks differ most, or evenly spaced ones where none differs."""
    count = min(SHOWN_FRAMES, len(ours))
    differing = np.array([int((a != b).sum()) for a, b in zip(ours, theirs)])
    even = np.linspace(0, len(ours) - 1, count).round().astype(int).tolist()
    chosen = even if not differing.any() else np.argsort(-differing, kind="stable")[:count].tolist()
    return tuple((t, ours[t], theirs[t]) for t in sorted(set(chosen)))


def _levels(compare: Comparison, name: str, features: Features) -> None:
    for i, level in enumerate((features.high0, features.high1, features.top)):
        compare.close(f"{name}_fpn{i}", channels_first(level))


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the language model made of a case's conversation."""

    text: TextReading
    embeds: list[tuple[jax.Array, np.ndarray]]  # input embeddings dtype[1, P, D] and which are valid, bool[1, P]


def read_conversation(
    network: Network, meta: Mapping[str, Any], visual: list[jax.Array], clips: int, tops: list[jax.Array]
) -> Reading:
    """Reads an e2e case's conversation as `segment` does: the video, then the text behind it.

    Args:
      visual: tokens dtype[tokens, D] of every clip, and of slots behind them that hold none.
      clips: how many are clips.
      tops: F maps dtype[H, W, C].
    """
    tokens = clips * visual[0].shape[0]
    row = splice(meta["input_ids"], meta["labels"], tokens, network.cfg.seg_token_id)
    texts = cut_behind_video([row], len(visual) * visual[0].shape[0] - tokens)
    ids, mask, seg = texts.batch(0, 1, 1)
    video = network.read_video(visual, texts.prefix_ids, texts.prefix_visual, texts.prefix_mask, keep_embeds=True)
    text = network.read_text(video.cache, ids, mask, seg, tops, keep_layers=True)
    assert video.embeds is not None
    assert text.embeds is not None
    return Reading(text, [(video.embeds, texts.prefix_mask), (text.embeds, mask)])


def _language(
    network: Network, compare: Comparison, clips: np.ndarray, scale: Scale, tops: list[jax.Array]
) -> jax.Array:
    """Everything up to the prompts of all segmentation frames, dtype[1, F, N, C], which it returns."""
    cfg, meta = network.cfg, compare.case.meta
    slots = max(len(clips), cfg.max_video_frames // cfg.vision.clip_frames)
    visual = network.encode_visual(clips, slots, scale)
    compare.close("visual_tokens", np.concatenate([np.asarray(x, np.float32) for x in visual[: len(clips)]])[None])
    reading = read_conversation(network, meta, visual, len(clips), tops)
    text, parts = reading.text, reading.embeds
    compare.close("inputs_embeds", np.concatenate([np.asarray(x, np.float32)[valid] for x, valid in parts])[None])
    assert text.layers is not None
    compare.close("hidden_layers", np.asarray(jnp.concatenate([text.layers[:, 0], text.seg_hidden]), np.float32))
    compare.close("seg_hidden", text.seg_hidden)
    prompts, scores = network.fuse(text.seg_hidden, tops, np.arange(len(tops), dtype=np.int32))
    compare.close("prompts", prompts.swapaxes(1, 2))
    compare.close("frame_scores", scores)
    return prompts


def _tracking(compare: Comparison, cfg: VirstConfig, chunks: Iterable[Chunk], size: tuple[int, int]) -> None:
    out = compare.case.outputs
    low_res, pointers, scores, masks = [], [], [], []
    memories: dict[str, np.ndarray] = {}
    for chunk in chunks:
        (tracked,) = chunk.tracked
        masks += list(chunk.masks[0])
        scores += list(chunk.scores[0])
        low_res += list(np.asarray(tracked.prediction.low_res[:, 0]))
        pointers += list(np.asarray(tracked.prediction.pointer[:, 0], np.float32))
        for t, memory in enumerate(tracked.memory[:, 0], chunk.start):
            if f"memory_{t}" in compare:
                side = cfg.sam2.feature_size
                rows = np.asarray(memory, np.float32).reshape(side, side, -1)
                memories[f"memory_{t}"] = compare.thin(f"memory_{t}", channels_first(rows))
    compare.close("low_res_masks", np.stack(low_res), 1e-3)
    compare.close("obj_ptr", np.stack(pointers), 1e-3)
    theirs = out["object_score_logits"]
    check = close("object_score_logits", np.asarray(scores), theirs, LOW_PRECISION if compare.low else 1e-3)
    if not np.array_equal(np.asarray(scores) > 0, theirs > 0):
        check = dataclasses.replace(check, passed=False, note="signs differ")
    compare.add(check)
    compare.tell("object_score_logits", scores, theirs)
    bits = np.unpackbits(out["video_mask_bits"], axis=-1)[..., : size[1]].astype(bool)
    compare.add(same_masks("video_mask_bits", np.stack(masks), bits, 0.95 if compare.low else 0.998))
    if compare.case.kept is not None:
        compare.case.kept["video_mask_bits"] = np.stack(masks)
    if compare.case.detailed:
        compare.case.details.append(Detail("video_mask_bits", masks=_telling_frames(masks, bits)))
    for name, memory in memories.items():
        compare.close(name, memory, BFLOAT16_STEP, thinned=True)
