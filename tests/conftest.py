"""What all tests share: one cache of compiled programs, and which worker runs what."""

import contextlib
import ctypes
import functools
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.places import ROOT

# Before anything imports JAX. Workers and the programs that tests start inherit it, and it is kept for the next run:
# the key of an entry holds the program, the compiler's version and its flags.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(
    os.pathsep
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# gcsfs would ask for a bucket's type at every call, which the store on this machine does not know
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
CACHE_LIMIT = 2**30
MEMORY_LIMIT = 3 * 2**30  # of a worker, of which there are two

# Files that take minutes begin first, so that no worker is left with one at the end.
LONGEST = ("test_train_buckets", "parallel/test_sharding", "test_train", "parallel/test_sharded_tracker")
LONGEST += ("conversion/test_bisect", "test_notebooks", "test_train_processes", "training/test_prompted")
LONGEST += ("training/test_losses", "serve/test_page", "test_load", "conversion/test_convert", "test_eval")
LONGEST += ("models/test_tracking", "profiling/test_flops", "io/test_model_folder", "benchmarks/test_accelerator")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Begins a new cache when the old one has grown too large."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return
    entries = list(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache"))
    if sum(entry.stat().st_size for entry in entries) > CACHE_LIMIT:
        for entry in entries:
            entry.unlink(missing_ok=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {ROOT / "tests" / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Lets go of compiled programs between two files where they take gigabytes; they are on disk, too."""
    if (nextitem is None or nextitem.path != item.path) and "jax" in sys.modules and _resident() > MEMORY_LIMIT:
        import jax

        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # only glibc gives back what is free
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


@pytest.fixture(scope="session")
def model() -> Any:
    """The small network that segments (see helpers.segmenting)."""
    from helpers.segmenting import small_model  # brings JAX, which few tests need

    return small_model()


@pytest.fixture(scope="session")
def three(model: Any) -> Any:
    """Three expressions at once, in two groups (see helpers.segmenting)."""
    from helpers.segmenting import three_expressions

    return three_expressions()


@pytest.fixture(scope="session")
def stores() -> Iterator[Any]:
    """Starts the store of a kind of bucket when a test first asks for it (see helpers.bucket_servers)."""
    from helpers.bucket_servers import store

    with contextlib.ExitStack() as running:
        yield functools.cache(lambda kind: running.enter_context(store(kind)))


@pytest.fixture
def make_bucket(stores: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function of a kind of store, which gives an empty bucket in it (see helpers.bucket_servers)."""
    from helpers.bucket_servers import PROXIES, new_bucket

    for name in ("gcsfs", "s3fs", "moto", "gcp_storage_emulator"):
        pytest.importorskip(name)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)

    def make(kind: str) -> Any:
        for name, value in stores(kind).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("VIRST_CACHE", str(tmp_path / "cache"))
        return new_bucket(kind)

    return make


@pytest.fixture(params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest, make_bucket: Any) -> Any:
    """An empty bucket of each kind of store."""
    return make_bucket(request.param)
