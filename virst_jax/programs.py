"""Modules that stand beside this package in a checkout, and inside it in an installed wheel.

train.py, eval.py, configs/ and conversion/ lie at the top of a checkout, where `python train.py` and
`python -m conversion.convert` run them. A wheel holds them inside the package (virst_jax.train, virst_jax.conversion),
so that no package with such a common name lands in site-packages. `load` finds them in both.

They import one another relatively, so they work under either name. A process never gets the same module under both.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent
TOP_LEVEL = ("configs", "conversion", "train", "eval")


def load(name: str) -> ModuleType:
    """The module of a checkout's name, such as "conversion.convert" or "train".

    Raises:
      ImportError: it is neither in the package nor beside it.
    """
    top, dot, rest = name.partition(".")
    return importlib.import_module(_top_level(top) + dot + rest)


def folder(name: str) -> Path:
    """Where a package of TOP_LEVEL lies."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else CHECKOUT / name


def _top_level(name: str) -> str:
    """The name under which a module of TOP_LEVEL can be imported; loads it if it is not on the path."""
    inside = f"virst_jax.{name}"
    if inside in sys.modules or _file(PACKAGE, name).is_file():
        return inside
    file = _file(CHECKOUT, name)
    loaded = sys.modules.get(name)
    origin = getattr(loaded, "__file__", None) if loaded else getattr(_find(name), "origin", None)
    if origin and Path(origin).resolve() == file:
        return name
    # the checkout is not on the path, as for `virst` of an editable installation, or another module has the name
    if not file.is_file():
        raise ImportError(f"{inside} is missing; install virst-jax again", name=inside)
    search = [str(file.parent)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(inside, file, submodule_search_locations=search)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[inside] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[inside]
        raise
    return inside


def _file(folder: Path, name: str) -> Path:
    package = folder / name / "__init__.py"
    return package if package.is_file() else folder / f"{name}.py"


def _find(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
