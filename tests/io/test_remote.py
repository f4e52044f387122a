"""Models from buckets and from the hub, by servers and a cache on this machine; and where an address is refused."""

import argparse
import shutil
from types import SimpleNamespace

import pytest

from virst_jax.api import EMBEDDED, find_model
from virst_jax.commands.train import workdir_of
from virst_jax.data.datasets.registry import open_dataset
from virst_jax.errors import UserError
from virst_jax.io import atomic, remote


def files_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_model_of_a_bucket(bucket):
    address = f"{bucket.address}/small/tiny"

    def put(name, content):
        bucket.system.pipe_file(f"{bucket.name}/{name}", content)

    with pytest.raises(UserError, match=f"{address}: nothing there"):
        find_model(address)
    for name, content in files_of(EMBEDDED["tiny"]).items():
        put(f"small/tiny/{name}", content)
    first = find_model(address)
    assert files_of(first) == files_of(EMBEDDED["tiny"])
    stamp = (first / "config.json").stat().st_mtime_ns
    assert find_model(f"{address}/") == first
    assert (first / "config.json").stat().st_mtime_ns == stamp  # not copied again

    put("small/tiny/config.json", b"{}")
    changed = find_model(address)
    assert changed != first
    assert (changed / "config.json").read_bytes() == b"{}"
    put("data/file", b"")
    with pytest.raises(UserError, match="no model there"):
        find_model(f"{bucket.address}/data")


def test_a_copy_that_the_disk_cannot_hold(bucket, monkeypatch):
    bucket.system.pipe_file(f"{bucket.name}/data/file", b"1234")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3))
    with pytest.raises(
        UserError, match=rf"{bucket.address}/data: .*has room for 0\.0 GB; name a larger disk by VIRST_CACHE"
    ):
        remote.fetch(f"{bucket.address}/data")


def test_a_model_of_the_hub(tmp_path, monkeypatch):
    """As it lies in the hub's cache; the hub itself is out of reach."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--virst-tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(EMBEDDED["tiny"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    found = find_model("hf://someone/virst-tiny")
    assert files_of(found) == files_of(EMBEDDED["tiny"])
    assert find_model(f"hf://someone/virst-tiny@{commit}") == found
    for wrong, words in (("hf://someone", "hf://OWNER/NAME"), ("hf://someone/else", "cannot be read")):
        with pytest.raises(UserError, match=words):
            find_model(wrong)


@pytest.mark.parametrize(
    "use",
    [
        lambda: atomic.new_folder("gs://bucket/folder").__enter__(),
        lambda: atomic.check_writable("gs://bucket/folder"),
        lambda: atomic.write_bytes("ftp://bucket/file", b"", parents=True),
        lambda: open_dataset("mevis", "ftp://bucket/data"),
    ],
    ids=["folder", "check", "file", "data"],
)
def test_no_folder_is_named_after_a_bucket(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"(gs|ftp)://bucket/\w+"):
        use()
    assert not list(tmp_path.iterdir())


def test_training_refuses_what_it_cannot_write_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = argparse.Namespace(config="synthetic", workdir="ftp://host/runs", steps=None)
    with pytest.raises(UserError, match=r"--workdir: ftp://host/runs"):
        workdir_of(given)
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_of_address():
    with pytest.raises(UserError, match="ftp://host/model: unknown kind of address"):
        find_model("ftp://host/model")
