"""What the accelerator that is here does with the network: whether its numbers agree, and how fast it is.

    python -m benchmarks.accelerator [--json accelerator.json] [--budget 540] [--size full] [--parts WORDS] [--again]

parity     the package's own parity cases in float32 (which must agree) and in bfloat16 (how far apart)
stage      every compiled step of virst_7b with random parameters made on the device, beside stored predictions
video      frames a second of whole videos: one sentence and eight, frames in memory and a file
attention  every implementation at the network's shapes: distance from the plain one, and time
training   a step at full width with two layers of the language model, and its share of the peak (MFU)
peer       the image encoder beside transformers' in PyTorch, also compiled by PyTorch, where that is installed

One table is printed at the end, and one JSON is written after every part. A part that fails is recorded with its error,
and the rest goes on. What is recorded is not run again, so the command can be given as often as needed; --again tries
what failed. Compiled programs are kept beside the JSON. No internet is used.
Exit status: 0; 1 if a part failed or float32 numbers do not agree; 2 with one line if an argument is wrong.
"""

import argparse
import gc
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.accelerator_parts import Bench, Part, Row, list_parts
from virst_jax.errors import UserError
from virst_jax.inference.placement import keep_compiled
from virst_jax.io import atomic
from virst_jax.io.json_files import read_json

GIB = 2**30
PACKAGES = ("jax", "jaxlib", "flax", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "torch", "transformers")
Record = dict[str, Any]


def machine(size: str) -> Record:
    """What the figures belong to."""
    device = jax.devices()[0]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": len(jax.devices()),
        "memory": _memory("bytes_limit"),
        "size": size,
        "python": platform.python_version(),
        "versions": versions,
    }


def _memory(name: str) -> int | None:
    """A figure of the device's memory, bytes; None: the device does not say."""
    try:
        return (jax.devices()[0].memory_stats() or {}).get(name)
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return None


class Log:
    """The parts that were run, kept in a file.

    Args:
      path: of the file; what it holds already is gone on with.
      here: of `machine`.

    Raises:
      UserError: the file is of another machine, another size or no such file.
    """

    def __init__(self, path: Path, here: Record):
        self.path = path
        self.content: Record = {"machine": here, "parts": {}}
        if not path.exists():
            return
        found = read_json(path).value
        if not isinstance(found, dict) or not isinstance(found.get("parts"), dict) or "machine" not in found:
            raise UserError(f"{path}: no file of this benchmark; give another one with --json")
        for name in ("device", "size"):
            if found["machine"].get(name) != here[name]:
                raise UserError(
                    f"{path}: was written with {name} {found['machine'].get(name)!r}, not {here[name]!r}; give another "
                    "file with --json"
                )
        self.content = found
        for part in self.parts.values():
            if "seconds" not in part:  # it was begun, and the process did not live to tell
                part |= {"seconds": 0.0, "rows": [], "error": "the process ended within this part"}
                atomic.write_json(path, self.content)

    @property
    def parts(self) -> dict[str, Record]:
        parts: dict[str, Record] = self.content["parts"]
        return parts

    def begin(self, name: str) -> None:
        self.parts[name] = {}
        atomic.write_json(self.path, self.content)

    def finish(self, name: str, seconds: float, rows: list[Row], error: str) -> None:
        part: Record = {"seconds": round(seconds, 2), "rows": rows}
        if error:
            part["error"] = error
        if peak := _memory("peak_bytes_in_use"):
            part["peak_gib"] = round(peak / GIB, 3)  # since the process began
        self.parts[name] = part
        atomic.write_json(self.path, self.content)

    def forget(self, name: str) -> None:
        self.parts.pop(name, None)
        atomic.write_json(self.path, self.content)


