"""Import arrows point down: a module imports only from layers below its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From top to bottom. A module belongs to the longest prefix that fits it and may import its own entry and what the
# entry lists; what is listed by an entry below is not inherited.
BASE = {"virst_jax.config", "virst_jax.errors"}
NETWORK = {"virst_jax.models", "virst_jax.ops", *BASE}
TOP = "virst_jax.__init__"
SERVICES = {"virst_jax.parallel", "virst_jax.data", "virst_jax.io", "virst_jax.io.model_folder", *NETWORK}
LAYERS: dict[str, set[str]] = {
    "conversion": {"virst_jax"},
    "virst_jax.cli": {"virst_jax", "virst_jax.commands", *BASE},
    "virst_jax.commands": {"virst_jax"},
    # the package itself only names `load`
    TOP: {"virst_jax.api"},
    "virst_jax.api": {"virst_jax.inference", *SERVICES},
    "virst_jax.inference": SERVICES,
    "virst_jax.pretraining.patches": BASE,
    "virst_jax.pretraining": {"virst_jax.training", "virst_jax.profiling", *SERVICES},
    "virst_jax.training": {"virst_jax.profiling", *SERVICES},
    "virst_jax.evaluation": {"virst_jax.data", "virst_jax.io", *BASE},
    "virst_jax.profiling": {"virst_jax.parallel", *NETWORK},
    "virst_jax.parallel": NETWORK,
    "virst_jax.io.model_folder": {"virst_jax.io", *NETWORK},
    "virst_jax.data": {"virst_jax.io", "virst_jax.pretraining.patches", *BASE},
    "virst_jax.io": BASE,
    "virst_jax.models": {"virst_jax.ops", *BASE},
    "virst_jax.ops": BASE,
    "virst_jax.config": {"virst_jax.errors"},
    "virst_jax.errors": set(),
}
# what runs where JAX may be missing, or must start fast
WITHOUT_JAX = [TOP, "virst_jax.config", "virst_jax.errors", "virst_jax.data", "virst_jax.evaluation"]
WITHOUT_JAX += ["conversion.record", "conversion.recording", "conversion.weights_rule", "conversion.formats"]
JAX = {"jax", "flax", "optax", "orbax"}


def sources() -> list[tuple[str, Path]]:
    files = [*(ROOT / "virst_jax").rglob("*.py"), *(ROOT / "conversion").rglob("*.py")]
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]
    return [(n if n == TOP else n.removesuffix(".__init__"), f) for n, f in zip(names, files)]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer_of(module: str) -> str:
    return max((layer for layer in LAYERS if within(module, layer)), key=len)


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda x: x if isinstance(x, str) else "")
def test_arrows_point_down(module, path):
    layer = layer_of(module)
    allowed = {layer, *LAYERS[layer]}
    ours = {name for name in imported(path) if within(name, "virst_jax") or within(name, "conversion")}
    up = {name for name in ours if not any(within(name, prefix) for prefix in allowed)}
    assert not up, f"{module} (layer {layer}) must not import {sorted(up)}"


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda x: x if isinstance(x, str) else "")
def test_only_conversion_knows_torch(module, path):
    torch = {name for name in imported(path) if within(name, "torch")}
    assert not torch or within(module, "conversion")


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda x: x if isinstance(x, str) else "")
def test_modules_that_do_without_jax(module, path):
    if any(within(module, free) for free in WITHOUT_JAX):
        heavy = {name for name in imported(path) if name.split(".")[0] in JAX}
        assert not heavy, f"{module} must not import {sorted(heavy)}"
