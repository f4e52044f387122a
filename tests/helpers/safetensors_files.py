"""Checkpoints of safetensors as the reference library writes them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from conversion.formats.safetensors_dir import INDEX


def write_shards(folder: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int | None = None) -> None:
    """Writes model.safetensors, or shards of at most `shard_bytes` (or one tensor) with their index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, values in tensors.items():
        filled = sum(array.nbytes for array in shards[-1].values())
        if shard_bytes is not None and shards[-1] and filled + values.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = values
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return
    places: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    size = sum(values.nbytes for values in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))
