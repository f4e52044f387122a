"""PyTorch checkpoint files (`.pt`) without torch: tensors read lazily from a memory map, files written in a stream.

A `.pt` file is a zip archive of stored (uncompressed) entries: PREFIX/data.pkl, a pickle that describes the tensors,
PREFIX/data/KEY, the values of one storage each, and PREFIX/byteorder. Nothing in the pickle is ever executed. Values
are compared with the archive's checksums when they are first read.

Source: model/builder.py reads such files with torch.load, under the key "model_state_dict"; model/sam2/build_sam.py
under "model".
"""

import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io import atomic

from .source import (
    TensorFile,
    TensorSpec,
    element_count,
    some,
    tensor_bytes,
)
from .torch_archive import Archive
from .torch_pickle import DTYPES, MAX_BYTES, Tensor, dump_pickle, load_pickle

_MAX_REPEATED_BYTES = 1 << 30  # of a tensor that shows its storage more than once, as torch.expand does
_ALIGNMENT = 64  # as torch.save
_ZIP64_FROM = 1 << 30  # from this entry size on the zip64 form is used; necessary from 4 GiB


class TorchFile(TensorFile[Tensor]):
    """A `.pt` file's tensors, read one at a time. A `TensorSource` and a context manager.

    root: the key of the top-level dict that holds the state dict; None: the top-level dict itself; several: the first
      under which there are tensors.

    Raises:
      UserError: missing, damaged or not a zip file; no such root (lists the keys there are); no tensors; a reference
        to anything that is not part of a state dict (nothing of the file is ever run).
    """

    where: str
    root: str | None  # where the tensors are
    scalars: dict[str, int | float | str | None]  # plain values of the top level: epoch, step, ...

    def __init__(self, path: str | Path, root: str | Sequence[str | None] | None = None) -> None:
        self.where = str(path)
        self._archive = Archive(path)
        try:
            self._open((root,) if root is None or isinstance(root, str) else tuple(root))
        except BaseException:
            self.close()
            raise

    def _open(self, roots: tuple[str | None, ...]) -> None:
        self._swap = self._byte_order() != sys.byteorder
        top = load_pickle(self._archive.read("data.pkl", MAX_BYTES), self.where)
        if not isinstance(top, dict):
            kind = type(top).__name__
            raise UserError(f"{self.where}: holds a {kind}, not a dict of tensors; save model.state_dict()")
        self.root, state = self._pick(top, roots)
        self.scalars = {
            key: value
            for key, value in top.items()
            if isinstance(key, str) and isinstance(value, int | float | str | None)
        }
        self.entries: dict[str, Tensor] = {}
        for name, value in state.items():
            if isinstance(value, Tensor):
                if not isinstance(name, str):
                    raise UserError(f"{self.where}: a tensor is named by a {type(name).__name__}; use text")
                self._check_tensor(name, value)
                self.entries[name] = value
        if not self.entries:
            at = "at its top level" if self.root is None else f"under {self.root!r}"
            raise UserError(f"{self.where}: no tensors {at}, {_keys(top)}; choose another root")

    def _byte_order(self) -> str:
        if "byteorder" not in self._archive:
            return "little"  # files of before the entry existed
        order = self._archive.read("byteorder", 16)
        if order not in (b"little", b"big"):
            raise UserError(f"{self.where}: unknown byte order {order!r}; get the file again")
        return order.decode()

    def _pick(self, top: dict[Any, Any], roots: tuple[str | None, ...]) -> tuple[str | None, dict[Any, Any]]:
        """The first root that holds tensors, and the dict there."""
        if len(roots) > 1:
            for root in roots:
                state = top if root is None else top.get(root)
                if isinstance(state, dict) and any(isinstance(value, Tensor) for value in state.values()):
                    return root, state
            named = ", ".join(repr(root) for root in roots if root is not None)
            raise UserError(f"{self.where}: no tensors under any of {named}, {_keys(top)}; name the root with --root")
        root = roots[0]
        if root is None:
            return None, top
        if root not in top:
            raise UserError(f"{self.where}: no entry {root!r}, {_keys(top)}; choose another root")
        state = top[root]
        if not isinstance(state, dict):
            kind = type(state).__name__
            raise UserError(f"{self.where}: {root!r} is a {kind}, not a dict of tensors; {_keys(top)}")
        return root, state

    def _check_tensor(self, name: str, tensor: Tensor) -> None:
        size = tensor.dtype.itemsize
        stored = self._archive.size(f"data/{tensor.storage.key}")
        item = tensor.storage.dtype.itemsize if tensor.storage.dtype is not None else 1
        bad = None
        try:
            count = element_count(tensor.shape)
        except ValueError as error:
            raise UserError(f"{self.where}: tensor {name!r} has {error}; get the file again") from error
        if tensor.storage.size * item > stored:
            bad = f"is cut short: its storage has {stored} bytes"
        elif len(tensor.strides) != len(tensor.shape) or min(tensor.strides, default=0) < 0:
            bad = "has strides that do not fit its shape"
        elif tensor.offset < 0 or (count and (tensor.offset + _last(tensor) + 1) * size > tensor.storage.size * item):
            bad = "reaches beyond its storage"
        elif count * size > max(stored, _MAX_REPEATED_BYTES):
            bad = "repeats its storage to an absurd size"
        if bad:
            raise UserError(f"{self.where}: tensor {name!r} {bad}; get the file again")

    def read(self, name: str) -> np.ndarray:
        """dtype[shape]: a read-only view of the file, with the strides it was saved with.

        A file of the other byte order gives a copy. Views stay valid after `close`.

        Raises:
          UserError: no such name, or the entry of its values is damaged or differs from its checksum.
        """
        tensor = self.entry(name)
        start, _ = self._archive.place(f"data/{tensor.storage.key}")
        if 0 in tensor.shape:
            return np.empty(tensor.shape, tensor.dtype)
        size = tensor.dtype.itemsize
        view: np.ndarray = np.ndarray(
            tensor.shape,
            tensor.dtype,
            buffer=self._archive.mapped,
            offset=start + tensor.offset * size,
            strides=[s * size if n > 1 else size for n, s in zip(tensor.shape, tensor.strides)],
        )
        if not self._swap or size == 1:
            return view
        if view.dtype.kind == "c":
            return view.byteswap()
        return view.view(f"u{size}").byteswap().view(tensor.dtype)  # ml_dtypes cannot swap

    def close(self) -> None:
        """Lets go of the file; what was read stays valid."""
        self._archive.close()


