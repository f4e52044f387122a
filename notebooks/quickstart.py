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
# # Quickstart
#
# A video and sentences in, masks out. The small model of the package answers here: it knows moving coloured shapes
# and nothing else, and needs no download. With converted weights, `virst_jax.load("virst_7b")` does the same with any
# video.
#
# `jupytext --to notebook quickstart.py` makes a notebook of this file; it also runs as a program.

# %%
import tempfile
from pathlib import Path

import numpy as np

import virst_jax
from virst_jax.commands.demo import CLIP
from virst_jax.io.video import open_video

model = virst_jax.load("tiny")
model

# %% [markdown]
# ## Segment a video
#
# One mask for each sentence and frame. In a notebook the result shows itself as a table with a few frames.

# %%
result = model.segment(CLIP, ["the cyan cross", "the shape that stays still"])
result

# %%
assert result.masks.shape[:2] == (2, 32)  # sentences, frames
print("pixels of the cross on frame 0:", result.masks[0, 0].sum())
print("scores, logits:", result.scores[:, 0].round(1))

# %% [markdown]
# ## Look at it

# %%
frames = np.stack(list(open_video(CLIP)))
result.plot(12, frames[12])

# %%
result.crop(frames[12], index=0, frame=12)

# %% [markdown]
# ## Several instances
#
# "the cyan shapes" is one mask; with `instances=True` each shape has a number of its own.

# %%
shapes = model.segment(CLIP, "the cyan shapes", instances=True)
print("numbers:", shapes.ids)
assert len(shapes.ids) == 2
shapes

# %% [markdown]
# ## Frame by frame, and live
#
# `segment_stream` holds one frame at a time, however long the video is. `live` sees every frame once, as from a
# camera.

# %%
for frame in model.segment_stream(CLIP, "the cyan cross"):
    if frame.index % 8 == 0:
        print(frame)

# %%
with model.live(frames, "the cyan cross", every=8) as stream:
    areas = [frame.masks[0].sum() for frame in stream]
print(stream.stats)

# %% [markdown]
# ## Keep it
#
# `save` writes COCO, YouTube-VIS, YOLO, DAVIS, CSV, mattes, or transparent videos.

# %%
with tempfile.TemporaryDirectory() as folder:
    result.save(Path(folder) / "coco", "coco")
    result.save(Path(folder) / "cut", "prores", video=CLIP)
    print(sorted(path.name for path in Path(folder).rglob("*") if path.is_file()))
