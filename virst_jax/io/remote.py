"""Addresses in place of paths: gs:// and s3:// (fsspec), hf://OWNER/NAME[@REVISION] (huggingface_hub).

Model folders can be read from there: they are copied to this machine first.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from virst_jax.errors import UserError
from virst_jax.io import atomic
from virst_jax.io.address import ADDRESS

BUCKETS = ("gs", "s3")
CACHE = "VIRST_CACHE"  # environment variable: where copies lie; default: .cache/virst_jax in the home folder


def fetch(address: str | Path) -> Path:
    """A folder of this machine that holds what lies at an address. Copied once; again if it has changed.

    Raises:
      UserError: an unknown kind of address, nothing there, or no way to it.
    """
    found = ADDRESS.fullmatch(str(address))
    assert found is not None
    kind, rest = found[1].lower(), found[2]
    if kind == "hf":
        return _from_hub(rest)
    if kind not in BUCKETS:
        raise UserError(f"{address}: unknown kind of address; known are gs://, s3:// and hf://")
    return _from_bucket(kind, rest.rstrip("/"))


def _from_hub(rest: str) -> Path:
    import huggingface_hub

    name, _, revision = rest.partition("@")
    if name.count("/") != 1:
        raise UserError(f"hf://{rest}: give hf://OWNER/NAME, or hf://OWNER/NAME@REVISION")
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise _unreadable(f"hf://{rest}", error) from error


def _from_bucket(kind: str, rest: str) -> Path:
    address = f"{kind}://{rest}"
    try:
        import fsspec

        system, root = fsspec.core.url_to_fs(address)
        system.invalidate_cache()
        files: dict[str, Any] = system.find(root, detail=True)
    except ImportError as error:
        raise UserError(f"{address}: pip install 'virst-jax[buckets]' to read from buckets ({error})") from error
    except Exception as error:  # each store has errors of its own
        raise _unreadable(address, error) from error
    files = {name: entry for name, entry in files.items() if entry["type"] == "file" and not name.endswith("/")}
    if not files:
        raise UserError(f"{address}: nothing there; check the bucket and the path")
    listing = [
        (name, entry["size"], str(entry.get("etag") or entry.get("ETag") or entry.get("md5Hash") or ""))
        for name, entry in sorted(files.items())
    ]
    target = _cache() / hashlib.sha256(repr((kind, listing)).encode()).hexdigest()[:20] / Path(rest).name
    if target.is_dir():
        return target
    try:
        with atomic.new_folder(target) as part:
            for name in files:
                file = part / _relative(name, root, address)
                file.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(name, str(file))
    except UserError:
        if target.is_dir():  # another process was faster
            return target
        raise
    except Exception as error:
        raise _unreadable(address, error) from error
    return target


def _relative(name: str, root: str, address: str) -> str:
    inner = name.removeprefix(root).lstrip("/")
    if not inner or ".." in inner.split("/"):
        raise UserError(f"{address}: is not a folder")
    return inner


def _cache() -> Path:
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "virst_jax")


def _unreadable(address: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{address}: cannot be read ({reason}); check the address, the network and your permissions")
