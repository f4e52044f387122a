"""Compares our network with recorded outputs of the PyTorch release, case by case.

    python -m conversion.parity CASE_DIR [--case NAME ...] [--dtype float32] [--json FILE]

Exit status: 0 all outputs pass; 1 an output fails, a case is unknown or a file is damaged; 2 bad arguments.
`virst parity` is the same.
"""

import argparse
import dataclasses
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from rich.console import Console

from virst_jax import cli
from virst_jax.config import ROUNDINGS
from virst_jax.errors import UserError
from virst_jax.io import atomic

from .cases import chat, curve, inputs, modules, network, sam2, tables, training
from .cases.case import Case, Check, Runner, case_names, load_case

RUNNERS: list[tuple[str, Runner]] = [
    (r"qwen2.*", modules.run_qwen2),
    (r"umt.*", modules.run_umt),
    (r"token_merge.*", modules.run_token_merge),
    (r"hiera.*", modules.run_hiera),
    (r"memory.*", modules.run_memory),
    (r"mask_decoder.*", modules.run_mask_decoder),
    (r"st_fusion.*", modules.run_st_fusion),
    (r"losses.*", modules.run_losses),
    (r"anchors.*", tables.run_anchors),
    (r"metrics.*", tables.run_metrics),
    (r"prompts.*", tables.run_prompts),
    (r"prompt_variants.*", tables.run_prompts),
    (r"frame_indices.*", tables.run_frame_indices),
    (r"transforms.*", tables.run_transforms),
    (r"reading.*", inputs.run_reading),
    (r"sizes.*", inputs.run_sizes),
    (r"tokens.*", inputs.run_tokens),
    (r"sam2_image_.*", sam2.run_sam2_image),
    (r"sam2_video_.*", sam2.run_sam2_video),
    (r"sam2_blocks.*", sam2.run_sam2_blocks),
    (r"chat_.*", chat.run_chat),
    (r"e2e_.*", network.run_e2e),
    (r"train_loss.*", training.run_train_loss),
    (r"train_batch.*", training.run_train_batch),
    (r"loss_curve.*", curve.run_loss_curve),
]


def runner_of(name: str) -> Runner:
    """The function that runs a case, by the case's name.

    Raises:
      UserError: no kind of case has this name.
    """
    for pattern, runner in RUNNERS:
        if re.fullmatch(pattern, name):
            return runner
    kinds = ", ".join(pattern.removesuffix(".*") for pattern, _ in RUNNERS)
    raise UserError(f"{name}: unknown kind of case; names begin with one of {kinds}")


def run_case(folder: Path, name: str, **given: Any) -> tuple[list[Check], float]:
    """See `run_whole_case`; returns the checks and the seconds."""
    _, checks, seconds = run_whole_case(folder, name, **given)
    return checks, seconds


def run_whole_case(folder: Path, name: str, **given: Any) -> tuple[Case, list[Check], float]:
    """Runs one case in float32 products of full precision and returns it, its checks and the seconds it took.

    What is wrong with the case itself becomes a failed check.
    """
    start = time.perf_counter()
    case: Case | None = None
    try:
        case = load_case(folder, name, **given)
        with jax.default_matmul_precision("highest"):
            runner_of(name)(case)
        checks = case.checks
        if not checks:
            raise UserError("nothing was compared")
    except UserError as error:
        checks = [*(case.checks if case else []), Check("-", False, note=str(error))]
    except Exception as error:  # of whatever kind: the other cases' results are wanted all the same
        note = f"the case does not fit its kind ({type(error).__name__}: {error})"
        checks = [*(case.checks if case else []), Check("-", False, note=note)]
    return case or Case(name, {}, {}), checks, time.perf_counter() - start


HEADER = ("case", "output", "max abs", "rel L2", "IoU", "", "s", "note")
WIDTHS = (21, 22, 8, 8, 7, 5, 5, 0)


