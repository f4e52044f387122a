"""Flags of XLA that a recipe names by platform, set before JAX looks for its devices.

The environment has the last word: a flag that LIBTPU_INIT_ARGS or XLA_FLAGS names already stays as it is there.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping, MutableMapping
from typing import Any

from jax._src import xla_bridge  # there is no public way to ask whether the backends are up
from packaging.version import Version

from virst_jax.errors import UserError

TPU, GPU = "tpu", "gpu"
TRAINS_V6E = "0.0.45"  # version of libtpu; 0.0.42 overflows its stack with the language model's layers
VARIABLES = {TPU: "LIBTPU_INIT_ARGS", GPU: "XLA_FLAGS"}
_PLUGINS = {TPU: ("libtpu",), GPU: ("jax_cuda12_plugin", "jax_cuda13_plugin")}  # who reads them

Flags = Mapping[str, Mapping[str, Any]]  # by platform and name, without hyphens


def as_text(flags: Mapping[str, Any]) -> dict[str, str]:
    """Values as XLA reads them; a flag whose value is None is left out."""
    spelled = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in flags.items()}
    return {name: value for name, value in spelled.items() if flags[name] is not None}


def as_options(flags: Mapping[str, Any], platform: str) -> dict[str, str | bool]:
    """The same for the `compiler_options` of a compilation.

    libtpu reads them as it reads flags. XLA itself, which knows those of GPUs, does not take "true" for a truth value.
    """
    text = as_text(flags)
    if platform == TPU:
        return dict(text)
    return {name: flags[name] if isinstance(flags[name], bool) else value for name, value in text.items()}


def known_fault(device_kind: str, installed: str | None = None) -> str:
    """A line about a compiler that is known to fail for such devices; empty: nothing is known.

    Args:
      device_kind: jax.Device.device_kind.
      installed: version of libtpu; None: the one that is installed.
    """
    if not device_kind.startswith("TPU v6"):
        return ""
    if installed is None:
        try:
            installed = importlib.metadata.version("libtpu")
        except importlib.metadata.PackageNotFoundError:
            return ""
    if Version(installed) >= Version(TRAINS_V6E):
        return ""
    return (
        f"libtpu {installed} may crash while it compiles training steps for TPU v6e: 0.0.42 did, {TRAINS_V6E} did not. "
        f"If the process ends with a segmentation fault, run pip install 'libtpu>={TRAINS_V6E}'"
    )


def check(flags: Flags) -> None:
    """Raises UserError: a platform that has no flags."""
    for platform in flags:
        if platform not in VARIABLES:
            raise UserError(f"xla_flags: unknown platform {platform!r}; give {' or '.join(VARIABLES)}")


def apply(flags: Flags, environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Adds flags to the variables that the installed backends read.

    Returns:
      What was added, a line for each variable; nothing once JAX has its devices, since then it is too late.

    Raises:
      UserError: a platform that has no flags.
    """
    check(flags)
    if xla_bridge.backends_are_initialized():
        return []
    told = []
    for platform, named in flags.items():
        asked = environment.get("JAX_PLATFORMS", "")
        wanted = not asked or platform in asked.replace("cuda", GPU).split(",")
        if not wanted or not any(importlib.util.find_spec(plugin) for plugin in _PLUGINS[platform]):
            continue
        variable = VARIABLES[platform]
        given = environment.get(variable, "")
        names = {word.lstrip("-").partition("=")[0] for word in given.split()}
        added = [f"--{name}={value}" for name, value in as_text(named).items() if name not in names]
        if added:
            environment[variable] = " ".join([*given.split(), *added])
            told.append(f"{variable}: {' '.join(added)}")
    return told
