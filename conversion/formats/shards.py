"""Models that lie in several files of a folder, with an index (JSON) that says which file holds which tensor."""

import json
from pathlib import Path

from virst_jax.errors import UserError

from .source import map_file, some

_MAX_INDEX = 16 << 20  # bytes; that of 2000 tensors has 200 kB


def find_shards(path: Path, ending: str, index: str) -> dict[Path, list[str]]:
    """The files of a model, each with the names that the index promises in it.

    Args:
      path: a folder, or the one file itself.
      ending: of the files' names.
      index: name of the index.

    Raises:
      UserError: nothing is there, a file is missing, or the index is damaged.
    """
    if not path.is_dir():
        if path.exists():
            return {path: []}
        raise UserError(f"{path}: no such folder; check the path")
    if (path / index).is_file():
        return _read_index(path, index)
    files = sorted(path.glob(f"*{ending}"))
    if not files:
        raise UserError(f"{path}: holds no {ending} files; check the path or download the checkpoint")
    if len(files) > 1:
        raise UserError(
            f"{path}: {len(files)} {ending} files but no {index}; download that file too, or give the path of one"
        )
    return {files[0]: []}


def _read_index(path: Path, name: str) -> dict[Path, list[str]]:
    index = path / name
    data = map_file(index)
    if len(data) > _MAX_INDEX:
        raise UserError(f"{index}: has {len(data)} bytes, far more than an index needs; download it again")
    try:
        weight_map = json.loads(data[:])["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: not an index (JSON with a weight_map); download it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: its weight_map lists no tensors; download it again")
    listed: dict[Path, list[str]] = {}
    for tensor, file in weight_map.items():
        # a path could lead out of the folder
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            raise UserError(
                f"{index}: {tensor!r:.80} is not in a file of this folder but in {file!r:.80}; download it again"
            )
        listed.setdefault(path / file, []).append(tensor)
    missing = sorted(shard.name for shard in listed if not shard.is_file())
    if missing:
        raise UserError(f"{path}: {name} names {some(missing)}, which is missing; download the rest of the checkpoint")
    return dict(sorted(listed.items()))


def check_promises(where: str, index: str, promised: dict[Path, list[str]], held: dict[str, Path]) -> None:
    """Compares an index with what its files hold.

    Raises:
      UserError: a name is not in the file that should hold it.
    """
    for shard, names in promised.items():
        absent = [name for name in names if held.get(name) != shard]
        if absent:
            raise UserError(
                f"{where}: {index} promises {some(absent)} in {shard.name}, which lacks it; download both again"
            )


def twice(where: str, name: str, first: Path, second: Path) -> UserError:
    """The error of a name that two files hold."""
    return UserError(
        f"{where}: {name!r:.80} is in {first.name} and in {second.name}; "
        "remove what does not belong to this checkpoint or download it again"
    )
