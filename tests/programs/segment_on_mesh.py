"""Segments a clip on a mesh of four virtual devices: python segment_on_mesh.py MODEL CLIP.npy OUT.npz"""

import sys

import jax
import numpy as np

import virst_jax
from virst_jax.parallel import sharding


def main(folder: str, clip: str, out: str) -> None:
    mesh = sharding.make_mesh(1, 2, 2)
    model = virst_jax.load(folder, mesh=mesh)
    split = [x for x in jax.tree.leaves(model.network.params) if not x.sharding.is_fully_replicated]
    frames, sentences = np.load(clip), ["the dog", "A red cat   that runs", "what scared the seal?"]
    result = model.segment(frames, sentences)
    # frames resized by the devices give the same bytes
    again = virst_jax.load(folder, mesh=mesh, resize="device").segment(frames, sentences)
    np.testing.assert_array_equal(again.masks, result.masks)
    np.testing.assert_array_equal(again.scores, result.scores)
    np.savez(out, split=len(split), masks=result.masks, scores=result.scores)


if __name__ == "__main__":
    main(*sys.argv[1:])
