"""A numeric check of a conversion: values at fixed places of the sources, read again from what was written."""

import hashlib
import zlib
from collections.abc import Iterable

import numpy as np

from virst_jax.errors import UserError

PLACES = 4  # of each tensor


class Samples:
    """Values to find again. The places follow from a tensor's path, so that equal conversions have equal digests."""

    def __init__(self) -> None:
        self._expected: dict[str, list[tuple[tuple[int, ...], np.ndarray]]] = {}

    def add(self, path: str, slot: int | None, value: np.ndarray, dtype: np.dtype) -> None:
        """Notes some values of a tensor.

        Args:
          slot: index on the leading axis of a stacked parameter.
          dtype: in which they are stored.
        """
        if not value.size:
            return
        rng = np.random.default_rng(zlib.crc32(f"{path}[{slot}]".encode()))
        for _ in range(PLACES if value.ndim else 1):
            index = tuple(int(rng.integers(n)) for n in value.shape)
            where = index if slot is None else (slot, *index)
            self._expected.setdefault(path, []).append((where, np.asarray(value[index]).astype(dtype)))

    def check(self, where: str, parameters: Iterable[tuple[str, np.ndarray]]) -> tuple[int, str]:
        """Compares with the parameters that were written.

        Returns:
          How many values were compared, and a digest of them.

        Raises:
          UserError: a value differs, or a parameter is missing.
        """
        left, digests, count = dict(self._expected), {}, 0
        for path, value in parameters:
            digest = hashlib.sha256(path.encode())
            for index, expected in left.pop(path, ()):
                found = np.asarray(value[index])
                if found.dtype != expected.dtype or found.tobytes() != expected.tobytes():
                    raise UserError(
                        f"{where}: {path}{list(index)} reads {found}, but {expected} was written: the disk is at "
                        "fault; convert again, to another place"
                    )
                digest.update(repr(index).encode() + found.tobytes())
                count += 1
            digests[path] = digest.digest()
        if left:
            raise UserError(f"{where}: {next(iter(left))} was not written; convert again")
        whole = hashlib.sha256(b"".join(digests[path] for path in sorted(digests)))
        return count, whole.hexdigest()[:16]
