"""What a session keeps of one object on one frame, in memory up to a budget and beyond it in a file.

An outcome takes L*L*4 + S*D*2 + C*4 bytes, at SAM 2.1's size 0.79 MB, and all outcomes of a session have one size.
Those used last stay in memory. The others lie in a file without a name in the folder for temporary files (TMPDIR),
which is gone when the session is, or the process.

Axes: S positions of the feature grid, C width, D memory width, L mask side.
"""

import tempfile
import threading
import weakref
from collections import OrderedDict
from typing import IO

import numpy as np

from virst_jax.errors import UserError

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # mask, pointer and memory of an Outcome


class Outcome:
    """One object on one frame. Never changes.

    Args:
      low_res: float32[L, L], logits.
      pointer: [C].
      memory: [S, D].
      score: logit: the object is there where it is above 0.
      iou: predicted.
    """

    __slots__ = ("__weakref__", "_arrays", "_store", "iou", "num_bytes", "score")

    def __init__(self, low_res: np.ndarray, pointer: np.ndarray, memory: np.ndarray, score: float, iou: float):
        self.score, self.iou = score, iou
        self._arrays: Arrays | None = (low_res, pointer, memory)
        self._store: OutcomeStore | None = None
        self.num_bytes = sum(x.nbytes for x in self._arrays)

    @property
    def low_res(self) -> np.ndarray:
        return self._read()[0]

    @property
    def pointer(self) -> np.ndarray:
        return self._read()[1]

    @property
    def memory(self) -> np.ndarray:
        return self._read()[2]

    def _read(self) -> Arrays:
        if self._store is not None:
            return self._store.arrays(self)
        assert self._arrays is not None
        return self._arrays


class OutcomeStore:
    """The outcomes of a session.

    Args:
      budget: bytes to keep in memory; one outcome is kept at least.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self._lock = threading.RLock()
        self._kept: OrderedDict[int, weakref.ref[Outcome]] = OrderedDict()  # in memory, by id, the last used one last
        self._in_memory = 0  # bytes
        self._slots: dict[int, int] = {}  # places in the file, by id
        self._free: list[int] = []
        self._file: IO[bytes] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return self._in_memory

    @property
    def num_bytes_on_disk(self) -> int:
        """Bytes in the file that are in use."""
        return len(self._slots) * self._size if self._slots else 0

    def keep(self, outcome: Outcome) -> Outcome:
        """Takes an outcome in, and brings those used longest ago to the file, if the budget asks for it.

        Raises:
          UserError: the file cannot be written. Nothing is lost: the outcomes stay in memory.
        """
        with self._lock:
            if outcome._store is None:
                assert outcome._arrays is not None
                self._size, self._layout = outcome.num_bytes, [(x.shape, x.dtype) for x in outcome._arrays]
                outcome._store = self
                self._add(outcome)
                weakref.finalize(outcome, self._forget, id(outcome), outcome.num_bytes).atexit = False
                self._shrink()
        return outcome

    def arrays(self, outcome: Outcome) -> Arrays:
        """The arrays of an outcome, from wherever they are.

        Raises:
          UserError: the file cannot be read.
        """
        with self._lock:
            if outcome._arrays is not None:
                self._kept.move_to_end(id(outcome))
                return outcome._arrays
            outcome._arrays = found = self._load(self._slots[id(outcome)])
            self._add(outcome)
            self._shrink()
            return found

    def _add(self, outcome: Outcome) -> None:
        self._kept[id(outcome)] = weakref.ref(outcome)
        self._in_memory += outcome.num_bytes

    def _shrink(self) -> None:
        while self._in_memory > self.budget and len(self._kept) > 1:
            key, reference = next(iter(self._kept.items()))
            outcome = reference()
            if outcome is not None:
                # what was read back is still in the file
                if key not in self._slots:
                    self._slots[key] = self._save(outcome)
                outcome._arrays = None
                self._in_memory -= outcome.num_bytes
            self._kept.pop(key, None)

    def _forget(self, key: int, num_bytes: int) -> None:
        """An outcome that nothing holds any more."""
        with self._lock:
            if self._kept.pop(key, None) is not None:
                self._in_memory -= num_bytes
            if key in self._slots:
                self._free.append(self._slots.pop(key))

    def _save(self, outcome: Outcome) -> int:
        """Writes an outcome into a free place of the file."""
        assert outcome._arrays is not None
        try:
            if self._file is None:
                # as long as any outcome: it is closed when nothing holds it
                self._file = tempfile.TemporaryFile(prefix="virst_outcomes_")  # noqa: SIM115
            slot = self._free[-1] if self._free else len(self._slots)
            self._file.seek(slot * self._size)
            for array in outcome._arrays:
                self._file.write(np.ascontiguousarray(array).view(np.uint8).data)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"the session's masks and memories take more than {self.budget / 2**30:.3g} GiB, and the rest cannot "
                f"be written to {tempfile.gettempdir()} ({error.strerror or error}); set TMPDIR to a folder with more "
                "room, raise host_budget, or track fewer frames or objects. What was tracked is kept"
            ) from error
        if self._free:
            self._free.pop()
        return slot

    def _load(self, slot: int) -> Arrays:
        assert self._file is not None
        try:
            self._file.seek(slot * self._size)
            data = self._file.read(self._size)
        except OSError as error:
            raise UserError(f"a temporary file of the session cannot be read ({error.strerror or error})") from error
        arrays, start = [], 0
        for shape, dtype in self._layout:
            count = int(np.prod(shape))
            arrays.append(np.frombuffer(data, dtype, count, start).reshape(shape))
            start += count * dtype.itemsize
        low_res, pointer, memory = arrays
        return low_res, pointer, memory
