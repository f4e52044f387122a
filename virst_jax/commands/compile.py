"""`virst compile`: the steps of segmentation and chat compiled for hardware that need not be there."""

import argparse
import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virst_jax.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from virst_jax.config import VirstConfig
    from virst_jax.inference.abstract import StepCall
    from virst_jax.profiling.aot import Compiled
    from virst_jax.profiling.prediction import Prediction
    from virst_jax.profiling.schedule import Spent
    from virst_jax.types import PyTree

HELP = """Compile the steps of segmentation and chat for hardware that need not be there: do they fit, how fast?

Nothing is run, and no parameters are read. For TPUs the milliseconds of every step are predicted from the compiler's
own estimates, with full effort, which takes one to three minutes a step. For NVIDIA GPUs a roofline is given: what
FLOPs and bytes alone take at the rates of the data sheet."""
EXAMPLES = """examples:
  virst compile --model virst_7b --topology v5e:1x1
  virst compile --model virst_7b --topology v5e:1x1 --quantize int8                 with integer kernels
  virst compile --model virst_7b --topology v5e:2x2 --expressions 8 --frames 64     four chips share the language model
  virst compile --model sam2.1_large --topology h100:1 --expressions 4             tracking four objects from clicks
  virst compile --model MODEL --topology h100:1 --only track                        does it fit?
  virst compile --model MODEL --topology v5e:1x1 --operations 20 --picture t.png   where does the time go?"""
GIB = 2**30
TRACKER = "sam2.1_"  # before a size of SAM 2.1, tracked from clicks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a preset (virst_7b, tiny, sam2.1_large, ...) or a model folder")
    parser.add_argument("--topology", required=True, help="hardware to compile for: v5e:1x1, v6e:1x1, h100:1, cpu:1")
    parser.add_argument("--expressions", type=int, default=1, metavar="N", help="sentences or objects, 1 to 8 (1)")
    parser.add_argument("--frames", type=int, default=64, metavar="T", help="of the video (64)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="(bfloat16)")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="compile it as if it were quantized")
    parser.add_argument("--parts", default="llm,vision", metavar="NAMES", help="parts to quantize (llm,vision)")
    parser.add_argument("--effort", choices=("quick", "full"), default="full", help="quick: does it fit? (full)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also add the figures to this file, in ms")
    parser.add_argument(
        "--operations", type=int, default=0, metavar="N", help="also the N dearest operations of a step"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw what the times go to: .png, .svg or .pdf")
    parser.add_argument("--only", default="", metavar="WORDS", help="steps whose names hold these words")


def run(args: argparse.Namespace) -> int:
    from virst_jax.io import atomic
    from virst_jax.profiling import aot, picture, prediction

    if not 1 <= args.expressions <= 8:
        raise UserError(f"--expressions {args.expressions}: give 1 to 8, which are tracked together")
    if args.frames < 1:
        raise UserError(f"--frames {args.frames}: give 1 or more")
    if args.operations < 0:
        raise UserError(f"--operations {args.operations}: give 0 or more")
    if args.picture:
        picture.check_format(args.picture)
        atomic.check_place(args.picture)
    wanted = "--picture" if args.picture else "--operations" if args.operations else ""
    if wanted and (not prediction.timed(args.topology) or args.effort == "quick"):
        raise UserError(f"{wanted}: times are known of TPUs and NVIDIA GPUs, with --effort full; leave it out")
    cfg = _config(args.model, args.dtype)
    if args.quantize:
        cfg = _quantized(cfg, args.quantize, args.parts)
    kept = _read_figures(args.json) if args.json else {}
    params, calls = steps_for(cfg, args.topology, args.frames, args.expressions)
    chosen = [call for call in calls if args.only in call.name]
    if not chosen:
        raise UserError(f"--only {args.only!r}: no such step; there are {', '.join(call.name for call in calls)}")
    done: list[tuple[StepCall, Compiled]] = []
    for call in chosen:
        found = compile_step(call, params, args.topology, args.effort == "quick")
        done.append((call, found))
        print(f"{call.name}: compiled in {found.seconds:.0f} s", flush=True)
        if args.json:
            _keep(args, kept, call.name, found)
    _print(args, cfg, aot.device_bytes(params), calls, done)
    return 0


def steps_for(cfg: "VirstConfig", topology: str, frames: int, expressions: int) -> "tuple[PyTree, list[StepCall]]":
    """Shapes of the parameters as they lie on the topology's devices, and the steps; see abstract.step_calls."""
    import jax

    from virst_jax.inference import abstract
    from virst_jax.io import model_folder
    from virst_jax.parallel import sharding
    from virst_jax.profiling import aot

    mesh = sharding.make_mesh(1, 1, -1, devices=aot.topology_devices(topology))
    params = abstract.parameters(model_folder.parameter_shapes(cfg), cfg.compute.dtype)
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    params = jax.tree.map(place, params, sharding.parameter_shardings(cfg, mesh))
    with sharding.use_mesh(mesh):
        return params, abstract.step_calls(cfg, params, frames, expressions)


def compile_step(call: "StepCall", params: "PyTree", topology: str, quick: bool = False) -> "Compiled":
    """Compiles a step of `steps_for`; every device holds its other arguments whole."""
    import jax

    from virst_jax.parallel import sharding
    from virst_jax.profiling import aot

    mesh = jax.tree.leaves(params)[0].sharding.mesh
    everywhere = sharding.replicated(mesh)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), call.arguments)
    first = () if call.part is None else (params[call.part] if call.part else params,)
    step = functools.partial(call.function, None) if call.part is None else call.function
    with sharding.use_mesh(mesh):
        return aot.compile_function(functools.partial(step, **call.static), (*first, *arguments), topology, quick)


