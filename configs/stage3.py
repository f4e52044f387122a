"""Stage 3: propagation. The neighbours of the anchors (five after, two before) are tracked, with memory.

python train.py --config=configs/stage3.py --workdir=runs/stage3 --config.model.init=runs/stage2/stage2/model \
    --config.data_root=DATA

Hardware: from one v5e slice of four chips on (docs/sharding.md). Cost, if 40 % of the peak is reached: at most 20 hours
of one H100 or 101 of one v5e chip. Expected score: the release's final ones, in docs/evaluation.md.
"""

from ml_collections import ConfigDict

from virst_jax.data.datasets.mixtures import GROUPS

from . import common


def get_config() -> ConfigDict:
    c = common.base()
    c.stages = ("stage3",)
    data = common.mixed(GROUPS, batch_size=16, conversations=3, vlm_frames=12, seg_frames=12)
    data["video"] |= {"propagate": True, "after": 5, "before": 2}
    c.stage3 = {
        "steps": 15_000,
        "optim": common.OPTIM,
        "groups": common.GROUPS,
        "frozen": "split",
        "frozen_weights": "float",
        "data": data,
    }
    return c
