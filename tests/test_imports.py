"""Import arrows point down: a module imports only from layers below its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From top to bottom. A module belongs to the longest prefix that fits it and may import its own entry and what the
# entry lists; what is listed by an entry below is not inherited.
BASE = {"virst_jax.config", "virst_jax.errors"}
NETWORK = {"virst_jax.models", "virst_jax.ops", *BASE}
LAYERS: dict[str, set[str]] = {
    "conversion": {"virst_jax"},
    "virst_jax.inference": {"virst_jax.tracking", *NETWORK},
    "virst_jax.losses": {"virst_jax.tracking", *NETWORK},
    "virst_jax.checkpoint": NETWORK,
    "virst_jax.evaluation": BASE,
    "virst_jax.data": BASE,
    "virst_jax.tracking": NETWORK,
    "virst_jax.models": {"virst_jax.ops", *BASE},
    "virst_jax.ops": BASE,
    "virst_jax.config": {"virst_jax.errors"},
    "virst_jax.errors": set(),
    "virst_jax": set(),
}
# what runs where JAX may be missing, or must start fast
WITHOUT_JAX = ["virst_jax", "virst_jax.config", "virst_jax.errors", "virst_jax.data", "virst_jax.evaluation"]
WITHOUT_JAX += ["conversion.record", "conversion.weights_rule", "conversion.torch_file", "conversion.safetensors_dir"]
JAX = {"jax", "flax", "optax", "orbax"}


def sources() -> list[tuple[str, Path]]:
    files = [*(ROOT / "virst_jax").rglob("*.py"), *(ROOT / "conversion").rglob("*.py")]
    return [(".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), f) for f in files]


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
    exact = {"virst_jax"}
    if any(module == free or (free not in exact and module.startswith(free)) for free in WITHOUT_JAX):
        heavy = {name for name in imported(path) if name.split(".")[0] in JAX}
        assert not heavy, f"{module} must not import {sorted(heavy)}"
