"""Where a model computes, and where JAX keeps its compiled programs."""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from virst_jax.config import VirstConfig
from virst_jax.errors import UserError, no_device
from virst_jax.io import model_folder
from virst_jax.parallel import sharding
from virst_jax.types import PyTree

CACHE_SECONDS = 0.2  # programs that compile faster are not kept

Context = Callable[[], contextlib.AbstractContextManager[Any]]


def find_placement(
    cfg: VirstConfig, mesh: jax.sharding.Mesh | None, device: str | jax.Device | None
) -> tuple[PyTree, Context | None]:
    """Where the parameters go, and the context in which to compute with them; None, None: JAX's default."""
    if mesh is not None:
        if device is not None:
            raise UserError("mesh and device exclude each other; a mesh has its devices")
        if not isinstance(mesh, jax.sharding.Mesh) or set(mesh.axis_names) != set(sharding.MESH_AXES):
            shown = mesh.axis_names if isinstance(mesh, jax.sharding.Mesh) else repr(mesh)
            raise UserError(f"mesh is {shown}; make one with virst_jax.parallel.sharding.make_mesh")
        return sharding.parameter_shardings(cfg, mesh), functools.partial(sharding.use_mesh, mesh)
    found = find_device(device)
    if device is None:
        return None, None
    placed = jax.sharding.SingleDeviceSharding(found)
    shapes = model_folder.parameter_shapes(cfg)
    return jax.tree.map(lambda _: placed, shapes), device_context(found)


def device_context(device: str | jax.Device | None) -> Context:
    """The context in which to compute on a device of `find_device`."""
    return contextlib.nullcontext if device is None else functools.partial(jax.default_device, find_device(device))


def find_device(device: str | jax.Device | None = None) -> jax.Device:
    """A device by its name, as "cpu", "gpu", "cuda:1" or "tpu:0"; None: JAX's default.

    Raises:
      UserError: there is none, or JAX cannot start the platform.
    """
    if isinstance(device, jax.Device):
        return device
    if device is not None and not isinstance(device, str):
        raise UserError(f"device is {device!r}; give a name such as 'cpu' or 'gpu:0', or one of jax.devices()")
    platform, _, number = (device or "").lower().partition(":")
    if number and not number.isdecimal():
        raise UserError(f"device {device!r}: {number!r} is no number; give a name such as 'cpu' or 'gpu:0'")
    try:
        devices = jax.local_devices(backend=platform or None)
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS")
        if not device and asked:
            raise UserError(no_device(asked)) from error
        lines = str(error).splitlines() or [type(error).__name__]
        wanted = f"device {device!r} is not here" if device else "JAX finds no device"
        raise UserError(f"{wanted} ({lines[0][:200]}); check JAX_PLATFORMS and how jax was installed") from error
    if int(number or 0) >= len(devices):
        raise UserError(f"device {device!r} is not here; there are {', '.join(map(str, devices))}")
    return devices[int(number or 0)]


def keep_compiled(where: bool | str | os.PathLike[str] = True) -> None:
    """Has JAX keep compiled programs on disk; see `compilation_cache` of `load`."""
    if not isinstance(where, (bool, str, os.PathLike)):
        raise UserError(f"compilation_cache is {where!r}; give True, False or a folder")
    if where is False or (where is True and getattr(jax.config, "jax_compilation_cache_dir", None)):
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(home, "virst_jax") if where is True else os.fspath(where)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", CACHE_SECONDS)
    jax_cache.reset_cache()  # JAX looks at the setting once, when it first compiles
