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

    # with name_targets the sentence is read after a few hundred steps; without, all shapes are segmented for thousands
    named = {"text_length": 56, "name_targets": True}
    image = data("image", 0.8, 8, 1, conversations=6, **named)
    video_text = data("video_text", 0.2, 8, 2, conversations=8, text_length=44)
    # many sentences of a video and few masks of each: what the language model has to learn takes longer
    video = data("video", 0.85, 8, 3, conversations=8, seg_frames=2, anchors=1, **named)
    tracked = data("video", 0.7, 4, 4, conversations=4, anchors=2, propagate=True, after=2, before=1, **named)

    unused = (("(occ_predictor|initial_fusion)/.*", 0.0), ("sam2/(no_memory_position|mask_downsample/.*)", 0.0))
    # the fusion normalises after its residual: at the full rate its prompts all become alike
    groups = (*unused, ("second_fusion/.*", 0.3), (".*", 1.0))
    # muon needs a third of the steps that adamw does
    optim = {"name": "muon", "muon_rms": 0.5, "learning_rate": 2e-3, "warmup_steps": 100, "b2": 0.98}
    optim |= {"weight_decay": 0.01, "clip_norm": 1.0}
    c.stages = ("stage1", "stage2", "stage3")
    c.stage1 = {
        "steps": 800,
        "optim": {**optim, "final_factor": 0.8},
        "groups": groups,
        "data": {"image": image, "video_text": video_text},
    }
    c.stage2 = {
        "steps": 2800,
        "optim": {**optim, "final_factor": 0.2},
        "groups": groups,
        "data": {"video": video, "video_text": {**video_text, "weight": 0.15}},
    }
    c.stage3 = {
        "steps": 500,
        "optim": {**optim, "learning_rate": 7e-4, "final_factor": 0.02},
        "groups": (*unused, ("sam2/image_encoder/.*", 0.0), (".*", 1.0)),
        "data": {"tracked": tracked, "video": {**video, "weight": 0.3}},
    }
    return c
