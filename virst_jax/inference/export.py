"""The steps of segmentation as artefacts of jax.export: StableHLO for platforms that need not be there.

A step is exported for one sentence and one video, with every shape that it is called with: F segmentation frames, and
texts of 64 tokens and multiples of it. Videos may have any length and size, as `Network` has it. Parameters are
arguments, each step's own.

What is exported is of XLA's operations alone (ops.platform.portable): attention is plain or in chunks.
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from virst_jax.config import FLOAT, VirstConfig, weights_of
from virst_jax.data.prompts import Tokenizer
from virst_jax.errors import UserError
from virst_jax.inference.abstract import StepCall, step_calls
from virst_jax.inference.plan import Options
from virst_jax.inference.steps import Steps
from virst_jax.inference.texts import TEXT_BUCKET, build_texts
from virst_jax.io import atomic, exported_folder, model_folder
from virst_jax.io.exported_folder import ArraySpec, Manifest, StepSpec
from virst_jax.ops.platform import portable
from virst_jax.types import Params, PyTree

PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}  # of jax.export, and what they are called when traced for

MAX_TEXT = 1024  # tokens, in which the longest sentence that is read has room
MAX_FRAMES = 64  # of a call


def export_model(
    path: Path,
    cfg: VirstConfig,
    params: Params,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    platforms: Sequence[str],
    *,
    text_tokens: int = 256,
    batch: int = 1,
    chunk: int = 4,
) -> Manifest:
    """Writes a folder of exported steps; see io.exported_folder.

    Args:
      path: of the folder, which must not exist.
      cfg: of the network; its compute.dtype is that of the activations.
      params: of `Virst(cfg)`.
      tokenizer_folder: where the tokenizer's files are copied from.
      platforms: some of PLATFORMS.
      text_tokens: of the longest conversation behind the video, which the sentence is a part of.
      batch: frames that are encoded in one call.
      chunk: frames that are tracked in one call.

    Raises:
      UserError: unknown platforms, numbers out of range, integer kernels, or a folder that cannot be written.
    """
    check_settings(platforms, text_tokens, batch, chunk)
    integers = [part for part, weights in weights_of(cfg).items() if weights != FLOAT]
    if integers:
        raise UserError(f"{', '.join(integers)} have integer kernels, which are not exported; export the model without")
    options = Options(batch=batch, chunk=chunk)
    if cfg.compute.attention in ("cudnn", "splash"):
        cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, attention="auto"))
    values = dict(model_folder.named(params))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(params))
    calls = all_calls(cfg, shapes, tokenizer, options, -(-text_tokens // TEXT_BUCKET) * TEXT_BUCKET)
    steps: list[StepSpec] = []
    with atomic.new_folder(path) as part:
        for platform in dict.fromkeys(platforms):
            (part / exported_folder.STEPS / platform).mkdir(parents=True)
            for file, call in _named(calls):
                step, data = export_step(call, shapes, platform)
                step = dataclasses.replace(step, file=f"{exported_folder.STEPS}/{platform}/{file}.bin")
                atomic.write_bytes(part / step.file, data)
                steps.append(step)
        used = dict.fromkeys(name for step in steps for name in step.parameters)
        exported_folder.write_parameters(part, ((name, np.asarray(values[name])) for name in used))
        model_folder.copy_tokenizer(tokenizer_folder, part / exported_folder.TOKENIZER)
        manifest = Manifest(cfg, exported_folder.package_versions(), batch, chunk, tuple(steps))
        exported_folder.write_manifest(part, manifest)
    return manifest


def check_settings(platforms: Sequence[str], text_tokens: int, batch: int, chunk: int) -> None:
    """Refuses what `export_model` cannot do.

    Raises:
      UserError: unknown platforms, or numbers out of range; or flatbuffers is not installed.
    """
    exported_folder.require_flatbuffers()
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms:
        raise UserError(f"--platforms {','.join(platforms)}: choose some of {', '.join(PLATFORMS)}, joined by commas")
    if not TEXT_BUCKET <= text_tokens <= MAX_TEXT:
        raise UserError(f"--text-tokens {text_tokens}: give {TEXT_BUCKET} to {MAX_TEXT}")
    for name, frames in (("batch", batch), ("chunk", chunk)):
        if not 1 <= frames <= MAX_FRAMES:
            raise UserError(f"--{name} {frames}: give 1 to {MAX_FRAMES} frames")


def all_calls(
    cfg: VirstConfig, shapes: PyTree, tokenizer: Tokenizer, options: Options, text_tokens: int
) -> list[StepCall]:
    """Every step of segmenting a video of any length by one sentence, with all shapes that it takes."""
    vision = cfg.vision
    visual = cfg.max_video_frames * vision.tokens_per_frame
    prefix = build_texts(cfg, tokenizer, ("it",), visual, visual, options).prefix_ids.shape[1]
    fewest = min(8, cfg.max_video_frames)  # as plan.plan_frames has it
    sampled = range(fewest, cfg.max_video_frames + 1, vision.clip_frames)
    fused = sorted({min(count, cfg.max_seg_frames) for count in sampled})
    texts = range(TEXT_BUCKET, text_tokens + 1, TEXT_BUCKET)
    # the language model reads maps only where there is an initial fusion; elsewhere not all pairs are needed
    pairs = [(frames, text) for frames in fused for text in texts]
    if not cfg.fusion.initial:
        pairs = [(frames, text) for frames, text in pairs if frames == fused[0] or text == texts[0]]
    calls: dict[Any, StepCall] = {}
    for frames, text in pairs:
        found = step_calls(cfg, shapes, frames, 1, options, text=text, prefix_text=prefix - visual)
        for call in found:
            if call.calls:  # those of chat are not exported
                leaves, structure = jax.tree.flatten(call.arguments)
                calls[call.function.__name__, structure, tuple((x.shape, str(x.dtype)) for x in leaves)] = call
    (track,) = (call for call in calls.values() if call.function.__name__ == "track")
    start = StepCall("memories", Steps(cfg).start_bank, None, track.arguments[:1], 1)
    return [*calls.values(), start]


def export_step(call: StepCall, shapes: PyTree, platform: str) -> tuple[StepSpec, bytes]:
    """A step's artefact for a platform, and what it takes and gives; its `file` is empty.

    Args:
      shapes: of the parameters.
      platform: one of PLATFORMS.
    """
    whole = None if call.part is None else shapes[call.part] if call.part else shapes
    paths, structure = jax.tree_util.tree_flatten_with_path(whole)
    names = ["/".join(filter(None, (call.part, _text(path, "/")))) for path, _ in paths]
    leaves = [leaf for _, leaf in paths]
    arguments, form = jax.tree.flatten(call.arguments)
    function = functools.partial(call.function, **call.static)
    given: list[str] = []  # names of what the step gives

    def flat(parameters: Sequence[Any], arrays: Sequence[Any]) -> list[jax.Array]:
        out = function(jax.tree.unflatten(structure, parameters), *jax.tree.unflatten(form, arrays))
        found = jax.tree_util.tree_flatten_with_path(out)[0]
        given[:] = [_text(path, ".") for path, _ in found]
        return [leaf for _, leaf in found]

    with portable(PLATFORMS[platform]):
        used = _read(flat, leaves, arguments)

        def step(*arrays: jax.Array) -> list[jax.Array]:
            # nothing reads the other parameters
            parameters: list[Any] = [np.broadcast_to(np.zeros((), x.dtype), x.shape) for x in leaves]
            for i, array in zip(used, arrays):
                parameters[i] = array
            return flat(parameters, arrays[len(used) :])

        exported = jax.export.export(jax.jit(step), platforms=[platform])(*(leaves[i] for i in used), *arguments)
    takes = list(inspect.signature(call.function).parameters)[1:]
    places = jax.tree_util.tree_flatten_with_path(call.arguments)[0]
    inputs = [".".join(filter(None, (takes[path[0].idx], _text(path[1:], ".")))) for path, _ in places]
    spec = StepSpec(
        call.function.__name__,
        platform,
        "",
        tuple(names[i] for i in used),
        tuple(_spec(name, x) for name, x in zip(inputs, arguments)),
        tuple(_spec(name, x) for name, x in zip(given, exported.out_avals)),
    )
    return spec, bytes(exported.serialize())


def _read(function: Any, leaves: Sequence[Any], arguments: Sequence[Any]) -> list[int]:
    """Which of the leaves a function reads."""
    jaxpr = jax.make_jaxpr(function)(leaves, arguments).jaxpr
    seen = {id(x) for equation in jaxpr.eqns for x in equation.invars} | {id(x) for x in jaxpr.outvars}
    return [i for i, x in enumerate(jaxpr.invars[: len(leaves)]) if id(x) in seen]


def _named(calls: Sequence[StepCall]) -> Iterator[tuple[str, StepCall]]:
    """The steps with names of files: the function's, numbered where it has several shapes."""
    names = [call.function.__name__ for call in calls]
    for i, (name, call) in enumerate(zip(names, calls)):
        yield (name if names.count(name) == 1 else f"{name}-{names[: i + 1].count(name)}"), call


def _spec(name: str, x: Any) -> ArraySpec:
    return ArraySpec(name, tuple(x.shape), str(x.dtype))


def _text(path: Sequence[Any], separator: str) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator=separator)
