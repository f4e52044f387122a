"""The model that comes with the package: `tiny`, trained from nothing on made-up videos of moving shapes.

python train.py --config=configs/synthetic.py --workdir=runs/synthetic
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.model = {"preset": "tiny", "init": "", "tokenizer": "", "overrides": {"loss": {"occ": 0.25, "dice": 1.0}}}
    c.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    c.seed = 0
    c.threads, c.workers = 1, 0
    c.data_root = ""
    c.distributed = False
    c.checkpoint = {"every": 500, "keep": 2}
    c.eval = {
        "source": {"kind": "synthetic", "num_videos": 40, "seed": 10**6, "expressions": 6},
        "videos": 40,
        "every": 2000,
    }

    def data(kind: str, weight: float, batch_size: int, seed: int, **values: object) -> dict:
        source = {"kind": "synthetic", "num_videos": 10**6, "seed": seed, "expressions": values["conversations"]}
        return {"kind": kind, "weight": weight, "batch_size": batch_size, "sources": {"shapes": source}, **values}

    image = data("image", 0.5, 16, 1, conversations=6, text_length=56)
    image_text = data("image_text", 0.3, 16, 2, conversations=8, text_length=44)
    video_text = data("video_text", 1.0, 8, 3, conversations=8, text_length=44)
    video = data("video", 1.0, 8, 4, conversations=6, text_length=56, anchors=3)
    tracked = data("video", 1.0, 4, 5, conversations=6, text_length=56, anchors=3, propagate=True, after=2, before=1)

    unused = (("(occ_predictor|initial_fusion)/.*", 0.0), ("sam2/(no_memory_position|mask_downsample/.*)", 0.0))
    first = {"learning_rate": 1.5e-3, "warmup_steps": 100, "weight_decay": 0.01, "clip_norm": 1.0}
    c.stages = ("stage1", "stage2", "stage3")
    c.stage1 = {
        "steps": 2000,
        "optim": {**first, "final_factor": 0.5},
        "groups": (*unused, (".*", 1.0)),
        "data": {"image": image, "image_text": image_text, "video_text": video_text},
    }
    frozen = ("sam2/image_encoder/.*", 0.0)
    c.stage2 = {
        "steps": 2200,
        "optim": {**first, "learning_rate": 1e-3, "final_factor": 0.3},
        "groups": (*unused, (".*", 1.0)),
        "data": {"image": {**image, "weight": 0.2}, "video_text": video_text, "video": video},
    }
    c.stage3 = {
        "steps": 1000,
        "optim": {**first, "learning_rate": 5e-4, "final_factor": 0.02},
        "groups": (*unused, frozen, (".*", 1.0)),
        "data": {"video_text": {**video_text, "weight": 0.3}, "video": {**video, "weight": 0.3}, "tracked": tracked},
    }
    return c
