"""What all tests share: one cache of compiled programs, and which worker runs what."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Before anything imports JAX. Workers and the programs that tests start inherit it, and it is kept for the next run:
# the key of an entry holds the program, the compiler's version and its flags.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
CACHE_LIMIT = 2**30

# Groups that take minutes begin first, so that no worker is left with one at the end.
LONGEST = ("train", "api", "eval", "losses", "tracking", "conversion_convert", "embedded", "inference")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Begins a new cache when the old one has grown too large."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return
    entries = list(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache"))
    if sum(entry.stat().st_size for entry in entries) > CACHE_LIMIT:
        for entry in entries:
            entry.unlink(missing_ok=True)


def group_of(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    return marker.args[0] if marker else item.path.stem.removeprefix("test_")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay on one worker, which makes its fixtures once, unless they name a group of their own."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group_of(item)))
    rank = {group: place for place, group in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(group_of(item), len(rank)))