def _read_figures(path: Path) -> dict[str, Any]:
    from virst_jax.io.json_files import read_json

    figures = read_json(path).value if path.exists() else {}
    if not isinstance(figures, dict):
        raise UserError(f"{path}: holds no figures of this command; give another file with --json")
    return figures


def _keep(args: argparse.Namespace, figures: dict[str, Any], name: str, found: "Compiled") -> None:
    """Adds a step to the file, as model, topology, sentences and step."""
    from virst_jax.io import atomic

    row = {"temporary_gib": found.temporary / GIB}
    if found.prediction is not None:
        row |= {"slow": 1e3 * found.prediction.slow.seconds, "fast": 1e3 * found.prediction.fast.seconds}
    if found.roofline is not None:
        row |= {"roofline": 1e3 * found.roofline.seconds, "operations": found.roofline.operations}
    model = f"{args.model} {args.quantize} {args.parts}" if args.quantize else args.model
    place = figures.setdefault(model, {}).setdefault(args.topology, {}).setdefault(str(args.expressions), {})
    place[name] = {key: round(value, 3) for key, value in row.items()}
    atomic.write_json(args.json, figures)


def _config(given: str, dtype: str) -> "VirstConfig":
    """A preset with its adapters merged, as `virst convert` leaves it, or the config of a model folder; computing in
    `dtype`."""
    import dataclasses

    from virst_jax.api import find_model
    from virst_jax.config import PRESETS, SAM2_SIZES, TrackerConfig, get_preset, sam2_preset
    from virst_jax.io import model_folder

    trackers = {TRACKER + size: size for size in SAM2_SIZES}
    cfg = _merged(get_preset(given)) if given in PRESETS else None
    if given in trackers:
        cfg = TrackerConfig(name=given, sam2=sam2_preset(trackers[given]))
    if cfg is None:
        with contextlib.suppress(UserError):
            cfg = model_folder.read_config(find_model(given))
    if cfg is None:
        raise UserError(
            f"--model {given}: neither a model folder nor a preset ({', '.join([*sorted(PRESETS), *trackers])})"
        )
    return dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, dtype=dtype, param_dtype=dtype))


def _quantized(cfg: "VirstConfig", kind: str, parts: str) -> "VirstConfig":
    """The network with integer kernels; adapters of the language model are merged."""
    from virst_jax.config import TrackerConfig, quantized

    if isinstance(cfg, TrackerConfig) and parts != "hiera":
        raise UserError(f"--quantize --parts {parts}: SAM 2.1 alone has none of these; add --parts hiera")

    return quantized(_merged(cfg) if "llm" in parts.split(",") else cfg, kind, parts.split(","))


def _merged(cfg: "VirstConfig") -> "VirstConfig":
    """Without adapters of the language model."""
    import dataclasses

    from virst_jax.config import LoraConfig

    return dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, lora=LoraConfig(rank=0)))


def _print(
    args: argparse.Namespace,
    cfg: "VirstConfig",
    weights: int,
    calls: "list[StepCall]",
    done: "list[tuple[StepCall, Compiled]]",
) -> None:
    from rich.console import Console
    from rich.table import Table

    from virst_jax.config import FLOAT, weights_of
    from virst_jax.profiling import aot

    console = Console()
    kernels = "".join(f", {part} {weights}" for part, weights in weights_of(cfg).items() if weights != FLOAT)
    where = f"{cfg.name} in {args.dtype}{kernels} on {args.topology}"
    each = "objects" if cfg.name.startswith(TRACKER) else "sentences"
    title = f"{where}: {args.frames} frames, {args.expressions} {each}"
    memory = _table(Table(title=title, title_justify="left"), "step", "calls", "temporary, GiB", "results, GiB")
    for call, found in done:
        sizes = (f"{size / GIB:.3f}" for size in (found.temporary, found.results))
        memory.add_row(call.name, str(call.calls or "chat"), *sizes)
    console.print(memory)
    kept = sum(call.kept for call in calls)
    peak = weights + kept + max(found.temporary + found.results for _, found in done)
    limit = aot.capacity(args.topology)
    verdict = " GiB"
    if limit:
        fits = f"fits, {(limit - peak) / GIB:.2f} GiB are left" if peak <= limit else "does not fit"
        verdict = f" of {limit / GIB:.1f} GiB: {fits}"
    console.print(
        f"a device holds {weights / GIB:.2f} GiB of parameters and {kept / GIB:.2f} GiB of features, memories and "
        f"cache; with the largest step {peak / GIB:.2f}{verdict}"
    )
    _print_predictions(args, console, calls, done)
    _print_rooflines(args, console, calls, done)
    timed = {call.name: spent for call, found in done if (spent := _times(found)) is not None}
    if args.operations:
        _print_operations(console, {name: upper for name, (upper, _) in timed.items()}, args.operations)
    if args.picture and timed:
        from virst_jax.io import atomic
        from virst_jax.profiling import picture

        atomic.write_bytes(args.picture, picture.draw(timed, where, picture.check_format(args.picture)))
        console.print(f"{args.picture}: what the times go to")


