"""A parity case on disk, and what comparing an output with ours gives.

A case is NAME.json (config, manifest of parameter names and shapes, fields that say how inputs are made) and NAME.npz
(outputs of the PyTorch release, channels first). Weights and inputs follow from names and shapes by weights_rule.py,
or, in recorded cases, come from a converted checkpoint and from the case's arrays.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from virst_jax.errors import UserError
from virst_jax.io.json_files import read_json
from virst_jax.io.npz import read_npz
from virst_jax.models.tree import flatten, unflatten

from ..assemble import assemble
from ..rules import Rule
from ..weights_rule import make_input, make_state

BINS = 60  # of histograms of errors
GRADIENTS = ".gradients.npz"  # behind a train_loss case's name, see recording/training.py
BLOCKS = ".blocks.npz"  # behind a case's name: what every block gave, see recording/blocks.py


@dataclass(frozen=True)
class Check:
    """One compared output. Errors that do not apply are None."""

    output: str
    passed: bool
    max_abs: float | None = None
    relative: float | None = None  # L2 error over L2 norm
    iou: float | None = None  # of masks, the worst frame's
    note: str = ""


def close(output: str, ours: Any, theirs: Any, relative: float = 1e-4) -> Check:
    """Equal up to a relative L2 error."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return Check(output, False, note=f"shape {list(ours.shape)}, expected {list(theirs.shape)}")
    error, norm = np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
    value = float(error / norm) if norm else float(error)
    return Check(output, bool(value <= relative), float(np.abs(ours - theirs).max(initial=0)), value)


def within(output: str, ours: Any, theirs: Any, bound: float, note: str = "") -> Check:
    """Equal up to an absolute error."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return Check(output, False, note=f"shape {list(ours.shape)}, expected {list(theirs.shape)}")
    error = float(np.abs(ours - theirs).max(initial=0))
    return Check(output, bool(error <= bound), error, note=note)


def exact(output: str, ours: Any, theirs: Any, note: str = "") -> Check:
    """Equal in every element."""
    passed = ours == theirs if not isinstance(ours, np.ndarray) else np.array_equal(ours, theirs)
    return Check(output, bool(passed), 0.0 if passed else None, note=note)


def same_masks(output: str, ours: np.ndarray, theirs: np.ndarray, least: float = 0.998) -> Check:
    """bool[T, H, W] whose intersection over union reaches `least` on every frame; empty equals empty."""
    if ours.shape != theirs.shape:
        return Check(output, False, note=f"shape {list(ours.shape)}, expected {list(theirs.shape)}")
    overlap, union = (ours & theirs).sum((1, 2)), (ours | theirs).sum((1, 2))
    iou = float(np.where(union > 0, overlap / np.maximum(union, 1), 1.0).min())
    return Check(output, bool(iou >= least), iou=iou, note=f"{int((ours != theirs).sum())} pixels differ")


@dataclass(frozen=True)
class Detail:
    """More about one output, for a report.

    Attributes:
      histogram: int[BINS], how many elements have an error within `edges()`; the first bin holds those that are equal.
      frames: relative L2 error of every frame.
      masks: frame number, our mask and the recorded one, bool[H, W], of some frames.
    """

    output: str
    histogram: np.ndarray | None = None
    frames: tuple[float, ...] | None = None
    masks: tuple[tuple[int, np.ndarray, np.ndarray], ...] = ()

    @staticmethod
    def edges() -> np.ndarray:
        """log10 of errors relative to the output's root mean square, float[BINS + 1]."""
        return np.linspace(-10.0, 2.0, BINS + 1)


