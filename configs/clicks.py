"""The tracker alone, on one's own videos with masks (docs/datasets.md): from clicks, boxes and masks, as SAM 2 learns.

virst train --config=clicks --workdir=runs/clicks --config.model.init=sam2_large --config.data_root=MINE

`sam2_large` is a folder that `virst convert --sam2` wrote; runs/clicks/clicks/model becomes one like it.
With a VIRST model in its place, its tracker is trained and the rest stays as it is; sentences may then be read worse,
unless batches of kind `video` are mixed in. Learning rates and prompts are those of SAM 2.1's fine-tuning
(configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml of facebookresearch/sam2).
"""

from ml_collections import ConfigDict

from . import common


def get_config() -> ConfigDict:
    c = common.base()
    c.model.overrides = {"compute": {"dtype": "bfloat16", "remat": "full"}}
    c.stages = ("clicks",)
    c.eval = {"source": {"kind": "custom", "split": "valid"}, "videos": 0, "every": 0}  # J&F is that of sentences
    c.clicks = {
        "steps": 1000,
        "optim": {"learning_rate": 5e-6, "warmup_steps": 50, "weight_decay": 0.1, "clip_norm": 0.1, "b2": 0.999},
        "groups": (
            (r"sam2/no_memory_position", 0.0),  # nothing uses it
            (r"sam2/image_encoder/.*", 0.6),
            (r"sam2/.*", 1.0),
            (r".*", 0.0),
        ),
        "data": {
            "video": {
                "kind": "video_prompted",
                "batch_size": 8,
                "conversations": 3,  # objects
                "seg_frames": 8,
                "anchors": 2,
                "corrected_frames": 2,
                "corrections": 7,
                "sources": {"custom": {}},
            }
        },
    }
    return c
