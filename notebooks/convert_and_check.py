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
# # Convert a checkpoint, and check that nothing is lost
#
# The release comes as three files: the VideoChat-Flash safetensors with their tokenizer, `sam2.1_hiera_large.pt`, and
# the VIRST `.pt`. `VIRST_CHECKPOINT` names the folder that holds them as `videochat/`, `sam2.pt` and `virst.pt`, and
# `VIRST_CONFIG` a config.json if the network is not the full one. docs/checkpoints.md tells where they are published.

# %%
import os
import tempfile
from pathlib import Path

from virst_jax import cli

source = Path(os.environ["VIRST_CHECKPOINT"])
work = Path(tempfile.mkdtemp())
model = work / "model"

# %% [markdown]
# ## Convert
#
# Every name of the sources is used exactly once, and every parameter filled exactly once; otherwise this stops and
# lists the names. `--lora keep` keeps the adapters apart, so that the way back gives the same bits.

# %%
arguments = ["--videochat", source / "videochat", "--sam2", source / "sam2.pt", "--virst", source / "virst.pt"]
arguments += ["--config", os.environ.get("VIRST_CONFIG", "virst_7b"), "--dtype", "source", "--lora", "keep"]
status = cli.main(["convert", *map(str, arguments), "--out", str(model)])
assert status == 0

# %% [markdown]
# ## And back
#
# The parameters with the release's names again: bit for bit those of the files.

# %%
status = cli.main(["convert", "--to-torch", str(model), "--out", str(work / "back.pt"), "--peft-names"])
assert status == 0
print(f"{(work / 'back.pt').stat().st_size:,} bytes")

# %% [markdown]
# ## Compare with recorded outputs of the release
#
# `virst record` runs the release in its own PyTorch environment and keeps what every stage computes; `virst parity`
# compares the converted model with it: `VIRST_CASES` names the folder of such cases. Those of this repository,
# tests/data/parity, compare the modules with small random weights.

# %%
cases, case = os.environ.get("VIRST_CASES"), os.environ.get("VIRST_CASE", "mask_decoder")
if cases:
    status = cli.main(["parity", cases, "--case", case])
    assert status == 0
