"""Runs the release's network on the inputs and keeps what its stages give.

Nothing of the release is changed: hooks and wrapped methods listen to one call of its forward pass
(model/VIRST.py, generation=False, seg_evaluate=True), and its tracker's state is read afterwards.
Axes: L decoder layers, N `[SEG]` tokens, T frames, D width, C channels, H height, W width.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from .blocks import Blocks
from .inputs import Inputs
from .listening import wrapped

WIDE = 512  # token features wider than this are thinned


@dataclass
class Record:
    """Arrays of a case, and the facts that only the run tells."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    strides: dict[str, list[int]] = field(default_factory=dict)
    anchors: list[int] = field(default_factory=list)  # video frame of each anchor, in the order of computation

    def add(self, name: str, value: Any, strides: tuple[int, ...] | None = None) -> None:
        """Keeps float32 `value`, each axis thinned by its stride."""
        array = value if isinstance(value, np.ndarray) else value.detach().float().cpu().numpy()
        if strides is not None and any(s > 1 for s in strides):
            self.strides[name] = list(strides)
            array = array[tuple(slice(None, None, s) for s in strides)]
        self.arrays[name] = np.ascontiguousarray(array)


@dataclass
class _Heard:
    visual_tokens: Any = None
    inputs_embeds: Any = None
    labels: Any = None
    hidden_states: Any = None
    seg_token: Any = None
    prompts: Any = None
    frame_scores: Any = None
    track_state: Any = None
    track_fpn: Any = None
    seg_fpn: Any = None
    anchors: list[int] = field(default_factory=list)


def prepare(virst: Any, device: str, dtype: str) -> None:
    """Brings the network to its device and precision, as eval.py does: the prompt encoder is float32 again.

    On the CPU a bfloat16 network stays float32 after rounding: its normalisations take no bfloat16 parameters there.
    """
    import torch

    if dtype == "float32":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    else:
        virst.to(torch.bfloat16)
        rounded = virst if device == "cpu" else virst.model.seg_model.sam_prompt_encoder
        rounded.to(torch.float32)
    virst.to(device)


