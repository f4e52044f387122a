"""Writes `.pt` files byte by byte, sound and hostile ones: a pickle assembler and the archive around it."""

import pickle
import struct
import zipfile
from dataclasses import dataclass

import numpy as np

# A pickle assembler: plain values, and the three things of a checkpoint's pickle that plain values cannot say.


@dataclass(frozen=True)
class Global:
    name: str


@dataclass(frozen=True)
class Call:
    function: object
    args: object
    state: object = None


@dataclass(frozen=True)
class Outside:
    value: object


@dataclass(frozen=True)
class Raw:
    code: bytes


def encode(value):
    match value:
        case Raw(code):
            return code
        case Global(name):
            return b"c" + name.replace(" ", "\n").encode() + b"\n"
        case Call(function, args, state):
            return encode(function) + encode(args) + b"R" + (b"" if state is None else encode(state) + b"b")
        case Outside(inner):
            return encode(inner) + b"Q"
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            code = pickle.encode_long(value)
            return b"\x8a" + bytes([len(code)]) + code
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, value)) + b"e"
        case dict():
            return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
    raise TypeError(type(value))


def program(value):
    return b"\x80\x02" + encode(value) + b"."


ORDERED = Call(Global("collections OrderedDict"), ())


def tensor(shape=(2, 3), strides=(3, 1), offset=0, key="0", size=6, storage="torch FloatStorage"):
    outside = Outside(("storage", Global(storage), key, "cpu", size))
    return Call(Global("torch._utils _rebuild_tensor_v2"), (outside, offset, shape, strides, False, ORDERED))


SIX = np.arange(6, dtype=np.float32)


def write_archive(path, value, storages=None, byteorder=None, compression=zipfile.ZIP_STORED, pickled=None):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", program(value) if pickled is None else pickled)
        if byteorder is not None:
            archive.writestr("model/byteorder", byteorder)
        for key, data in {"0": SIX.tobytes()}.items() if storages is None else storages.items():
            archive.writestr(f"model/data/{key}", data)
    return path
