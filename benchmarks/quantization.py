"""What integer kernels change: outputs of single layers, masks of a model, and a language model's choice of words.

python -m benchmarks.quantization layers                                one layer of each part, at the release's widths
python -m benchmarks.quantization masks [--model tiny] [--videos 20] [--expressions 4] [--seed 1000000]
python -m benchmarks.quantization language --model DIR --text FILE      a Llama or Qwen2: safetensors and tokenizer.json

`layers` draws random parameters. `masks` takes held-out synthetic videos: intersection over union with the masks of the
same model in float32, over frames that either finds the object in, and J&F. `language` gives the perplexity of a text,
and how often the most probable next word is the same.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import virst_jax
from benchmarks import run
from benchmarks.random_network import random_params
from conversion.assemble import assemble
from conversion.formats.safetensors_dir import SafetensorsDir
from conversion.rules import llm_rules
from virst_jax.config import PARTS, HieraConfig, LoraConfig, QwenConfig, VirstConfig, quantized, tiny, virst_7b
from virst_jax.data.samples import Video
from virst_jax.data.synthetic.videos import SyntheticVideos
from virst_jax.errors import UserError
from virst_jax.evaluation.held_out import score_videos, summarize
from virst_jax.models.quantized import quantize_params
from virst_jax.models.qwen2 import Qwen2
from virst_jax.models.sam2.hiera import Hiera
from virst_jax.models.umt import VideoEncoder

NO_ADAPTERS = LoraConfig(rank=0)
KINDS = ("int8", "int4")
VARIANTS = (("int8", ("llm",)), ("int8", ("llm", "vision")), ("int8", PARTS), ("int4", ("llm",)), ("int4", PARTS))
WINDOW = 512  # tokens of a text that are read together


def one_layer() -> VirstConfig:
    """virst_7b with one layer of the language model and of the video encoder, and one block a stage of Hiera."""
    cfg = virst_7b()
    hiera = HieraConfig(stages=(1, 1, 1, 1), global_att_blocks=(2,))
    return dataclasses.replace(
        cfg,
        llm=dataclasses.replace(cfg.llm, num_layers=1, vocab_size=64, lora=NO_ADAPTERS),
        vision=dataclasses.replace(cfg.vision, depth=2, image_size=112, pretrained_grid=7),
        sam2=dataclasses.replace(cfg.sam2, hiera=hiera),
        seg_token_id=63,
    )


def layer_outputs(cfg: VirstConfig, part: str, params: Mapping[str, Any]) -> Sequence[jax.Array]:
    """What a part makes of random inputs; of Hiera, the last block of every stage."""
    rng = np.random.default_rng(1)
    found: Any
    if part == "llm":
        embeds = jnp.asarray(rng.standard_normal((1, 64, cfg.llm.hidden_size), np.float32))
        found = Qwen2(cfg.llm, cfg.compute).apply({"params": params["llm"]}, embeds, None)
        return [found]
    if part == "vision":
        side = cfg.vision.image_size
        clip = jnp.asarray(rng.standard_normal((1, 4, side, side, 3), np.float32))
        found = VideoEncoder(cfg.vision, cfg.compute).apply({"params": params["vision"]}, clip)
        return [found]
    image = jnp.asarray(rng.standard_normal((1, 256, 256, 3), np.float32))
    trunk = params["sam2"]["image_encoder"]["trunk"]
    found = Hiera(cfg.sam2.hiera, cfg.compute).apply({"params": trunk}, image)
    return list(found)


def relative(ours: Any, theirs: Any) -> float:
    """The L2 norm of the difference over that of `theirs`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def layer_errors(cfg: VirstConfig) -> Iterator[tuple[str, list[float]]]:
    """For every part its relative errors in int8, in int4, and of bfloat16 without integers."""
    low = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, dtype="bfloat16"))
    for part in PARTS:
        params = jax.tree.map(np.asarray, random_params(cfg, {"hiera": "sam2"}.get(part, part)))
        exact = layer_outputs(cfg, part, params)
        found = []
        for kind in KINDS:
            integers = quantized(cfg, kind, [part])
            if part == "hiera":  # config.quantized leaves it at int8
                hiera = dataclasses.replace(cfg.sam2.hiera, weights=kind)
                integers = dataclasses.replace(cfg, sam2=dataclasses.replace(cfg.sam2, hiera=hiera))
            found.append(layer_outputs(integers, part, quantize_params(integers, params)))
        found.append(layer_outputs(low, part, params))
        for place, output in enumerate(exact):
            name = f"{part}, stage {place + 1}" if len(exact) > 1 else part
            yield name, [relative(each[place], output) for each in found]


