"""The release's checkpoint as one source of tensors: three files laid over each other, adapters merged or kept.

VideoChat-Flash (safetensors) and SAM 2.1 (`.pt`) come first; the VIRST `.pt`, which holds all parameters or only the
trained ones, with or without PEFT's names, lies over both. Source: model/builder.py, model/sam2/build_sam.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from virst_jax.errors import UserError
from virst_jax.models.lora import add_adapter

from .assemble import listing
from .formats.safetensors_dir import SafetensorsDir
from .formats.source import TensorSource
from .formats.torch_file import TorchFile
from .rules import LLM_PROJECTIONS

SEG_MODEL = "model.seg_model."
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
# tables with a row a token: the release cuts them to the tokenizer's length
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def canonical(name: str) -> str:
    """A name without what PEFT, DeepSpeed or data parallelism wrap around it."""
    name = name.removeprefix("module.").removeprefix("base_model.model.").replace(".base_layer.", ".")
    return re.sub(r"\.(lora_[AB])\.\w+\.weight$", r".\1.weight", name)


@dataclass(frozen=True)
class Entry:
    source: TensorSource
    name: str  # in that source


class Release:
    """Named tensors of the whole network, in the release's plain names.

    Args:
      videochat: folder of the VideoChat-Flash safetensors.
      sam2: sam2.1_hiera_large.pt.
      virst: the VIRST `.pt`; None: without.
      vocab_size: rows that the vocabulary keeps.
      lora: "merge" adds the adapters to their weights, "keep" hands them on.
      lora_alpha: scale of the adapters times their rank; the checkpoint does not hold it.

    Raises:
      UserError: a file is missing or damaged, a name comes twice, or an adapter is incomplete.
    """

    def __init__(
        self,
        videochat: Path,
        sam2: Path,
        virst: Path | None,
        *,
        vocab_size: int,
        lora: str = "merge",
        lora_alpha: float = 16.0,
    ):
        self.where = " + ".join(str(path) for path in (videochat, sam2, virst) if path)
        self.vocab_size, self.lora_alpha = vocab_size, lora_alpha
        self.sources: list[SafetensorsDir | TorchFile] = []
        try:
            self.entries: dict[str, Entry] = {}
            for path, open_source, prefix in (
                (videochat, SafetensorsDir, ""),
                (sam2, lambda p: TorchFile(p, root="model"), SEG_MODEL),
                (virst, lambda p: TorchFile(p, root="model_state_dict"), ""),
            ):
                if path is None:
                    continue
                source = open_source(path)
                self.sources.append(source)
                self.entries |= _named(source, prefix)
            self.adapters = _adapters(self.entries, str(virst))
        except BaseException:
            self.close()
            raise
        self.rank = self._rank()
        self.merge = lora == "merge"

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def _rank(self) -> int:
        ranks = {self._shape(name + LORA_A)[0] for name in self.adapters}
        if len(ranks) > 1:
            raise UserError(f"{self.where}: adapters of different ranks {sorted(ranks)} cannot be converted")
        return ranks.pop() if ranks else 0

    def _shape(self, name: str) -> tuple[int, ...]:
        entry = self.entries[name]
        return entry.source.shape(entry.name)

    def _read(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        return entry.source.read(entry.name)

    def names(self) -> list[str]:
        """Names of all tensors; without the adapters where they are merged."""
        merged = {name + end for name in self.adapters for end in (LORA_A, LORA_B)} if self.merge else set()
        return [name for name in self.entries if name not in merged]

    def read(self, name: str) -> np.ndarray:
        """One tensor, cut or merged as it must be.

        Raises:
          UserError: damaged, or the vocabulary has too few rows.
        """
        value = self._read(name)
        if name in VOCABULARY:
            if value.shape[0] < self.vocab_size:
                raise UserError(
                    f"{self.entries[name].source.where}: {name} has {value.shape[0]} rows, the config asks for "
                    f"{self.vocab_size}: the tokenizer of this checkpoint is smaller"
                )
            return value[: self.vocab_size]
        adapter = name.removesuffix(".weight")
        if self.merge and adapter in self.adapters and name.endswith(".weight"):
            down, up = (self._read(adapter + end) for end in (LORA_A, LORA_B))
            if up.shape[1:] != down.shape[:1] or (up.shape[0], down.shape[1]) != value.shape:
                raise UserError(
                    f"{self.where}: the adapter of {adapter} has shapes {list(down.shape)} and {list(up.shape)}, which "
                    f"do not fit its weight {list(value.shape)}"
                )
            # the transpose of models.lora's layout: the factors change places
            return np.asarray(_add_adapter(value, up, down, self.lora_alpha / self.rank))
        return value


_add_adapter = jax.jit(add_adapter)


def _named(source: TensorSource, prefix: str) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name in source.names():
        plain = prefix + canonical(name)
        if plain in entries:
            raise UserError(f"{source.where}: {entries[plain].name} and {name} are the same parameter")
        entries[plain] = Entry(source, name)
    return entries


def _adapters(entries: Mapping[str, Entry], where: str) -> list[str]:
    """Names (without `.weight`) of the linear layers that have an adapter: all of the language model's or none."""
    halves: dict[str, set[str]] = {LORA_A: set(), LORA_B: set()}
    for name in entries:
        for end, names in halves.items():
            if name.endswith(end):
                names.add(name.removesuffix(end))
    odd = halves[LORA_A] ^ halves[LORA_B]
    if odd:
        raise UserError(f"{where}: {len(odd)} adapters have one of their two matrices only: {listing(odd)}")
    adapted = halves[LORA_A]
    projections = tuple(theirs for theirs, _, _ in LLM_PROJECTIONS)
    every = {
        name.removesuffix(".weight")
        for name in entries
        if name.startswith("model.layers.") and name.removesuffix(".weight").endswith(projections)
    }
    if adapted and adapted != every:
        wrong = adapted ^ every
        raise UserError(f"{where}: adapters do not cover the language model's projections: {listing(wrong)}")
    return sorted(adapted)
