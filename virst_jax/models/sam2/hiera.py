"""Hiera image encoder with its feature pyramid.

Axes: B images, H, W grid, C width, S window side, N windows of all images.

Between blocks the residual stream stands as windows where the grid consists of whole ones. Blocks with windows of one
size then need no transposition, and neither do global ones: attention does not depend on the order of its tokens.
Source: model/sam2/modeling/backbones/{hieradet,image_encoder,utils}.py.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from virst_jax.config import FLOAT, Compute, HieraConfig, Sam2Config
from virst_jax.models.layers import Mlp, Projections, conv, dense, gelu, in_parts, layer_norm, remat, with_axes
from virst_jax.ops.attention import attention
from virst_jax.ops.constrain import constrain
from virst_jax.ops.platform import target_platform
from virst_jax.ops.resize import resize_matrix, upsample_nearest_2x


@dataclass(frozen=True)
class BlockSpec:
    dim: int
    dim_out: int
    num_heads: int
    window: int  # 0: global attention
    pool: bool  # halves the grid


@dataclass(frozen=True)
class Run:
    """Consecutive blocks of one kind; runs of several blocks are stacked and scanned."""

    start: int
    count: int
    spec: BlockSpec

    @property
    def name(self) -> str:
        return f"blocks{self.start}"


def block_specs(cfg: HieraConfig) -> list[BlockSpec]:
    """Every block's shape. The first block of a stage still uses the window of the stage before."""
    specs: list[BlockSpec] = []
    dim = cfg.embed_dim
    for stage, count in enumerate(cfg.stages):
        for i in range(count):
            first = i == 0 and stage > 0
            window = 0 if len(specs) in cfg.global_att_blocks else cfg.window_spec[stage - 1 if first else stage]
            dim_out = cfg.stage_dims[stage]
            specs.append(BlockSpec(dim, dim_out, cfg.num_heads * 2**stage, window, pool=first and stage <= cfg.q_pool))
            dim = dim_out
    return specs


def block_runs(cfg: HieraConfig) -> list[Run]:
    """The blocks grouped into runs of equal ones, broken at stage ends (whose outputs are features)."""
    ends = {sum(cfg.stages[: i + 1]) for i in range(len(cfg.stages))}
    runs: list[Run] = []
    for index, spec in enumerate(block_specs(cfg)):
        if runs and runs[-1].spec == spec and index not in ends:
            runs[-1] = Run(runs[-1].start, runs[-1].count + 1, spec)
        else:
            runs.append(Run(index, 1, spec))
    return runs


def max_pool_2x(x: jax.Array) -> jax.Array:
    """dtype[B, H, W, C] -> dtype[B, H // 2, W // 2, C]"""
    if target_platform() == "cpu":  # where windows of a reduction are slow
        return rearrange(x, "b (h p) (w q) c -> b h w (p q) c", p=2, q=2).max(3)
    return nn.max_pool(x, (2, 2), (2, 2))


class Attention(nn.Module):
    spec: BlockSpec
    compute: Compute
    weights: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Windows dtype[N, S, S, dim] -> dtype[N, S, S, dim_out], S halved where the block pools its queries."""
        spec = self.spec
        q, k, v = Projections(self.compute, spec.dim_out, weights=self.weights, name="qkv")(x)
        if spec.pool:
            q = max_pool_2x(q)
        side = q.shape[1:3]
        q, k, v = (rearrange(y, "b i j (h d) -> b (i j) h d", h=spec.num_heads) for y in (q, k, v))
        out = attention(q, k, v, impl=self.compute.attention)
        out = rearrange(out, "b (i j) h d -> b i j (h d)", i=side[0])
        return dense(self.compute, spec.dim_out, ("heads", "embed"), weights=self.weights, name="proj")(out)


class Block(nn.Module):
    """On whole grids dtype[B, H, W, dim], or on windows dtype[N, S, S, dim] of `windows` an image (0: a grid)."""

    spec: BlockSpec
    mlp_ratio: float
    compute: Compute
    windows: int = 0
    weights: str = FLOAT  # of config.WEIGHTS

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        if self.spec.window and self.windows:
            return in_parts(self, Block._run, x, self._hidden), None
        return self._run(x), None

    @property
    def _hidden(self) -> int:
        return int(self.spec.dim_out * self.mlp_ratio)

    def _run(self, x: jax.Array) -> jax.Array:
        spec = self.spec
        x = shortcut = constrain(x, None, None, None, "width")
        x = layer_norm(self.compute, 1e-6, name="norm1")(x)
        if spec.dim != spec.dim_out:
            shortcut = dense(self.compute, spec.dim_out, ("conv_in", "embed"), weights=self.weights, name="proj")(x)
        if spec.pool:
            shortcut = max_pool_2x(shortcut)
        x = shortcut + self._attend(Attention(spec, self.compute, self.weights, name="attn"), x)
        mlp = Mlp(self.compute, (self._hidden, spec.dim_out), gelu, weights=self.weights, name="mlp")
        y = layer_norm(self.compute, 1e-6, name="norm2")(x)
        return x + in_parts(mlp, Mlp.__call__, y, self._hidden, flat=True)

    def _attend(self, attend: Attention, x: jax.Array) -> jax.Array:
        if self.windows and not self.spec.window:  # all windows of an image, one below the other
            whole = attend(rearrange(x, "(b n) i j d -> b (n i) j d", n=self.windows))
            return rearrange(whole, "b (n i) j d -> (b n) i j d", n=self.windows)
        if self.windows or not self.spec.window:
            return attend(x)
        # padded with zeros to whole windows, which are attended like the rest
        height, width, side = *x.shape[1:3], self.spec.window
        x = jnp.pad(x, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)))
        grid = (x.shape[1] // side, x.shape[2] // side)
        x = to_grid(attend(to_windows(x, side)), grid)
        shrink = 2 if self.spec.pool else 1
        return x[:, : height // shrink, : width // shrink]


def to_windows(x: jax.Array, side: int) -> jax.Array:
    """dtype[B, H, W, C] -> dtype[N, side, side, C], row by row; H and W are multiples of side."""
    return rearrange(x, "b (r i) (c j) d -> (b r c) i j d", i=side, j=side)


def to_grid(x: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The inverse of `to_windows`; grid: windows of an image, down and across."""
    return rearrange(x, "(b r c) i j d -> b (r i) (c j) d", r=grid[0], c=grid[1])


