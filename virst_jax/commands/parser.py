"""The parser of all commands."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from virst_jax.errors import UserError
from virst_jax.io.address import local


class Parser(argparse.ArgumentParser):
    """Errors take one line and name what was probably meant; `--data_root` is `--data-root`.

    Where `settings` names an option that takes a config, `--NAME.key=value` goes to the namespace's `settings`.
    """

    settings: str | None = None

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        self._given: list[str] = []
        super().__init__(**kwargs)
        self.register("type", Path, _path)  # every option and argument of the type Path

    def error(self, message: str) -> NoReturn:
        mistyped = [arg.partition("=")[0] for arg in self._given if self._is_unknown(arg)]
        if "required" in message and mistyped:  # the reason is likely this one
            message = f"unknown option {mistyped[0]!r}{did_you_mean(mistyped[0], self._all_options(None))}"
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [arg.partition("=")[0] for arg in unknown if arg.startswith("-") and arg != "-"]
            if not options:
                self.error(f"unexpected argument {unknown[0]!r}")
            self.error(f"unknown option {options[0]!r}{did_you_mean(options[0], self._all_options(found))}")
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        end = args.index("--") if "--" in args else len(args)
        args, settings = self._split([*map(self._hyphenated, args[:end]), *args[end:]])
        self._given = args
        found, unknown = super().parse_known_args(args, namespace)
        if self.settings:
            found.settings = settings
        return found, unknown

    def _split(self, args: list[Any]) -> tuple[list[Any], list[str]]:
        """Arguments that argparse knows, and changes of the config."""
        settings: list[str] = []
        rest: list[Any] = []
        waits = False  # for the value of `--config.key value`
        for arg in args:
            if self.settings and arg.startswith((f"--{self.settings}.", f"--no{self.settings}.")):
                settings.append(arg)
                waits = "=" not in arg and not arg.startswith("--no")
            elif waits and not arg.startswith("--"):
                settings.append(arg)
                waits = False
            else:
                rest.append(arg)
                waits = False
        return rest, settings

    def _hyphenated(self, arg: Any) -> Any:
        name, equals, value = arg.partition("=")
        other = name.replace("_", "-")
        known = name.startswith("--") and name not in self._option_string_actions
        return other + equals + value if known and other in self._option_string_actions else arg

    def _is_unknown(self, arg: Any) -> bool:
        name = arg.partition("=")[0]
        has_subcommands = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        return name.startswith("--") and len(name) > 2 and not has_subcommands and not self._get_option_tuples(name)

    def _all_options(self, found: argparse.Namespace | None) -> list[str]:
        """Options of this parser and of the subcommands that were chosen."""
        names = [name for name in self._option_string_actions if name.startswith("--")]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                chosen = action.choices.get(getattr(found, action.dest, "") or "")
                names += chosen._all_options(found) if isinstance(chosen, Parser) else []
        return names


def _path(text: str) -> Path:
    """A path of this machine; addresses keep their form in what is said of them."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, where a path is needed")
    try:
        return local(text, "")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from error


def path_or_bucket(text: str) -> Path:
    """For commands that write to buckets: a path of this machine, or an address for `buckets.place`."""
    from virst_jax.io import buckets  # imports more than `virst --help` may

    return Path(text) if buckets.is_bucket(text) else _path(text)


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """'; did you mean X?', or nothing if nothing is like it."""
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
