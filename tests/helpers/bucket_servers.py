"""Object stores on this machine: moto for s3://, gcp-storage-emulator (programs/gcs_server.py) for gs://."""

import contextlib
import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.places import PROGRAMS

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY")
_numbers = itertools.count(1)


@contextlib.contextmanager
def server(*command: str) -> Iterator[str]:
    """The address of a program that listens on a free port, which takes the place of PORT in its command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = [sys.executable, *(part.replace("PORT", str(port)) for part in command)]
    with subprocess.Popen(given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@contextlib.contextmanager
def store(kind: str) -> Iterator[dict[str, str]]:
    """A store of gs:// or s3://: the environment variables by which programs find it."""
    if kind == "s3":
        with server("-m", "moto.server", "-p", "PORT") as address:
            keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
            yield {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1", **keys}
    else:
        with server(str(PROGRAMS / "gcs_server.py"), "PORT") as address:
            yield {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}


@dataclass(frozen=True)
class Bucket:
    """An empty bucket."""

    address: str  # such as gs://bucket-1
    system: "AbstractFileSystem"

    @property
    def name(self) -> str:
        return self.address.split("://")[1]

    def files(self) -> dict[str, bytes]:
        """All there is, by the name in the bucket."""
        self.system.invalidate_cache()
        return {name.removeprefix(f"{self.name}/"): self.system.cat_file(name) for name in self.system.find(self.name)}

    def put(self, folder: Path, name: str) -> str:
        """Copies a folder to a name in the bucket; gives its address."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.system.pipe_file(f"{self.name}/{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        return f"{self.address}/{name}"


def new_bucket(kind: str) -> Bucket:
    """A bucket in the store that the environment names."""
    import fsspec

    from virst_jax.io import buckets

    made = Bucket(f"{kind}://bucket-{next(_numbers)}", buckets.system(f"{kind}://any")[0])
    assert isinstance(made.system, fsspec.AbstractFileSystem)
    made.system.mkdir(made.name)
    return made
