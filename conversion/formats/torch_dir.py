"""Folders of PyTorch files: pytorch_model.bin, or several with pytorch_model.bin.index.json."""

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from .shards import check_promises, find_shards, twice
from .source import no_such_name
from .torch_file import TorchFile

INDEX = "pytorch_model.bin.index.json"


class TorchDir:
    """Tensors of a folder of PyTorch files, or of one such file. A `TensorSource` and a context manager.

    Raises:
      UserError: nothing there, a missing or damaged file, a name that the index and the files disagree on.
    """

    def __init__(self, path: str | Path) -> None:
        self.where = str(path)
        self._files: dict[Path, TorchFile] = {}
        self._shards: dict[str, Path] = {}  # of each name
        try:
            promised = find_shards(Path(path), ".bin", INDEX)
            for shard in promised:
                self._files[shard] = TorchFile(shard)
                for name in self._files[shard].names():
                    if name in self._shards:
                        raise twice(self.where, name, self._shards[name], shard)
                    self._shards[name] = shard
            check_promises(self.where, INDEX, promised, self._shards)
        except BaseException:
            self.close()
            raise

    def _file(self, name: str) -> TorchFile:
        if name not in self._shards:
            raise no_such_name(self.where, name)
        return self._files[self._shards[name]]

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files."""
        return list(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. UserError: no such name."""
        return self._file(name).shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor. UserError: no such name."""
        return self._file(name).dtype(name)

    def read(self, name: str) -> np.ndarray:
        """dtype[shape], read-only. UserError: no such name, or damaged."""
        return self._file(name).read(name)

    def close(self) -> None:
        """Lets go of the files; what was read stays valid."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
