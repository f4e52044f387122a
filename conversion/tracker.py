"""SAM 2.1 alone: a published file of any of the four sizes becomes a tracker's folder."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from virst_jax.config import SAM2_SIZES, HieraConfig, Sam2Config, sam2_preset
from virst_jax.errors import UserError
from virst_jax.io import atomic, tracker_folder
from virst_jax.models.tree import flatten

from .checkpoint import SAM2_ROOTS, check_sam2_version, open_source, plain_entries
from .gather import Converted, stored_dtype, write_assembled
from .rules import Target, sam2_rules


def tracker_table(cfg: Sam2Config) -> dict[str, Target]:
    """As `rules.rule_table`, of SAM 2.1 alone."""
    table: dict[str, Target] = {}
    for name, target in sam2_rules(cfg, "", ""):
        table[name.removeprefix(".")] = Target(target.path.removeprefix("/"), target.slot, target.transform)
    return table


def blocks_of(names: Collection[str], prefix: str = "") -> int:
    """How many Hiera blocks the names speak of."""
    start = f"{prefix}image_encoder.trunk.blocks."
    numbers = {name[len(start) :].split(".")[0] for name in names if name.startswith(start)}
    return len(numbers)


def size_of(names: Collection[str], prefix: str = "") -> str | None:
    """Which of SAM2_SIZES the names are those of; they differ in their numbers of blocks."""
    found = blocks_of(names, prefix)
    return next((size for size, hiera in SAM2_SIZES.items() if sum(hiera.stages) == found), None)


def check_size(names: Mapping[str, Any], hiera: HieraConfig, where: str, prefix: str = "") -> None:
    """Compares a file of SAM 2.1 with the size that a config asks for.

    Raises:
      UserError: it is another of the published ones.
    """
    found = size_of(names, prefix)
    if found and sum(hiera.stages) != sum(SAM2_SIZES[found].stages):
        wanted = next((size for size, known in SAM2_SIZES.items() if known == hiera), f"{sum(hiera.stages)} blocks")
        raise UserError(f"{where}: is SAM 2.1 {found}, the config asks for {wanted}; give that file")


def convert_tracker(
    sam2: Path, out: Path, *, dtype: str = "bfloat16", root: str | None = None, progress: bool = True
) -> Converted:
    """Writes a tracker's folder from a file of SAM 2.1, whose size is found out from its names.

    Args:
      dtype: of the parameters, one of gather.DTYPES; the prompt encoder stays float32 unless "source".
      root: key of the file's state dict; None: one of the usual ones.

    Raises:
      UserError: the file is missing or damaged, not one of the four sizes or of SAM 2.0, or `out` exists.
    """
    atomic.check_new(out)
    source = open_source(sam2, SAM2_ROOTS if root is None else (root,))
    try:
        entries = plain_entries(source)
        check_sam2_version(entries, str(sam2))
        size = size_of(entries)
        if size is None:
            blocks = blocks_of(entries)
            raise UserError(
                f"{sam2}: none of the published sizes of SAM 2.1 ({blocks} Hiera blocks, not "
                f"{', '.join(f'{sum(h.stages)} of {name}' for name, h in SAM2_SIZES.items())}); check the path"
            )
        cfg = sam2_preset(size)

        def read(name: str) -> np.ndarray:
            return source.read(entries[name].name)

        shapes = {path: leaf.shape for path, leaf in flatten(tracker_folder.parameter_shapes(cfg)).items()}
        with atomic.new_folder(out) as part:
            samples = write_assembled(
                part,
                tracker_table(cfg),
                entries,
                read,
                where=f"{sam2} ({size})",
                shapes=shapes,
                store=stored_dtype(dtype, tracker_folder.FLOAT32),
                describe=lambda params: tracker_folder.write_description(part, cfg, params),
                progress=progress,
            )
            checked, digest = samples.check(str(out), tracker_folder.read_parameters(part))
        return Converted(f"SAM 2.1 {size}, a tracker without language model", checked, digest)
    finally:
        source.close()
