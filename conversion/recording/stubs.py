"""Stubs for packages that the release imports, that this machine lacks, and that a recording does not need.

A stub is put into sys.modules only when the real package cannot be imported, and taken out again afterwards.
Most hold nothing: whoever calls one is told which package to install. torchvision and timm hold the few functions
that the release does call on the way of a recording.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any

from virst_jax.errors import UserError

# package -> the submodules that the release names
OPTIONAL: dict[str, tuple[str, ...]] = {
    "accelerate": (),
    "av": (),
    "cv2": (),
    "decord": (),
    "imageio": (),
    "iopath": ("iopath.common", "iopath.common.file_io"),
    "peft": (),
    "pycocotools": ("pycocotools.mask",),
    "tensordict": (),
    "timm": ("timm.layers",),
    "torchvision": (
        "torchvision.transforms",
        "torchvision.transforms.functional",
        "torchvision.transforms.v2",
        "torchvision.transforms.v2.functional",
    ),
}
NEEDED = ("transformers", "hydra", "omegaconf", "tqdm", "PIL")  # the release cannot run without these
_INSTALL = {"hydra": "hydra-core", "PIL": "pillow", "cv2": "opencv-python-headless"}


class Absent:
    """A name of a package that is not there. As a decorator it hands a class back; any other call is an error."""

    def __init__(self, name: str, why: str):
        self._name, self._why = name, why

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], type):
            return args[0]
        package = self._name.partition(".")[0]
        raise UserError(
            f"the release calls {self._name}, which cannot be imported here ({self._why}): "
            f"pip install {_INSTALL.get(package, package)}"
        )


class Stub(types.ModuleType):
    """A module whose every name is Absent, except those that are set on it."""

    def __init__(self, name: str, why: str):
        super().__init__(name, "stub")
        self.__spec__ = ModuleSpec(name, None)
        self.__path__: list[str] = []
        self._why = why

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}", self._why)


def require(*names: str) -> None:
    """Imports packages that have no stub.

    Raises:
      UserError: one of them cannot be imported; says how to install it.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken install raises anything
            raise UserError(
                f"the release needs {name}, which cannot be imported here ({first_line(error)}): "
                f"pip install {_INSTALL.get(name, name)}"
            ) from error


@contextlib.contextmanager
def stubbed(packages: dict[str, tuple[str, ...]] | None = None) -> Iterator[list[str]]:
    """Within the block, every package of the table can be imported; yields the names of those that are stubs."""
    packages = OPTIONAL if packages is None else packages
    missing: dict[str, str] = {}
    for package, submodules in packages.items():
        before = set(sys.modules)
        try:
            for name in (package, *submodules):
                importlib.import_module(name)
        except Exception as error:  # a package may raise anything when what it needs is not there
            missing[package] = first_line(error)
            for name in set(sys.modules) - before:
                if name == package or name.startswith(package + "."):
                    del sys.modules[name]
    hidden: dict[str, types.ModuleType] = {}
    for package, why in missing.items():
        for name in (package, *packages[package]):
            if name in sys.modules:
                hidden[name] = sys.modules[name]
            module = Stub(name, why)
            for key, function in _FUNCTIONS.get(name, {}).items():
                setattr(module, key, function)
            sys.modules[name] = module
            parent, _, leaf = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], leaf, module)
    try:
        yield sorted(missing)
    finally:
        for package in missing:
            for name in (package, *packages[package]):
                sys.modules.pop(name, None)
        sys.modules.update(hidden)


def first_line(error: Exception) -> str:
    """What an error says, on one line of moderate length."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _resize(image: Any, size: Any, *args: Any, **kwargs: Any) -> Any:
    """torchvision's functional.resize for a PIL image: bilinear; `size` is (height, width)."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise UserError("the release resizes a tensor, and torchvision is not installed here: pip install torchvision")
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def _to_tensor(image: Any) -> Any:
    """torchvision's functional.to_tensor for a PIL RGB image: float32[3, H, W] in 0..1."""
    import numpy as np

    import torch

    return torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous().float().div(255)


def _normalize(tensor: Any, mean: Any, std: Any, inplace: bool = False) -> Any:
    """torchvision's functional.normalize."""
    shape = (-1, 1, 1)
    return (tensor - tensor.new_tensor(mean).view(shape)) / tensor.new_tensor(std).view(shape)


def _to_2tuple(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else (x, x)


def _drop_path(x: Any, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True) -> Any:
    if drop_prob and training:
        raise UserError("the release drops paths, and timm is not installed here: pip install timm")
    return x


def _trunc_normal(tensor: Any, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> Any:
    import torch

    return torch.nn.init.trunc_normal_(tensor, mean, std, a, b)


_FUNCTIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "torchvision.transforms.functional": {"resize": _resize, "to_tensor": _to_tensor, "normalize": _normalize},
    "timm.layers": {"to_2tuple": _to_2tuple, "drop_path": _drop_path, "trunc_normal_": _trunc_normal},
}
