"""Projector from the video encoder to the language model: merges tokens, then Linear-GELU-Linear.

Source: model/videochat/mm_projector_builder.py, ToMe16_mlp_hd64.
"""

import flax.linen as nn
import jax

from virst_jax.config import Compute, VisionConfig
from virst_jax.models.layers import dense, gelu
from virst_jax.ops.token_merge import merge_tokens


class Projector(nn.Module):
    cfg: VisionConfig
    compute: Compute
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, frames: int, merge: bool = True) -> jax.Array:
        """dtype[B, frames * grid * grid, D] -> dtype[B, tokens, features].

        A clip keeps tokens_per_frame tokens a frame, a still image (frames = 1) tokens_per_image; all if not `merge`.
        """
        cfg = self.cfg
        target = cfg.tokens_per_image if frames == 1 else cfg.tokens_per_frame * frames
        if merge and x.shape[1] > target:
            x = merge_tokens(x, target, cfg.num_heads)
        x = gelu(dense(self.compute, self.features, ("embed", "mlp"), name="fc1")(x))
        return dense(self.compute, self.features, ("mlp", "embed"), name="fc2")(x)
