"""Fills the release's network: from a checkpoint's three sources, or by the rule of the parity cases.

The sources are laid over one another as the release does (model/builder.py, eval.py): VideoChat-Flash's safetensors,
sam2.1_hiera_large.pt, and the release's .pt over both, with LoRA adapters where it holds any.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virst_jax.errors import UserError

from ..weights_rule import make_tensor
from .stubs import first_line, require

_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Rule:
    """Parameters by the rule; the salt selects one of its draws."""

    salt: int


@dataclass(frozen=True)
class Files:
    """The three sources of a checkpoint."""

    videochat: Path  # folder with *.safetensors
    sam2: Path
    virst: Path
    trust: bool = False  # unpickle the .pt whatever it holds


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch raises anything on a damaged file
        raise UserError(f"{path}: does not load ({type(error).__name__}: {first_line(error)})") from error


def manifest_of(virst: Any) -> dict[str, list[int]]:
    """{name: shape} of everything in the network's state, in its order."""
    return {name: list(tensor.shape) for name, tensor in virst.state_dict().items()}


def fill_by_rule(virst: Any, salt: int) -> None:
    """Sets every parameter to what the rule makes of its name and shape."""
    import torch

    with torch.no_grad():
        for name, tensor in virst.state_dict().items():
            tensor.copy_(torch.as_tensor(make_tensor(name, tuple(tensor.shape), salt)))


def fill_from_files(
    release: Any, virst: Any, sources: Files, vocab_size: int
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Lays the three sources over one another, in the release's order.

    Returns:
      The manifest before adapters, and what the case's "state" tells of the files.

    Raises:
      UserError: a file is damaged or of other sizes, or a parameter is in none of them.
    """
    with _reading(sources.sam2):
        release.module("model.sam2.build_sam")._load_checkpoint(virst.model.seg_model, str(sources.sam2))
    filled = {name for name in virst.state_dict() if name.startswith("model.seg_model.")}  # read strictly
    shards = _shards(sources.videochat)
    ignored: list[str] = []
    for shard in shards:
        names, unknown = _copy_safetensors(virst, shard)
        filled |= names
        ignored += unknown
    virst.resize_token_embeddings(vocab_size)
    manifest = manifest_of(virst)
    tensors = _read_pt(sources.virst, sources.trust)
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    state: dict[str, Any] = {"from": "checkpoint", "files": [describe(p) for p in (*shards, sources.sam2)]}
    state["files"].append(describe(sources.virst))
    if any(".lora_" in name for name in tensors):
        state["lora"] = _add_adapters(release, virst, tensors)
    names, unknown = _copy(virst, tensors, sources.virst)
    filled |= names
    left = [name for name in _plain_names(virst) if name not in filled]
    if left:
        raise UserError(
            f"{sources.virst}: {len(left)} parameters are in none of the three files (first {left[0]}): "
            "give the checkpoint that the release's evaluation loads"
        )
    state["ignored"] = sorted(ignored + unknown)
    return manifest, state


def _shards(folder: Path) -> list[Path]:
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise UserError(f"{folder}: no *.safetensors here; give the folder of VideoChat-Flash-Qwen2-7B")
    return shards


def table_rows(folder: Path) -> int:
    """Rows of VideoChat-Flash's token table: more than the tokenizer has tokens."""
    require("safetensors")
    from safetensors import safe_open

    name = "model.embed_tokens.weight"
    for shard in _shards(folder):
        with _reading(shard), safe_open(str(shard), framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a dict
                return int(file.get_slice(name).get_shape()[0])
    raise UserError(f"{folder}: no {name} in its files; give the folder of VideoChat-Flash-Qwen2-7B")


def _plain_names(virst: Any) -> dict[str, Any]:
    """The state by the names of a .pt: newer PEFT puts `base_layer` before an adapted layer's own parameters."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in virst.state_dict().items()}


def _copy(virst: Any, tensors: dict[str, Any], where: Path) -> tuple[set[str], list[str]]:
    """Copies tensors into the network; returns the names that it has, and those that it has not."""
    import torch

    state = _plain_names(virst)
    for name, tensor in tensors.items():
        if name not in state:
            continue
        if tuple(tensor.shape) != tuple(state[name].shape):
            raise UserError(
                f"{where}: {name} is {tuple(tensor.shape)} and the network wants {tuple(state[name].shape)}: "
                "a checkpoint of another network, or of another tokenizer"
            )
        with torch.no_grad():
            state[name].copy_(tensor)
    return {n for n in tensors if n in state}, [n for n in tensors if n not in state]


def _copy_safetensors(virst: Any, path: Path) -> tuple[set[str], list[str]]:
    from safetensors import safe_open

    names: set[str] = set()
    unknown: list[str] = []
    with _reading(path), safe_open(str(path), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            copied, left = _copy(virst, {name: file.get_tensor(name)}, path)
            names |= copied
            unknown += left
    return names, unknown


def _read_pt(path: Path, trust: bool) -> dict[str, Any]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust, mmap=True)
    except Exception as error:
        hint = "" if trust else "; if it holds more than tensors and you trust it, add --trust-checkpoint"
        raise UserError(f"{path}: does not load ({type(error).__name__}: {first_line(error)}){hint}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
        raise UserError(f"{path}: no 'model_state_dict' in it: give the .pt of the release's checkpoint")
    return content["model_state_dict"]


def _add_adapters(release: Any, virst: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """LoRA on the decoder's seven projections, by PEFT, with the release's arguments."""
    require("peft")
    from peft import LoraConfig, TaskType, get_peft_model

    defaults = {f.name: f.default for f in dataclasses.fields(release.module("utils.argument").TrainingArguments)}
    rank = next(int(t.shape[0]) for name, t in tensors.items() if ".lora_A." in name)
    targets = [
        name
        for name, _ in virst.named_modules()
        if name.endswith(_LORA_TARGETS) and "layers" in name and "seg_model" not in name
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=defaults["lora_alpha"],
        target_modules=targets,
        lora_dropout=defaults["lora_dropout"],
        bias=defaults["lora_bias"],
        task_type=TaskType.CAUSAL_LM,
    )
    get_peft_model(virst, config)  # puts the adapters into virst itself
    return {"rank": rank, "alpha": defaults["lora_alpha"], "targets": len(targets)}


def describe(path: Path) -> dict[str, Any]:
    """A file's name, size, and the sha256 of its first, middle and last MiB: whole where it is no longer than 3 MiB."""
    size, mib = path.stat().st_size, 1 << 20
    digest = hashlib.sha256()
    with path.open("rb") as file:
        starts = (0, (size - mib) // 2, size - mib) if size > 3 * mib else ()
        for start in starts:
            file.seek(start)
            digest.update(file.read(mib))
        if not starts:
            digest.update(file.read())
    return {"name": path.name, "bytes": size, "sha256_sample": digest.hexdigest()}