def one_line(error: BaseException) -> str:
    """The first line of an error, with its kind."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


def run_parts(parts: list[Part], log: Log, budget: float, again: bool) -> list[str]:
    """Runs what is not recorded, as long as it fits; the names of what is left."""
    begun, left = time.monotonic(), []
    for part in parts:
        known = log.parts.get(part.name)
        if known is not None and not (again and "error" in known):
            continue
        if time.monotonic() - begun + part.seconds > budget:
            left.append(part.name)
            continue
        print(part.name, file=sys.stderr, flush=True)
        log.begin(part.name)
        start, rows, error = time.monotonic(), [], ""
        try:
            rows = part.run()
        except KeyboardInterrupt:
            log.forget(part.name)
            raise
        except Exception as failure:  # of whatever kind: the other parts are wanted all the same
            error = one_line(failure)
            gc.collect()
        log.finish(part.name, time.monotonic() - start, rows, error)
    return left


def whole_video(parts: dict[str, Record], stages: list[str], frames: int) -> float | None:
    """Frames a second by the times of the steps; None: one of them has no time."""
    rows = [row for name in stages for row in parts.get(name, {}).get("rows", [])]
    if not rows or len(rows) < len(stages):
        return None
    return frames / sum(1e-3 * row["value"] * row["calls"] for row in rows)


def show(log: Log, stages: list[str], frames: int, left: list[str], console: Console) -> None:
    here = log.content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    memory = f", {here['memory'] / GIB:.1f} GiB" if here["memory"] else ""
    title = f"{here['device']}{memory}, size {here['size']}; Python {here['python']}, {versions}"
    table = Table(title=title, title_justify="left")
    for column in ("part", "what", "value", "unit", "beside it"):
        table.add_column(column, justify="right" if column == "value" else "left", overflow="fold")
    for name, part in log.parts.items():
        if error := part.get("error"):
            table.add_row(name, "failed", "", "", error, style="red")
        for row in part.get("rows", []):
            value = "" if row["value"] is None else f"{row['value']:.4g}"
            style = "red" if row.get("wrong") else None
            table.add_row(name, row["what"], value, row["unit"], row.get("note", ""), style=style)
    if speed := whole_video(log.parts, stages, frames):
        what = f"{frames} frames by the steps' times"
        table.add_row("stage", what, f"{speed:.4g}", "frames/s", "decoding and copies to the host aside")
    peaks = [part["peak_gib"] for part in log.parts.values() if "peak_gib" in part]
    if peaks:
        table.add_row("memory", "largest peak of the parts", f"{max(peaks):.4g}", "GiB", "device.memory_stats")
    console.print(table)
    if left:
        console.print(f"left for another run: {', '.join(left)}", highlight=False)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("accelerator.json"), help="the figures, and what is done")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="(540)")
    parser.add_argument("--size", choices=("full", "small"), help="default: full on accelerators, small on CPUs")
    parser.add_argument("--parts", default="", metavar="WORDS", help="parts whose names begin so, with commas between")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="run what failed once more")
    options = parser.parse_args(arguments)
    if options.budget <= 0 or options.repeats < 1:
        raise UserError(f"--budget {options.budget:g}, --repeats {options.repeats}: give more than 0")
    return options


def main(arguments: list[str] | None = None) -> int:
    left: list[str] = []
    try:
        options = parse(arguments)
        size = options.size or ("small" if jax.default_backend() == "cpu" else "full")
        log = Log(options.json, machine(size))
        bench = Bench(size, options.repeats)
        words = tuple(word for word in options.parts.split(",") if word)
        every = list_parts(bench)
        parts = [part for part in every if not words or part.name.startswith(words)]
        if not parts:
            names = dict.fromkeys(part.name.split("/")[0] for part in every)
            raise UserError(f"--parts {options.parts}: there are {', '.join(names)}")
        keep_compiled(options.json.with_suffix(".cache"))
        left = run_parts(parts, log, options.budget, options.again)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what is recorded is not run again", file=sys.stderr)
        return 130
    stages = [part.name for part in every if part.name.startswith("stage/")]
    show(log, stages, bench.frames, left, Console(width=None if sys.stdout.isatty() else 160))
    wrong = [n for n, p in log.parts.items() if "error" in p or any(row.get("wrong") for row in p.get("rows", []))]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
