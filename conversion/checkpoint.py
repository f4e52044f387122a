"""The release's checkpoint as one source of tensors: three files laid over each other, adapters merged or kept.

VideoChat-Flash (safetensors) and SAM 2.1 (`.pt`) come first; the VIRST checkpoint, which holds all parameters or only
the trained ones, with or without PEFT's names, lies over both. Source: model/builder.py, model/sam2/build_sam.py.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from virst_jax.errors import UserError
from virst_jax.models.lora import add_adapter

from .formats.safetensors_dir import SafetensorsDir
from .formats.source import TensorSource, map_file
from .formats.torch_dir import TorchDir
from .formats.torch_file import TorchFile
from .names import SEG_MODEL, canonical, is_buffer, is_other_adapter, listing, precedence, shown
from .rules import LLM_PROJECTIONS

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
# tables with a row a token: the release cuts them to the tokenizer's length
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# under which keys state dicts are found; None: at the top level
SAM2_ROOTS = ("model", "model_state_dict", "state_dict", None)
VIRST_ROOTS = ("model_state_dict", "state_dict", "module", "model", None)
# what SAM 2.1 has and SAM 2.0 has not
NEW_IN_SAM2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")

Source = SafetensorsDir | TorchDir | TorchFile


@dataclass(frozen=True)
class Entry:
    source: TensorSource
    name: str  # in that source


def open_source(path: Path, roots: Sequence[str | None]) -> Source:
    """Opens a `.pt` or safetensors file, or a folder of safetensors or .bin files.

    Raises:
      UserError: it is missing or damaged, or holds no tensors under any of the roots.
    """
    if path.suffix == ".safetensors" or (path.is_dir() and not any(path.glob("*.bin"))):
        return SafetensorsDir(path)
    if path.is_dir():
        return SafetensorsDir(path) if any(path.glob("*.safetensors")) else TorchDir(path)
    return TorchFile(path, roots)


def plain_entries(source: TensorSource, prefix: str = "") -> dict[str, Entry]:
    """The tensors of a source by their plain names; buffers and modules that PEFT has replaced are left out.

    Raises:
      UserError: two tensors are the same parameter, or belong to an adapter of a kind that cannot be converted.
    """
    entries: dict[str, Entry] = {}
    for name in source.names():
        if is_buffer(name):
            continue
        if is_other_adapter(name):
            raise UserError(
                f"{source.where}: {shown(name)} belongs to an adapter that is not plain LoRA (DoRA, IA3, ...); "
                "merge it first where it was trained (PEFT's merge_and_unload)"
            )
        plain = prefix + canonical(name)
        if plain in entries:
            order = precedence(entries[plain].name) - precedence(name)
            if order == 0:
                raise UserError(
                    f"{source.where}: {shown(entries[plain].name)} and {shown(name)} are the same parameter; remove one"
                )
            if order > 0:
                continue
        entries[plain] = Entry(source, name)
    return entries


def check_sam2_version(names: Sequence[str] | dict[str, Entry], where: str, prefix: str = "") -> None:
    """Tells SAM 2.0 from SAM 2.1.

    Raises:
      UserError: the names are those of SAM 2.0.
    """
    if f"{prefix}maskmem_tpos_enc" in names and not any(prefix + name in names for name in NEW_IN_SAM2_1):
        raise UserError(
            f"{where}: a file of SAM 2.0 (it lacks {NEW_IN_SAM2_1[0]} and obj_ptr_tpos_proj); VIRST is built on "
            "SAM 2.1: give sam2.1_hiera_*.pt"
        )


class Checkpoint:
    """Named tensors of the whole network, in the release's plain names.

    Args:
      videochat: folder of VideoChat-Flash.
      sam2: sam2.1_hiera_large.pt.
      virst: the VIRST checkpoint; None: without.
      vocab_size: rows that the vocabulary keeps.
      lora: "merge" adds the adapters to their weights, "keep" hands them on.
      lora_alpha: scale of the adapters times their rank; the checkpoint does not hold it.
      root: key of the VIRST checkpoint's state dict; None: one of the usual ones.

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
        root: str | None = None,
    ):
        self.where = " + ".join(str(path) for path in (videochat, sam2, virst) if path)
        self.vocab_size, self.lora_alpha, self.merge = vocab_size, lora_alpha, lora == "merge"
        self.sources: list[Source] = []
        self.warnings: list[str] = []
        self.entries: dict[str, Entry] = {}
        try:
            self.entries |= plain_entries(self._opened(videochat, (None,)))
            self.entries |= plain_entries(self._opened(sam2, SAM2_ROOTS), SEG_MODEL)
            if virst is not None:
                over = plain_entries(self._opened(virst, VIRST_ROOTS if root is None else (root,)))
                self._warn_of_vocabulary(over, virst)
                self.entries |= over
            check_sam2_version(self.entries, str(sam2), SEG_MODEL)
            self.ranks = self._adapter_ranks(str(virst))
            if self.ranks and virst is not None:
                check_adapter_config(virst, lora_alpha)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for source in self.sources:
            source.close()

    @property
    def rank(self) -> int:
        """Of the adapters that are kept; 0 without."""
        return 0 if self.merge else next(iter(self.ranks.values()), 0)

    def shape(self, name: str) -> tuple[int, ...]:
        entry = self.entries[name]
        return entry.source.shape(entry.name)

    def names(self) -> list[str]:
        """Names of all tensors; without the adapters where they are merged, with all of them where they are kept."""
        adapters = {name + end for name in self.ranks for end in (LORA_A, LORA_B)}
        names = [name for name in self.entries if name not in adapters]
        if self.merge or not self.ranks:
            return names
        return names + [name + end for name in self._projections() for end in (LORA_A, LORA_B)]

    def read(self, name: str) -> np.ndarray:
        """One tensor, cut or merged as it must be.

        Raises:
          UserError: damaged, or the vocabulary has too few rows.
        """
        if name not in self.entries:
            return self._idle_adapter(name)
        value = self._read(name)
        if name in (EMBEDDING, HEAD):
            if value.ndim != 2 or value.shape[0] < self.vocab_size:
                raise UserError(
                    f"{self.entries[name].source.where}: {name} has the shape {list(value.shape)}, the config asks for "
                    f"{self.vocab_size} rows: the tokenizer of this checkpoint is smaller"
                )
            value = value[: self.vocab_size]
        layer = name.removesuffix(".weight")
        if self.merge and layer in self.ranks and name.endswith(".weight"):
            down, up = (self._read(layer + end) for end in (LORA_A, LORA_B))
            if down.ndim != 2 or up.shape[1:] != down.shape[:1] or (up.shape[0], down.shape[1]) != value.shape:
                raise UserError(
                    f"{self.where}: the adapter of {layer} has shapes {list(down.shape)} and {list(up.shape)}, which "
                    f"do not fit its weight {list(value.shape)}"
                )
            # the transpose of models.lora's layout: the factors change places
            return np.asarray(_add_adapter(value, up, down, self.lora_alpha / self.ranks[layer]))
        return value

    def _opened(self, path: Path, roots: Sequence[str | None]) -> Source:
        source = open_source(path, roots)
        self.sources.append(source)
        return source

    def _read(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        return entry.source.read(entry.name)

    def _projections(self) -> list[str]:
        """The language model's linear layers, which are all adapted or none, without `.weight`."""
        projections = tuple(theirs for theirs, _, _ in LLM_PROJECTIONS)
        layers = [name.removesuffix(".weight") for name in self.entries if name.startswith("model.layers.")]
        return [layer for layer in layers if layer.endswith(projections)]

    def _warn_of_vocabulary(self, over: dict[str, Entry], virst: Path) -> None:
        lacking = [name for name in (EMBEDDING, HEAD) if name not in over]
        if lacking:
            self.warnings.append(
                f"{virst}: holds no {' and no '.join(lacking)}: what then holds [SEG] are rows of VideoChat-Flash's "
                "tables that no training has touched. That is right only if these tables stayed frozen in training"
            )

    def _adapter_ranks(self, where: str) -> dict[str, int]:
        """The rank of every adapter, by the name of its layer without `.weight`."""
        halves = {end: {n.removesuffix(end) for n in self.entries if n.endswith(end)} for end in (LORA_A, LORA_B)}
        odd = halves[LORA_A] ^ halves[LORA_B]
        if odd:
            raise UserError(f"{where}: {len(odd)} adapters have one of their two matrices only: {listing(odd)}")
        homeless = {name for name in halves[LORA_A] if name + ".weight" not in self.entries}
        if homeless:
            raise UserError(f"{where}: {len(homeless)} adapters belong to no layer: {listing(homeless)}")
        ranks: dict[str, int] = {}
        for name in sorted(halves[LORA_A]):
            shape = self.shape(name + LORA_A)
            if len(shape) != 2 or not shape[0]:
                raise UserError(f"{where}: the adapter of {name} has the shape {list(shape)}; merge it with PEFT first")
            ranks[name] = shape[0]
        if self.merge or not ranks:
            return ranks
        elsewhere = set(ranks) - set(self._projections())
        if elsewhere or len(set(ranks.values())) > 1:
            what = f"of ranks {sorted(set(ranks.values()))}"
            if elsewhere:
                what = f"outside of the language model's projections ({listing(elsewhere)})"
            raise UserError(f"{where}: adapters {what} can only be merged: give --lora merge")
        return ranks

    def _idle_adapter(self, name: str) -> np.ndarray:
        """Half of an adapter that adds nothing yet, as PEFT starts one: for layers that were trained without."""
        layer, end = name[: -len(LORA_A)], name[-len(LORA_A) :]
        features, width = self.shape(layer + ".weight")
        first = next(iter(self.ranks)) + end
        dtype = self.entries[first].source.dtype(self.entries[first].name)
        if end == LORA_B:
            return np.zeros((features, self.rank), dtype)
        rng = np.random.default_rng(zlib.crc32(layer.encode()))
        return rng.uniform(-(width**-0.5), width**-0.5, (self.rank, width)).astype(dtype)


_add_adapter = jax.jit(add_adapter)


def check_adapter_config(virst: Path, alpha: float) -> None:
    """Compares what PEFT wrote beside a checkpoint with the alpha that is used.

    Raises:
      UserError: another alpha, or a scale that is not alpha / rank.
    """
    path = (virst if virst.is_dir() else virst.parent) / "adapter_config.json"
    if not path.is_file():
        return
    try:
        told = json.loads(map_file(path)[: 1 << 20])
    except (ValueError, RecursionError):
        return
    if not isinstance(told, dict):
        return
    if told.get("use_rslora") or told.get("alpha_pattern"):
        raise UserError(f"{path}: scales its adapters in its own way; merge them first with PEFT's merge_and_unload")
    if isinstance(told.get("lora_alpha"), int | float) and told["lora_alpha"] != alpha:
        raise UserError(f"{path}: says lora_alpha {told['lora_alpha']}, and {alpha:g} would be used; give --lora-alpha")
