"""Quantizes a model folder: integer kernels for inference. One parameter after another, on the host."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from virst_jax.config import LoraConfig, VirstConfig, quantized, weights_of
from virst_jax.errors import UserError
from virst_jax.io import atomic, digests, model_folder, tracker_folder
from virst_jax.models.lora import add_adapter
from virst_jax.models.quantized import quantized_leaves
from virst_jax.models.tree import flatten, unflatten

from .gather import SCRATCH, scratch_arrays

PARTS = ("llm", "vision")  # Hiera's masks are the finest that the network gives, and its kernels are 3 % of all


def quantize_folder(
    model: Path, out: Path, kind: str, parts: Sequence[str] = PARTS, *, progress: bool = True
) -> dict[str, str]:
    """Writes the model folder `out` with integer kernels, of a model folder; its adapters are merged first.

    Args:
      kind: int8 or int4.
      parts: of config.PARTS.

    Returns:
      The kernels of every part, as config.weights_of gives them.

    Raises:
      UserError: no model folder, a damaged one or one that has integer kernels, or `out` exists.
    """
    atomic.check_new(out)
    if tracker_folder.is_tracker(model):
        raise UserError(f"{model}: holds SAM 2.1 alone; only whole models are quantized")
    given, _ = model_folder.stored_shapes(model)
    merged = merged_config(given) if "llm" in parts else given
    try:
        cfg = quantized(merged, kind, parts)
    except UserError as error:
        raise UserError(f"{model}: {error}") from error
    wanted = flatten(model_folder.parameter_shapes(cfg))
    leaves = checked_leaves(model)
    if merged is not given:
        leaves = merged_leaves(leaves, given.llm.lora)
    with atomic.new_folder(out) as part:
        if (model / model_folder.TOKENIZER).is_dir():
            model_folder.copy_tokenizer(model / model_folder.TOKENIZER, part / model_folder.TOKENIZER)
        with (
            scratch_arrays(part / SCRATCH) as allocate,
            tqdm(total=len(wanted), unit="tensor", desc="quantizing", disable=not progress) as bar,
        ):
            flat = {}
            for name, value in quantized_leaves(cfg, leaves):
                flat[name] = allocate(name, value.shape, value.dtype)
                flat[name][...] = value
                bar.update()
            bar.set_description("writing")
            params = unflatten(flat)
            model_folder.write_parameters(part / model_folder.PARAMS, params)
            model_folder.write_description(part, cfg, params)
            del flat, params
        model_folder.check_model(part)
    return weights_of(cfg)


def merged_config(cfg: VirstConfig) -> VirstConfig:
    """The network once its adapters are merged; the same object if it has none."""
    if not cfg.llm.lora.rank:
        return cfg
    lora = LoraConfig(0, cfg.llm.lora.alpha, cfg.llm.lora.dropout)
    return dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, lora=lora))


def checked_leaves(model: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of a folder's parameters, each compared with its digest if the folder has any."""
    stated = digests.read(model)
    for name, value in model_folder.read_parameters(model):
        if stated is not None:
            digests.check_tensors(model, stated, [(name, value)])
        yield name, value


def merged_leaves(leaves: Iterable[tuple[str, np.ndarray]], lora: LoraConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves with every adapter added to its kernel, one layer after another. Adapters stand beside their kernels.

    Raises:
      UserError: an adapter without its other half or its kernel.
    """
    waiting: dict[str, dict[str, np.ndarray]] = {}
    adapted = ("kernel", "lora_a", "lora_b")
    for name, value in leaves:
        module, _, last = name.rpartition("/")
        if not module.startswith("llm/layers/") or last not in adapted:
            yield name, value
            continue
        parts = waiting.setdefault(module, {})
        parts[last] = value
        if len(parts) == len(adapted):
            kernel, a, b = (waiting[module].pop(key) for key in adapted)
            del waiting[module]
            layers = [np.asarray(add_adapter(*layer, lora.scale)) for layer in zip(kernel, a, b)]
            yield f"{module}/kernel", np.stack(layers)
    if waiting:
        raise UserError(f"merging adapters: {next(iter(waiting))} lacks a part of its adapter; convert the model again")
