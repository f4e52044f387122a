"""`virst info`: devices, versions, and what a model is."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from virst_jax.commands import _common
from virst_jax.errors import UserError

HELP = """Show devices and versions, and with --model what a model is: sizes, parameters, files.

With --check every parameter and every file of the model is compared with its digest."""
EXAMPLES = """examples:
  virst info
  virst info --model virst_7b
  virst info --model virst_7b --check"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help='model folder, or "tiny"')
    parser.add_argument("--check", action="store_true", help="compare the model with its digests")
    _common.add_device_argument(parser)
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    import jax
    from rich.console import Console
    from rich.table import Table

    if args.check and not args.model:
        raise UserError("--check needs a model: add --model")
    rows = list(_common.versions(args.device).items())
    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        rows.append((str(device), device.device_kind + (f", {memory / 2**30:.1f} GiB" if memory else "")))
    if args.model:
        rows += _describe(args.model)
        rows.append(("digests", _digests(args.model, args.check)))
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


def _digests(given: str, check: bool) -> str:
    from virst_jax.api import find_model
    from virst_jax.io import digests, model_folder

    folder = find_model(given)
    stated = digests.read(folder)
    if stated is None:
        return "no digests: the folder was written before there were any, and damage would not be seen"
    if not check:
        return f"of {len(stated.tensors)} parameters and {len(stated.files)} files (--check compares them)"
    counts = model_folder.check_model(folder)
    assert counts is not None
    return f"{counts[0]} parameters and {counts[1]} files are as they were saved"


def _describe(given: str) -> list[tuple[str, str]]:
    import jax

    from virst_jax.api import find_model
    from virst_jax.data.prompts import load_tokenizer
    from virst_jax.io import model_folder

    folder = find_model(given)
    cfg, stored = model_folder.stored_shapes(folder)
    leaves = jax.tree.leaves(stored)
    counts: dict[str, int] = {}
    for leaf in leaves:
        counts[str(leaf.dtype)] = counts.get(str(leaf.dtype), 0) + math.prod(leaf.shape)
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    llm, vision, sam = cfg.llm, cfg.vision, cfg.sam2
    rows: list[tuple[str, Any]] = [
        ("model", folder if Path(given) == folder else f"{given} ({folder})"),
        ("config", cfg.name),
        ("parameters", ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(counts.items()))),
        ("on disk", f"{total / 2**20:,.1f} MiB"),
        ("language model", f"{llm.num_layers} layers of {llm.hidden_size}, {llm.vocab_size} tokens"),
        ("adapters", f"rank {llm.lora.rank}" if llm.lora.rank else "none (merged)"),
        ("video encoder", f"{vision.num_layers} layers of {vision.hidden_size}, {vision.image_size} px"),
        ("tracker", f"Hiera {'-'.join(map(str, sam.hiera.stages))} of {sam.hiera.embed_dim}, {sam.image_size} px"),
        ("frames", f"{cfg.max_video_frames} read, {cfg.max_seg_frames} fused, up to {cfg.max_anchors} anchors"),
        ("[SEG] tokens", f"{cfg.num_seg_tokens}, id {cfg.seg_token_id}"),
        ("initial fusion", "on" if cfg.fusion.initial else "off"),
        ("tokenizer", f"{load_tokenizer(folder / model_folder.TOKENIZER, cfg.seg_token_id).num_rows} tokens"),
    ]
    if _common.is_small(given):
        rows.append(("it knows", "moving coloured shapes, and nothing of the real world"))
    return [(name, str(value)) for name, value in rows]
