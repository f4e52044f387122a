"""`virst compile`: the steps of segmentation and chat compiled for hardware that need not be there."""

import argparse
import contextlib
import functools
from typing import TYPE_CHECKING

from virst_jax.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from virst_jax.config import VirstConfig
    from virst_jax.inference.abstract import StepCall
    from virst_jax.profiling.aot import Compiled
    from virst_jax.profiling.prediction import Prediction
    from virst_jax.profiling.schedule import Spent

HELP = """Compile the steps of segmentation and chat for hardware that need not be there: do they fit, how fast?

Nothing is run, and no parameters are read. For TPUs the milliseconds of every step are predicted from the compiler's
own estimates, with full effort, which takes one to three minutes a step."""
EXAMPLES = """examples:
  virst compile --model virst_7b --topology v5e:1x1
  virst compile --model virst_7b --topology v5e:2x2 --expressions 8 --frames 64     four chips share the language model
  virst compile --model MODEL --topology h100:1 --only track                        does it fit?"""
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a preset (virst_7b, tiny, ...) or a model folder")
    parser.add_argument("--topology", required=True, help="hardware to compile for: v5e:1x1, v6e:1x1, h100:1, cpu:1")
    parser.add_argument("--expressions", type=int, default=1, metavar="N", help="sentences about the video, 1 to 8 (1)")
    parser.add_argument("--frames", type=int, default=64, metavar="T", help="of the video (64)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="(bfloat16)")
    parser.add_argument("--effort", choices=("quick", "full"), default="full", help="quick: does it fit? (full)")
    parser.add_argument("--only", default="", metavar="WORDS", help="steps whose names hold these words")


def run(args: argparse.Namespace) -> int:
    import jax

    from virst_jax.inference import abstract
    from virst_jax.io import model_folder
    from virst_jax.parallel import sharding
    from virst_jax.profiling import aot

    if not 1 <= args.expressions <= 8:
        raise UserError(f"--expressions {args.expressions}: give 1 to 8, which are tracked together")
    if args.frames < 1:
        raise UserError(f"--frames {args.frames}: give 1 or more")
    cfg = _config(args.model, args.dtype)
    mesh = sharding.make_mesh(1, 1, -1, devices=aot.topology_devices(args.topology))
    shardings = sharding.parameter_shardings(cfg, mesh)
    params = abstract.parameters(model_folder.parameter_shapes(cfg), args.dtype)
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    params = jax.tree.map(place, params, shardings)
    whole = functools.partial(jax.tree.map, lambda x: place(x, sharding.replicated(mesh)))
    quick = args.effort == "quick"
    with sharding.use_mesh(mesh):
        calls = abstract.step_calls(cfg, params, args.frames, args.expressions)
        chosen = [call for call in calls if args.only in call.name]
        if not chosen:
            raise UserError(f"--only {args.only!r}: no such step; there are {', '.join(call.name for call in calls)}")
        done: list[tuple[StepCall, Compiled]] = []
        for call in chosen:
            first = () if call.part is None else (params[call.part] if call.part else params,)
            step = functools.partial(call.function, None) if call.part is None else call.function
            function = functools.partial(step, **call.static)
            found = aot.compile_function(function, (*first, *whole(call.arguments)), args.topology, quick)
            done.append((call, found))
            print(f"{call.name}: compiled in {found.seconds:.0f} s", flush=True)
    _print(args, cfg, aot.device_bytes(params), calls, done)
    return 0


def _config(given: str, dtype: str) -> "VirstConfig":
    """A preset, or the config of a model folder, computing in `dtype`."""
    import dataclasses

    from virst_jax.api import find_model
    from virst_jax.config import PRESETS, get_preset
    from virst_jax.io import model_folder

    cfg = get_preset(given) if given in PRESETS else None
    if cfg is None:
        with contextlib.suppress(UserError):
            cfg = model_folder.read_config(find_model(given))
    if cfg is None:
        raise UserError(f"--model {given}: neither a model folder nor a preset ({', '.join(sorted(PRESETS))})")
    return dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, dtype=dtype, param_dtype=dtype))


def _print(
    args: argparse.Namespace,
    cfg: "VirstConfig",
    weights: int,
    calls: "list[StepCall]",
    done: "list[tuple[StepCall, Compiled]]",
) -> None:
    from rich.console import Console
    from rich.table import Table

    from virst_jax.profiling import aot
    from virst_jax.profiling.schedule import CATEGORIES

    console = Console()
    title = f"{cfg.name} in {args.dtype} on {args.topology}: {args.frames} frames, {args.expressions} sentences"
    memory = _table(Table(title=title, title_justify="left"), "step", "calls", "temporary, GiB", "results, GiB")
    for call, found in done:
        sizes = (f"{size / GIB:.3f}" for size in (found.temporary, found.results))
        memory.add_row(call.name, str(call.calls or "chat"), *sizes)
    console.print(memory)
    kept = sum(call.kept for call in calls)
    peak = weights + kept + max(found.temporary + found.results for _, found in done)
    limit = aot.capacity(args.topology)
    verdict = f" of {limit / GIB:.1f} GiB: {'fits' if peak <= limit else 'does not fit'}" if limit else " GiB"
    console.print(
        f"a device holds {weights / GIB:.2f} GiB of parameters and {kept / GIB:.2f} GiB of features, memories and "
        f"cache; with the largest step {peak / GIB:.2f}{verdict}"
    )
    steps = [(call, found.prediction) for call, found in done if found.prediction is not None]
    if not steps:
        return
    used = [name for name in CATEGORIES if any(step.slow.category(name) for _, step in steps)]
    times = Table(title="predicted ms of a call, not measured", title_justify="left")
    _table(times, "step", "compiler's estimate", "moves at bandwidth", *used)
    for call, step in steps:
        figures = (step.slow.seconds, step.fast.seconds, *map(step.slow.category, used))
        times.add_row(call.name, *(f"{1e3 * seconds:.2f}" for seconds in figures))
    console.print(times)
    if {call.name for call in calls if call.calls} <= {call.name for call, _ in done}:
        slow, fast = (sum(call.calls * one.seconds for call, one in each) for each in _both(steps))
        console.print(
            f"{args.frames} frames in {fast:.2f} to {slow:.2f} s: {args.frames / slow:.1f} to {args.frames / fast:.1f} "
            "frames/s, decoding and copies to the host aside"
        )
    unknown = sorted({name for _, step in steps for name in step.slow.unknown_kernels})
    if unknown:
        console.print(f"kernels without an estimate are not counted: {', '.join(unknown)[:300]}")


def _table(table: "Table", *headings: str) -> "Table":
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "step" else "right")
    return table


def _both(
    steps: "list[tuple[StepCall, Prediction]]",
) -> "tuple[list[tuple[StepCall, Spent]], list[tuple[StepCall, Spent]]]":
    return [(call, step.slow) for call, step in steps], [(call, step.fast) for call, step in steps]
