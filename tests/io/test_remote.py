"""Models from buckets and from the hub, by servers and a cache on this machine; and where an address is refused."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.places import ROOT
from virst_jax.api import EMBEDDED, find_model
from virst_jax.data.datasets.registry import open_dataset
from virst_jax.errors import UserError
from virst_jax.io import atomic, remote


def files_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@contextlib.contextmanager
def server(*command):
    """A program that listens on a free port, which takes the place of PORT in its command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen([sys.executable, *(part.replace("PORT", str(port)) for part in command)]) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.fixture
def bucket(request, monkeypatch, tmp_path):
    """A file system of fsspec with an empty bucket named "models"."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv(remote.CACHE, str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if request.param == "s3":
        pytest.importorskip("s3fs")
        pytest.importorskip("moto")
        with server("-m", "moto.server", "-p", "PORT") as address:
            monkeypatch.setenv("AWS_ENDPOINT_URL", address)
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            yield made(fsspec.filesystem("s3", skip_instance_cache=True))
    else:
        pytest.importorskip("gcsfs")
        start = "from gcp_storage_emulator.server import create_server as c; c('127.0.0.1', PORT, in_memory=True).run()"
        pytest.importorskip("gcp_storage_emulator")
        with server("-c", start) as address:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
            yield made(fsspec.filesystem("gs", skip_instance_cache=True))


def made(system):
    system.mkdir("models")
    return system


@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
def test_a_model_of_a_bucket(bucket, request, monkeypatch, capsys):
    kind = request.node.callspec.params["bucket"]
    address = f"{kind}://models/small/tiny"
    with pytest.raises(UserError, match=f"{address}: nothing there"):
        find_model(address)
    for name, content in files_of(EMBEDDED["tiny"]).items():
        bucket.pipe_file(f"models/small/tiny/{name}", content)
    first = find_model(address)
    assert files_of(first) == files_of(EMBEDDED["tiny"])
    stamp = (first / "config.json").stat().st_mtime_ns
    assert find_model(f"{address}/") == first
    assert (first / "config.json").stat().st_mtime_ns == stamp  # not copied again

    bucket.pipe_file("models/small/tiny/config.json", b"{}")
    changed = find_model(address)
    assert changed != first
    assert (changed / "config.json").read_bytes() == b"{}"
    bucket.pipe_file("models/data/file", b"")
    with pytest.raises(UserError, match="no model there"):
        find_model(f"{kind}://models/data")


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
        lambda: atomic.write_bytes("gs://bucket/file", b"", parents=True),
        lambda: atomic.write_text(Path("gs://bucket/file"), ""),
        lambda: atomic.new_folder("gs://bucket/folder").__enter__(),
        lambda: atomic.check_writable("gs://bucket/folder"),
        lambda: open_dataset("mevis", "gs://bucket/data"),
    ],
    ids=["file", "path", "folder", "check", "data"],
)
def test_no_folder_is_named_after_a_bucket(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"gs://bucket/\w+ is an address.*mount the bucket"):
        use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_programs_refuse_a_bucket_as_workdir(program, tmp_path):
    config = ROOT / ("configs/synthetic.py" if program == "train.py" else "configs/eval.py")
    command = [sys.executable, str(ROOT / program), f"--config={config}", "--workdir=gs://bucket/runs"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--workdir: gs://bucket/runs is an address" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_of_address():
    with pytest.raises(UserError, match="ftp://host/model: unknown kind of address"):
        find_model("ftp://host/model")
