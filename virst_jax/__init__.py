"""VIRST in JAX: a video and a sentence in, the masks of the object that the sentence means out."""

from typing import TYPE_CHECKING, Any

from virst_jax.errors import UserError

if TYPE_CHECKING:
    from virst_jax.api import Model, load, read_result
    from virst_jax.tracking import TrackerModel, load_tracker

__version__ = "0.1.0"
__all__ = ["Model", "TrackerModel", "UserError", "__version__", "load", "load_tracker", "read_result"]


def __getattr__(name: str) -> Any:
    # `virst_jax.load` brings JAX; the package itself does not
    if name in ("load", "Model", "read_result"):
        from virst_jax import api

        return getattr(api, name)
    if name in ("load_tracker", "TrackerModel"):
        from virst_jax import tracking

        return getattr(tracking, name)
    raise AttributeError(f"module 'virst_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
