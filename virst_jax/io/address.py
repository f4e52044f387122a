"""Addresses such as gs://bucket/folder where a path is meant: refused, rather than made into a folder named "gs:"."""

import re
from pathlib import Path, PurePath

from virst_jax.errors import UserError

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)", re.IGNORECASE)  # Path makes gs:/ of gs://


def is_address(path: str | PurePath) -> bool:
    return ADDRESS.fullmatch(str(path)) is not None and not Path(path).exists()


def local(path: str | PurePath, what: str) -> Path:
    """A path of the file system.

    Args:
      what: it is for, such as "--workdir".

    Raises:
      UserError: it is an address.
    """
    if is_address(path):
        address = ADDRESS.sub(r"\1://\2", str(path))
        raise UserError(
            f"{what}: {address} is an address, where a path is needed; mount the bucket (gcsfuse, mount-s3) and "
            "name the path below it"
        )
    return Path(path)
