"""The pickle inside a `.pt` file, read and written without torch.

A pickle is a program for a stack machine. This one knows the few instructions and names that a state dict is made
of and stands in for them with plain records, so that nothing from the file is ever called, imported or assigned.
"""

import math
import pickletools
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from virst_jax.errors import UserError

from .source import MAX_DIMS

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(getattr(ml_dtypes if hasattr(ml_dtypes, name) else np, name))
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
}
# The dtypes that have a storage class; the others are kept in untyped storages.
STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": DTYPES["float64"],
    "FloatStorage": DTYPES["float32"],
    "HalfStorage": DTYPES["float16"],
    "BFloat16Storage": DTYPES["bfloat16"],
    "LongStorage": DTYPES["int64"],
    "IntStorage": DTYPES["int32"],
    "ShortStorage": DTYPES["int16"],
    "CharStorage": DTYPES["int8"],
    "ByteStorage": DTYPES["uint8"],
    "BoolStorage": DTYPES["bool"],
    "ComplexFloatStorage": DTYPES["complex64"],
    "ComplexDoubleStorage": DTYPES["complex128"],
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}


class Storage(NamedTuple):
    """A run of values, in the archive's entry data/KEY."""

    key: str
    dtype: np.dtype | None  # None: bytes
    size: int  # in elements, or in bytes if untyped


