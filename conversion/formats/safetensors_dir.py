"""Folders of safetensors files, read lazily from memory maps.

A `.safetensors` file is the size of its header (8 bytes, little endian), the header (JSON: dtype, shape and byte
range of every tensor) and the values. A model of several such files (shards) has a model.safetensors.index.json that
says which shard holds which tensor. Parsed here because the safetensors package knows no float8 for numpy.

Source: model/builder.py (from_pretrained with use_safetensors) reads such folders.
"""

import json
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from virst_jax.errors import UserError

from .shards import check_promises, find_shards, twice
from .source import TensorFile, element_count, ends_early, map_file

INDEX = "model.safetensors.index.json"
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_FORMAT_MAX_HEADER = 100_000_000  # bytes
_MAX_HEADER = 16 << 20  # bytes; parsing takes some 25 times as much memory. 2000 tensors have 200 kB


class _Entry(NamedTuple):
    shard: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # in the file


class SafetensorsDir(TensorFile[_Entry]):
    """Tensors of a folder of safetensors files, or of one such file. A `TensorSource` and a context manager.

    Raises:
      UserError: nothing there, a missing or damaged shard, a name that the index and the shards disagree on.
    """

    def __init__(self, path: str | Path) -> None:
        self.where = str(path)
        self._maps: dict[Path, mmap.mmap] = {}
        self.entries: dict[str, _Entry] = {}
        try:
            self._open(Path(path))
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        promised = find_shards(path, ".safetensors", INDEX)
        for shard in promised:
            self._maps[shard] = map_file(shard)
            for name, entry in _header(shard, self._maps[shard]).items():
                if name in self.entries:
                    raise twice(self.where, name, self.entries[name].shard, shard)
                self.entries[name] = entry
        check_promises(self.where, INDEX, promised, {name: entry.shard for name, entry in self.entries.items()})

    def read(self, name: str) -> np.ndarray:
        """dtype[shape]: a read-only view of the file, which stays valid after `close`.

        Raises:
          UserError: no such name.
        """
        entry = self.entry(name)
        if entry.shard not in self._maps:
            raise ValueError(f"{self.where}: is closed")
        if 0 in entry.shape:
            return np.empty(entry.shape, entry.dtype)
        return np.ndarray(entry.shape, entry.dtype, buffer=self._maps[entry.shard], offset=entry.start)

    def close(self) -> None:
        """Lets go of the files; what was read stays valid."""
        self._maps.clear()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name that comes twice")
    return dict(pairs)


def _header(path: Path, data: mmap.mmap) -> dict[str, _Entry]:
    """What a file says of its tensors, checked against its size, in the order of the values."""
    size = int.from_bytes(data[:8], "little")
    base = 8 + size
    if len(data) < 8 or size > _FORMAT_MAX_HEADER or data[8:9] not in (b"{", b" ", b""):
        raise UserError(f"{path}: not a safetensors file, or one that ends early; download it again")
    if base > len(data):
        raise ends_early(path, len(data), base, least=True)
    if size > _MAX_HEADER:
        raise UserError(f"{path}: its header has {size} bytes, far more than a network needs; save it in several files")
    try:
        header = json.loads(data[8:base].decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("not an object")
        header.pop("__metadata__", None)
        ranges = {name: _byte_range(name, value) for name, value in header.items()}
        entries, end = {}, 0
        for name in sorted(ranges, key=ranges.__getitem__):
            first, last = ranges[name]
            if first != end:
                raise ValueError(f"a gap or an overlap before {name!r}")
            entries[name] = _Entry(path, DTYPES[header[name]["dtype"]], tuple(header[name]["shape"]), base + first)
            end = last
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its header is damaged ({reason}); download it again") from error
    if base + end > len(data):
        raise ends_early(path, len(data), base + end)
    if base + end < len(data):
        raise UserError(f"{path}: longer than its header says ({len(data)} bytes for {base + end}); download it again")
    return entries


def _byte_range(name: str, value: Any) -> tuple[int, int]:
    if value["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {value['dtype']!r:.40}")
    first, last = value["data_offsets"]
    if type(first) is not int or type(last) is not int or not isinstance(value["shape"], list):
        raise ValueError(f"the place or shape of {name!r} is not whole numbers")
    if last - first != element_count(value["shape"]) * DTYPES[value["dtype"]].itemsize:
        raise ValueError(f"the shape and byte range of {name!r} disagree")
    return first, last