def _line(*cells: str) -> str:
    numbers = (False, False, True, True, True, False, True, False)
    padded = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(cells, WIDTHS, numbers, strict=True))
    return " ".join(padded).rstrip()


def _row(name: str, check: Check, seconds: float | None) -> str:
    number = lambda x: "" if x is None else f"{x:.1e}"  # noqa: E731
    return _line(
        name,
        check.output,
        number(check.max_abs),
        number(check.relative),
        "" if check.iou is None else f"{check.iou:.4f}",
        "pass" if check.passed else "FAIL",
        "" if seconds is None else f"{seconds:.0f}",
        " ".join(check.note.split()),
    )


WITHIN = {"bisect": "conversion.bisect", "ratio": "conversion.ratio"}
HELP = "Compare the network with recorded outputs of the PyTorch release, case by case."
EXAMPLES = """examples:
  virst parity cases
  virst parity cases --case e2e_dog --checkpoint virst_7b
  virst parity bisect cases/e2e_dog --checkpoint virst_7b      # which operation differs first? (bisect --help)
  virst parity ratio cases/e2e_dog --low bf16/e2e_dog --checkpoint virst_7b      # bfloat16, against the release's own

Exit status: 0 all outputs pass; 1 an output fails, a case is unknown or a file is damaged; 2 bad arguments."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("case_dir", type=Path, metavar="CASE_DIR", help="directory of NAME.json and NAME.npz")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="run these cases only")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--rounding",
        default="late",
        choices=ROUNDINGS,
        help="of the language model in bfloat16: as late as can be (late)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="also write a page here: tables, errors, masks; one HTML file"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="Qwen2 tokenizer of the prompts case (default: CASE_DIR/../tokenizer)",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="converted checkpoint, for recorded cases")


def run(args: argparse.Namespace) -> int:
    """Runs the cases and prints the table; 1 if one fails.

    Raises:
      UserError: there are no cases.
    """
    folder = args.case_dir
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; give one that holds NAME.json and NAME.npz")
    names = args.case or case_names(folder)
    if not names:
        raise UserError(f"{folder}: holds no cases (NAME.json, NAME.npz)")
    beside = folder.resolve().parent / "tokenizer"
    given = {
        "dtype": args.dtype,
        "rounding": args.rounding,
        "tokenizer": args.tokenizer or (beside if beside.is_dir() else None),
        "checkpoint": args.checkpoint,
    }
    report: ModuleType | None = None
    if args.report:
        from . import report as page  # its packages belong to an extra

        report = page
        given["detailed"] = True
    sections: list[Any] = []
    console = Console(highlight=False, soft_wrap=True)
    console.print(_line(*HEADER), style="bold")
    results: list[dict[str, Any]] = []
    with console.status("") as status:
        for i, name in enumerate(names):
            status.update(f"{name} ({i + 1} of {len(names)})")
            case, checks, seconds = run_whole_case(folder, name, **given)
            for k, check in enumerate(checks):
                row = _row(name if k == 0 else "", check, seconds if k == 0 else None)
                console.print(row, style=None if check.passed else "red", markup=False)
            results.append({"case": name, "seconds": seconds, "checks": [dataclasses.asdict(c) for c in checks]})
            if args.json:
                atomic.write_json(args.json, results)
            if report:
                sections.append(report.case_section(case, checks, seconds))
                report.write_page(args.report, f"Parity: the cases of {folder.name}", sections, _conclusion(results)[0])
    conclusion, failed = _conclusion(results)
    console.print(conclusion)
    return 1 if failed else 0


def _conclusion(results: list[dict[str, Any]]) -> tuple[str, int]:
    failed = sum(not check["passed"] for result in results for check in result["checks"])
    total = sum(len(result["checks"]) for result in results)
    return f"{len(results)} cases, {total} outputs, {failed} failed", failed


def main(argv: list[str] | None = None) -> int:
    return cli.call(sys.modules[__name__], argv, "python -m conversion.parity")


if __name__ == "__main__":
    sys.exit(main())
