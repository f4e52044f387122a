"""Which kind of device is traced for, and whether with its kernels."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_PORTABLE: ContextVar[str | None] = ContextVar("portable", default=None)


@contextlib.contextmanager
def portable(kind: str) -> Iterator[None]:
    """What is traced inside is for such devices (cpu, gpu or tpu), of XLA's operations alone: it can be kept in a file.

    Kernels of cuDNN and Pallas are bound to versions of libraries and to generations of devices.
    """
    token = _PORTABLE.set(kind)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def allows_kernels() -> bool:
    """Whether what is traced may call kernels that are not XLA's."""
    return _PORTABLE.get() is None


def target_platform() -> str:
    """cpu, gpu or tpu: that of `portable`, of the mesh in use (which may be compiled for from elsewhere), or else the
    default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = _PORTABLE.get() or getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if platform == "cuda" else platform
