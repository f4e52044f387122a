"""Folders of safetensors: reading, refusing what is damaged."""

import json
import random

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from conversion.formats.safetensors_dir import DTYPES, INDEX, SafetensorsDir
from conversion.formats.source import TensorSource
from helpers.safetensors_files import write_shards
from virst_jax.errors import UserError


def random_tensor(rng, shape, dtype):
    raw = rng.integers(0, 2 if dtype == np.bool_ else 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


def same(a, b):
    """Bit for bit, so that NaNs count too."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def all_dtypes():
    rng = np.random.default_rng(2)
    shapes = [(), (3,), (0, 3), (2, 1, 5)]
    return {f"{n}.{i}": random_tensor(rng, s, d) for n, d in DTYPES.items() for i, s in enumerate(shapes)}


def read_all(path):
    with SafetensorsDir(path) as source:
        return {name: source.read(name) for name in source.names()}


def refused(path, *words):
    with pytest.raises(UserError) as error:
        read_all(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def left(folder):
    return sorted(p.name for p in folder.iterdir())


THREE = {f"w{i}": np.arange(4 * i, 4 * i + 4, dtype=np.float32) for i in range(3)}


@pytest.fixture
def sharded(tmp_path):
    """Three shards of a tensor each."""
    folder = tmp_path / "sharded"
    write_shards(folder, THREE, shard_bytes=20)
    return folder


def shard(folder, i):
    return folder / f"model-0000{i + 1}-of-00003.safetensors"


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


# Round trips


@pytest.mark.parametrize("shard_bytes", [1, 100, 10_000])
def test_round_trip_of_all_dtypes(tmp_path, shard_bytes):
    arrays = all_dtypes()
    write_shards(tmp_path, arrays, shard_bytes)
    with SafetensorsDir(tmp_path) as folder:
        source: TensorSource = folder
        assert source.where == str(tmp_path)
        assert sorted(source.names()) == sorted(arrays)
        for name, values in arrays.items():
            assert (source.shape(name), source.dtype(name)) == (values.shape, values.dtype)
            assert same(source.read(name), values)
            assert source.read(name).flags.aligned
        with pytest.raises(UserError, match=r"no tensor named 'other'"):
            source.read("other")
    files = left(tmp_path)
    assert (files == ["model.safetensors"]) == (shard_bytes == 10_000)
    assert (INDEX in files) == (shard_bytes != 10_000)


def test_reads_what_the_reference_library_writes(tmp_path):
    arrays = {name: a for name, a in all_dtypes().items() if not name.startswith(("F8", "BF16", "C64"))}
    safetensors.numpy.save_file(arrays, tmp_path / "one.safetensors", metadata={"note": "text"})
    for path in (tmp_path, tmp_path / "one.safetensors"):
        read = read_all(path)
        assert sorted(read) == sorted(arrays)
        assert all(same(read[name], values) for name, values in arrays.items())


@pytest.mark.torch
def test_reads_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    half = {name: torch.tensor([[1, -2, 0.5]]).to(getattr(torch, name)) for name in ("bfloat16", "float8_e4m3fn")}
    save_file(half, tmp_path / "theirs.safetensors")
    read = read_all(tmp_path / "theirs.safetensors")
    for name in half:
        assert same(read[name], np.array([[1, -2, 0.5]], getattr(ml_dtypes, name)))


def test_shards_and_index(sharded):
    assert left(sharded) == [*(shard(sharded, i).name for i in range(3)), INDEX]
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"] == {"total_size": 48}
    assert index["weight_map"] == {f"w{i}": shard(sharded, i).name for i in range(3)}
    assert all(same(values, THREE[name]) for name, values in read_all(sharded).items())


def test_a_reading_is_a_view_that_outlives_the_folder(sharded):
    folder = SafetensorsDir(sharded)
    values = folder.read("w1")
    assert not values.flags.owndata
    assert not values.flags.writeable
    folder.close()
    np.testing.assert_array_equal(values, THREE["w1"])
    with pytest.raises(ValueError, match="closed"):
        folder.read("w1")


def test_names_beside_the_index_are_read_too(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update(w2=shard(sharded, 2).name))
    write_shards(sharded.parent / "more", {"w1": THREE["w1"], "extra": THREE["w0"]})
    shard(sharded, 1).write_bytes((sharded.parent / "more" / "model.safetensors").read_bytes())
    assert sorted(read_all(sharded)) == ["extra", "w0", "w1", "w2"]


# Damage


def test_folders_without_a_checkpoint(tmp_path, sharded):
    refused(tmp_path / "nothing", "no such folder")
    refused(tmp_path, "no .safetensors files")
    (sharded / INDEX).unlink()
    refused(sharded, "3 .safetensors files", INDEX)


def test_missing_shard(sharded):
    shard(sharded, 1).unlink()
    refused(sharded, shard(sharded, 1).name, "missing")


def test_name_that_its_shard_lacks(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update(ghost=shard(sharded, 0).name))
    refused(sharded, "'ghost'", shard(sharded, 0).name, "lacks it")


def test_name_in_another_shard_than_promised(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update(w0=shard(sharded, 1).name, w1=shard(sharded, 0).name))
    refused(sharded, "'w1'", shard(sharded, 0).name, "lacks it")


def test_name_in_two_shards(sharded):
    shard(sharded, 2).write_bytes(shard(sharded, 1).read_bytes())
    refused(sharded, "'w1'", shard(sharded, 1).name, shard(sharded, 2).name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../a.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": "a\\u0000b"}}',
        '{"weight_map": {"a": "model\\ud800"}}',
        "[" * 100_000,
        "\ufeff{}",
    ],
)
def test_damaged_index(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX)


def test_index_that_is_not_text(sharded):
    (sharded / INDEX).write_bytes(b"\xff\xfe\x00")
    refused(sharded, INDEX)


def test_truncated_anywhere(tmp_path):
    write_shards(tmp_path, THREE)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(path)
    path.write_bytes(whole + b"\0")
    refused(path, "longer than its header says")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")
    refused(path, "git lfs pull")


def test_flipped_bits_give_values_or_a_user_error(tmp_path):
    write_shards(tmp_path, THREE)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    rng = random.Random(0)
    refusals = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert read_all(path)
        except UserError:
            refusals += 1
    assert 100 < refusals < 400


GOOD = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
HEADERS = {
    "not JSON": "{",
    "a list": "[]",
    "a number": "3",
    "an entry that is a list": '{"a": []}',
    "no dtype": '{"a": {"shape": [2], "data_offsets": [0, 8]}}',
    "no shape": '{"a": {"dtype": "F32", "data_offsets": [0, 8]}}',
    "no offsets": '{"a": {"dtype": "F32", "shape": [2]}}',
    "unknown dtype": '{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}',
    "dtype that is a list": '{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
    "shape that is text": '{"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}',
    "shape of fractions": '{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
    "shape of truths": '{"a": {"dtype": "F32", "shape": [2, true], "data_offsets": [0, 8]}}',
    "negative shape": '{"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}',
    "huge shape": '{"a": {"dtype": "F32", "shape": [0, 4611686018427387904], "data_offsets": [0, 0]}}',
    "huge number": f'{{"a": {{"dtype": "F32", "shape": [{"9" * 5000}], "data_offsets": [0, 8]}}}}',
    "three offsets": '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}',
    "offsets of text": '{"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}',
    "other size": '{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
    "negative range": '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
    "gap": '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    "overlap": f'{{{GOOD}, "b": {{"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}}}',
    "twice": f"{{{GOOD}, {GOOD}}}",
    "too long": f'{{{GOOD}, "b": {{"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}}}',
    "deep": "[" * 100_000,
}


def header_file(path, header):
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + np.ones(2, np.float32).tobytes())
    return path


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_header(tmp_path, case):
    refused(header_file(tmp_path / "a.safetensors", HEADERS[case]))


def test_sound_header_by_hand(tmp_path):
    read = read_all(header_file(tmp_path / "a.safetensors", f"{{{GOOD}}}"))
    np.testing.assert_array_equal(read["a"], np.ones(2, np.float32))
