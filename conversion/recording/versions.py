"""Which versions a recording was made with."""

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "sam2", "decord", "av", "pillow", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a recording may use, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
