"""Stage 1: images and text. Semantic, referring and reasoning segmentation, and video question answering.

python train.py --config=configs/stage1.py --workdir=runs/stage1 --config.model.init=START --config.data_root=DATA

START is a converted model folder (`python -m conversion.convert` without --virst: VideoChat-Flash and SAM 2.1, fresh
fusions); DATA holds the data sets' folders (docs/datasets.md).
Hardware: from one v5e slice of four chips on (docs/sharding.md). Cost, if 40 % of the peak is reached: 5 hours
of one H100 or 24 of one v5e chip. Expected score: the release has none for its stages; watch the loss curves and the
J&F on MeViS valid_u that a run writes.
"""

from ml_collections import ConfigDict

from . import common


def get_config() -> ConfigDict:
    c = common.base()
    c.stages = ("stage1",)
    c.stage1 = {
        "steps": 15_000,
        "optim": common.OPTIM,
        "groups": common.GROUPS,
        "frozen": "split",
        "frozen_weights": "float",
        "data": common.mixed(
            {"sem_seg": 9, "refer_seg": 3, "reason_seg": 1, "video_vqa": 4}, batch_size=16, conversations=3
        ),
    }
    return c
