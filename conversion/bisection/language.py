"""The operations of the language model and of both fusions.

Axes: L positions, N [SEG] tokens, F segmentation frames, K keys, D width, C fusion width.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.data.sequence import splice
from virst_jax.inference.steps import Network
from virst_jax.models import qwen2, st_fusion
from virst_jax.models.qwen2 import Qwen2
from virst_jax.models.virst import Virst

from ..cases.network import read_conversation
from .operation import Operation, apply, compiled, hearing, layer_of


def language_operations(network: Network, meta: Mapping[str, Any], clips: int) -> Iterator[Operation]:
    """Embeddings, every decoder layer at all positions, and the same once more as segmenting reads it: in two parts.

    meta: of an e2e case.
    """
    cfg, params = network.cfg, network.params
    dtype = jnp.dtype(cfg.compute.dtype)
    tokens = cfg.vision.tokens_per_frame * cfg.vision.clip_frames
    row = splice(meta["input_ids"], meta["labels"], clips * tokens, cfg.seg_token_id)
    ids, index, seg = row.token_ids[None], row.visual_index[None], row.seg_positions[None]
    model = network.steps.model

    def embed(params: Any, visual: jax.Array) -> tuple[jax.Array]:
        flat = visual.reshape(1, -1, visual.shape[-1])
        return (apply(model, params, ids, index, flat, method=Virst.embed),)

    yield Operation("language / embeddings", ("visual",), ("llm.embeds",), compiled(embed), {"llm": params["llm"]})
    before = "llm.embeds"
    if cfg.fusion.initial:

        def fuse(params: Any, embeds: jax.Array, maps: jax.Array) -> tuple[jax.Array]:
            return (apply(model, params, embeds, seg, maps[None], method=Virst.fuse_initially),)

        own = {"initial_fusion": params["initial_fusion"]}
        names = ("llm.embeds", "maps")
        yield Operation("language / initial fusion", names, ("llm.fused",), compiled(fuse), own)
        before = "llm.fused"
    block = qwen2.Block(cfg.llm, cfg.compute)

    def layer(params: Any, x: jax.Array) -> tuple[jax.Array]:
        rotary = qwen2.rotary_table(jnp.arange(x.shape[1])[None], cfg.llm.head_dim, cfg.llm.rope_theta)
        return apply(block, params, x.astype(dtype), None, None, rotary, None, True, True, False, 0, None)[:1]

    run = compiled(layer)
    for i in range(cfg.llm.num_layers):
        own = layer_of(params["llm"]["layers"], i)
        yield Operation(f"language / layer {i}", (before,), (f"llm.layer{i}",), run, own)
        before = f"llm.layer{i}"

    def norm(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        llm = Qwen2(cfg.llm, cfg.compute)
        hidden = apply(llm, params, x.astype(dtype), method=lambda self, x: self.norm(x))
        return hidden, hidden[:, seg[0]]

    yield Operation("language / final norm", (before,), ("llm.norm", "seg_hidden"), compiled(norm), params["llm"])

    def read(_: None, visual: np.ndarray, maps: np.ndarray) -> tuple[jax.Array]:
        parts = [jnp.asarray(x, dtype) for x in visual]
        tops = [jnp.asarray(x, dtype) for x in maps]
        return (read_conversation(network, meta, parts, len(parts), tops).text.seg_hidden,)

    yield Operation("language / video, then text", ("visual", "maps"), ("seg_hidden",), read)


def fusion_operations(network: Network) -> Iterator[Operation]:
    """The second fusion: keys and queries, every layer, prompts."""
    cfg, params = network.cfg, network.params["second_fusion"]
    dtype = jnp.dtype(cfg.compute.dtype)
    fusion = st_fusion.SecondFusion(cfg.fusion, cfg.compute, cfg.sam2.hidden_size)

    def enter(params: Any, seg: jax.Array, maps: jax.Array) -> tuple[jax.Array, jax.Array]:
        heard: list[Any] = []
        with nn.intercept_methods(hearing(st_fusion.FusionLayer, heard)):
            apply(fusion, params, seg.astype(dtype), maps[None].astype(dtype))
        (queries, keys, *_), _ = heard[0]
        return keys, queries

    given, names = ("seg_hidden", "maps"), ("fusion.keys", "fusion.queries")
    yield Operation("fusion / keys and queries", given, names, compiled(enter), params)
    block = st_fusion.FusionLayer(cfg.fusion, cfg.compute)
    grid = (cfg.sam2.feature_size // 8) ** 2

    def layer(params: Any, x: jax.Array, keys: jax.Array) -> tuple[jax.Array]:
        frames = keys.shape[1] // grid
        return apply(block, params, x.astype(dtype), keys.astype(dtype), frames, True)[:1]

    run, before = compiled(layer), "fusion.queries"
    for i in range(cfg.fusion.num_layers):
        own = params[f"layer{i}"]
        yield Operation(f"fusion / layer {i}", (before, "fusion.keys"), (f"fusion.layer{i}",), run, own)
        before = f"fusion.layer{i}"

    def whole(params: Any, seg: jax.Array, maps: jax.Array) -> tuple[jax.Array, jax.Array]:
        return apply(fusion, params, seg.astype(dtype), maps[None].astype(dtype))

    yield Operation("fusion / prompts", given, ("prompts", "frame_scores"), compiled(whole), params)
