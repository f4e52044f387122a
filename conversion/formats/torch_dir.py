"""Folders of PyTorch files: pytorch_model.bin, or several with pytorch_model.bin.index.json."""

from pathlib import Path

import numpy as np

from .shards import check_promises, find_shards, twice
from .source import TensorFile
from .torch_file import TorchFile
from .torch_pickle import Tensor

INDEX = "pytorch_model.bin.index.json"


class TorchDir(TensorFile[Tensor]):
    """Tensors of a folder of PyTorch files, or of one such file. A `TensorSource` and a context manager.

    Raises:
      UserError: nothing there, a missing or damaged file, a name that the index and the files disagree on.
    """

    def __init__(self, path: str | Path) -> None:
        self.where = str(path)
        self._files: dict[Path, TorchFile] = {}
        self.entries = {}
        self._shards: dict[str, Path] = {}  # of each name
        try:
            promised = find_shards(Path(path), ".bin", INDEX)
            for shard in promised:
                self._files[shard] = TorchFile(shard)
                for name in self._files[shard].names():
                    if name in self._shards:
                        raise twice(self.where, name, self._shards[name], shard)
                    self._shards[name] = shard
                self.entries |= self._files[shard].entries
            check_promises(self.where, INDEX, promised, self._shards)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """dtype[shape], read-only. UserError: no such name, or damaged."""
        self.entry(name)
        return self._files[self._shards[name]].read(name)

    def close(self) -> None:
        """Lets go of the files; what was read stays valid."""
        for file in self._files.values():
            file.close()
