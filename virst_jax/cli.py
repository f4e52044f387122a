"""The command `virst`: subcommands, each a module of virst_jax.commands with HELP, add_arguments and run.

Exit status: that of the subcommand, 2 for bad input (one line on stderr says what, where and how to mend it), 130 when
interrupted.
"""

import argparse
import errno
import importlib
import sys
from typing import Any, NoReturn

from virst_jax import __version__
from virst_jax.commands import interrupt
from virst_jax.errors import UserError

# imported when they are called: help is there at once
COMMANDS = {
    "segment": "segment objects in a video by sentences",
    "chat": "ask a question about a video",
    "demo": "segment the sample clip with the small model of this package",
    "info": "show devices, versions and what a model is",
    "data": "check, show or build data sets",
    "metrics": "score folders of predicted masks",
    "submit": "write and check submissions to benchmark servers",
}
EXAMPLES = """examples:
  virst demo
  virst segment dog.mp4 "the dog" "what does the dog chase?" --model virst_7b --out masks
  virst chat dog.mp4 "what happens in the video?" --model virst_7b
  virst info --model virst_7b

`virst COMMAND --help` explains a command."""


class Parser(argparse.ArgumentParser):
    """Errors take one line."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status."""
    listing = "\n".join(f"  {name:10}{summary}" for name, summary in COMMANDS.items())
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
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help()
        return 2
    known = parser.parse_args(argv)
    if known.command not in COMMANDS:
        parser.error(f"unknown command {known.command!r}: choose one of {', '.join(COMMANDS)}")
    command = importlib.import_module(f"virst_jax.commands.{known.command}")
    options = Parser(prog=f"virst {known.command}", description=command.HELP, epilog=getattr(command, "EXAMPLES", None))
    command.add_arguments(options)
    try:
        with interrupt.watched():
            return command.run(options.parse_args(known.rest))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished parts are kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output has gone
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}no space left on the disk; free some and run it again", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
