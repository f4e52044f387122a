"""`virst info`: devices, versions, and what a model is."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virst_jax.commands import _common
from virst_jax.errors import UserError
from virst_jax.io import small_model

if TYPE_CHECKING:
    from virst_jax.config import Sam2Config, VirstConfig

HELP = """Show devices and versions, and with --model what a model is: sizes, parameters, files.

With --check every parameter and every file of the model is compared with its digest."""
EXAMPLES = """examples:
  virst info
  virst info --model virst_7b
  virst info --model virst_7b --check"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help='model folder, tracker folder, or "tiny"')
    parser.add_argument("--check", action="store_true", help="compare the model with its digests")
    _common.add_device_argument(parser)
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    import jax
    from rich.console import Console
    from rich.table import Table

    if args.check and args.model is None:
        raise UserError("--check needs a model: add --model")
    rows = list(_common.versions(args.device).items())
    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        rows.append((str(device), device.device_kind + (f", {memory / 2**30:.1f} GiB" if memory else "")))
    if args.model is not None:
        rows += _describe(args.model, args.check)
    if args.json:
        print(json.dumps(dict(rows), indent=1))
        return 0
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    Console(soft_wrap=True).print(table)
    return 0


def _digests(folder: Path, check: Callable[[Path], tuple[int, int] | None] | None) -> str:
    """Args: check: compares everything with the digests; None: only say what there are."""
    from virst_jax.io import digests

    stated = digests.read(folder)
    if stated is None:
        return "no digests: the folder was written before there were any, and damage would not be seen"
    if check is None:
        return f"of {len(stated.tensors)} parameters and {len(stated.files)} files (--check compares them)"
    counts = check(folder)
    assert counts is not None
    return f"{counts[0]} parameters and {counts[1]} files are as they were saved"


def _describe(given: str, check: bool) -> list[tuple[str, str]]:
    from virst_jax.api import find_folder, find_model
    from virst_jax.io import model_folder, tracker_folder

    folder = find_folder(given)
    compare: Callable[[Path], tuple[int, int] | None]
    if tracker_folder.is_tracker(folder):
        compare = tracker_folder.check_tracker
        tracker, stored = tracker_folder.stored_shapes(folder)
        more = [("holds", "SAM 2.1 alone, no language model"), *_tracker_rows(tracker)]
    else:
        compare = model_folder.check_model
        cfg, stored = model_folder.stored_shapes(find_model(given))
        more = _model_rows(folder, cfg)
    rows = [("model", folder if Path(given) == folder else f"{given} ({folder})"), *_sizes(folder, stored), *more]
    rows.append(("digests", _digests(folder, compare if check else None)))
    return [(name, str(value)) for name, value in rows]


def _sizes(folder: Path, stored: Any) -> list[tuple[str, Any]]:
    import jax

    counts: dict[str, int] = {}
    for leaf in jax.tree.leaves(stored):
        counts[str(leaf.dtype)] = counts.get(str(leaf.dtype), 0) + math.prod(leaf.shape)
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return [
        ("parameters", ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(counts.items()))),
        ("on disk", f"{total / 2**20:,.1f} MiB"),
    ]


def _tracker_rows(sam: "Sam2Config") -> list[tuple[str, Any]]:
    return [("tracker", f"Hiera {'-'.join(map(str, sam.hiera.stages))} of {sam.hiera.embed_dim}, {sam.image_size} px")]


def _model_rows(folder: Path, cfg: "VirstConfig") -> list[tuple[str, Any]]:
    from virst_jax.config import FLOAT, weights_of
    from virst_jax.data.prompts import load_tokenizer
    from virst_jax.io import model_folder

    llm, vision = cfg.llm, cfg.vision
    kernels = [f"{part} {weights}" for part, weights in weights_of(cfg).items() if weights != FLOAT]
    rows: list[tuple[str, Any]] = [
        ("config", cfg.name),
        ("language model", f"{llm.num_layers} layers of {llm.hidden_size}, {llm.vocab_size} tokens"),
        ("adapters", f"rank {llm.lora.rank}" if llm.lora.rank else "none (merged)"),
        ("integer kernels", ", ".join(kernels) or "none"),
        ("video encoder", f"{vision.num_layers} layers of {vision.hidden_size}, {vision.image_size} px"),
        *_tracker_rows(cfg.sam2),
        ("frames", f"{cfg.max_video_frames} read, {cfg.max_seg_frames} fused, up to {cfg.max_anchors} anchors"),
        ("[SEG] tokens", f"{cfg.num_seg_tokens}, id {cfg.seg_token_id}"),
        ("initial fusion", "on" if cfg.fusion.initial else "off"),
        ("tokenizer", f"{load_tokenizer(folder / model_folder.TOKENIZER, cfg.seg_token_id).num_rows} tokens"),
    ]
    if small_model.is_small(folder):
        rows.append(("it knows", "moving coloured shapes, and nothing of the real world"))
    return rows
