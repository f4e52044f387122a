# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Correct what a sentence has found
#
# A session begins objects by sentences, clicks, boxes or masks, on any frame, and takes corrections.

# %%
import numpy as np

import virst_jax
from virst_jax.commands.demo import CLIP

model = virst_jax.load("tiny")
session = model.session(CLIP)
(cross,) = session.add_text("the cyan cross")
before = {frame.index: frame.of(cross) for frame in session.propagate()}
print("frames:", len(before), "pixels on frame 20:", before[20].sum())

# %% [markdown]
# ## Another object, by a click
#
# The star of the same colour, on frame 0, in pixels of the video. Boxes begin objects, too, and so do masks
# (`session.add_mask`).

# %%
star = session.add_points(2, 0, [(231, 85)]).of(2)
print("pixels of the star:", star.sum())
found = {frame.index: frame.object_ids for frame in session.propagate()}
print("objects on frame 31:", found[31])

# %% [markdown]
# ## A correction
#
# On frame 20 a box takes the place of what was found. The corrected frame becomes an anchor, and tracking goes on
# from it.

# %%
rows, columns = np.nonzero(before[20])
box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
session.add_points(cross, 20, box=box)
after = {frame.index: frame.of(cross) for frame in session.propagate(20, direction="forward")}
print("pixels on frame 20 after the correction:", after[20].sum())

# %%
session.undo()  # the tracking
session.undo()  # the correction
assert (session.masks(20).of(cross) == before[20]).all()
