"""Keeps what the blocks of the release's mask decoder and memory encoder give on every frame.

Names of the modules: model/sam2/modeling/sam/{mask_decoder,transformer}.py and model/sam2/modeling/memory_encoder.py.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .listening import around, wrapped

Keep = Callable[[str, Any], None]  # of a frame's tensor's name and value


@contextlib.contextmanager
def listening_to_frames(seg_model: Any, keep: Keep) -> Iterator[None]:
    """Within the block, `keep` is given the tensors of the frame that is decoded, as docs/recording.md names them."""
    decoder, encoder = seg_model.sam_mask_decoder, seg_model.memory_encoder
    transformer, fuser = decoder.transformer, encoder.fuser

    def entered(module: Any, args: Any) -> None:
        image, _, tokens = args
        keep("decoder.tokens", tokens)
        keep("decoder.image", image.flatten(2).transpose(1, 2))

    def block(index: int) -> Callable[..., None]:
        def after(module: Any, args: Any, out: Any) -> None:
            for name, value in zip(("tokens", "image"), out, strict=True):
                keep(f"decoder{index}.{name}", value)

        return after

    def attended(module: Any, args: Any, out: Any) -> None:
        keep("decoder.final", out[0])

    def decoded(out: Any, *_: Any, **__: Any) -> None:
        masks, ious, _, score = out
        keep("decoder.masks", masks)
        keep("decoder.ious", ious)
        keep("decoder.object", score)

    def result(name: str) -> Callable[..., None]:
        return lambda module, args, out: keep(name, out.movedim(1, -1))

    with contextlib.ExitStack() as stack:
        hooks = [transformer.register_forward_pre_hook(entered), transformer.register_forward_hook(attended)]
        hooks += [layer.register_forward_hook(block(i)) for i, layer in enumerate(transformer.layers)]
        hooks.append(encoder.mask_downsampler.register_forward_hook(result("encoder.mask")))
        hooks.append(fuser.register_forward_pre_hook(lambda module, args: keep("encoder.sum", args[0].movedim(1, -1))))
        hooks += [layer.register_forward_hook(result(f"encoder{i}")) for i, layer in enumerate(fuser.layers)]
        for hook in hooks:
            stack.callback(hook.remove)
        stack.enter_context(wrapped(decoder, "predict_masks", around(None, decoded)))
        yield