def _last(tensor: Tensor) -> int:
    """Index of the tensor's last element, from its first."""
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides))


def _keys(top: dict[Any, Any]) -> str:
    """What a checkpoint's top level holds, for an error message."""
    keys = [key for key in top if isinstance(key, str)]
    return f"found {some(keys)}" if keys else "found nothing there"


def write_torch_file(
    path: str | Path,
    tensors: Iterable[TensorSpec],
    root: str | None = "model_state_dict",
    on_tensor: Callable[[str], None] | None = None,
) -> None:
    """Writes a file that torch.load(path, weights_only=True) reads, also with mmap=True, one tensor at a time.

    tensors: (name, shape, dtype, function that returns dtype[shape]) each; asked for values once, in order.
    root: the key under which the state dict lies; None: it is the top level itself.
    on_tensor: called with the name of every tensor written.

    Raises:
      UserError: the disk is full or the folder cannot be written (nothing is left then), a name comes twice, or
        PyTorch has no such dtype.
      ValueError: values are not of the announced shape and dtype.
    """
    path = Path(path)
    written: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    with atomic.new_file(path) as file, zipfile.ZipFile(file, "w") as archive:

        def add(entry: str, data: memoryview | bytes) -> None:
            info = zipfile.ZipInfo(f"archive/{entry}")
            zip64 = len(data) >= _ZIP64_FROM
            # torch.load(mmap=True) views storages in place, so they start at multiples of the alignment. The gap
            # before them is an extra field, behind the header (30 bytes, the name, in the zip64 form 20 bytes more)
            # and its own id and size (4 bytes).
            gap = -(file.tell() + 30 + len(info.filename) + 20 * zip64 + 4) % _ALIGNMENT
            info.extra = struct.pack("<HH", 0x4246, gap) + b"Z" * gap
            with archive.open(info, "w", force_zip64=zip64) as out:
                out.write(data)

        for name, shape, dtype, read in tensors:
            shape, dtype = tuple(int(n) for n in shape), np.dtype(dtype)
            if name in written:
                raise UserError(f"{path}: two tensors are named {name!r}; give every tensor a name of its own")
            if dtype not in DTYPES.values():
                raise UserError(f"{path}: {name!r} is {dtype}, which PyTorch has not; convert it first")
            add(f"data/{len(written)}", tensor_bytes((name, shape, dtype, read)))
            written[name] = (shape, dtype)
            if on_tensor is not None:
                on_tensor(name)
        add("data.pkl", dump_pickle(((name, *spec) for name, spec in written.items()), root))
        add("byteorder", sys.byteorder.encode())
        add("version", b"3\n")
