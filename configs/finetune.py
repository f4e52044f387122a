"""One's own videos (docs/datasets.md says how they are laid out), from a trained model.

python train.py --config=configs/finetune.py --workdir=runs/mine --config.model.init=virst_7b --config.data_root=MINE

`virst data check MINE` looks the folder through first. J&F is measured on MINE/valid if that is there, else set
--config.eval.videos=0. With --config.model.init=tiny the small model of the package is trained further, on a laptop.
Hardware and cost: as stage 3 (docs/sharding.md), for as many steps as you give it; a few passes are enough.
"""

from ml_collections import ConfigDict

from . import common


def get_config() -> ConfigDict:
    c = common.base()
    c.stages = ("finetune",)
    c.eval = {"source": {"kind": "custom", "split": "valid"}, "videos": 8, "every": 500}
    c.finetune = {
        "steps": 1000,
        "optim": common.OPTIM,
        "groups": common.GROUPS,
        "frozen": "split",
        "frozen_weights": "float",
        "data": {
            "video": {
                "kind": "video",
                "batch_size": 8,
                "conversations": 3,
                "packed_length": 0,
                "vlm_frames": 12,
                "seg_frames": 12,
                "propagate": True,
                "sources": {"custom": {}},
            }
        },
    }
    return c
