"""Converts the released PyTorch checkpoints to a model folder, and a model folder back to the release's names.

    python -m conversion.convert --videochat DIR --sam2 FILE.pt --virst FILE.pt --out DIR
    python -m conversion.convert --videochat DIR --sam2 FILE.pt --out DIR          what training starts from
    python -m conversion.convert --sam2 FILE.pt --out DIR                          SAM 2.1 alone, of any size
    python -m conversion.convert --model MODEL --quantize int8 --out DIR           integer kernels for inference
    python -m conversion.convert --to-torch MODEL --out FILE.pt

Nothing of the sources is executed; torch is not needed. The result appears whole or not at all. Exit status: 0, or 2
with one line that says what is wrong. `virst convert` is the same.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from tqdm import tqdm

from virst_jax import cli
from virst_jax.config import FLOAT, PARTS, PRESETS, WEIGHTS, LoraConfig, VirstConfig, from_json, get_preset, weights_of
from virst_jax.errors import UserError
from virst_jax.io import atomic, model_folder, regular
from virst_jax.models.tree import flatten
from virst_jax.models.virst import Virst

from .assemble import take_apart
from .checkpoint import Checkpoint
from .formats.torch_file import write_torch_file
from .gather import DTYPES, Converted, stored_dtype, write_assembled
from .names import SEG_MODEL
from .quantize import PARTS as QUANTIZED
from .quantize import quantize_folder
from .rules import rule_table
from .tracker import check_size, convert_tracker

# what neither VideoChat-Flash nor SAM 2.1 holds
FRESH = ("initial_fusion", "second_fusion", "occ_predictor")


def read_config(given: str) -> VirstConfig:
    """A preset by name, or a config file.

    Raises:
      UserError: neither.
    """
    if given in PRESETS or not given.endswith(".json"):
        return get_preset(given)
    return from_json(regular.read_text(given, "give a preset or a config.json"), given)


def convert(
    videochat: Path,
    sam2: Path,
    virst: Path | None,
    out: Path,
    *,
    cfg: VirstConfig,
    dtype: str = "bfloat16",
    lora: str = "merge",
    lora_alpha: float = 16.0,
    root: str | None = None,
    tokenizer: Path | None = None,
    progress: bool = True,
) -> Converted:
    """Writes the model folder `out` from the release's three files.

    The parameters lie in memory-mapped scratch files until Orbax has written them, so memory need not hold them.

    Args:
      virst: None: where VIRST's own training starts from; the parts that the other two files lack (both fusions) are
        drawn anew, always the same.
      cfg: the network; its LoRA rank follows from the checkpoint and `lora`.
      dtype: of the parameters, one of DTYPES; the prompt encoder stays float32 unless "source".
      lora: "merge" or "keep".
      root: key of the VIRST checkpoint's state dict; None: one of the usual ones.
      tokenizer: folder of the tokenizer; None: `videochat`.

    Raises:
      UserError: a source is missing or damaged, names or shapes do not fit the config, or `out` exists.
    """
    atomic.check_new(out)
    checkpoint = Checkpoint(
        videochat, sam2, virst, vocab_size=cfg.llm.vocab_size, lora=lora, lora_alpha=lora_alpha, root=root
    )
    try:
        check_size(checkpoint.entries, cfg.sam2.hiera, str(sam2), SEG_MODEL)
        adapters = LoraConfig(checkpoint.rank, lora_alpha, cfg.llm.lora.dropout)
        cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, lora=adapters))
        fresh = FRESH if virst is None else ()
        table = {name: to for name, to in rule_table(cfg).items() if to.path.split("/")[0] not in fresh}
        with atomic.new_folder(out) as part:
            # first, so that a missing tokenizer does not cost the whole conversion
            model_folder.copy_tokenizer(tokenizer or videochat, part / model_folder.TOKENIZER)
            samples = write_assembled(
                part,
                table,
                checkpoint.names(),
                checkpoint.read,
                where=checkpoint.where,
                shapes={path: leaf.shape for path, leaf in flatten(model_folder.parameter_shapes(cfg)).items()},
                store=stored_dtype(dtype, model_folder.FLOAT32),
                more=_fresh(cfg, fresh),
                describe=lambda params: model_folder.write_description(part, cfg, params),
                progress=progress,
            )
            checked, digest = samples.check(str(out), model_folder.read_parameters(part))
        return Converted(cfg.name, checked, digest, tuple(checkpoint.warnings))
    finally:
        checkpoint.close()


def _fresh(cfg: VirstConfig, parts: tuple[str, ...]) -> dict[str, Any]:
    """Initial parameters of some parts of the network; the others are not computed."""

    def make(key: jax.Array) -> dict[str, Any]:
        params = nn.meta.unbox(Virst(cfg).init(key)["params"])
        return {part: params[part] for part in parts}

    return jax.device_get(jax.jit(make)(jax.random.key(0))) if parts else {}


def to_torch(model: Path, out: Path, *, peft: bool = False, progress: bool = True) -> None:
    """Writes a model folder as the release's `.pt`: {"model_state_dict": every parameter by its name}.

    Args:
      peft: name the parameters as PEFT wraps them, as the released file does.

    Raises:
      UserError: no model folder, or `out` exists or cannot be written.
    """
    atomic.check_new(out, parents=False)
    cfg, _ = model_folder.stored_shapes(model)
    if set(weights_of(cfg).values()) != {FLOAT}:
        raise UserError(f"{model}: has integer kernels; give the model that it was made of")
    table = rule_table(cfg)
    with tqdm(total=len(table), unit="tensor", desc="writing", disable=not progress) as bar:
        specs = (
            (_wrapped(name) if peft else name, value.shape, value.dtype, lambda value=value: value)
            for name, tensor in take_apart(table, model_folder.read_parameters(model))
            for value in (tensor(),)
        )
        write_torch_file(out, specs, root="model_state_dict", on_tensor=lambda name: bar.update())


def _wrapped(name: str) -> str:
    for end in (".lora_A", ".lora_B"):
        name = name.replace(f"{end}.weight", f"{end}.default.weight")
    return f"base_model.model.{name}"


HELP = "Convert the released PyTorch checkpoints to a model folder, or back."
EXAMPLES = """examples:
  virst convert --videochat checkpoints/videochat --sam2 checkpoints/sam2.1_hiera_large.pt \\
      --virst checkpoints/virst.pt --out virst_7b
  virst convert --sam2 checkpoints/sam2.1_hiera_tiny.pt --out tracker
  virst convert --model virst_7b --quantize int8 --out virst_7b_int8
  virst convert --to-torch virst_7b --out back.pt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--videochat", type=Path, metavar="DIR", help="VideoChat-Flash: safetensors and tokenizer")
    parser.add_argument("--sam2", type=Path, metavar="FILE.pt", help="sam2.1_hiera_large.pt; alone, any of the four")
    parser.add_argument(
        "--virst", type=Path, metavar="FILE.pt", help="the VIRST checkpoint; without: a start for training"
    )
    parser.add_argument("--model", type=Path, help="model folder to quantize, in place of the released files")
    parser.add_argument("--to-torch", type=Path, metavar="MODEL", help="model folder to write in the release's names")
    parser.add_argument("--out", type=Path, required=True, help="folder (or .pt file) to write; must not exist")
    parser.add_argument("--config", default="virst_7b", help="preset or config.json (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the parameters (default: %(default)s)")
    parser.add_argument("--lora", default="merge", choices=["merge", "keep"], help="(default: %(default)s)")
    parser.add_argument("--lora-alpha", type=float, default=16.0, metavar="A", help="(default: %(default)s)")
    parser.add_argument(
        "--root", metavar="KEY", help="where in the --virst file (or --sam2 alone) the tensors are (default: found)"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer's folder (default: --videochat)")
    parser.add_argument("--quantize", choices=WEIGHTS[1:], help="integer kernels, for inference alone")
    parser.add_argument(
        "--parts",
        default=",".join(QUANTIZED),
        metavar="NAMES",
        help=f"which parts to quantize, of {','.join(PARTS)} (default: %(default)s)",
    )
    parser.add_argument("--peft-names", action="store_true", help="with --to-torch: name as PEFT wraps them")


def run(args: argparse.Namespace) -> int:
    """Converts.

    Raises:
      UserError: bad arguments, or what is wrong with the files.
    """
    jax.config.update("jax_platforms", "cpu")  # only shapes and files: leave accelerators alone
    try:
        if args.to_torch:
            if args.videochat or args.sam2 or args.virst or args.model or args.quantize:
                raise UserError("--to-torch takes a model folder alone: leave out all other sources and --quantize")
            to_torch(args.to_torch, args.out, peft=args.peft_names)
        elif args.model:
            if args.videochat or args.sam2 or args.virst or not args.quantize:
                raise UserError("--model takes --quantize int8 or int4, and no other source")
            _quantize(args, args.model)
        elif args.quantize:
            atomic.check_new(args.out)
            with atomic.scratch_folder(args.out.with_name(f"{args.out.name}.whole")) as scratch:
                _convert_sources(args, scratch / "whole")
                _quantize(args, scratch / "whole")
        else:
            _convert_sources(args, args.out)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("interrupted; nothing was written") from error
    print(f"wrote {args.out}")
    return 0


def _quantize(args: argparse.Namespace, model: Path) -> None:
    done = quantize_folder(model, args.out, args.quantize, args.parts.split(","))
    print("kernels: " + ", ".join(f"{part} {weights}" for part, weights in done.items()))


def _convert_sources(args: argparse.Namespace, out: Path) -> None:
    sources = (args.videochat, args.sam2, args.virst)
    if args.sam2 and not args.videochat and not args.virst:
        if args.quantize:
            raise UserError("--quantize takes a whole model: --sam2 alone gives a tracker without language model")
        done = convert_tracker(args.sam2, out, dtype=args.dtype, root=args.root)
    elif all(sources[:2]):
        done = convert(
            *sources,
            out,
            cfg=read_config(args.config),
            dtype=args.dtype,
            lora=args.lora,
            lora_alpha=args.lora_alpha,
            root=args.root,
            tokenizer=args.tokenizer,
        )
    else:
        raise UserError(
            "give the release's files: --videochat DIR, --sam2 FILE.pt and --virst FILE.pt (without the last: "
            "the model that training starts from; --sam2 alone: a tracker)"
        )
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{done.name}: {done.checked} values read again from {out} are those of the files; digest {done.digest}")
    if args.virst:
        for case in sorted((*args.virst.parent.glob("e2e_*.json"), *args.virst.parent.glob("*/e2e_*.json")))[:1]:
            print(f"its recorded case: virst parity {case.parent} --case {case.stem} --checkpoint {args.out}")


def main(argv: list[str] | None = None) -> int:
    return cli.call(sys.modules[__name__], argv, "python -m conversion.convert")


if __name__ == "__main__":
    sys.exit(main())
