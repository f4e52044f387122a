"""Stage 2: adds referring video segmentation; three random anchors of a video, each frame by itself.

python train.py --config=configs/stage2.py --workdir=runs/stage2 --config.model.init=runs/stage1/stage1/model \
    --config.data_root=DATA

Hardware: from one v5e slice of four chips on (docs/sharding.md). Cost, if 40 % of the peak is reached: at most 21 hours
of one H100 or 104 of one v5e chip. Expected score: the release has none for its stages; its final ones are in
docs/evaluation.md.
"""

from ml_collections import ConfigDict

from virst_jax.data.datasets.mixtures import GROUPS

from . import common


def get_config() -> ConfigDict:
    c = common.base()
    c.stages = ("stage2",)
    c.stage2 = {
        "steps": 30_000,
        "optim": common.OPTIM,
        "groups": common.GROUPS,
        "frozen": "split",
        "frozen_weights": "float",
        "data": common.mixed(GROUPS, batch_size=16, conversations=3, vlm_frames=12, seg_frames=12),
    }
    return c