def _times(found: "Compiled") -> "tuple[Spent, Spent] | None":
    """The upper and the lower figure of a step."""
    if found.prediction is not None:
        return found.prediction.slow, found.prediction.fast
    return None if found.roofline is None else (found.roofline, found.roofline)


def _print_operations(console: "Console", steps: "dict[str, Spent]", count: int) -> None:
    from rich.table import Table

    from virst_jax.profiling.prediction import dearest

    for name, spent in steps.items():
        table = Table(title=f"{name}: the dearest of its operations, ms of a call", title_justify="left")
        table.add_column("operation", overflow="fold")
        _table(table, "of", "ms")
        for operation, category, seconds in dearest(spent, count):
            table.add_row(operation, category, f"{1e3 * seconds:.3f}")
        console.print(table)


def _print_predictions(
    args: argparse.Namespace, console: "Console", calls: "list[StepCall]", done: "list[tuple[StepCall, Compiled]]"
) -> None:
    from rich.table import Table

    steps = [(call, found.prediction) for call, found in done if found.prediction is not None]
    if not steps:
        return
    used = _used([step.slow for _, step in steps])
    times = Table(title="predicted ms of a call, not measured", title_justify="left")
    _table(times, "step", "compiler's estimate", "moves at bandwidth", *used)
    for call, step in steps:
        figures = (step.slow.seconds, step.fast.seconds, *map(step.slow.category, used))
        times.add_row(call.name, *(f"{1e3 * seconds:.2f}" for seconds in figures))
    console.print(times)
    if _is_whole(calls, done):
        slow, fast = (sum(call.calls * one.seconds for call, one in each) for each in _both(steps))
        console.print(
            f"{args.frames} frames in {fast:.2f} to {slow:.2f} s: {args.frames / slow:.1f} to {args.frames / fast:.1f} "
            "frames/s, decoding and copies to the host aside"
        )
    unknown = sorted({name for _, step in steps for name in step.slow.without_estimate})
    if unknown:
        console.print(f"operations without an estimate are not counted in full: {', '.join(unknown)[:300]}")


def _print_rooflines(
    args: argparse.Namespace, console: "Console", calls: "list[StepCall]", done: "list[tuple[StepCall, Compiled]]"
) -> None:
    from rich.table import Table

    steps = [(call, found.roofline) for call, found in done if found.roofline is not None]
    if not steps:
        return
    used = _used([spent for _, spent in steps])
    times = Table(title="roofline, ms of a call: a lower bound, not measured", title_justify="left")
    _table(times, "step", "roofline", *used, "operations")
    for call, spent in steps:
        figures = (spent.seconds, *map(spent.category, used))
        times.add_row(call.name, *(f"{1e3 * seconds:.2f}" for seconds in figures), f"{spent.operations:,}")
    console.print(times)
    if _is_whole(calls, done):
        least = sum(call.calls * spent.seconds for call, spent in steps)
        launched = sum(call.calls * spent.operations for call, spent in steps)
        console.print(
            f"{args.frames} frames take {least:.2f} s at least ({args.frames / least:.1f} frames/s at most), and the "
            f"starts of {launched:,} operations, decoding and copies to the host aside"
        )


def _is_whole(calls: "list[StepCall]", done: "list[tuple[StepCall, Compiled]]") -> bool:
    """Whether all steps of segmentation were compiled."""
    return {call.name for call in calls if call.calls} <= {call.name for call, _ in done}


def _used(spent: "list[Spent]") -> list[str]:
    from virst_jax.profiling.schedule import CATEGORIES

    return [name for name in CATEGORIES if any(one.category(name) for one in spent)]


def _table(table: "Table", *headings: str) -> "Table":
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "step" else "right")
    return table


def _both(
    steps: "list[tuple[StepCall, Prediction]]",
) -> "tuple[list[tuple[StepCall, Spent]], list[tuple[StepCall, Spent]]]":
    return [(call, step.slow) for call, step in steps], [(call, step.fast) for call, step in steps]
