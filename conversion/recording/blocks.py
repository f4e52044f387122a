"""Keeps what every block of the release's network gives, for `virst parity bisect`.

Tensors are named and laid out as docs/parity.md says: float32, one item of a batch first, channels last. Of the
segmentation frames and of the clips, the encoders' blocks are kept for the first one only.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io import atomic

from .listening import around, wrapped
from .masks import listening_to_frames

SUFFIX = ".blocks.npz"  # behind a case's name


class Blocks:
    """Listens to one forward pass of the release and holds the tensors that it has met."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._frame = -1  # that is tracked at the moment

    def keep(self, name: str, value: Any) -> None:
        """Keeps the first value of a name."""
        if name not in self.arrays:
            self.arrays[name] = np.array(value.detach().float().cpu().numpy(), order="C")

    @contextlib.contextmanager
    def listening(self, virst: Any) -> Iterator[None]:
        """Within the block, the network's modules are heard."""
        seg_model = virst.model.seg_model
        with contextlib.ExitStack() as stack:
            for path, before, after in self._listeners(virst):
                module = virst.get_submodule(path)
                if before:
                    hook = module.register_forward_pre_hook(_first(before), with_kwargs=True)
                    stack.callback(hook.remove)
                if after is not None:
                    stack.callback(module.register_forward_hook(_result(after)).remove)
            listeners: tuple[tuple[str, Callable[..., Any]], ...] = (
                ("_get_image_feature", around(None, self._featured)),
                ("track_step_eval", around(self._tracking, None)),
                ("_run_memory_encoder", around(self._encoding_anchor, None)),
                ("forward_image", around(None, self._encoded)),
            )
            for name, listener in listeners:
                stack.enter_context(wrapped(seg_model, name, listener))
            hook = seg_model.memory_attention.register_forward_pre_hook(self._remembering, with_kwargs=True)
            stack.callback(hook.remove)
            stack.enter_context(listening_to_frames(seg_model, self.of_frame))
            yield

    def _listeners(self, virst: Any) -> Iterator[tuple[str, Callable[[Any], None] | None, Callable[[Any], None]]]:
        """Modules with what takes their first argument and what takes their result."""

        def keep(name: str, change: Callable[[Any], Any] = lambda x: x) -> Callable[[Any], None]:
            return lambda x: self.keep(name, change(x))

        def first(x: Any) -> Any:
            return x[:1]

        def none(_: Any) -> None:
            return None

        video = "model.vision_tower.vision_tower.encoder"
        yield f"{video}.patch_embed", keep("vision.pixels", lambda x: x[:1].permute(0, 2, 3, 4, 1)), none
        for i, _ in enumerate(virst.get_submodule(f"{video}.blocks")):
            before = keep("vision.embed", first) if i == 0 else None
            yield f"{video}.blocks.{i}", before, keep(f"vision.block{i}", first)
        yield f"{video}.vision_layernorm", None, keep("vision.norm", first)
        yield "model.mm_projector.mlp", keep("projector.merged", first), self._projected
        for i, _ in enumerate(virst.get_submodule("model.layers")):
            before = keep("llm.fused") if i == 0 else None
            yield f"model.layers.{i}", before, keep(f"llm.layer{i}")
        yield "model.norm", None, keep("llm.norm")
        trunk = "model.seg_model.image_encoder.trunk"
        yield trunk, keep("image.pixels", lambda x: x[:1].permute(0, 2, 3, 1)), none
        for i, _ in enumerate(virst.get_submodule(f"{trunk}.blocks")):
            before = keep("image.embed", first) if i == 0 else None
            yield f"{trunk}.blocks.{i}", before, keep(f"image.block{i}", first)
        yield "model.seg_model.image_encoder", None, self._pyramid
        yield "model.seg_prompter.memory_norm", None, keep("fusion.keys", _batch_first)
        for i, _ in enumerate(virst.get_submodule("model.seg_prompter.decoder")):
            before = keep("fusion.queries", _batch_first) if i == 0 else None
            yield f"model.seg_prompter.decoder.{i}", before, keep(f"fusion.layer{i}", _batch_first)
        attention = "model.seg_model.memory_attention"
        for i, _ in enumerate(virst.get_submodule(f"{attention}.layers")):
            before = self._in_frame("enter") if i == 0 else None
            yield f"{attention}.layers.{i}", before, self._in_frame(f"attention{i}")
        yield attention, None, self._in_frame("conditioned", lambda x: _square(x))

    def _in_frame(self, part: str, change: Callable[[Any], Any] = lambda x: x) -> Callable[[Any], None]:
        return lambda x: self.keep(f"frame{self._frame}.{part}", change(x))

    def _projected(self, tokens: Any) -> None:
        self.keep("projector.tokens", tokens[:1])
        more = tokens.detach().float().cpu().numpy()
        visual = self.arrays.get("visual")
        self.arrays["visual"] = more if visual is None else np.concatenate([visual, more])

    def _pyramid(self, out: Mapping[str, Any]) -> None:
        for i, level in enumerate(out["backbone_fpn"]):
            self.keep(f"image.fpn{i}", _channels_last(level[:1]))

    def _encoded(self, out: Mapping[str, Any], *_: Any, **__: Any) -> None:
        """The first call encodes all segmentation frames."""
        if "maps" not in self.arrays:
            for i in range(2):
                self.keep(f"image.high{i}", _channels_last(out["backbone_fpn"][i][:1]))
            self.keep("maps", _channels_last(out["vision_features"]))

    def _featured(self, out: Any, state: Any, frame_idx: int, batch_size: int) -> None:
        for name, level in zip(("high0", "high1", "top"), out[2], strict=True):
            self.keep(f"frame{frame_idx}.{name}", _square(level))

    def _tracking(self, frame_idx: int, *_: Any, **__: Any) -> None:
        self._frame = int(frame_idx)

    def _encoding_anchor(self, inference_state: Any, frame_idx: int, *_: Any, **__: Any) -> None:
        """Anchors' memories are encoded when all of them have their masks."""
        self._frame = int(frame_idx)

    def of_frame(self, part: str, value: Any) -> None:
        """Keeps the last value of a part of the frame: of several anchors on one frame, the last one counts."""
        self.arrays[f"frame{self._frame}.{part}"] = np.array(value.detach().float().cpu().numpy(), order="C")

    def _remembering(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        keys, positions = (kwargs[name][:, 0].detach().float() for name in ("memory", "memory_pos"))
        self.arrays[f"frame{self._frame}.keys"] = second_moments(keys.cpu().numpy(), positions.cpu().numpy())

    def finish(self, anchors: list[int], outputs: Mapping[int, Any], more: Mapping[str, Any]) -> None:
        """Adds what only the end of the run tells: every frame's outcome, and tensors that the case holds too."""
        for t, out in outputs.items():
            self.keep(f"frame{t}.low_res", out["pred_masks"][0, 0])
            self.keep(f"frame{t}.pointer", out["obj_ptr"][0])
            self.keep(f"frame{t}.score", out["object_score_logits"][0, 0])
            memory = out["maskmem_features"][0]
            self.keep(f"frame{t}.memory", memory.flatten(1).T)
        for name, value in more.items():
            self.keep(name, value)
        self.arrays["anchors"] = np.asarray(anchors, np.int32)


def second_moments(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The sum over keys of the outer product of (1, key, position) with itself; it does not depend on their order.

    Args:
      keys, positions: float32[K, D].
    """
    rows = np.concatenate([np.ones((len(keys), 1)), keys, positions], axis=1, dtype=np.float64)
    return (rows.T @ rows).astype(np.float32)


def write_blocks(path: Path, arrays: Mapping[str, np.ndarray], tell: Callable[[str], None]) -> None:
    """Writes the tensors, after saying how large they are.

    Raises:
      UserError: there is no room for them.
    """
    size = sum(array.nbytes for array in arrays.values())
    tell(f"{path}: {len(arrays)} tensors of blocks, {size / 1e6:,.0f} MB")
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise UserError(
            f"{path}: the blocks take {size / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; the case itself is "
            "written: make room and record again with --blocks, or use fewer frames (--max-frames)"
        )
    atomic.write_npz(path, arrays)


def _first(take: Callable[[Any], None]) -> Callable[..., None]:
    def hook(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        take(args[0] if args else next(iter(kwargs.values())))

    return hook


def _result(take: Callable[[Any], None]) -> Callable[..., None]:
    def hook(module: Any, args: Any, out: Any) -> None:
        take(out[0] if isinstance(out, tuple) else out)

    return hook


def _batch_first(x: Any) -> Any:
    return x.transpose(0, 1)


def _channels_last(x: Any) -> Any:
    return x.movedim(1, -1)


def _square(x: Any) -> Any:
    """[H * W, 1, C] -> [H, W, C]"""
    side = round(x.shape[0] ** 0.5)
    return x[:, 0].unflatten(0, (side, side))
