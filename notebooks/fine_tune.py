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
# # Fine-tune on your own videos
#
# No JSON is needed: a folder of frames (or videos) beside a folder of mask images, and a table of sentences. Here
# synthetic videos stand for yours, and the small model of the package is trained for a few steps; with
# `--config.model.init=virst_7b` and the defaults of the recipe the same command trains the full model.

# %%
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from virst_jax import cli
from virst_jax.data.synthetic.videos import SyntheticVideos

root = Path(tempfile.mkdtemp())
lines = ["video,sentence,object"]
source = SyntheticVideos(3, 5, expressions=2, num_frames=8, size=(64, 64), categories=("appearance",))
for number in range(len(source)):
    video = source[number]
    name, labels = f"clip{number}", video.read_objects(range(8))
    for kind, images in (("frames", video.read_frames(range(8))), ("masks", labels.astype(np.uint8))):
        folder = root / "mine" / kind / name
        folder.mkdir(parents=True)
        for t, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{t:05d}.png")
    for position, expression in enumerate(video.expressions):
        meant = set(np.unique(labels[video.read_masks(position, range(8))])) - {0}
        lines.append(f'{name},"{expression.text}",{" ".join(map(str, sorted(meant)))}')
(root / "mine" / "sentences.csv").write_text("\n".join(lines) + "\n")
print("\n".join(lines))

# %% [markdown]
# ## Check it

# %%
assert cli.main(["data", "check", str(root / "mine")]) == 0

# %% [markdown]
# ## Train

# %%
settings = {"model.init": "tiny", "data_root": root / "mine", "eval.videos": 0}
settings |= {f"finetune.data.video.{key}": value for key, value in {"batch_size": 1, "conversations": 1}.items()}
settings |= {f"finetune.data.video.{key}": 4 for key in ("vlm_frames", "seg_frames")}
arguments = [f"--config.{key}={value}" for key, value in settings.items()]
assert cli.main(["train", "--config=finetune", f"--workdir={root / 'run'}", "--steps=2", *arguments]) == 0

# %% [markdown]
# ## Measure
#
# On what it was trained with, which says nothing about other videos; give a folder of videos that it has not seen.

# %%
model = root / "run" / "finetune" / "model"
evaluate = [f"--model={model}", "--dataset=custom", f"--data-root={root / 'mine'}", f"--workdir={root / 'eval'}"]
assert cli.main(["eval", *evaluate]) == 0
