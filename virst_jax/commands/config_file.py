"""Config files of train.py and eval.py: found by name or by path, and changed by `--config.key=value`."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virst_jax import programs
from virst_jax.commands.parser import Parser, did_you_mean
from virst_jax.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

NOT_RECIPES = ("common", "eval")


def add_arguments(parser: argparse.ArgumentParser, meaning: str, default: str | None = None) -> None:
    """--config, and changes of what it holds."""
    if isinstance(parser, Parser):
        parser.settings = "config"
    parser.add_argument("--config", default=default, metavar="NAME|FILE.py", help=meaning)


def recipes() -> list[str]:
    """Names of the recipes of the package."""
    files = programs.folder("configs").glob("*.py")
    return sorted(f.stem for f in files if f.stem not in NOT_RECIPES and not f.stem.startswith("_"))


def load(given: str, settings: Sequence[str] = ()) -> ConfigDict:
    """The ConfigDict of a config: a name of configs/, or a Python file with `get_config`, either with `:argument`.

    A file may import what the package's recipes share by `from . import common`, wherever it lies.

    Raises:
      UserError: there is no such config, it cannot be run, or one of the settings does not fit it.
    """
    name, _, argument = given.partition(":") if not Path(given).is_file() else (given, "", "")
    module = _module(name)
    if not hasattr(module, "get_config"):
        raise UserError(f"{given}: has no function get_config; configs/synthetic.py shows the form")
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{given}: get_config fails ({type(error).__name__}: {_flat(error)})") from error
    return change(config, settings)


def change(config: ConfigDict, settings: Sequence[str]) -> ConfigDict:
    """The config with settings in the form of absl flags, such as "--config.seed=3".

    Raises:
      UserError: an unknown key, or a value of another type.
    """
    from absl import flags
    from ml_collections import config_flags

    for setting in settings:
        if setting.startswith("--"):
            _check_key(config, setting.partition("=")[0])
    values = flags.FlagValues()
    given = ["", *settings]
    try:
        holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=given)
        rest = values(given)[1:]
    except (flags.Error, AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(_flat(error)) from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; settings are given as --config.key=value")
    return holder.value


def _check_key(config: ConfigDict, option: str) -> None:
    """Names the part of a key that a config does not have."""
    path = re.sub(r"^--(no)?config\.", "", option)
    here, passed = config, "config"
    for key in path.split("."):
        name, *indices = re.split(r"[\[\]]+", key.rstrip("]")) if "[" in key else (key,)
        if not hasattr(here, "keys"):
            raise UserError(f"{option}: {passed} is a value, which has no {name!r}")
        if name not in here:
            known = sorted(here.keys())
            hint = did_you_mean(name, known) or f"; known are {', '.join(known)}"
            raise UserError(f"{option}: unknown key {name!r} in {passed}{hint}")
        here, passed = here[name], f"{passed}.{name}"
        for index in indices:
            try:
                here, passed = here[int(index)], f"{passed}[{index}]"
            except (ValueError, IndexError, TypeError, KeyError) as error:
                raise UserError(f"{option}: {passed} has no element {index!r}") from error


def _module(given: str) -> Any:
    known = recipes()
    name = given if given.isidentifier() else ""
    path = Path(given)
    if path.is_file() and path.resolve().parent == programs.folder("configs").resolve():
        name = path.stem
    if name in known or name in NOT_RECIPES[1:]:
        return programs.load(f"configs.{name}")
    if not path.is_file():
        hint = did_you_mean(path.stem, known) or f": give a Python file, or one of {', '.join(known)}"
        raise UserError(f"{given}: no such config{hint}")
    package = programs.load("configs").__name__
    spec = importlib.util.spec_from_file_location(f"{package}._file_{abs(hash(path.resolve()))}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{given}: not a Python file; a config's name ends in .py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        hint = "; write `from . import common`" if getattr(error, "name", None) == "configs" else ""
        raise UserError(f"{given}: cannot be run ({type(error).__name__}: {_flat(error)}){hint}") from error
    return module


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
