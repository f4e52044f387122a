"""`virst info`: devices, versions, and what a model is."""

import argparse
import math
from pathlib import Path
from typing import Any

HELP = "Show devices and versions, and with --model what a model is: sizes, parameters, files."
EXAMPLES = """examples:
  virst info
  virst info --model virst_7b"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help='model folder, or "tiny"')


def run(args: argparse.Namespace) -> int:
    import jax
    from rich.console import Console
    from rich.table import Table

    from virst_jax.commands.segment import versions

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in versions().items():
        table.add_row(name, value)
    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        table.add_row(str(device), device.device_kind + (f", {memory / 2**30:.1f} GiB" if memory else ""))
    if args.model:
        for name, value in _describe(args.model):
            table.add_row(name, value)
    Console(soft_wrap=True).print(table)
    return 0


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
    return [(name, str(value)) for name, value in rows]
