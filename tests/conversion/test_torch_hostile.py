"""`.pt` and safetensors files that want time, memory or a hang, that are cut, or that lie about their values."""

import json
import os
import resource
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from conversion.formats.safetensors_dir import SafetensorsDir
from conversion.formats.torch_dir import TorchDir
from conversion.formats.torch_file import TorchFile, write_torch_file
from helpers.torch_archives import SIX, Call, Global, Outside, Raw, encode, tensor, write_archive
from virst_jax.errors import UserError

MIB = 1 << 20


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.pt"


def refused(open_file, *words):
    with pytest.raises(UserError) as error:
        open_file()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def many(code: bytes, count: int) -> bytes:
    """A pickle of one instruction many times."""
    return b"\x80\x02" + code * count + b"N."


LONG_TUPLE = b"\x80\x02(" + b"K\x01" * 500_000 + b"tq\x00ctorch._utils\n_rebuild_tensor_v2\nq\x01"
STORAGE = encode(Outside(("storage", Global("torch FloatStorage"), "0", "cpu", 6)))
BOMBS = {
    "dicts": many(b"}", 30 * MIB),
    "lists in the memo": many(b"]\x94", 15 * MIB),
    "one long number": b"\x80\x02\x8b" + struct.pack("<i", 30 * MIB) + b"\x7f" * (30 * MIB) + b".",
    "numbers as text": many(b"I" + b"1" * 5000 + b"\n", 5),
    "a list of 40 MB": b"\x80\x02" + b"N" * 40 * MIB + b".",
    "deep tuples": many(b"\x85", 0) + b")" + b"\x85" * (20 * MIB) + b".",
    "deep lists": b"\x80\x02" + b"](" * (10 * MIB),
    # one tuple of 500,000 numbers, named by 100,000 tensors
    "long shapes": LONG_TUPLE + STORAGE + b"q\x02" + b"h\x01(h\x02K\x00h\x00h\x00tR" * 100_000 + b".",
    # one tuple of 500,000 arguments, for 400,000 calls
    "long arguments": LONG_TUPLE + b"h\x01h\x00R" * 400_000 + b".",
    # numbers of the same hash
    "colliding keys": b"\x80\x02}(" + b"".join(encode(k * sys.hash_info.modulus) + b"N" for k in range(20_000)) + b"u.",
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_list_of_tensors_is_bounded(path, case):
    """In a process that may take little: 1 GB of addresses beside the file, and 30 s."""
    write_archive(path, None, pickled=BOMBS[case])
    program = f"""
import resource, sys
from conversion.formats.torch_file import TorchFile
from virst_jax.errors import UserError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {1 << 30}, used + {1 << 30}))
try:
    TorchFile(sys.argv[1])
except UserError as error:
    print(error)
"""
    start = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=120)
    assert str(path) in done.stdout, done.stderr[-500:]
    assert done.stdout.count("\n") == 1
    assert len(done.stdout) < 600
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start[1] < 30


def test_directory_of_the_archive_is_bounded(path):
    entries = 400_000
    record = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    directory = record * entries
    local = b"PK\x03\x04" + bytes(26)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), len(local), 0)
    path.write_bytes(local + directory + end)
    refused(lambda: TorchFile(path), "its directory has")
    # the wide form names the size a second time
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, len(directory), len(local))
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(local) + len(directory), 1)
    for size in (0xFFFFFFFF, 10):
        end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, size, len(local), 0)
        path.write_bytes(local + directory + wide + locator + end)
        refused(lambda: TorchFile(path), "its directory has")


