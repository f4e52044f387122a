"""Writes a checkpoint of full size in the release's three files, converts it, and reports time and peak memory.

    python -m benchmarks.convert_full_size WORKDIR --manifest tests/data/manifests/release_peft_state_dict.json

Values are random, names and shapes those of the manifest; needs about 55 GB in WORKDIR (75 GB with --whole). What was
converted is compared with the sources at random places.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from conversion.formats.safetensors_dir import INDEX
from conversion.formats.source import TensorSpec
from conversion.formats.torch_file import write_torch_file
from conversion.names import SEG_MODEL, canonical
from conversion.rules import TRANSFORMS, rule_table
from virst_jax.config import virst_7b

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NEW = ("model.seg_model.", "model.seg_prompter.", "model.initial_seg_fusion_module.", "model.occ_predictor.")


def values(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Random values that depend on the name; a short pattern is repeated, so that writing is what takes time."""
    seed = np.frombuffer(name.encode(), np.uint8).astype(np.uint32)
    pattern = np.random.default_rng(seed).standard_normal(min(int(np.prod(shape)), 1 << 20)).astype(np.float32)
    return np.resize((0.02 * pattern).astype(dtype), shape)


def specs(names: list[tuple[str, str]], shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> Iterator[TensorSpec]:
    for written, name in names:
        shape = shapes[name]
        yield written, shape, dtype, functools.partial(values, name, shape, dtype)


def write_base(folder: Path, names: list[str], shapes: dict[str, tuple[int, ...]], shard_bytes: int = 2 << 30) -> None:
    """Writes a folder of safetensors in shards, of which one is held in memory at a time."""
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    for name in names:
        shard[name] = values(name, shapes[name], BFLOAT16)
        if name == names[-1] or sum(array.nbytes for array in shard.values()) >= shard_bytes:
            file = f"model-{len(set(places.values())) + 1:05}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard = {}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def write_release(folder: Path, manifest: Path, tokenizer: Path, whole: bool) -> dict[str, tuple[int, ...]]:
    """Writes videochat/, sam2.pt and virst.pt; returns the canonical names with their shapes."""
    given = {name: tuple(shape) for name, shape in json.loads(manifest.read_text()).items()}
    shapes = {canonical(name): shape for name, shape in given.items()}
    rows = virst_7b().llm.vocab_size
    base = [n for n in shapes if not n.startswith(NEW) and ".lora_" not in n]
    write_base(folder / "videochat", base, shapes)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / "videochat" / name).write_bytes((tokenizer / name).read_bytes())
    seg = [(n.removeprefix(SEG_MODEL), n) for n in shapes if n.startswith(SEG_MODEL)]
    write_torch_file(folder / "sam2.pt", specs(seg, shapes, np.dtype(np.float32)), root="model")
    cut = {n: (rows, *s[1:]) if s[:1] == (152064,) else s for n, s in shapes.items()}
    trained = [(w, canonical(w)) for w in given if whole or canonical(w).startswith(NEW) or ".lora_" in w]
    write_torch_file(folder / "virst.pt", specs(trained, cut, BFLOAT16))
    return shapes


class Memory(threading.Thread):
    """Samples another process's memory: its own pages, and with the files that it maps."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.status, self.own, self.mapped = Path(f"/proc/{pid}/status"), 0, 0

    def run(self) -> None:
        while self.status.exists():
            try:
                lines = dict(line.split(":", 1) for line in self.status.read_text().splitlines())
                own, files = (int(lines[key].split()[0]) for key in ("RssAnon", "RssFile"))
            except (OSError, KeyError, ValueError):
                return
            self.own, self.mapped = max(self.own, own), max(self.mapped, own + files)
            time.sleep(0.2)


def compare(out: Path, shapes: dict[str, tuple[int, ...]], samples: int = 40) -> int:
    """Reads random places of converted arrays and compares them with the sources' values."""
    import tensorstore as ts

    cfg, rng = virst_7b(), np.random.default_rng(0)
    table = rule_table(cfg)
    adapted = {name.split(".lora_")[0] for name in shapes if ".lora_" in name}
    names = [n for n in table if n in shapes and ".lora_" not in n and n.removesuffix(".weight") not in adapted]
    for name in rng.choice(names, samples, replace=False):
        target = table[name]
        spec = {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": f"file://{out.absolute()}/params",
                "path": target.path.replace("/", "."),
            },
        }
        array = ts.open(spec, read=True).result()
        stored = array if target.slot is None else array[target.slot]
        shape = (cfg.llm.vocab_size, *shapes[name][1:]) if shapes[name][:1] == (152064,) else shapes[name]
        dtype = np.dtype(np.float32) if name.startswith(SEG_MODEL) and len(shapes) == 1624 else BFLOAT16
        wanted = TRANSFORMS[target.transform].to_jax(values(name, shape, dtype))
        index = tuple(int(rng.integers(n)) for n in wanted.shape)
        got = np.asarray(stored[index].read().result(), np.float32) if index else np.asarray(stored.read().result())
        assert np.float32(got) == np.float32(wanted[index]), (name, index, got, wanted[index])
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path("tests/data/tokenizer"))
    parser.add_argument("--whole", action="store_true", help="virst.pt holds all parameters, not only the trained ones")
    options = parser.parse_args()
    folder: Path = options.workdir
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    shapes = write_release(folder, options.manifest, options.tokenizer, options.whole)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"sources: {size / 1e9:.1f} GB in {time.perf_counter() - started:.0f} s", flush=True)
    command = [sys.executable, "-m", "conversion.convert", "--videochat", str(folder / "videochat")]
    command += ["--sam2", str(folder / "sam2.pt"), "--virst", str(folder / "virst.pt"), "--out", str(folder / "model")]
    started = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    memory = Memory(process.pid)
    memory.start()
    if process.wait():
        print(f"conversion ended with status {process.returncode}; peak memory {memory.own / 1e6:.1f} GB")
        return 1
    seconds = time.perf_counter() - started
    written = sum(f.stat().st_size for f in (folder / "model").rglob("*") if f.is_file())
    print(
        f"conversion: {seconds:.0f} s, {written / 1e9:.1f} GB written, peak memory {memory.own / 1e6:.1f} GB "
        f"({memory.mapped / 1e6:.1f} GB with the file pages that it maps)"
    )
    print(f"{compare(folder / 'model', shapes)} places compared")
    return 0


if __name__ == "__main__":
    sys.exit(main())
