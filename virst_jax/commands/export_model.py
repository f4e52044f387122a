"""`virst export-model`: the steps of segmentation as StableHLO, with their parameters."""

import argparse
from pathlib import Path

HELP = """Write the steps of segmentation as StableHLO (jax.export), to run without this network's code.

The folder holds an artefact of every step for every platform, the parameters (safetensors), the tokenizer's files and a
manifest with shapes, versions and digests. The platforms need not be there. `virst_jax.exported.load` runs the folder:
one sentence and one video at a time, of any length and size."""
EXAMPLES = """examples:
  virst export-model --model virst_7b --dtype bfloat16 --platforms cuda,tpu --batch 4 --out virst_7b_exported
  virst export-model --model tiny --platforms cpu --out tiny_exported"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help='a model folder, or "tiny", the small one of this package')
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    parser.add_argument("--platforms", default="cpu,cuda,tpu", metavar="NAMES", help="(cpu,cuda,tpu)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of parameters and activations (as stored; float32)"
    )
    parser.add_argument(
        "--text-tokens", type=int, default=256, metavar="N", help="of the longest sentence with its wording (256)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="frames that are encoded in one call (1)")
    parser.add_argument("--chunk", type=int, default=4, metavar="N", help="frames that are tracked in one call (4)")


def run(args: argparse.Namespace) -> int:
    from virst_jax.api import find_model, load
    from virst_jax.inference.export import check_settings, export_model
    from virst_jax.io import atomic, model_folder

    platforms = tuple(name.strip() for name in args.platforms.split(",") if name.strip())
    check_settings(platforms, args.text_tokens, args.batch, args.chunk)  # before the parameters, which take long
    atomic.check_new(args.out)
    model = load(args.model, dtype=args.dtype, device="cpu", compilation_cache=False)
    manifest = export_model(
        args.out,
        model.cfg,
        model.network.params,
        model.tokenizer,
        find_model(args.model) / model_folder.TOKENIZER,
        platforms,
        text_tokens=args.text_tokens,
        batch=args.batch,
        chunk=args.chunk,
    )
    print(f"wrote {args.out}: {len(manifest.steps)} steps for {', '.join(manifest.platforms)}")
    return 0
