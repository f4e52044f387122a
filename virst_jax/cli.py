"""The command `virst`: subcommands, each a module with HELP, add_arguments and run.

Exit status: that of the subcommand, 2 for bad input (one line on stderr says what, where and how to fix it), 130 when
interrupted, 143 when told to end by SIGTERM.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from virst_jax import __version__, programs
from virst_jax.commands import failures, interrupt
from virst_jax.commands.parser import Parser, did_you_mean

# imported when they are called: help is there at once
COMMANDS = {
    "segment": "segment objects in a video by sentences",
    "live": "segment a camera, a pipe or a network stream as it comes",
    "track": "track objects from points, boxes and masks",
    "serve": "serve a page in the browser, and an HTTP interface",
    "export": "write a result as COCO, YOLO, DAVIS, CSV, ...",
    "chat": "ask a question about a video",
    "demo": "segment the sample clip with the small model of this package",
    "compile": "compile the steps for hardware that is not there: fit and speed",
    "info": "show devices, versions and what a model is",
    "data": "check, show or build data sets",
    "train": "train a model by a recipe",
    "eval": "evaluate a model on a benchmark",
    "metrics": "score folders of predicted masks",
    "submit": "write and check submissions to benchmark servers",
    "export-model": "write the steps as StableHLO, to run without this network's code",
    "push": "publish a model on the Hugging Face hub",
    "convert": "convert the released PyTorch checkpoints, or back",
    "parity": "compare the network with recorded outputs of the release",
    "record": "record outputs of the release (needs PyTorch)",
    "completion": "print a script that completes `virst` in a shell",
}
Run = Callable[[argparse.Namespace], int]
HELP_SUMMARY = "explain a command"
# commands that are modules beside the package in a checkout, where `python -m` runs them too
BESIDE = {name: f"conversion.{name}" for name in ("convert", "parity", "record")}
EXAMPLES = """examples:
  virst demo
  virst segment dog.mp4 "the dog" "what does the dog chase?" --model virst_7b --out masks
  virst chat dog.mp4 "what happens in the video?" --model virst_7b
  virst info --model virst_7b
  virst train --config=synthetic --steps=2

`virst help COMMAND`, or `virst COMMAND --help`, explains a command."""


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _listing()
    if not argv:
        parser.print_help()
        return 2
    known = parser.parse_args(argv)
    name, rest = known.command, known.rest
    if name == "help":
        if not rest or rest[0].startswith("-"):
            parser.print_help()
            return 0
        name, rest = rest[0], ["--help"]
    if name not in COMMANDS:
        meant = did_you_mean(name, [*COMMANDS, "help"])
        parser.error(f"unknown command {name!r}{meant or ': choose one of ' + ', '.join(COMMANDS)}")
    return guarded(lambda: _run(name, rest))


def call(command: ModuleType, argv: Sequence[str] | None, prog: str, run: Run | None = None) -> int:
    """The exit status of a command that is a program of its own, such as train.py.

    Args:
      command: defines the arguments, and what they do.
      argv: None: this process's arguments.
      prog: how the user called it.
      run: takes the place of the command's.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if run is None:
        return guarded(lambda: _parse_and_run(command, prog, given))
    return guarded(lambda: run(_options(command, prog).parse_args(given)))


def guarded(run: Callable[[], int]) -> int:
    """The exit status of `run`; what a person can do something about takes one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal of another encoding must not end the work with an exception
            stream.reconfigure(errors="backslashreplace")
    try:
        with interrupt.watched():
            return run()
    except KeyboardInterrupt as stop:
        failures.end_bars()
        print(str(stop) or "interrupted; finished parts are kept", file=sys.stderr)
        return getattr(stop, "status", 130)
    except BrokenPipeError:
        failures.leave_pipe()
        return 1
    except Exception as error:
        line = failures.one_line(error)
        if line is None:
            raise
        failures.end_bars()
        print(f"error: {line}", file=sys.stderr)
        return 2


def command_module(name: str) -> ModuleType:
    """The module of a command."""
    if name in BESIDE:
        return programs.load(BESIDE[name])
    return importlib.import_module(f"virst_jax.commands.{name.replace('-', '_')}")


def whole_parser() -> argparse.ArgumentParser:
    """A parser of all commands, for shell completion; imports them all."""
    parser = Parser(prog="virst", description="Segment in a video what a sentence describes.")
    parser.add_argument("--version", action="version", version=f"virst_jax {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module, parser_of = command_module(name), commands.add_parser(name, help=summary)
        within: dict[str, str] = getattr(module, "WITHIN", {})
        if within:
            words = parser_of.add_subparsers(metavar="COMMAND")
            for word, path in within.items():
                inner = programs.load(path)
                inner.add_arguments(words.add_parser(word, help=inner.HELP))
        module.add_arguments(parser_of)
    names = commands.add_parser("help", help=HELP_SUMMARY)
    names.add_argument("command", nargs="?", choices=list(COMMANDS))
    return parser


def _run(name: str, arguments: list[str]) -> int:
    return _parse_and_run(command_module(name), f"virst {name}", arguments)


def _parse_and_run(command: ModuleType, prog: str, arguments: list[str]) -> int:
    """Runs a command, or one within it: those that a module's WITHIN names, which maps a word to a module."""
    within: dict[str, str] = getattr(command, "WITHIN", {})
    if arguments and arguments[0] in within:
        inner = programs.load(within[arguments[0]])
        return _parse_and_run(inner, f"{prog} {arguments[0]}", arguments[1:])
    status: int = command.run(_options(command, prog).parse_args(arguments))
    return status


def _options(command: ModuleType, prog: str) -> Parser:
    parser = Parser(prog=prog, description=command.HELP, epilog=getattr(command, "EXAMPLES", None))
    command.add_arguments(parser)
    return parser


def _listing() -> Parser:
    summaries = {**COMMANDS, "help": HELP_SUMMARY}
    listing = "\n".join(f"  {name:14}{summary}" for name, summary in summaries.items())
    parser = Parser(
        prog="virst",
        usage="virst [--version] COMMAND ...",
        description=f"Segment in a video what a sentence describes.\n\ncommands:\n{listing}",
        epilog=EXAMPLES,
        add_help=True,
    )
    parser.add_argument("--version", action="version", version=f"virst_jax {__version__}")
    parser.add_argument("command", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
