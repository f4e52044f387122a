"""`.pt` files: reading, and refusing what is hostile or damaged."""

import argparse
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from conversion.formats.source import TensorSource
from conversion.formats.torch_file import TorchFile, write_torch_file
from helpers.torch_archives import ORDERED, SIX, Call, Global, Outside, encode, program, tensor, write_archive
from virst_jax.errors import UserError


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.pt"


def read_all(path, root):
    with TorchFile(path, root) as file:
        return {name: file.read(name) for name in file.names()}


def refused(path, *words, root=None):
    """The one line with which the file is refused."""
    with pytest.raises(UserError) as error:
        read_all(path, root)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def same(a, b):
    """Bit for bit, so that NaNs count too."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


# Reading


def test_reads_views_tied_storages_and_ignores_the_rest(path):
    state = {
        "whole": tensor(),
        "tied": tensor(),
        "transposed": tensor((3, 2), (1, 3)),
        "column": tensor((2,), (3,), offset=1),
        "scalar": tensor((), (), offset=5),
        "empty": tensor((0, 4), (4, 1), key="1", size=0),
        "repeated": tensor((2, 3), (0, 1), offset=3),
        "one": tensor((1, 3), (2**62, 1)),  # the stride of a dimension of one never counts
        "parameter": Call(Global("torch._utils _rebuild_parameter"), (tensor(), True, ORDERED)),
        "count": 7,
        "history": [1.5, None, "text"],
        "dtype": Global("torch bfloat16"),
        "size": Call(Global("torch Size"), ((2, 3),)),
    }
    metadata = {"_metadata": {"": {"version": 1}}}
    top = {"epoch": 3, "loss": 0.5, "model": Call(Global("collections OrderedDict"), (), metadata), "state": state}
    write_archive(path, top, {"0": SIX.tobytes(), "1": b""})
    grid = SIX.reshape(2, 3)
    expected = {
        "whole": grid,
        "tied": grid,
        "transposed": grid.T,
        "column": grid[:, 1],
        "scalar": np.float32(5),
        "empty": np.zeros((0, 4)),
        "repeated": grid[[1, 1]],
        "one": grid[:1],
        "parameter": grid,
    }
    with TorchFile(path, root="state") as file:
        source: TensorSource = file
        assert source.where == str(path)
        assert source.names() == list(expected)
        for name, values in expected.items():
            assert source.shape(name) == values.shape
            assert source.dtype(name) == np.float32
            np.testing.assert_array_equal(source.read(name), values)
        assert file.scalars == {"epoch": 3, "loss": 0.5}


def test_a_reading_is_a_view_that_outlives_the_file(path):
    write_archive(path, {"a": tensor()})
    file = TorchFile(path)
    values = file.read("a")
    assert not values.flags.owndata
    assert not values.flags.writeable
    file.close()
    file.close()
    np.testing.assert_array_equal(values.ravel(), SIX)
    with pytest.raises(ValueError, match="closed"):
        file.read("a")


@pytest.mark.parametrize("order", ["little", "big", None])
def test_byte_order(path, order):
    half = np.array([1, -2, 0.5], ml_dtypes.bfloat16)
    wave = np.array([1 + 2j, 3 - 4j], np.complex64)
    small = np.array([1, 2, 255], np.uint8)
    value = {
        "a": tensor(),
        "half": tensor((3,), (1,), key="1", size=3, storage="torch BFloat16Storage"),
        "wave": tensor((2,), (1,), key="2", size=2, storage="torch ComplexFloatStorage"),
        "small": tensor((3,), (1,), key="3", size=3, storage="torch ByteStorage"),
    }
    sign = ">" if order == "big" else "<"
    storages = {
        "0": SIX.astype(sign + "f4").tobytes(),
        "1": half.view(np.uint16).astype(sign + "u2").tobytes(),
        "2": wave.astype(sign + "c8").tobytes(),
        "3": small.tobytes(),
    }
    with TorchFile(write_archive(path, value, storages, order)) as file:
        for name, values in {"a": SIX.reshape(2, 3), "half": half, "wave": wave, "small": small}.items():
            assert same(file.read(name), values)


def test_roots(path):
    state = {"a": tensor()}
    write_archive(path, {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}})
    assert TorchFile(path, root="state_dict").names() == ["a"]
    refused(path, "'model_state_dict'", "'state_dict', 'epoch', 'optimizer'", root="model_state_dict")
    refused(path, "no tensors under 'optimizer'", root="optimizer")
    refused(path, "'epoch' is a int", root="epoch")
    refused(path, "no tensors at its top level", "'state_dict'")
    refused(write_archive(path, {}), "no tensors", "found nothing")
    refused(write_archive(path, [tensor()]), "holds a list")
    refused(write_archive(path, {3: tensor()}), "named by a int")
    refused(write_archive(path, {f"w{i}": 0 for i in range(30)}), "and 22 more", root="model")
    with TorchFile(write_archive(path, state)) as file:
        for ask in (file.shape, file.dtype, file.read):
            with pytest.raises(UserError, match=r"no tensor named 'b'"):
                ask("b")


# Hostile files


class Reduced:
    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("nested", [False, True])
def test_nothing_is_run(path, tmp_path, protocol, nested):
    witness = tmp_path / "witness"
    attacks = {
        f"{os.system.__module__}.system": Reduced(os.system, (f"touch {witness}",)),
        f"{'builtins' if protocol > 2 else '__builtin__'}.eval": Reduced(eval, (f"open({str(witness)!r}, 'w')",)),
        "exec": Reduced(exec, (f"open({str(witness)!r}, 'w')",)),
        "getattr": Reduced(getattr, (OrderedDict, "clear")),
        "io.open": Reduced(open, (str(witness), "w")),
        "shutil.rmtree": Reduced(shutil.rmtree, (str(tmp_path),)),
        "argparse.Namespace": argparse.Namespace(lr=0.1),
    }
    for name, attack in attacks.items():
        top = {"model": {"weight": attack}} if nested else attack
        write_archive(path, None, pickled=pickle.dumps(top, protocol))
        refused(path, name, "never run", root="model")
        assert not witness.exists()
    pickle.loads(pickle.dumps(attacks["io.open"], protocol))  # such an attack does work elsewhere
    assert witness.exists()


OLD_STYLE = {
    "INST": b"(S'touch x'\nios\nsystem\n.",
    "OBJ": b"(cposix\nsystem\nX\x01\x00\x00\x00ao.",
    "NEWOBJ": b"ccollections\nOrderedDict\n)\x81.",
    "NEWOBJ_EX": b"ccollections\nOrderedDict\n)}\x92.",
    "EXT1": b"\x82\x01.",
    "PERSID": b"Pname\n.",
    "NEXT_BUFFER": b"\x97.",
    "REDUCE of a dtype": b"ctorch\nfloat32\n)R.",
    "REDUCE of a storage": b"ctorch\nFloatStorage\n)R.",
    "REDUCE of text": b"X\x01\x00\x00\x00a)R.",
    "REDUCE without a tuple": b"ccollections\nOrderedDict\n]R.",
    "BUILD of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__defaults__)sb.",
    "BUILD of a dtype": b"ctorch\nfloat32\n}b.",
    "BUILD of nothing": b"}b.",
    "STACK_GLOBAL of numbers": b"K\x01K\x02\x93.",
    "a key that is a dict": b"}}Ns.",
    "a key that is a tuple": b"})Ns.",
    "items of a tuple": b")N0Na.",
    "an odd number of items": b"}(NNNu.",
    "items of nothing": b"(NNu.",
    "an empty stack": b".",
    "a missing mark": b"Nt.",
    "a missing memo": b"h\x05.",
    "a storage that is a text": b"X\x01\x00\x00\x00aQ.",
    "a storage of four": encode(Outside(("storage", Global("torch FloatStorage"), "0", "cpu"))) + b".",
    "a storage of another kind": encode(Outside(("module", Global("torch FloatStorage"), "0", "cpu", 6))) + b".",
    "a storage of a class": encode(Outside(("storage", Global("torch float32"), "0", "cpu", 6))) + b".",
    "a storage with an odd key": encode(Outside(("storage", Global("torch FloatStorage"), 0, "cpu", 6))) + b".",
    "a storage of negative size": encode(Outside(("storage", Global("torch FloatStorage"), "0", "cpu", -6))) + b".",
    "a storage of true size": encode(Outside(("storage", Global("torch FloatStorage"), "0", "cpu", True))) + b".",
    "a tensor of nothing": encode(Call(Global("torch._utils _rebuild_tensor_v2"), ())) + b".",
    "a tensor of text": encode(Call(Global("torch._utils _rebuild_tensor_v2"), tuple("abcd"))) + b".",
    "a tensor without dtype": encode(tensor(storage="torch.storage UntypedStorage")) + b".",
    "a parameter of text": encode(Call(Global("torch._utils _rebuild_parameter"), ("a", True))) + b".",
    "a size of text": encode(Call(Global("torch Size"), ("a",))) + b".",
    "an ordered dict of pairs": encode(Call(Global("collections OrderedDict"), ([("a", 1)],))) + b".",
    "a text longer than the file": b"X\xff\xff\xff\x7fa.",
    "a text of 2**62 bytes": b"\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "a number of 2**31 bytes": b"\x8b\xff\xff\xff\x7f1.",
    "bytes of 2**63": b"\x8e" + b"\xff" * 8 + b".",
    "text that is not text": b"X\x01\x00\x00\x00\xff.",
    "no such instruction": b"\xff.",
    "no end": b"N",
    "nothing": b"",
}


@pytest.mark.parametrize("case", OLD_STYLE)
def test_instructions_out_of_place(path, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    refused(write_archive(path, None, pickled=b"\x80\x02" + OLD_STYLE[case]))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_depth_and_memo_do_not_exhaust_the_machine(path):
    deep = b"\x80\x02}(" + encode("a") + encode(tensor()) + encode("deep") + b")" + b"\x85" * 100_000 + b"u."
    assert TorchFile(write_archive(path, None, pickled=deep)).names() == ["a"]
    as_key = b"\x80\x02})" + b"\x85" * 100_000 + b"Ns."
    refused(write_archive(path, None, pickled=as_key), "key")
    far = b"\x80\x02}(" + encode("a") + encode(tensor()) + b"r\xff\xff\xff\xffu."
    assert TorchFile(write_archive(path, None, pickled=far)).names() == ["a"]
    endless = b"\x80\x02}q\x00(" + encode("self") + b"h\x00" + encode("a") + encode(tensor()) + b"u."
    assert TorchFile(write_archive(path, None, pickled=endless)).names() == ["a"]


BAD_TENSORS = {
    "offset beyond": tensor(offset=1),
    "offset far beyond": tensor(offset=2**70),
    "negative offset": tensor(offset=-1),
    "negative stride": tensor(strides=(-3, 1), offset=3),
    "stride beyond": tensor(strides=(4, 1)),
    "stride that would overflow": tensor(strides=(2**62, 1)),
    "stride that would wrap to zero": tensor(strides=(2**64, 1)),
    "too few strides": tensor(strides=(3,)),
    "too many strides": tensor(strides=(3, 1, 1)),
    "negative size": tensor(shape=(-2, 3)),
    "huge size": tensor(shape=(2**62, 3), strides=(0, 0)),
    "huge product": tensor(shape=(2**40, 2**40), strides=(0, 0)),
    "huge and empty": tensor(shape=(0, 2**62)),
    "absurd repetition": tensor(shape=(2**40,), strides=(0,)),
    "65 dimensions": tensor(shape=(1,) * 65, strides=(1,) * 65),
    "size larger than the storage": tensor(shape=(7,), strides=(1,)),
    "storage cut short": tensor(size=7),
    "storage of a wider type": tensor(storage="torch DoubleStorage"),
    "storage of a huge size": tensor(size=2**80),
    "missing storage": tensor(key="1"),
    "storage outside": tensor(key="../data.pkl"),
    "size that is a truth": tensor(shape=(True, 3)),
    "size that is a fraction": tensor(shape=(2.0, 3)),
    "shape that is a list": tensor(shape=[2, 3]),
    "offset that is a truth": tensor(offset=True),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_their_storage(path, case):
    refused(write_archive(path, {"good": tensor(), "bad": BAD_TENSORS[case]}))


def test_the_tensor_is_named(path):
    refused(write_archive(path, {"bad": tensor(offset=1)}), "'bad'", "beyond its storage")
    refused(write_archive(path, {"bad": tensor(size=7)}), "'bad'", "24 bytes")


# Damaged files


def small_file(path):
    arrays = {f"layer.{i}": np.arange(6 + i).astype(ml_dtypes.bfloat16) for i in range(3)}
    write_torch_file(path, ((name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()))
    return path.read_bytes()


def test_truncated_anywhere(path):
    whole = small_file(path)
    with TorchFile(path, "model_state_dict") as file:
        assert len(file.names()) == 3
    for size in range(1, len(whole), 3):
        path.write_bytes(whole[:size])
        refused(path, root="model_state_dict")


def test_pickle_truncated_anywhere(path):
    whole = program({"model": {"a": tensor(), "b": tensor(key="0")}})
    for size in range(len(whole)):
        refused(write_archive(path, None, pickled=whole[:size]), root="model")


def test_flipped_bits_give_values_or_a_user_error(path):
    whole = small_file(path)
    rng = random.Random(0)
    refusals = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            with TorchFile(path, "model_state_dict") as file:
                for name in file.names():
                    assert file.read(name).shape == file.shape(name)
        except UserError:
            refusals += 1
    assert 100 < refusals < 400


def test_files_of_other_kinds(path, tmp_path):
    refused(tmp_path / "nothing.pt", "no such file")
    refused(tmp_path, "folder")
    for content, word in {
        b"": "empty",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "old pickle format",
        b"storages".ljust(257, b"\0") + b"ustar".ljust(255, b"\0"): "old tar format",
        b"version https://git-lfs.github.com/spec/v1\noid": "git lfs pull",
        b"\n<!DOCTYPE html>": "a web page",
        b"something else": "not a PyTorch checkpoint",
    }.items():
        path.write_bytes(content)
        refused(path, word)
    refused(write_archive(path, {"a": tensor()}, compression=zipfile.ZIP_DEFLATED), "compressed")
    refused(write_archive(path, {"a": tensor()}, byteorder="middle"), "byte order")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "text")
    refused(path, "no data.pkl")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("b/data.pkl", b"N.")
    refused(path, "several data.pkl")


def test_encrypted_entry(path):
    write_archive(path, {"a": tensor()})
    whole = bytearray(path.read_bytes())
    at = whole.rindex(b"PK\x01\x02")  # the last entry's record in the directory: data/0
    whole[at + 8] |= 1
    path.write_bytes(whole)
    refused(path, "encrypted")


def test_damaged_local_header(path):
    write_archive(path, {"a": tensor()})
    whole = bytearray(path.read_bytes())
    whole[whole.rindex(b"PK\x03\x04")] = 0  # data/0: noticed when it is read
    path.write_bytes(whole)
    assert TorchFile(path).names() == ["a"]
    refused(path, "'data/0' is damaged")
