"""Mutated checkpoint files: they read as values or end in one UserError, in bounded time and memory.

Files are mutated byte by byte; pickles and headers are also made from the right words in any order, so that more than
the outermost check is met.
"""

import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conversion.formats.safetensors_dir import SafetensorsDir
from conversion.formats.source import TensorSource
from conversion.formats.torch_file import TorchFile, write_torch_file
from fuzz.target import Target
from helpers.safetensors_files import write_shards
from helpers.torch_archives import Call, Global, Outside, Raw, encode, program, tensor, write_archive

ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a.bias": np.arange(4, dtype=np.float16),
    "count": np.array(7),
    "empty": np.zeros((0, 3), np.float32),
}


def _specs() -> Any:
    return [(name, x.shape, x.dtype, lambda x=x: x) for name, x in ARRAYS.items()]


def _torch_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        write_torch_file(path, _specs())
        ours = path.read_bytes()
        path.unlink()
        metadata = {"_metadata": {"": {"version": 1}}}
        state = {
            "model": Call(Global("collections OrderedDict"), (), metadata),
            "state": {
                "whole": tensor(),
                "view": tensor((2,), (3,), offset=1),
                "attributes": Call(
                    Global("torch._utils _rebuild_parameter_with_state"), (tensor(), True, Raw(b"}"), {"a": 1})
                ),
            },
            "epoch": 3,
            "loss": [0.5, None, "text"],
        }
        write_archive(path, state, byteorder="little")
        return [ours, path.read_bytes()]


def _safetensors_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), ARRAYS)
        return [(Path(folder) / "model.safetensors").read_bytes()]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A sound file with bytes changed, cut out, repeated or put in, or cut short."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(["bit", "byte", "cut", "insert", "repeat", "number", "end"]))
        if kind == "bit":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte":
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=64))
        elif kind == "repeat":
            part = bytes(data[at : at + draw(st.integers(1, 64))])
            data[at:at] = part * draw(st.sampled_from([1, 2, 50]))
        elif kind == "number":
            number = draw(st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 31, (1 << 63) - 1, (1 << 64) - 1]))
            width = draw(st.sampled_from([2, 4, 8]))
            data[at : at + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        else:
            del data[at:]
    return bytes(data)


_SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8)
_NUMBERS = st.lists(st.integers(-3, 2**66) | st.integers(0, 4), max_size=4).map(tuple)
_STORAGE = st.builds(
    lambda key, size, kind: Outside(("storage", Global(f"torch {kind}"), key, "cuda:0", size)),
    st.sampled_from(["0", "1", "../data.pkl"]),
    st.integers(-1, 8) | st.sampled_from([2**40, 2**80]),
    st.sampled_from(["FloatStorage", "BFloat16Storage", "UntypedStorage", "ByteStorage", "float32"]),
)
_TENSOR = st.builds(
    lambda function, args: Call(Global(function), args),
    st.sampled_from(["tensor_v2", "tensor_v3", "parameter"]).map("torch._utils _rebuild_{}".format),
    st.tuples(_STORAGE, st.integers(-1, 8), _NUMBERS, _NUMBERS, st.booleans(), _SCALARS)
    | st.lists(_SCALARS, max_size=8).map(tuple),
)
_VALUE = st.recursive(
    _SCALARS | _TENSOR,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_CODE = st.lists(
    st.sampled_from([bytes([code]) for code in range(256)])
    | st.sampled_from([encode(tensor()), b"ctorch\nSize\n", b"ccollections\nOrderedDict\n)R"])
    | st.sampled_from([b"K\x01", b"h\x00", b"q\x00"]),
    max_size=40,
).map(b"".join)


def _archive(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/data/0", bytes(24))
    return buffer.getvalue()


# damaged files (most fail at a checksum), pickles of the right words in any order, and any instructions
TORCH = (
    mutated(_torch_seeds())
    | st.dictionaries(st.text(max_size=8), _VALUE, max_size=4).map(lambda v: _archive(program({"good": tensor(), **v})))
    | mutated([program({"good": tensor(), "view": tensor((2,), (3,), offset=1)})]).map(_archive)
    | _CODE.map(lambda code: _archive(b"\x80\x02" + code + b"."))
)

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F64", "F7"]) | _JSON,
        "shape": st.lists(st.integers(-1, 4) | st.sampled_from([2**48, 2**63]), max_size=4) | _JSON,
        "data_offsets": st.lists(st.integers(-1, 24), min_size=2, max_size=2) | _JSON,
    }
)


def _with_header(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(24)


SAFETENSORS = mutated(_safetensors_seeds()) | (
    st.dictionaries(st.text(max_size=8), _ENTRY | _JSON, max_size=3) | _JSON
).map(_with_header)


def _read_all(source: TensorSource) -> None:
    for name in source.names():
        value = source.read(name)
        assert value.shape == source.shape(name)
        assert value.dtype == source.dtype(name)
        if value.nbytes < 1 << 20:
            value.tobytes()  # touches every value: a view beyond the file would end the process


def check_torch(data: bytes, folder: Path) -> None:
    """Reads a `.pt` file."""
    path = folder / "model.pt"
    path.write_bytes(data)
    with TorchFile(path, ("model_state_dict", "state", "model", None)) as file:
        _read_all(file)


def check_safetensors(data: bytes, folder: Path) -> None:
    """Reads a safetensors file."""
    path = folder / "model.safetensors"
    path.write_bytes(data)
    with SafetensorsDir(path) as file:
        _read_all(file)


def _in_a_folder(check: Callable[[bytes, Path], None]) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            check(data, Path(folder))

    return read


TARGETS = [
    Target("checkpoint_torch_file", TORCH, _in_a_folder(check_torch)),
    Target("checkpoint_safetensors", SAFETENSORS, _in_a_folder(check_safetensors)),
]
