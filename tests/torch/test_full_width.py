"""Single layers at the width and the grids of the released network, against `transformers` or plain PyTorch."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from conversion.assemble import assemble
from conversion.rules import Target, hiera_rules, sam2_rules, vision_rules
from helpers.torch_sam2 import (
    assert_close,
    channels_first,
    fill,
    hiera_config,
    inference,
    random_tensor,
    release_name,
    tensor,
)
from virst_jax.config import Compute, HieraConfig, Sam2Config, VisionConfig
from virst_jax.models.sam2.hiera import Block, BlockSpec, Hiera, block_specs
from virst_jax.models.sam2.memory import MemoryAttention
from virst_jax.models.umt import VideoEncoder

pytestmark = [pytest.mark.torch, pytest.mark.heavy, pytest.mark.full_size]

HIERA, SAM, VISION = HieraConfig(), Sam2Config(), dataclasses.replace(VisionConfig(), depth=2)
# one block of every kind: windowed, windowed with pooled queries, global; and the grid it works on
KINDS = {spec: index for index, spec in reversed(list(enumerate(block_specs(HIERA))))}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with inference(threads=2):
        yield


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.RandomState(seed).standard_normal(shape)).astype(np.float32)


def grid_of(index: int) -> int:
    """Side of the grid that a block gets at 1024 pixels."""
    return 256 // 2 ** sum(spec.pool for spec in block_specs(HIERA)[:index])


@pytest.mark.parametrize(
    "index", sorted(KINDS.values()), ids=lambda i: f"block{i}_width{block_specs(HIERA)[i].dim}_grid{grid_of(i)}"
)
def test_hiera_block(index: int) -> None:
    from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleBlock

    spec: BlockSpec = block_specs(HIERA)[index]
    stage = int(np.searchsorted(np.cumsum(HIERA.stages), index, side="right"))
    config = hiera_config(HIERA)
    config._attn_implementation = "sdpa"
    theirs = Sam2MultiScaleBlock(config, stage, index - sum(HIERA.stages[:stage]), index).eval()
    fill(theirs, index)
    prefix = f"vision_encoder.backbone.blocks.{index}."
    state = {release_name(prefix + name): value.numpy() for name, value in theirs.state_dict().items()}
    rules = dict(hiera_rules(HIERA, "image_encoder.trunk", "trunk"))
    table = {name: Target("/".join(rules[name].path.split("/")[2:]), None, rules[name].transform) for name in state}
    params = assemble(table, state, state.__getitem__, where="transformers")
    x = normal(index, 1, grid_of(index), grid_of(index), spec.dim)
    ours, _ = jax.jit(Block(spec, HIERA.mlp_ratio, Compute()).apply)({"params": params}, x)
    assert_close(ours, theirs(tensor(x)))


def test_hiera_at_1024_pixels() -> None:
    """The patch embedding and both position tables, seen through a trunk of one block."""
    import transformers

    cfg = dataclasses.replace(HIERA, stages=(1,), global_att_blocks=(), window_spec=HIERA.window_spec[:1])
    theirs = transformers.AutoModel.from_config(hiera_config(cfg)).eval()
    fill(theirs, 50)
    named = {release_name(f"vision_encoder.backbone.{name}"): x.numpy() for name, x in theirs.state_dict().items()}
    table = dict(hiera_rules(cfg, "image_encoder.trunk", "trunk"))
    params = assemble(table, named, named.__getitem__, where="transformers")["trunk"]
    pixels = normal(51, 1, 1024, 1024, 3)
    (ours,) = jax.jit(Hiera(cfg, Compute()).apply)({"params": params}, pixels)
    assert_close(ours, theirs(channels_first(pixels)).last_hidden_state)


class Layers:
    """Modules of the release with random weights: `state` in PyTorch for plain functions, `params` as our tree.

    Args:
      rules: of the conversion table.
      prefix: of the names that are used.
      shapes: of the weights, by the rest of the name.
    """

    def __init__(self, rules: Iterator[tuple[str, Target]], prefix: str, shapes: dict[str, tuple[int, ...]]):
        table = {name.removeprefix(prefix): target for name, target in rules if name.startswith(prefix)}
        assert sorted(table) == sorted(shapes)
        rng = np.random.RandomState(60)
        state = {name: random_tensor(name, shape, rng) for name, shape in shapes.items()}
        self.params = assemble(table, state, state.__getitem__, where="test")
        self.state = {name: tensor(value) for name, value in state.items()}
        self.functions = pytest.importorskip("torch").nn.functional

    def linear(self, name: str, x: Any) -> Any:
        return self.functions.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Any, eps: float) -> Any:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return self.functions.layer_norm(x, weight.shape, weight, bias, eps)


def norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear_shapes(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def test_video_encoder() -> None:
    """A clip of 4 x 28 x 28 patches through the patch embedding, the position table, one block and the last norm."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    width, heads, length, side = VISION.hidden_size, VISION.num_heads, VISION.clip_frames, VISION.grid
    block = "blocks.0"
    shapes = {
        "patch_embed.proj.weight": (width, 3, 1, 16, 16),
        "patch_embed.proj.bias": (width,),
        f"{block}.attn.qkv.weight": (3 * width, width),
        f"{block}.attn.q_bias": (width,),
        f"{block}.attn.v_bias": (width,),
        **linear_shapes(f"{block}.attn.proj", width, width),
        **linear_shapes(f"{block}.mlp.fc1", width, 4 * width),
        **linear_shapes(f"{block}.mlp.fc2", 4 * width, width),
        **norm_shapes(f"{block}.norm1", width),
        **norm_shapes(f"{block}.norm2", width),
        **norm_shapes("vision_layernorm", width),
    }
    layers = Layers(vision_rules(VISION), "model.vision_tower.vision_tower.encoder.", shapes)
    pixels = normal(61, 1, length, 448, 448, 3)

    def encode(params: Any, pixels: Any) -> Any:
        capture: Any = {"mutable": "intermediates", "capture_intermediates": lambda m, _: m.name == "patch_embed"}
        return VideoEncoder(VISION, Compute()).apply({"params": params}, pixels, **capture)

    ours, kept = jax.jit(encode)(layers.params["vision"], pixels)

    state, video = layers.state, tensor(pixels).permute(0, 4, 1, 2, 3)
    x = F.conv3d(video, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=(1, 16, 16))
    x = x.flatten(2).transpose(1, 2)
    assert x.shape == (1, 3136, 1024)
    assert_close(kept["intermediates"]["patch_embed"]["__call__"][0].reshape(x.shape), x)

    position = torch.arange(length * 14 * 14, dtype=torch.float64)[:, None]
    angle = position / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    table = torch.stack([angle.sin(), angle.cos()], -1).reshape(length, 14, 14, width).float()
    table = F.interpolate(table.permute(0, 3, 1, 2), (side, side), mode="bicubic", align_corners=False)
    x = x + table.permute(0, 2, 3, 1).reshape(1, -1, width)

    bias = torch.cat([state[f"{block}.attn.q_bias"], torch.zeros(width), state[f"{block}.attn.v_bias"]])
    qkv = F.linear(layers.norm(f"{block}.norm1", x, 1e-6), state[f"{block}.attn.qkv.weight"], bias)
    q, k, v = qkv.reshape(1, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + layers.linear(f"{block}.attn.proj", attended)
    hidden = F.gelu(layers.linear(f"{block}.mlp.fc1", layers.norm(f"{block}.norm2", x, 1e-6)))
    x = x + layers.linear(f"{block}.mlp.fc2", hidden)
    assert_close(ours, layers.norm("vision_layernorm", x, 1e-12))


def test_memory_attention_layer() -> None:
    """4096 queries, and keys of seven memories and 64 pointer tokens among slots of which some are dead."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    cfg = dataclasses.replace(Sam2Config(), memory_layers=1)
    width, depth, side = cfg.hidden_size, cfg.memory_dim, cfg.feature_size
    layer = "layers.0"
    shapes = {
        **linear_shapes(f"{layer}.linear1", width, cfg.memory_mlp_dim),
        **linear_shapes(f"{layer}.linear2", cfg.memory_mlp_dim, width),
        **norm_shapes("norm", width),
    }
    for i in (1, 2, 3):
        shapes |= norm_shapes(f"{layer}.norm{i}", width)
    for part, inputs in (("self_attn", width), ("cross_attn_image", depth)):
        shapes |= linear_shapes(f"{layer}.{part}.q_proj", width, width)
        shapes |= linear_shapes(f"{layer}.{part}.k_proj", inputs, width)
        shapes |= linear_shapes(f"{layer}.{part}.v_proj", inputs, width)
        shapes |= linear_shapes(f"{layer}.{part}.out_proj", width, width)
    layers = Layers(sam2_rules(cfg), "model.seg_model.memory_attention.", shapes)
    pointers = 72
    keys = 8 * side**2 + pointers
    image, image_pos = normal(71, 1, side**2, width), normal(72, side**2, width)
    memory, memory_pos = normal(73, 1, keys, depth), normal(74, 1, keys, depth)
    valid = np.ones((1, keys), bool)
    valid[:, 3 * side**2 : 4 * side**2] = False
    valid[:, -40:-32] = False
    assert valid.sum() == 7 * 4096 + 64
    attend = jax.jit(MemoryAttention(cfg, Compute()).apply, static_argnums=6)
    params = layers.params["sam2"]["memory_attention"]
    ours = attend({"params": params}, image, image_pos, memory, memory_pos, valid, pointers)

    frequency = 1.0 / cfg.rope_theta ** (torch.arange(0, width, 4).float() / width)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.cat([torch.outer(x.flatten(), frequency), torch.outer(y.flatten(), frequency)], -1)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(x: Any) -> Any:
        """Whole frames of tokens [1, F * S, C], neighbouring channels as complex numbers."""
        pairs = torch.view_as_complex(x.reshape(-1, side**2, width // 2, 2))
        return torch.view_as_real(pairs * turn).reshape(x.shape)

    def attention(name: str, q: Any, k: Any, v: Any, rotated: int) -> Any:
        q, k, v = (layers.linear(f"{layer}.{name}.{part}_proj", x) for part, x in (("q", q), ("k", k), ("v", v)))
        k = torch.cat([rotate(k[:, :rotated]), k[:, rotated:]], 1)
        out = F.scaled_dot_product_attention(rotate(q)[:, None], k[:, None], v[:, None])[:, 0]
        return layers.linear(f"{layer}.{name}.out_proj", out)

    values, keyed = tensor(memory[valid][None]), tensor((memory + memory_pos)[valid][None])
    z = tensor(image) + 0.1 * tensor(image_pos)
    normed = layers.norm(f"{layer}.norm1", z, 1e-5)
    z = z + attention("self_attn", normed, normed, normed, side**2)
    z = z + attention("cross_attn_image", layers.norm(f"{layer}.norm2", z, 1e-5), keyed, values, 7 * side**2)
    hidden = F.relu(layers.linear(f"{layer}.linear1", layers.norm(f"{layer}.norm3", z, 1e-5)))
    z = z + layers.linear(f"{layer}.linear2", hidden)
    assert_close(ours, layers.norm("norm", z, 1e-5))
