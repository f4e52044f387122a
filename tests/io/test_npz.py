"""Files of arrays: read as they were written, or refused in one line."""

import io
import os
import zipfile

import numpy as np
import pytest

from virst_jax.errors import UserError
from virst_jax.io import atomic
from virst_jax.io.npz import read_npz

ARRAYS = {"next": np.array(3), "0.a": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 2), bool)}


def packed(header: bytes, content: bytes = b"") -> bytes:
    """An archive of one array with this header."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        text = header.ljust(118) + b"\n"
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content)
    return file.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_come_back(tmp_path, compressed):
    atomic.write_npz(tmp_path / "a.npz", ARRAYS, compressed=compressed)
    found = read_npz(tmp_path / "a.npz", "x")
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK",
        packed(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"),
        packed(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-4,), }"),
        packed(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"12345678"),
        packed(b"{'descr': 'f'", b"1234"),
        packed(b"(" * 100),
    ],
)
def test_what_is_no_file_of_arrays(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz: damaged, or no file of arrays \(.*\); begin again$"):
        read_npz(tmp_path / "a.npz", "begin again")


def test_changed_bytes_are_found_by_their_checksums(tmp_path):
    atomic.write_npz(tmp_path / "a.npz", ARRAYS)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    at = content.index(ARRAYS["0.a"].tobytes())
    content[at + 9] ^= 4
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match="CRC"):
        read_npz(tmp_path / "a.npz", "begin again")


def test_bounds(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe"):
        read_npz(tmp_path / "pipe", "x")
    atomic.write_npz(tmp_path / "large.npz", {"a": np.zeros(10**6)}, compressed=True)
    with pytest.raises(UserError, match="more than 1000 bytes when unpacked"):
        read_npz(tmp_path / "large.npz", "x", limit=1000)
