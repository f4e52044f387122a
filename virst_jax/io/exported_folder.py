"""A folder of exported steps, which `virst export-model` writes and `virst_jax.exported` runs.

FOLDER/manifest.json              versions, the network's config, the steps with their shapes, digests of all files
FOLDER/steps/PLATFORM/STEP.bin    artefacts of jax.export: StableHLO of a step for one platform
FOLDER/parameters-N.safetensors   their parameters
FOLDER/tokenizer/                 the tokenizer's files

Digests are BLAKE2b of 16 bytes. That of the manifest is of its other members.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from virst_jax.config import VirstConfig, from_json
from virst_jax.errors import UserError
from virst_jax.io import atomic, digests
from virst_jax.io.json_files import Json, read_json

FORMAT, VERSION = "virst exported model", 1
MANIFEST, STEPS, TOKENIZER = "manifest.json", "steps", "tokenizer"
PARAMETERS = "parameters-*.safetensors"
SHARD_BYTES = 2 << 30  # of a file of parameters, unless one alone is larger
AGAIN = "copy the folder again, or export the model again"


@dataclass(frozen=True)
class ArraySpec:
    """An array that a step takes or gives."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class StepSpec:
    """A step for one platform. It takes its parameters, then its inputs, and gives its outputs, all in a row."""

    step: str
    platform: str  # cpu, cuda or tpu
    file: str  # below the folder
    parameters: tuple[str, ...]  # their names
    inputs: tuple[ArraySpec, ...]
    outputs: tuple[ArraySpec, ...]


@dataclass(frozen=True)
class Manifest:
    """What a manifest.json says, digests aside.

    Attributes:
      cfg: of the network.
      versions: of the packages that wrote the folder.
      batch, chunk: frames that are encoded, and tracked, in one call.
    """

    cfg: VirstConfig
    versions: Mapping[str, str]
    batch: int
    chunk: int
    steps: tuple[StepSpec, ...]

    @property
    def platforms(self) -> tuple[str, ...]:
        """What there are steps for."""
        return tuple(dict.fromkeys(step.platform for step in self.steps))


def write_parameters(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes arrays with their names; those of one file are held in memory."""
    from safetensors.numpy import save_file

    held: dict[str, np.ndarray] = {}
    count = 0

    def put() -> None:
        nonlocal count
        count += 1
        save_file(held, folder / PARAMETERS.replace("*", str(count)))
        held.clear()

    for name, value in tensors:
        if held and sum(x.nbytes for x in held.values()) + value.nbytes > SHARD_BYTES:
            put()
        held[name] = np.ascontiguousarray(value).reshape(value.shape)  # the former makes a number a list of one
    put()


def read_parameters(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays, one after another.

    Raises:
      UserError: a broken file.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob(PARAMETERS)):
        try:
            with safe_open(file, "numpy") as tensors:
                names = tensors.keys()
                for name in names:
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: broken parameters ({atomic.reason(error)}); {AGAIN}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json, when all other files are there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {
        "format": FORMAT,
        "version": VERSION,
        "versions": dict(manifest.versions),
        "platforms": list(manifest.platforms),
        "batch": manifest.batch,
        "chunk": manifest.chunk,
        "config": dataclasses.asdict(manifest.cfg),
        "steps": [dataclasses.asdict(step) for step in manifest.steps],
        "files": {path.relative_to(folder).as_posix(): digests.of_file(path) for path in files},
    }
    atomic.write_json(folder / MANIFEST, content | {"digest": _digest(content)})


def read_manifest(folder: Path) -> Manifest:
    """Reads a folder's manifest and compares all files with their digests.

    Raises:
      UserError: it is no such folder, of a later version, not whole, or damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: no exported model there ({MANIFEST} is missing); `virst export-model` writes one")
    found = read_json(path, advice=AGAIN)
    content = found.object()
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: is not of an exported model; give a folder that `virst export-model` wrote")
    if found["version"].integer() != VERSION:
        raise UserError(
            f"{path}: has version {content['version']}, this package reads {VERSION}; export the model again"
        )
    if content.get("digest") != _digest({key: value for key, value in content.items() if key != "digest"}):
        raise UserError(f"{path}: is not as it was written: damaged or edited; {AGAIN}")
    for name, digest in found["files"].members():
        _check_file(folder, name, digest.text())
    return Manifest(
        from_json(json.dumps(found["config"].object()), str(path)),
        {name: version.text() for name, version in found["versions"].members()},
        found["batch"].integer(1),
        found["chunk"].integer(1),
        tuple(_step(step, content["files"]) for step in found["steps"].elements()),
    )


def require_flatbuffers() -> None:
    """Raises UserError: the package is missing with which JAX reads and writes artefacts."""
    try:
        import flatbuffers  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("flatbuffers is not installed; pip install 'virst-jax[export]'") from error


def package_versions() -> dict[str, str]:
    """Of what an artefact depends on."""
    return {name: importlib.metadata.version(name) for name in ("virst-jax", "jax", "jaxlib")}


def _check_file(folder: Path, name: str, digest: str) -> None:
    path = folder / name
    if ".." in path.parts or Path(name).is_absolute():
        raise UserError(f"{folder / MANIFEST}: names {name!r}, which is not in the folder; {AGAIN}")
    if not path.is_file():
        raise UserError(f"{path}: is missing; {AGAIN}")
    if digests.of_file(path) != digest:
        raise UserError(f"{path}: is not as it was written: damaged or edited; {AGAIN}")


def _step(step: Json, files: Mapping[str, str]) -> StepSpec:
    file = step["file"]
    if file.text() not in files:
        raise file.error("names a file without a digest", AGAIN)
    return StepSpec(
        step["step"].text(),
        step["platform"].text(),
        file.text(),
        tuple(name.text() for name in step["parameters"].elements()),
        tuple(_array(array) for array in step["inputs"].elements()),
        tuple(_array(array) for array in step["outputs"].elements()),
    )


def _array(array: Json) -> ArraySpec:
    shape = tuple(length.integer(0) for length in array["shape"].elements())
    return ArraySpec(array["name"].text(), shape, array["dtype"].text())


def _digest(content: Mapping[str, Any]) -> str:
    """As read back: of lists, where there were tuples."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()