def detail(output: str, ours: Any, theirs: Any, by_frame: bool) -> Detail:
    """The errors of one output; of arrays whose first axis is frames, also those of every frame."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return Detail(output)
    error = np.abs(ours - theirs)
    rms = float(np.sqrt(np.mean(theirs**2))) or 1.0
    edges = Detail.edges()
    counts, _ = np.histogram(np.log10(np.maximum(error / rms, 10 ** edges[0])).clip(edges[0], edges[-1]), edges)
    frames = None
    if by_frame:
        axes = tuple(range(1, error.ndim))
        norms = np.sqrt((theirs**2).sum(axes))
        frames = tuple((np.sqrt((error**2).sum(axes)) / np.where(norms > 0, norms, 1)).tolist())
    return Detail(output, counts, frames)


@dataclass
class Case:
    """A case of a directory, with what the runner was given beside it."""

    name: str
    meta: dict[str, Any]
    outputs: Mapping[str, np.ndarray]
    dtype: str = "float32"
    rounding: str = "late"  # see virst_jax.config.ROUNDINGS
    folder: Path | None = None  # where it lies
    tokenizer: Path | None = None
    checkpoint: Path | None = None  # a converted one, for recorded cases
    checks: list[Check] = field(default_factory=list)
    detailed: bool = False  # whether `details` are wanted
    details: list[Detail] = field(default_factory=list)
    kept: dict[str, np.ndarray] | None = None  # given a dictionary, a runner puts its own outputs there

    @property
    def salt(self) -> int:
        return self.meta.get("salt", 0)

    @property
    def text(self) -> str:
        """How the inputs are made, in words; in cases of before, these alone give some of the numbers."""
        return self.meta.get("inputs", "")

    def input(self, name: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
        return make_input(name, shape, self.salt, scale)

    def number(self, name: str, pattern: str, default: int) -> int:
        """The field `name`, or in cases of before, that have none, the pattern's first group in the words `inputs`."""
        if name in self.meta:
            return int(self.meta[name])
        match = re.search(pattern, self.text)
        return int(match.group(1)) if match else default

    def clip_name(self, default: str) -> str:
        """Name of the input that makes the clips: the field clip.name, or the one in the words that ends in .clip."""
        given = self.meta.get("clip", {}).get("name")
        match = re.search(r'"([^"]*\.clip)"', self.text)
        return str(given) if given else match[1] if match else default

    def shape(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """An input's shape: of the field `shapes`, or as the words give it.

        They write `"name",(2,3)`, `"name" (2,3)` or `(2,3)="name"`.
        """
        if name in self.meta.get("shapes", {}):
            return tuple(self.meta["shapes"][name])
        quoted, sizes = re.escape(f'"{name}"'), r"\(([\d\s,]+)\)"
        match = re.search(rf"{quoted}[\s,]*{sizes}|{sizes}\s*=\s*{quoted}", self.text)
        return tuple(int(size) for size in re.findall(r"\d+", match[1] or match[2])) if match else default

    def params(self, rules: "list[Rule]", prefix: str = "") -> dict[str, Any]:
        """The tree of the case's own weights. Its names lack `prefix`."""
        table = {name.removeprefix(prefix): target for name, target in rules}
        state = make_state(self.meta["manifest"], self.salt)
        return assemble(table, state, state.__getitem__, where=self.name, partial=True)

    def complete(self, params: dict[str, Any], module: nn.Module, *args: Any) -> dict[str, Any]:
        """A module's whole tree: what the case does not hold is NaN, so that using it shows."""
        shapes = flatten(parameter_shapes(module, *args))
        given = flatten(params)
        return unflatten({k: given.get(k, np.full(s.shape, np.nan, np.float32)) for k, s in shapes.items()})


def parameter_shapes(module: nn.Module, *args: Any) -> dict[str, Any]:
    """The shapes of a module's parameters, without computing them."""
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]
    return nn.meta.unbox(boxed)


def load_case(folder: Path, name: str, **given: Any) -> Case:
    """Reads NAME.json and NAME.npz, of which one may be missing.

    Raises:
      UserError: neither exists, or one is damaged.
    """
    meta_file, output_file = folder / f"{name}.json", folder / f"{name}.npz"
    if not meta_file.exists() and not output_file.exists():
        raise UserError(f"{folder}: no case {name!r}; there are {', '.join(case_names(folder)) or 'none'}")
    advice = "copy the case again"
    meta: Any = read_json(meta_file, advice=advice).value if meta_file.exists() else {}
    outputs = read_npz(output_file, advice) if output_file.exists() else {}
    meta = meta if isinstance(meta, dict) else {"rows": meta}
    return Case(name, meta, outputs, folder=folder, **given)


def case_names(folder: Path) -> list[str]:
    """Names of all cases of a directory."""
    files = (path for path in folder.iterdir() if path.suffix in (".json", ".npz"))
    return sorted({path.stem for path in files if not path.name.endswith((BLOCKS, GRADIENTS))})


Runner = Callable[[Case], None]