def test_entries_do_not_inflate(path):
    write_archive(path, {"a": tensor()}, {"0": bytes(64 * MIB)}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < MIB
    refused(lambda: TorchFile(path), "compressed")


def test_repeated_entries(path):
    write_archive(path, {"a": tensor()})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/0", bytes(24))
    refused(lambda: TorchFile(path), "come twice")


# Values


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_every_flipped_bit_of_the_values_is_noticed(path):
    values = np.arange(5000, dtype=np.float32)
    write_torch_file(path, [("w", values.shape, values.dtype, lambda: values)])
    first = path.read_bytes().index(values.tobytes())
    for at in (first, first + 7777, first + values.nbytes - 1):
        flip(path, at)
        with TorchFile(path, "model_state_dict") as file:  # the list of tensors is sound
            refused(lambda file=file: file.read("w"), "'data/0' differs from its checksum", "download it again")
        flip(path, at)
    with TorchFile(path, "model_state_dict") as file:
        np.testing.assert_array_equal(file.read("w"), values)
        np.testing.assert_array_equal(file.read("w"), values)


def test_a_flipped_bit_of_the_list_is_noticed(path):
    write_archive(path, {"a": tensor()})
    flip(path, path.read_bytes().index(b"FloatStorage") - 3)
    refused(lambda: TorchFile(path), "'data.pkl' differs from its checksum")


@pytest.mark.torch
def test_files_without_checksums_are_read(path):
    torch = pytest.importorskip("torch")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(6.0)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    np.testing.assert_array_equal(TorchFile(path).read("a"), SIX)


# Files that are cut, and what is no file


@pytest.mark.torch
def test_a_cut_download_says_how_much_is_missing(path):
    torch = pytest.importorskip("torch")
    torch.save({"model": {f"w{i}": torch.zeros(10_000) for i in range(5)}}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    message = refused(lambda: TorchFile(path, "model"), "ends early", f"{len(whole) // 2} of at least 200", "download")
    wanted = int(message.split("at least ")[1].split()[0])
    assert 200_000 < wanted <= len(whole)
    for size in (4, 29, 50, 300, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(lambda: TorchFile(path, "model"), "ends early", "download it again")


def safetensors(path: Path, header: bytes, values: bytes = b"", size: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + values)
    return path


def test_cut_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    SafetensorsDir(safetensors(path, header, bytes(16)))
    safetensors(path, header, bytes(9))
    refused(lambda: SafetensorsDir(path), f"ends early: {len(header) + 17} of {len(header) + 24} bytes; download")
    safetensors(path, header[:20], size=len(header))
    refused(lambda: SafetensorsDir(path), f"ends early: 28 of at least {len(header) + 8} bytes")


def test_header_of_safetensors_is_bounded(tmp_path):
    path = safetensors(tmp_path / "a.safetensors", b'{"a":[' + b"{}," * (8 * MIB) + b"{}]}")
    start = time.process_time()
    refused(lambda: SafetensorsDir(path), "far more than a network needs")
    assert time.process_time() - start < 2
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(b'{"weight_map": {' + b" " * (20 * MIB) + b"}}")
    refused(lambda: SafetensorsDir(tmp_path), "far more than an index needs")


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "null"])
def test_what_is_no_file(tmp_path, kind):
    path = tmp_path / "model.pt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path = tmp_path / "a\0b"
    word = {"fifo": "a pipe or a device", "device": "a pipe or a device", "folder": "", "null": ""}[kind]
    for open_file in (TorchFile, SafetensorsDir, TorchDir):
        refused(lambda open_file=open_file: open_file(path), word)


# What torch saves besides plain tensors


def test_parameters_and_tensors_with_attributes(path):
    plain = tensor()
    kind, args = plain.function, plain.args
    state = {"note": "text", "shape": (2, 3), "more": [1, {"a": None}]}
    value = {
        "parameter": Call(Global("torch._utils _rebuild_parameter_with_state"), (plain, True, Raw(b"}"), state)),
        "typed": Call(Global("torch._tensor _rebuild_from_type_v2"), (kind, Global("torch Tensor"), args, state)),
        "subclass": Call(
            Global("torch._tensor _rebuild_from_type_v2"), (kind, Global("torch.nn.parameter Parameter"), args, state)
        ),
    }
    with TorchFile(write_archive(path, value)) as file:
        for name in value:
            np.testing.assert_array_equal(file.read(name).ravel(), SIX)
    for bad in (
        (Global("torch._tensor _rebuild_from_type_v2"), Global("torch Tensor"), args, state),  # itself
        (Global("collections OrderedDict"), Global("torch Tensor"), (), state),
        (kind, Global("collections OrderedDict"), args, state),
        (kind, Global("torch Tensor"), [], state),
        (kind, Global("torch Tensor"), args),
    ):
        write_archive(path, {"a": Call(Global("torch._tensor _rebuild_from_type_v2"), bad)})
        refused(lambda: TorchFile(path), "damaged")


@pytest.mark.torch
def test_attributes_as_torch_saves_them(path):
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.arange(6.0))
    parameter.weight_note = "kept by nobody"
    plain = torch.arange(6.0)
    plain.note = [1, 2]
    torch.save({"p": parameter, "t": plain}, path)
    with TorchFile(path) as file:
        for name in ("p", "t"):
            np.testing.assert_array_equal(file.read(name), SIX)


def test_several_roots(path):
    inner = {"w": tensor()}
    roots = ("model_state_dict", "state_dict", None)
    for value, root in (({"state_dict": inner}, "state_dict"), (inner, None), ({"model_state_dict": 3, **inner}, None)):
        with TorchFile(write_archive(path, value), roots) as file:
            assert file.root == root
            assert file.names() == ["w"]
    write_archive(path, {"ema": inner})
    refused(lambda: TorchFile(path, roots), "'model_state_dict', 'state_dict'", "found 'ema'", "--root")
    assert TorchFile(path, "ema").names() == ["w"]


# Several .bin files


def test_sharded_bin(tmp_path):
    first, second = {"a": tensor(), "b": tensor((3,), (1,))}, {"c": tensor((2,), (1,), 4)}
    write_archive(tmp_path / "pytorch_model-00001-of-00002.bin", first)
    refused(lambda: TorchDir(tmp_path / "none"), "no such folder")
    assert TorchDir(tmp_path).names() == ["a", "b"]
    write_archive(tmp_path / "pytorch_model-00002-of-00002.bin", second)
    refused(lambda: TorchDir(tmp_path), "2 .bin files but no pytorch_model.bin.index.json")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00001-of-00002.bin"}
    weight_map["c"] = "pytorch_model-00002-of-00002.bin"
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with TorchDir(tmp_path) as folder:
        assert folder.names() == ["a", "b", "c"]
        assert (folder.shape("c"), folder.dtype("c")) == ((2,), np.float32)
        np.testing.assert_array_equal(folder.read("c"), SIX[4:])
        refused(lambda: folder.read("d"), "no tensor named 'd'")
    index.write_text(json.dumps({"weight_map": {**weight_map, "d": "pytorch_model-00002-of-00002.bin"}}))
    refused(lambda: TorchDir(tmp_path), "promises 'd'")
    index.write_text(json.dumps({"weight_map": {**weight_map, "d": "../secret.bin"}}))
    refused(lambda: TorchDir(tmp_path), "not in a file of this folder")
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    refused(lambda: TorchDir(tmp_path), "names 'pytorch_model-00002-of-00002.bin', which is missing")
