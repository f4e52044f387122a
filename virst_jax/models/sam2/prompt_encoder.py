"""SAM's prompt encoder: points, boxes and masks.

Axes: B prompts, P points, C width, H, W feature grid, L mask side (4H).
Source: model/sam2/modeling/sam/prompt_encoder.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import Compute, Sam2Config
from virst_jax.models.layers import conv, gelu, layer_norm, with_axes

PADDING = -1  # label of a point that is none
BOX_CORNERS = (2, 3)  # labels of a box's top-left and bottom-right corner


class PromptEncoder(nn.Module):
    cfg: Sam2Config
    compute: Compute

    def setup(self) -> None:
        cfg, dtype = self.cfg, jnp.dtype(self.compute.param_dtype)
        width, channels = cfg.hidden_size, cfg.mask_prompt_channels
        normal = nn.initializers.normal(1.0)
        self.gaussian = self.param("gaussian", with_axes(normal, "token", "embed"), (2, width // 2), dtype)
        self.point_embed = self.param("point_embed", with_axes(normal, "token", "embed"), (4, width), dtype)
        self.not_a_point_embed = self.param("not_a_point_embed", with_axes(normal, "embed"), (width,), dtype)
        self.no_mask_embed = self.param("no_mask_embed", with_axes(normal, "embed"), (width,), dtype)
        self.mask_conv0 = conv(self.compute, channels // 4, 2, stride=2)
        self.mask_norm0 = layer_norm(self.compute, 1e-6)
        self.mask_conv1 = conv(self.compute, channels, 2, stride=2)
        self.mask_norm1 = layer_norm(self.compute, 1e-6)
        self.mask_conv2 = conv(self.compute, width, 1)

    def _encode(self, position: jax.Array | np.ndarray) -> jax.Array:
        """Positions float32[..., 2] as (x, y) in [0, 1] -> random Fourier features float32[..., C]."""
        # reduced-precision products would move points by pixels
        angle = 2 * jnp.pi * jnp.matmul(2 * position - 1, self.gaussian.astype(jnp.float32), precision="highest")
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)

    def dense_position(self) -> jax.Array:
        """Position encoding float32[H, W, C] of the image features."""
        size = self.cfg.feature_size
        center = (np.arange(size, dtype=np.float32) + 0.5) / size
        return self._encode(np.stack(np.meshgrid(center, center), -1))

    def points(self, coords: jax.Array, labels: jax.Array, pad: bool = True) -> jax.Array:
        """Embeds points.

        Args:
          coords: float32[B, P, 2], (x, y) in pixels of the model's image.
          labels: int[B, P]: 1 foreground, 0 background, 2 and 3 box corners, -1 none.
          pad: append one point that is none, as SAM does where no box follows.

        Returns:
          dtype[B, P (+ 1), C].
        """
        if pad:
            coords = jnp.pad(coords, ((0, 0), (0, 1), (0, 0)))
            labels = jnp.pad(labels, ((0, 0), (0, 1)), constant_values=PADDING)
        table = self.point_embed.astype(jnp.float32)
        known = self._encode((coords + 0.5) / self.cfg.image_size) + table[jnp.clip(labels, 0, 3)]
        embedding = jnp.where((labels == PADDING)[..., None], self.not_a_point_embed.astype(jnp.float32), known)
        return embedding.astype(jnp.dtype(self.compute.dtype))

    def boxes(self, boxes: jax.Array) -> jax.Array:
        """Boxes float32[B, 4] as (x0, y0, x1, y1) in pixels -> dtype[B, 2, C]."""
        labels = jnp.broadcast_to(jnp.asarray(BOX_CORNERS), (boxes.shape[0], 2))
        return self.points(boxes.reshape(-1, 2, 2), labels, pad=False)

    def no_points(self, batch: int) -> jax.Array:
        """What SAM sees on a frame without prompts, dtype[B, 2, C]: an empty point and the padding point."""
        return self.points(jnp.zeros((batch, 1, 2)), jnp.full((batch, 1), PADDING))

    def masks(self, logits: jax.Array) -> jax.Array:
        """Mask prompt, logits float[B, L, L] -> dtype[B, H, W, C]."""
        x = logits[..., None].astype(jnp.dtype(self.compute.dtype))
        x = gelu(self.mask_norm0(self.mask_conv0(x)))
        x = gelu(self.mask_norm1(self.mask_conv1(x)))
        return self.mask_conv2(x)

    def no_mask(self, batch: int) -> jax.Array:
        """Dense embedding where there is no mask prompt: dtype[B, H, W, C]."""
        size = self.cfg.feature_size
        embedding = self.no_mask_embed.astype(jnp.dtype(self.compute.dtype))
        return jnp.broadcast_to(embedding, (batch, size, size, self.cfg.hidden_size))