class Hiera(nn.Module):
    cfg: HieraConfig
    compute: Compute

    @nn.compact
    def __call__(self, pixels: jax.Array) -> list[jax.Array]:
        """Normalised pixels float[B, S, S, 3] -> one dtype[B, S/4/2^i, S/4/2^i, C * 2^i] a stage i."""
        cfg, compute = self.cfg, self.compute
        x = conv(compute, cfg.embed_dim, 7, stride=4, padding=3, name="patch_embed")(pixels)
        x = x + self._position(x.shape[1:3]).astype(x.dtype)
        self.sow("intermediates", "embedded", x)
        ends = {sum(cfg.stages[: i + 1]) for i in range(len(cfg.stages))}
        features = []
        grid, side = (1, 1), 0  # windows of an image, and their side; 0: x is a grid
        for run in block_runs(cfg):
            if run.spec.window and run.spec.window != side:
                x = to_grid(x, grid) if side else x
                side = 0 if any(n % run.spec.window for n in x.shape[1:3]) else run.spec.window
                if side:
                    grid = (x.shape[1] // side, x.shape[2] // side)
                    x = to_windows(x, side)
            block: Any = remat(Block, compute.remat)
            if run.count > 1:
                block = nn.scan(
                    block,
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    length=run.count,
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
            windows = grid[0] * grid[1] if side else 0
            x, _ = block(run.spec, cfg.mlp_ratio, compute, windows, cfg.weights, name=run.name)(x, None)
            if run.spec.pool:
                side //= 2
            if run.start + run.count in ends:
                features.append(to_grid(x, grid) if side else x)
        return features

    def _position(self, grid: tuple[int, ...]) -> jax.Array:
        """Position embedding float32[H, W, C]: a small table resized to the grid plus one tiled per window."""
        cfg, dtype = self.cfg, jnp.dtype(self.compute.param_dtype)
        init = with_axes(nn.initializers.normal(0.02), "grid", "grid", "embed")
        table = self.param("pos_embed", init, (*cfg.window_pos_embed_bkg_spatial_size, cfg.embed_dim), dtype)
        window = cfg.window_spec[0]
        tile = self.param("pos_embed_window", init, (window, window, cfg.embed_dim), dtype)
        rows, columns = (resize_matrix(n, m, "bicubic") for n, m in zip(table.shape[:2], grid))
        table = jnp.einsum("ih,hwc,jw->ijc", rows, table.astype(jnp.float32), columns, precision="highest")
        return table + jnp.tile(tile.astype(jnp.float32), (grid[0] // window, grid[1] // window, 1))


class ImageEncoder(nn.Module):
    """Hiera and the pyramid over it: lateral 1x1 convolutions, top-down additions at the coarse levels."""

    cfg: Sam2Config
    compute: Compute

    @nn.compact
    def __call__(self, pixels: jax.Array) -> list[jax.Array]:
        """Normalised pixels float[B, S, S, 3] -> maps dtype[B, S/4/2^i, S/4/2^i, hidden_size], i = 0, 1, 2."""
        cfg = self.cfg
        stages = Hiera(cfg.hiera, self.compute, name="trunk")(pixels)
        self.sow("intermediates", "stages", stages)
        maps: list[jax.Array] = []
        previous = None
        for level in reversed(range(len(stages))):
            x = conv(self.compute, cfg.hidden_size, 1, name=f"lateral{level}")(stages[level])
            x = constrain(x, None, None, None, "width")
            if previous is not None and level in cfg.fpn_top_down_levels:
                x = x + upsample_nearest_2x(previous)
            previous = x
            maps.insert(0, x)
        return maps[:-1]  # the coarsest level only feeds the one above it