def overlap(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """Intersection over union of bool[N, T, H, W], one for every mask that is not empty in both."""
    both, either = ((op(ours, theirs)).sum((2, 3)) for op in (np.logical_and, np.logical_or))
    return (both[either > 0] / either[either > 0]).tolist()


def print_masks(options: argparse.Namespace) -> None:
    base = virst_jax.load(options.model, dtype="float32")
    source = SyntheticVideos(options.videos, options.seed, expressions=options.expressions)
    params = jax.tree.map(lambda x: np.asarray(x), base.network.params)
    masks: dict[str, np.ndarray] = {}

    def exact(video: Video, texts: Sequence[str]) -> np.ndarray:
        masks[video.name] = base.segment(video, texts).masks
        return masks[video.name]

    table = _table(f"{options.model}: {len(source)} videos of seed {options.seed}", "IoU with float32", "J", "F", "J&F")
    scores = summarize([row for rows in score_videos(exact, source) for row in rows])
    table.add_row("float32", "1", *(f"{100 * scores[key]:.2f}" for key in ("j", "f", "j_and_f")))
    for kind, parts in VARIANTS:
        cfg = quantized(base.cfg, kind, parts)
        model = virst_jax.api.Model(cfg, quantize_params(cfg, params), base.tokenizer, dtype="float32")
        found: list[float] = []

        def segment(video: Video, texts: Sequence[str], model: Any = model, found: list[float] = found) -> np.ndarray:
            ours = model.segment(video, texts).masks
            found += overlap(ours, masks[video.name])
            return ours

        scores = summarize([row for rows in score_videos(segment, source) for row in rows])
        name = f"{kind}: {', '.join(f'{part} int8' if part == 'hiera' else part for part in parts)}"
        table.add_row(name, f"{np.mean(found):.4f}", *(f"{100 * scores[key]:.2f}" for key in ("j", "f", "j_and_f")))
    Console().print(table)


def read_language_model(folder: Path) -> tuple[QwenConfig, dict[str, Any]]:
    """A Llama or Qwen2 of transformers: its config.json and safetensors. Biases that it lacks are zeros.

    Raises:
      UserError: no such model.
    """
    try:
        stated = json.loads((folder / "config.json").read_text())
        heads = stated["num_attention_heads"]
        cfg = QwenConfig(
            vocab_size=stated["vocab_size"],
            hidden_size=stated["hidden_size"],
            intermediate_size=stated["intermediate_size"],
            num_layers=stated["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=stated.get("num_key_value_heads", heads),
            rope_theta=float(stated.get("rope_theta", 10000.0)),
            rms_norm_eps=stated.get("rms_norm_eps", 1e-6),
            lora=NO_ADAPTERS,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: holds no config.json of a Llama or Qwen2 ({error})") from error
    table = dict(llm_rules(cfg))
    source = SafetensorsDir(folder)
    try:
        have = set(source.names())

        def read(name: str) -> np.ndarray:
            if name in have:
                return np.asarray(source.read(name), np.float32)
            if name == "lm_head.weight":  # tied
                return np.asarray(source.read("model.embed_tokens.weight"), np.float32)
            return np.zeros(len(source.read(name.removesuffix("bias") + "weight")), np.float32)

        return cfg, dict(assemble(table, list(table), read, where=str(folder))["llm"])
    finally:
        source.close()


def next_words(cfg: QwenConfig, params: Mapping[str, Any], ids: np.ndarray) -> tuple[float, np.ndarray]:
    """Perplexity of int[L], read in windows, and the most probable next token at every place."""
    model = Qwen2(cfg, tiny().compute)

    @jax.jit
    def read(params: Any, window: jax.Array) -> tuple[jax.Array, jax.Array]:
        embeds = model.apply({"params": params}, window[None], method=Qwen2.embed)
        hidden = model.apply({"params": params}, embeds, None)
        logits = model.apply({"params": params}, hidden, method=Qwen2.logits)[0]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), window[1:, None], axis=-1)
        return -chosen[:, 0], jnp.argmax(logits[:-1], axis=-1)

    size = min(WINDOW, len(ids))
    windows = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    losses, best = zip(*(read(params, jnp.asarray(window)) for window in windows))
    return float(np.exp(np.mean(losses))), np.concatenate(best)


def language_rows(folder: Path, text: str) -> Iterator[tuple[str, float, float]]:
    """For float32 and every kind: perplexity, and the share of next words that float32 chooses too."""
    import tokenizers

    cfg, params = read_language_model(folder)
    ids = np.asarray(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids, np.int32)
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} tokens; give a longer one")
    perplexity, exact = next_words(cfg, params, ids)
    yield "float32", perplexity, 1.0
    for kind in KINDS:
        integers = dataclasses.replace(cfg, weights=kind)
        whole = quantize_params(dataclasses.replace(tiny(), llm=integers), {"llm": params})
        perplexity, ours = next_words(integers, whole["llm"], ids)
        yield kind, perplexity, float((ours == exact).mean())


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "masks", "language"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--expressions", type=int, default=4)
    parser.add_argument("--seed", type=int, default=10**6)
    parser.add_argument("--text", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.what == "masks":
        return print_masks(options)
    if options.what == "layers":
        table = _table("relative error of a layer's output, against float32", *KINDS, "bfloat16")
        for name, errors in layer_errors(one_layer()):
            table.add_row(name, *(f"{error:.2e}" for error in errors))
    else:
        if options.text is None:
            raise UserError("language needs a text: add --text FILE")
        table = _table(f"{options.model} on {options.text}", "perplexity", "same next word")
        for name, perplexity, same in language_rows(Path(options.model), options.text.read_text()):
            table.add_row(name, f"{perplexity:.3f}", f"{same:.2%}")
    Console().print(table)
    return None


if __name__ == "__main__":
    run(main)