def run_release(
    virst: Any, inputs: Inputs, *, device: str, dtype: str, encode_batch: int, blocks: Blocks | None = None
) -> Record:
    """One forward pass of the release's evaluation.

    Args:
      encode_batch: how many segmentation frames the image encoder takes at a time; 0 is all at once.
      blocks: is given what every block computes.
    """
    import torch

    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    heard = _Heard()
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([inputs.input_ids]),
        "labels": torch.tensor([inputs.labels]),
        "attention_mask": torch.ones(1, len(inputs.input_ids), dtype=torch.bool),
        "images_clip": inputs.images_clip[None].to(kind),
        "images_sam": inputs.images_sam[None].to(kind),
    }
    batch = {k: v.to(device) for k, v in batch.items()}
    precision = torch.autocast(device, dtype=torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
    with _listening(virst, heard, encode_batch, blocks), torch.no_grad(), precision:
        masks = virst(
            **batch,
            image_ids=[0],
            modalities=["video"],
            gt_masks=[None],
            video_path=[str(inputs.folder)],
            frame_ids=[[inputs.sam_idx]],
            generation=False,
            seg_evaluate=True,
        )
    record = _keep(virst, heard, masks, inputs)
    if blocks:
        _finish(blocks, heard)
    record.anchors = heard.anchors
    return record


@contextlib.contextmanager
def _listening(virst: Any, heard: _Heard, encode_batch: int, blocks: Blocks | None) -> Iterator[None]:
    seg_model = virst.model.seg_model

    def prepared(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        heard.inputs_embeds, heard.labels, heard.visual_tokens = out[4:7]
        return out

    def started(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        heard.track_state = call(*args, **kwargs)  # warms the encoder up on frame 0
        heard.track_fpn = heard.track_state["cached_features"][0][1]["backbone_fpn"]
        return heard.track_state

    def prompted(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        heard.anchors.append(int(kwargs["frame_idx"]))
        return call(*args, **kwargs)

    def encoded(call: Callable[..., Any], images: Any) -> Any:
        step = encode_batch or len(images)
        out = reduce(_join, (call(images[i : i + step]) for i in range(0, len(images), step)))
        if heard.seg_fpn is None:
            heard.seg_fpn = [level[:1].clone() for level in out["backbone_fpn"]]
        return out

    def decoded(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        heard.hidden_states = out[0].hidden_states

    def fused(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        heard.seg_token, (heard.prompts, heard.frame_scores) = kwargs["seg_token"], out

    listeners = (
        (virst, "prepare_inputs_labels_for_multimodal", prepared),
        (seg_model, "init_state", started),
        (seg_model, "add_new_prompt", prompted),
        (seg_model, "forward_image", encoded),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, listener in listeners:
            stack.enter_context(wrapped(owner, name, listener))
        if blocks:  # around what encodes in parts: it hears the parts put together
            stack.enter_context(blocks.listening(virst))
        hooks = [
            virst.model.register_forward_hook(decoded, with_kwargs=True),
            virst.model.seg_prompter.register_forward_hook(fused, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _join(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    import torch

    def cat(x: Any, y: Any) -> Any:
        return [cat(a, b) for a, b in zip(x, y)] if isinstance(x, list) else torch.cat((x, y))

    return {key: cat(one[key], other[key]) for key in one}


def _keep(virst: Any, heard: _Heard, masks: dict[int, dict[int, Any]], inputs: Inputs) -> Record:
    record = Record()
    at = (heard.labels[0] == virst.seg_token_idx).nonzero()[:, 0]
    thin = 8 if heard.inputs_embeds.shape[-1] > WIDE else 1
    record.add("clip_pixels", inputs.images_clip, (1, 1, 16, 16))
    record.add("sam_pixels", inputs.images_sam[0], (1, 16, 16))
    record.add("track_pixels", heard.track_state["images"][0], (1, 16, 16))
    record.add("visual_tokens", heard.visual_tokens, (1, 1, thin))
    record.add("inputs_embeds", heard.inputs_embeds, (1, 1, thin))
    record.add("hidden_layers", _stack([h[0, at] for h in heard.hidden_states]))
    record.add("seg_hidden", heard.seg_token)
    for prefix, levels in (("seg_fpn", heard.seg_fpn), ("track_fpn", heard.track_fpn)):
        for level, feature in enumerate(levels):
            record.add(f"{prefix}{level}", feature[0], _thinning(feature.shape[1:]))
    record.add("prompts", heard.prompts)
    record.add("frame_scores", heard.frame_scores)
    tracked = heard.track_state["output_dict_per_obj"][0]
    outputs = {**tracked["non_cond_frame_outputs"], **tracked["cond_frame_outputs"]}
    steps = range(len(inputs.frames))
    record.add("low_res_masks", _stack([outputs[t]["pred_masks"][0, 0] for t in steps]), (1, 4, 4))
    record.add("obj_ptr", _stack([outputs[t]["obj_ptr"][0] for t in steps]))
    record.add("object_score_logits", _stack([outputs[t]["object_score_logits"][0, 0] for t in steps]))
    drawn = np.stack([np.asarray(masks[t][0]).reshape(inputs.frames.shape[1:3]) for t in steps])
    record.arrays["video_mask_bits"] = np.packbits(drawn.astype(bool), axis=-1)
    for t in steps:
        record.add(f"memory_{t}", outputs[t]["maskmem_features"][0], (8, 8, 8))
    return record


def _finish(blocks: Blocks, heard: _Heard) -> None:
    tracked = heard.track_state["output_dict_per_obj"][0]
    more = {"llm.embeds": heard.inputs_embeds, "seg_hidden": heard.seg_token}
    more |= {"prompts": heard.prompts, "frame_scores": heard.frame_scores}
    blocks.finish(heard.anchors, {**tracked["non_cond_frame_outputs"], **tracked["cond_frame_outputs"]}, more)


def _thinning(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides that leave 8 channels and 16 x 16 places of a feature map [C, H, W]."""
    return max(shape[0] // 8, 1), max(shape[1] // 16, 1), max(shape[2] // 16, 1)


def _stack(tensors: list[Any]) -> Any:
    import torch

    return torch.stack([t.detach().float().cpu() for t in tensors])
