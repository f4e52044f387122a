"""A small checkpoint in the release's exact three files, and the parameters that it stands for."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from conversion import convert
from conversion.assemble import take_apart
from conversion.formats.torch_file import write_torch_file
from conversion.names import SEG_MODEL
from conversion.rules import rule_table
from helpers.places import DATA
from helpers.safetensors_files import write_shards
from virst_jax.config import HieraConfig, LoraConfig, QwenConfig, Sam2Config, VirstConfig, VisionConfig, to_json
from virst_jax.io.model_folder import parameter_shapes
from virst_jax.models.tree import flatten

BASE_ROWS = 48  # of the base model's vocabulary, more than the tokenizer needs


def small(rank: int = 0) -> VirstConfig:
    return VirstConfig(
        name="small",
        llm=QwenConfig(40, 16, 24, num_layers=2, num_heads=4, num_kv_heads=2, lora=LoraConfig(rank)),
        vision=VisionConfig(hidden_size=8, depth=3, num_heads=2, image_size=32),
        sam2=Sam2Config(
            hiera=HieraConfig(8, 1, (1, 2, 3, 1), global_att_blocks=(4,), window_spec=(8, 4, 4, 2)),
            image_size=128,
            hidden_size=32,
            memory_dim=8,
            memory_layers=2,
            memory_mlp_dim=16,
            decoder_mlp_dim=16,
            iou_head_dim=16,
        ),
        seg_token_id=39,
    )


def random_params(cfg: VirstConfig, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(dtype), parameter_shapes(cfg))


def specs(tensors: dict[str, np.ndarray]) -> Any:
    return [(name, x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()]


def peft(name: str) -> str:
    return "base_model.model." + name.replace("lora_A.weight", "lora_A.default.weight").replace(
        "lora_B.weight", "lora_B.default.weight"
    )


@dataclasses.dataclass
class Files:
    """A checkpoint in the release's three files, and the parameters that it stands for."""

    folder: Path
    params: dict[str, Any]
    trained: dict[str, np.ndarray]

    def run(self, *extra: str) -> int:
        f = self.folder
        config = f / "small.json"
        config.write_text(to_json(small()))
        paths = ["--videochat", f / "videochat", "--sam2", f / "sam2.pt", "--virst", f / "virst.pt", "--out", f / "out"]
        return convert.main([*map(str, paths), "--config", str(config), "--dtype", "source", *extra])


def write_checkpoint(
    folder: Path, rank: int = 4, trained_only: bool = True, rename: Callable[[str], str] = peft
) -> Files:
    """Writes videochat/, sam2.pt and virst.pt.

    Args:
      trained_only: virst.pt holds the trained parameters only.
      rename: of the names in virst.pt.
    """
    cfg = small(rank)
    params = random_params(cfg)
    named = {name: read() for name, read in take_apart(rule_table(cfg), flatten(params).items())}
    seg = {k: v for k, v in named.items() if k.startswith(SEG_MODEL)}
    new = {k for k in named if ".lora_" in k or k.startswith(("model.seg_prompter", "model.initial", "model.occ"))}
    base = {k: v for k, v in named.items() if k not in seg and k not in new}
    # what lies below the trained tensors is something else, so that a wrong order shows
    trained = {k: v for k, v in named.items() if k in new or not trained_only or "mask_decoder" in k}
    below = lambda k, v: v + 1 if k in trained else v  # noqa: E731
    base = {k: below(k, v) for k, v in base.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = np.concatenate([base[name], np.full((BASE_ROWS - 40, 16), 9, np.float32)])
    write_shards(folder / "videochat", base, shard_bytes=20_000)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / "videochat" / name).write_bytes((DATA / "tokenizer" / name).read_bytes())
    seg_plain = {k.removeprefix(SEG_MODEL): below(k, v) for k, v in seg.items()}
    write_torch_file(folder / "sam2.pt", specs(seg_plain), root="model")
    write_torch_file(folder / "virst.pt", specs({rename(k): v for k, v in trained.items()}))
    return Files(folder, params, trained)


def assert_equal_trees(ours: Any, theirs: Any) -> None:
    a, b = flatten(ours), flatten(theirs)
    assert a.keys() == b.keys()
    for path, value in a.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(b[path]), err_msg=path)
