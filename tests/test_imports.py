"""Import arrows point down: a module imports only from layers below its own."""

import ast
from pathlib import Path

from helpers.places import ROOT

# From top to bottom. A module belongs to the longest prefix that fits it and may import its own entry and what the
# entry lists; what is listed by an entry below is not inherited.
BASE = {"virst_jax.config", "virst_jax.errors", "virst_jax.types"}
NETWORK = {"virst_jax.models", "virst_jax.ops", *BASE}
TOP = "virst_jax.__init__"
SERVICES = {"virst_jax.parallel", "virst_jax.data", "virst_jax.io", "virst_jax.io.model_folder", *NETWORK}
LAYERS: dict[str, set[str]] = {
    "conversion": {"virst_jax"},
    "configs": {"virst_jax.data.datasets.mixtures"},
    "virst_jax.__main__": {"virst_jax.cli"},
    "virst_jax.cli": {"virst_jax", "virst_jax.commands", "virst_jax.programs", *BASE},
    "virst_jax.programs": set(),
    "virst_jax.commands": {"virst_jax"},
    # the package itself only names `load` and `Model`
    TOP: {"virst_jax.api", "virst_jax.tracking", "virst_jax.errors"},
    "virst_jax.serve": {"virst_jax.api", "virst_jax.tracking", "virst_jax.inference", *SERVICES},
    "virst_jax.tracking": {"virst_jax.api", "virst_jax.inference", "virst_jax.io.tracker_folder", *SERVICES},
    "virst_jax.api": {"virst_jax.inference", *SERVICES},
    # neither Flax nor the network's code: see tests/test_exported.py
    "virst_jax.exported": {"virst_jax.data", "virst_jax.io", *BASE}
    | {f"virst_jax.inference.{name}" for name in ("plan", "texts", "tiles")},
    "virst_jax.inference": SERVICES,
    "virst_jax.pretraining": {"virst_jax.training", "virst_jax.profiling", *SERVICES},
    "virst_jax.training": {"virst_jax.evaluation", "virst_jax.profiling", *SERVICES},
    "virst_jax.evaluation": {"virst_jax.data", "virst_jax.io", *BASE},
    "virst_jax.profiling": {"virst_jax.parallel", *NETWORK},
    "virst_jax.parallel.hosts": BASE,
    "virst_jax.parallel.processes": {"virst_jax.parallel.hosts", *BASE},
    "virst_jax.parallel": {"virst_jax.parallel.processes", *NETWORK},
    "virst_jax.io.model_folder": {"virst_jax.io", "virst_jax.parallel.processes", *NETWORK},
    "virst_jax.io.tracker_folder": {"virst_jax.io", "virst_jax.io.model_folder", *NETWORK},
    "virst_jax.data": {"virst_jax.io", *BASE},
    "virst_jax.io": BASE,
    "virst_jax.models": {"virst_jax.ops", *BASE},
    "virst_jax.ops": BASE,
    "virst_jax.config": {"virst_jax.errors"},
    "virst_jax.errors": set(),
    "virst_jax.types": set(),
}
# what runs where JAX may be missing, or must start fast
WITHOUT_JAX = [TOP, "virst_jax.config", "virst_jax.errors", "virst_jax.data", "virst_jax.evaluation"]
WITHOUT_JAX += [
    "conversion.record",
    "conversion.record_training",
    "conversion.targets",
    "conversion.recording",
    "conversion.weights_rule",
    "conversion.formats",
]
RENAMED = {"configs", "conversion"}  # in a wheel: virst_jax.configs and virst_jax.conversion
JAX = {"jax", "flax", "optax", "orbax"}


def sources() -> list[tuple[str, Path]]:
    files = [f for name in ("virst_jax", "conversion", "configs") for f in (ROOT / name).rglob("*.py")]
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]
    return [(n if n == TOP else n.removesuffix(".__init__"), f) for n, f in zip(names, files)]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # relative imports would hide where an arrow points; what a wheel renames needs them (virst_jax/programs.py)
            here = path.relative_to(ROOT).parent.parts
            renamed = here[0] in RENAMED
            assert renamed or node.level == 0, f"{path}: relative import"
            assert not renamed or (node.module or "").split(".")[0] not in ("conversion", "configs"), (
                f"{path}: absolute"
            )
            base = ".".join((*here[: len(here) + 1 - node.level], *filter(None, [node.module])))
            names |= {f"{base if node.level else node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer_of(module: str) -> str:
    return max((layer for layer in LAYERS if within(module, layer)), key=len)


IMPORTED = {module: imported(path) for module, path in sources()}


def test_arrows_point_down():
    wrong = []
    for module, names in IMPORTED.items():
        layer = layer_of(module)
        allowed = {layer, *LAYERS[layer]}
        ours = {name for name in names if name.split(".")[0] in ("virst_jax", "conversion", "configs")}
        up = sorted(name for name in ours if not any(within(name, prefix) for prefix in allowed))
        wrong += [f"{module} (layer {layer}) must not import {name}" for name in up]
    assert not wrong, "\n".join(wrong)


def test_only_conversion_knows_torch():
    knowing = {module for module, names in IMPORTED.items() if any(within(name, "torch") for name in names)}
    assert not [module for module in knowing if not within(module, "conversion")]


def test_modules_that_do_without_jax():
    free = {module: names for module, names in IMPORTED.items() if any(within(module, f) for f in WITHOUT_JAX)}
    heavy = {module: {name for name in names if name.split(".")[0] in JAX} for module, names in free.items()}
    assert not {module: names for module, names in heavy.items() if names}
    # every entry of the list names something
    assert all(any(within(module, f) for module in IMPORTED) for f in WITHOUT_JAX)
