"""`.pt` files: written without torch, read by torch, and the reverse."""

import resource
import weakref
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import conversion.formats.torch_file as torch_file
from conversion.formats.torch_file import TorchFile, write_torch_file
from conversion.formats.torch_pickle import DTYPES
from virst_jax.errors import UserError


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.pt"


def random_tensor(rng, shape, dtype):
    raw = rng.integers(0, 2 if dtype == np.bool_ else 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


def same(a, b):
    """Bit for bit, so that NaNs count too."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def specs(arrays):
    return [(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()]


def all_dtypes():
    rng = np.random.default_rng(1)
    shapes = [(), (3,), (0, 3), (2, 1, 5), (300, 70_000 // 300)]
    names = sorted(DTYPES)
    return {f"{n}.{i}": random_tensor(rng, s, DTYPES[n]) for i, s in enumerate(shapes) for n in names}


@pytest.mark.parametrize("root", ["model_state_dict", "model", None])
def test_round_trip_of_all_dtypes(path, root):
    arrays = all_dtypes()
    seen = []
    write_torch_file(path, iter(specs(arrays)), root, seen.append)
    assert seen == list(arrays)
    with TorchFile(path, root) as file:
        assert file.names() == list(arrays)
        for name, values in arrays.items():
            assert (file.shape(name), file.dtype(name)) == (values.shape, values.dtype)
            assert same(file.read(name), values)
            assert file.read(name).flags.aligned


def test_written_values_are_contiguous_and_files_reproducible(path, tmp_path):
    values = np.arange(12.0).reshape(3, 4).T[::2]
    write_torch_file(path, specs({"a": values}))
    with TorchFile(path, "model_state_dict") as file:
        np.testing.assert_array_equal(file.read("a"), values)
        assert file.read("a").flags.c_contiguous
    write_torch_file(tmp_path / "again.pt", specs({"a": values}))
    assert path.read_bytes() == (tmp_path / "again.pt").read_bytes()


@pytest.mark.parametrize("zip64", [False, True])
def test_storages_are_aligned(path, monkeypatch, zip64):
    if zip64:
        monkeypatch.setattr(torch_file, "_ZIP64_FROM", 0)
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 64)  # sizes and offsets beyond it take the wide fields
    arrays = {f"t{i}" * (i + 1): np.arange(i * 7, dtype=np.float32) for i in range(9)}
    write_torch_file(path, specs(arrays))
    whole = path.read_bytes()
    assert (b"PK\x06\x06" in whole) == zip64
    for values in arrays.values():
        if values.size > 4:
            assert whole.index(values.tobytes()) % 64 == 0
    with TorchFile(path, "model_state_dict") as file:
        assert all(same(file.read(name), values) for name, values in arrays.items())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_one_tensor_is_held_at_a_time(path):
    made = []

    class Values(np.ndarray):
        pass

    def make():
        assert all(ref() is None for ref in made)
        values = np.zeros(10, np.float32).view(Values)
        made.append(weakref.ref(values))
        return values

    write_torch_file(path, ((f"t{i}", (10,), np.float32, make) for i in range(4)))
    assert len(made) == len(TorchFile(path, "model_state_dict").names()) == 4


def left(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_write_that_fails_leaves_what_was_there(path, tmp_path):
    path.write_bytes(b"old")
    good = np.zeros(3, np.float32)

    def fail():
        raise OSError(5, "Input/output error")

    def interrupt(name):
        raise KeyboardInterrupt

    cases = [
        ([*specs({"a": good}), *specs({"a": good})], UserError, "two tensors are named 'a'"),
        ([("a", (3,), np.dtype(ml_dtypes.int4), lambda: good)], UserError, "'a' is int4"),
        ([("a", (3,), np.dtype("f4"), fail)], UserError, "a: its values cannot be read"),
        ([("a", (4,), np.dtype("f4"), lambda: good)], ValueError, "announced as float32"),
        ([("a", (3,), np.dtype("f8"), lambda: good)], ValueError, "announced as float64"),
    ]
    for tensors, kind, words in cases:
        with pytest.raises(kind, match=words):
            write_torch_file(path, tensors)
        assert left(tmp_path) == ["model.pt"]
    with pytest.raises(KeyboardInterrupt):
        write_torch_file(path, specs({"a": good}), on_tensor=interrupt)
    assert left(tmp_path) == ["model.pt"]
    assert path.read_bytes() == b"old"
    with pytest.raises(UserError, match="cannot be written"):
        write_torch_file(tmp_path / "no" / "folder.pt", specs({"a": good}))
    with pytest.raises(UserError, match="cannot be written"):
        write_torch_file(path / "below.pt", specs({"a": good}))


@pytest.fixture
def full_disk():
    """Files cannot grow beyond 8 MiB; what the system then says is what it says of a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.usefixtures("full_disk")
def test_full_disk(path, tmp_path):
    values = np.zeros(1 << 20, np.float32)
    with pytest.raises(UserError, match=r"model\.pt: cannot be written .*free disk space"):
        write_torch_file(path, specs({f"t{i}": values for i in range(3)}))
    assert left(tmp_path) == []


def numpy_of(torch, value):
    value = value.detach().contiguous()
    if value.dtype in (torch.bool, torch.complex64, torch.complex128) or not value.dtype.is_floating_point:
        return value.numpy()
    name = str(value.dtype).removeprefix("torch.")
    return value.reshape(-1).view(torch.uint8).numpy().view(DTYPES[name]).reshape(value.shape)


@pytest.mark.torch
@pytest.mark.parametrize("form", ["dict", "module", "nested", "model", "protocol 4"])
def test_reads_what_torch_saves(path, form):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    state = OrderedDict(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict())
    state["view"] = base[2:, 1:5]
    state["transposed"] = base.T
    state["strided"] = base[::2, ::3]
    state["tied"] = base
    state["repeated"] = base[0].expand(5, 8)
    state["scalar"] = torch.tensor(3.5)
    state["empty"] = torch.zeros(0, 4)
    state["parameter"] = torch.nn.Parameter(base[1])
    for name in DTYPES:
        if hasattr(torch, name):
            dtype = getattr(torch, name)
            state[f"dtype.{name}"] = torch.randint(0, 2, (3, 5)).to(torch.float32).to(dtype)
    tensors = dict(state)
    state["note"] = "text"
    top, root = {
        "dict": (dict(state), None),
        "module": (state, None),
        "nested": ({"epoch": 3, "model_state_dict": state, "optimizer": {"lr": [1e-3], 0: base}}, "model_state_dict"),
        "model": ({"model": state}, "model"),
        "protocol 4": ({"model": state}, "model"),
    }[form]
    torch.save(top, path, pickle_protocol=4 if form == "protocol 4" else 2)
    with TorchFile(path, root) as file:
        assert file.names() == list(tensors)
        for name, value in tensors.items():
            assert same(file.read(name), numpy_of(torch, value)), name


@pytest.mark.torch
def test_reads_a_module_with_metadata_and_shares_storages(path):
    torch = pytest.importorskip("torch")
    embedding = torch.nn.Embedding(5, 4)
    head = torch.nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    model = torch.nn.ModuleDict({"embedding": embedding, "head": head})
    torch.save(model.state_dict(), path)
    with TorchFile(path) as file:
        first, second = file.read("embedding.weight"), file.read("head.weight")
        assert np.shares_memory(first, second)
        np.testing.assert_array_equal(first, embedding.weight.detach().numpy())


@pytest.mark.torch
def test_refuses_a_whole_module_and_old_formats(path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear, which is not part of a state dict"):
        TorchFile(path)
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"old pickle format; .* torch\.save\(torch\.load\("):
        TorchFile(path)


@pytest.mark.torch
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("root", ["model_state_dict", None])
@pytest.mark.parametrize("zip64", [False, True])
def test_torch_reads_what_is_written(path, monkeypatch, mmap, root, zip64):
    torch = pytest.importorskip("torch")
    arrays = {name: a for name, a in all_dtypes().items() if hasattr(torch, name.split(".")[0])}
    if zip64:
        monkeypatch.setattr(torch_file, "_ZIP64_FROM", 0)
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 64)
    write_torch_file(path, specs(arrays), root)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    state = loaded if root is None else loaded[root]
    assert list(state) == list(arrays)
    for name, values in arrays.items():
        value = state[name]
        assert value.dtype == getattr(torch, name.split(".")[0])
        assert value.is_contiguous()
        assert not value.requires_grad
        assert same(numpy_of(torch, value), values), name