class Tensor(NamedTuple):
    """How a tensor lies in its storage. Offset and strides count elements; nothing is checked yet but the types."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype | None


@dataclass(frozen=True)
class _TensorType:
    """Stands in for a class of tensors; it is never made."""


@dataclass(frozen=True)
class _Function:
    """Stands in for a callable of the file."""

    call: Callable[[tuple[Any, ...]], object]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any) -> Tensor:
    if not (isinstance(storage, Storage) and isinstance(dtype, np.dtype) and type(offset) is int):
        raise ValueError("a tensor without storage, dtype or offset")
    for numbers in (shape, strides):
        # the length first: one long tuple can be named by every tensor of a file
        if not isinstance(numbers, tuple) or len(numbers) > MAX_DIMS + 1 or any(type(n) is not int for n in numbers):
            raise ValueError("a tensor whose shape or strides are not a few whole numbers")
    return Tensor(storage, dtype, offset, shape, strides)


def _tensor_v2(args: tuple[Any, ...]) -> Tensor:
    # behind the strides: requires_grad, hooks, metadata
    if not 4 <= len(args) <= 7:
        raise ValueError(f"a tensor made from {len(args)} values")
    storage, offset, shape, strides = args[:4]
    return _tensor(storage, offset, shape, strides, storage.dtype if isinstance(storage, Storage) else None)


def _tensor_v3(args: tuple[Any, ...]) -> Tensor:
    # behind the strides: requires_grad, hooks, dtype, metadata
    if not 7 <= len(args) <= 8:
        raise ValueError(f"a tensor made from {len(args)} values")
    storage, offset, shape, strides, _requires_grad, _hooks, dtype = args[:7]
    return _tensor(storage, offset, shape, strides, dtype)


def _parameter(args: tuple[Any, ...]) -> Tensor:
    """Also of `_rebuild_parameter_with_state`: the attributes that somebody set on a parameter are left out."""
    if not args or not isinstance(args[0], Tensor):
        raise ValueError("a parameter without a tensor")
    return args[0]


def _from_type(args: tuple[Any, ...]) -> Tensor:
    """A tensor with attributes: (function, class, its arguments, attributes). The attributes are left out."""
    if len(args) != 4 or not isinstance(args[0], _Function) or not isinstance(args[1], _TensorType):
        raise ValueError("a tensor with attributes that is made in an unknown way")
    known = args[0].call in (_tensor_v2, _tensor_v3, _parameter) and isinstance(args[2], tuple)
    tensor = args[0].call(args[2]) if known else None
    if not isinstance(tensor, Tensor):
        raise ValueError("attributes of what is not a tensor")
    return tensor


def _size(args: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(args) != 1 or not isinstance(args[0], tuple):
        raise ValueError("a torch.Size that is not made from a tuple")
    return args[0]


def _ordered_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    if args:
        raise ValueError("an OrderedDict with arguments")
    return {}


_GLOBALS: dict[str, object] = {
    "collections OrderedDict": _Function(_ordered_dict),
    "torch._utils _rebuild_tensor_v2": _Function(_tensor_v2),
    "torch._utils _rebuild_tensor_v3": _Function(_tensor_v3),
    "torch._utils _rebuild_parameter": _Function(_parameter),
    "torch._utils _rebuild_parameter_with_state": _Function(_parameter),
    "torch._tensor _rebuild_from_type_v2": _Function(_from_type),
    "torch._tensor Tensor": _TensorType(),
    "torch Tensor": _TensorType(),
    "torch.nn.parameter Parameter": _TensorType(),
    "torch.nn.parameter Buffer": _TensorType(),
    "torch Size": _Function(_size),
    "torch UntypedStorage": _StorageType(None),
    "torch.storage UntypedStorage": _StorageType(None),
    **{f"torch {name}": _StorageType(dtype) for name, dtype in STORAGES.items()},
    **{f"torch {name}": dtype for name, dtype in DTYPES.items()},
}
_PUSH_ARGUMENT = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    }
)
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KEY_TYPES = (str, int, float, bool, bytes, type(None))  # a nested tuple could exhaust the stack when hashed
_MAX_INT_KEY = sys.hash_info.modulus  # from here on numbers can be chosen whose hashes are equal
_MAX_BITS = 1024  # of a number; arithmetic with longer ones takes time
# A list of 2000 tensors has some 80,000 instructions in 400 kB. Each of these bounds keeps what a hostile list takes
# to some seconds and some hundred megabytes.
MAX_BYTES = 32 << 20
MAX_INSTRUCTIONS = 2_000_000


class _Machine:
    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: list[Storage] = []

    def run(self, data: bytes) -> object:
        stack, memo = self.stack, self.memo
        for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):
            name = opcode.name
            if count == MAX_INSTRUCTIONS:
                raise self.too_large(f"more than {MAX_INSTRUCTIONS} instructions")
            if name in _PUSH_ARGUMENT:
                if isinstance(arg, int) and arg.bit_length() > _MAX_BITS:
                    raise ValueError(f"a number of {arg.bit_length()} bits")
                stack.append(arg)
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[int(arg)] = stack[-1]  # type: ignore[arg-type]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[int(arg)])  # type: ignore[arg-type]
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _TUPLES:
                self.push_tuple(_TUPLES[name])
            elif name in _STEPS:
                _STEPS[name](self)
            elif name == "GLOBAL":
                stack.append(self.resolve(str(arg)))
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                raise UserError(
                    f"{self.where}: its pickle uses the instruction {name}, which no state dict needs and which is "
                    "never run; save the file again with the state dict alone"
                )
        raise ValueError("no end")  # genops raises first

    def too_large(self, what: str) -> UserError:
        return UserError(
            f"{self.where}: its list of tensors has {what}, far more than a network needs; save the file again with "
            "the state dict alone"
        )

    def resolve(self, name: str) -> object:
        if name not in _GLOBALS:
            shown = ascii(name.replace(" ", "."))[1:-1][:120]
            raise UserError(
                f"{self.where}: refers to {shown}, which is not part of a state dict and is never run; "
                "save the file again with the state dict alone"
            )
        return _GLOBALS[name]

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def push_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("a tuple without items")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a reference whose name is not text")
        self.stack.append(self.resolve(f"{module} {name}"))

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items for what is not a list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("keys and values for what is not a dict")
        for key, value in zip(items[::2], items[1::2]):
            if not isinstance(key, _KEY_TYPES) or (isinstance(key, int) and abs(key) >= _MAX_INT_KEY):
                raise ValueError(f"a key that is a {type(key).__name__}")
            target[key] = value

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not (isinstance(function, _Function) and isinstance(args, tuple)):
            raise ValueError("a call of what is not a function")
        self.stack.append(function.call(args))

    def build(self) -> None:
        # The attributes of an OrderedDict (a module's `_metadata`) say nothing about its tensors.
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise ValueError("attributes for what is not a dict")

    def persistent(self) -> None:
        item = self.stack.pop()
        if not isinstance(item, tuple) or len(item) != 5:
            raise ValueError("a storage that is not described by five values")
        kind, storage, key, _device, size = item
        if not (isinstance(kind, str) and kind == "storage" and isinstance(storage, _StorageType)):
            raise ValueError("an outside value that is not a storage")
        if not isinstance(key, str) or type(size) is not int or size < 0:
            raise ValueError("a storage whose key or size is of the wrong kind")
        found = Storage(key, storage.dtype, size)
        self.storages.append(found)
        self.stack.append(found)

    def new_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(items)


_STEPS: dict[str, Callable[[_Machine], Any]] = {
    "MARK": _Machine.mark,
    "POP": lambda m: m.stack.pop(),
    "POP_MARK": _Machine.pop_mark,
    "DUP": lambda m: m.stack.append(m.stack[-1]),
    "EMPTY_DICT": lambda m: m.stack.append({}),
    "EMPTY_LIST": lambda m: m.stack.append([]),
    "TUPLE": lambda m: m.stack.append(tuple(m.pop_mark())),
    "LIST": lambda m: m.stack.append(m.pop_mark()),
    "DICT": _Machine.new_dict,
    "APPEND": lambda m: m.append([m.stack.pop()]),
    "APPENDS": lambda m: m.append(m.pop_mark()),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda m: m.set_items(m.pop_mark()),
    "MEMOIZE": _Machine.memoize,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


def load_pickle(data: bytes, where: str) -> object:
    """The object that a checkpoint's pickle describes, with a `Tensor` record for every tensor.

    Raises:
      UserError: the pickle is damaged, or refers to anything that is not part of a state dict; names `where`.
    """
    machine = _Machine(where)
    if len(data) > MAX_BYTES:
        raise machine.too_large(f"{len(data)} bytes")
    try:
        return machine.run(data)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{where}: its list of tensors is damaged ({reason}); download or save the file again"
        ) from error


def stored_bytes(data: bytes, where: str) -> int:
    """Bytes of all storages that the pickle at the start of `data` names; 0 where it is damaged."""
    machine = _Machine(where)
    try:
        machine.run(data)
    except (UserError, ValueError, IndexError, KeyError, TypeError, OverflowError):
        return 0
    return sum({s.key: s.size * (s.dtype.itemsize if s.dtype is not None else 1) for s in machine.storages}.values())


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")  # protocol 2, as torch.save
        self.memo: dict[str, int] = {}

    def name(self, module_and_name: str) -> None:
        if module_and_name in self.memo:
            self.out += b"h" + bytes([self.memo[module_and_name]])
        else:
            self.memo[module_and_name] = index = len(self.memo)  # fewer than 256: storages and dtypes
            self.out += b"c" + module_and_name.replace(" ", "\n").encode() + b"\nq" + bytes([index])

    def text(self, value: str) -> None:
        encoded = value.encode()
        self.out += b"X" + struct.pack("<I", len(encoded)) + encoded

    def number(self, value: int) -> None:
        if value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            encoded = value.to_bytes(value.bit_length() // 8 + 1, "little")
            self.out += b"\x8a" + bytes([len(encoded)]) + encoded

    def numbers(self, values: Iterable[int]) -> None:
        self.out += b"("
        for value in values:
            self.number(value)
        self.out += b"t"

    def tensor(self, key: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        storage = _STORAGE_NAMES.get(dtype)
        strides = [math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape))]  # contiguous
        size = math.prod(shape)
        self.name("torch._utils _rebuild_tensor_v2" if storage else "torch._utils _rebuild_tensor_v3")
        self.out += b"(("
        self.text("storage")
        self.name(f"torch {storage}" if storage else "torch.storage UntypedStorage")
        self.text(key)
        self.text("cpu")
        self.number(size if storage else size * dtype.itemsize)
        self.out += b"tQ"
        self.number(0)
        self.numbers(shape)
        self.numbers(strides)
        self.out += b"\x89"  # requires_grad
        self.name("collections OrderedDict")  # hooks
        self.out += b")R"
        if not storage:
            self.name(f"torch {_DTYPE_NAMES[dtype]}")
        self.out += b"tR"


def dump_pickle(tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]], root: str | None) -> bytes:
    """The pickle of {root: {name: tensor}}, or of {name: tensor}; the i-th tensor lies in the storage data/i.

    Raises:
      KeyError: PyTorch has no such dtype.
    """
    writer = _Writer()
    if root is not None:
        writer.out += b"}"
        writer.text(root)
    writer.out += b"}("
    for index, (name, shape, dtype) in enumerate(tensors):
        writer.text(name)
        writer.tensor(str(index), shape, dtype)
    writer.out += b"u"
    if root is not None:
        writer.out += b"s"
    return bytes(writer.out + b".")
