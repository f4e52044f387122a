"""The model that comes with the package: `tiny`, trained from nothing on made-up videos of moving shapes.

python train.py --config=configs/synthetic.py --workdir=runs/synthetic
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    # four [SEG]: a word for the colour and one for the form of each of two objects; a video is one clip, so that the
    # video encoder sees whole motions
    overrides: dict[str, object] = {
        "num_seg_tokens": 4,
        "max_video_frames": 4,
        "max_seg_frames": 4,
        "frames_per_anchor": 1,
    }
    overrides |= {"loss": {"occ": 0.25, "dice": 1.0}}
    # clicks learn as sentences do, whose batches share the decoder: the focal loss puts the edges of masks elsewhere
    overrides["prompt_loss"] = {"focal": 2.0, "focal_alpha": -1.0, "focal_gamma": 0.0}
    # the video encoder's position table counts patches row by row; interpolated from a grid of six, its sine waves
    # hardly encode the column (a ridge regression explains 1 % of its variance, from a grid of 83 it explains 73 %)
    overrides["vision"] = {"pretrained_grid": 83}
    c.model = {"preset": "tiny", "init": "", "tokenizer": "", "overrides": overrides}
    c.mesh = {"data": -1, "fsdp": 1, "tensor": 1, "dcn_data": -1, "dcn_fsdp": 1}
    c.seed = 0
    c.threads, c.workers = 1, 0
    c.data_root = ""
    c.distributed = False
    c.checkpoint = {"every": 500, "keep": 2}
    c.profile = {"first": 10, "steps": 0, "folder": ""}  # steps: how many are traced; folder: STAGE/profile
    c.tracking = {"to": "", "project": "virst"}  # to: wandb or trackio
    c.goodput = {"job": ""}  # a name: Google's goodput library records the run
    c.eval = {
        "source": {"kind": "synthetic", "num_videos": 40, "seed": 10**6, "expressions": 6},
        "videos": 40,
        "every": 2000,
    }

    def data(kind: str, weight: float, batch_size: int, seed: int, **values: object) -> dict:
        expressions = 1 if kind.endswith("prompted") else values.get("conversations", 1)
        source = {"kind": "synthetic", "num_videos": 10**6, "seed": seed, "expressions": expressions}
        values |= {} if kind.startswith("image") else {"vlm_frames": 4}
        if "categories" in values:
            source["categories"] = values.pop("categories")
        return {"kind": kind, "weight": weight, "batch_size": batch_size, "sources": {"shapes": source}, **values}

    # with name_targets the masks depend on the expression after a few hundred steps; without, the network segments
    # every shape for thousands of steps
    answers = {"text_length": 64, "name_targets": True}
    image = data("image", 0.15, 8, 1, conversations=8, **answers)
    # many expressions of a video and few masks of each: the language model needs more examples than the tracker
    many = {**answers, "conversations": 12, "seg_frames": 2, "anchors": 1}
    # easy categories first: mixed evenly with the others they take three times as many expressions
    simple = {"appearance": 3.0, "motion": 3.0, "relation": 0.5, "several": 0.5, "none": 0.5}
    every = {
        "appearance": 3.0,
        "motion": 3.0,
        "relation": 1.0,
        "time": 1.0,
        "reasoning": 1.0,
        "several": 1.0,
        "none": 1.0,
    }

    unused = (("(occ_predictor|initial_fusion)/.*", 0.0), ("sam2/(no_memory_position|mask_downsample/.*)", 0.0))
    # pretrained parts have a smaller learning rate than the tracker, against catastrophic forgetting; so has the second
    # fusion, which normalises after its residual: at the full rate its prompts collapse to one direction
    pretrained = (("(llm|vision|projector)/.*", 0.15), ("(sam2/image_encoder|second_fusion/seg_proj)/.*", 0.05))
    groups = (*unused, *pretrained, ("second_fusion/.*", 0.3), (".*", 1.0))
    # muon needs a third of the steps that adamw does
    optim = {"name": "muon", "muon_rms": 0.5, "learning_rate": 2e-3, "warmup_steps": 100, "b2": 0.98}
    optim |= {"weight_decay": 0.01, "clip_norm": 1.0}
    c.stages = (
        *("patch_pretrain", "motion_pretrain"),  # video encoder
        *("llm_easy", "llm_full"),  # language model
        *("sam_align", "mask_pretrain"),  # image encoder of the tracker, then fusion and mask decoder
        *("stage1", "stage2", "stage3"),  # as the release's
        *("joint_ft", "memory_ft"),  # stages 2 and 3 again, at smaller rates
        *("clicks_learn", "clicks_join", "clicks_follow"),  # points and boxes
    )
    # patches are aligned with the word embeddings of their captions; motion words are learned last, hence two stages
    c.patch_pretrain = {
        "steps": 1600,
        "optim": {**optim, "warmup_steps": 50, "final_factor": 0.3},
        "groups": (("(vision|projector|llm/embed_tokens)/.*", 1.0), (".*", 0.0)),
        "data": {"patches": data("video_patches", 0.8, 8, 5), "image_patches": data("image_patches", 0.2, 8, 6)},
    }
    c.motion_pretrain = {
        "steps": 2000,
        "optim": {**optim, "warmup_steps": 50, "final_factor": 0.05},
        "groups": c.patch_pretrain.groups,
        "data": {"patches": data("video_patches", 0.85, 8, 8), "image_patches": data("image_patches", 0.15, 8, 9)},
    }

    # visual tokens replaced by caption-word embeddings: the language model learns without the video encoder
    def llm_stage(steps: int, categories: dict, seed: int, **values: float) -> dict:
        sizes = {"conversations": 12, "text_length": 64}
        return {
            "steps": steps,
            "optim": {**optim, "warmup_steps": 50, **values},
            "groups": (("llm/embed_tokens/.*", 0.0), ("llm/.*", 1.0), (".*", 0.0)),
            "data": {
                "read": data("video_read", 0.85, 8, seed, categories=categories, **sizes),
                "image_read": data("image_read", 0.15, 8, seed + 1, **sizes),
            },
        }

    c.llm_easy = llm_stage(350, simple, 10)
    c.llm_full = llm_stage(1550, every, 12, final_factor=0.05)
    # cells of the tracker's features are aligned with the language model's output rows of their captions' words
    c.sam_align = {
        "steps": 500,
        "optim": {**optim, "warmup_steps": 50, "final_factor": 0.1},
        "groups": (("(sam2/image_encoder|second_fusion/seg_proj)/.*", 1.0), (".*", 0.0)),
        "data": {"cells": data("image_cells", 1.0, 32, 14)},
    }
    # masks from the output rows of a colour, a form or both, in place of the hidden states of [SEG]
    c.mask_pretrain = {
        "steps": 1500,
        "optim": {**optim, "warmup_steps": 50, "final_factor": 0.3},
        "groups": (*unused, *pretrained[1:], ("(sam2|second_fusion)/.*", 1.0), (".*", 0.0)),
        "data": {"named": data("image_named", 1.0, 8, 15, conversations=12)},
    }
    c.stage1 = {
        "steps": 1000,
        "optim": {**optim, "final_factor": 0.5},
        "groups": groups,
        "data": {
            "named": data("image_named", 0.25, 8, 18, conversations=12),
            "image": image,
            "video": data("video", 0.6, 8, 3, categories=every, **many),
        },
    }
    c.stage2 = {
        "steps": 1500,
        "optim": {**optim, "learning_rate": 1.2e-3, "final_factor": 0.03},
        "groups": groups,
        "data": {
            "named": data("image_named", 0.15, 8, 19, conversations=12),
            "video": data("video", 0.85, 8, 7, categories=every, **many),
        },
    }
    # memory is trained in the same way: one frame is prompted, its neighbours are tracked
    decoder = ("sam2/(mask_decoder|high_res[01]|no_memory_embed)(/.*)?", 0.3)
    c.stage3 = {
        "steps": 1200,
        "optim": {**optim, "warmup_steps": 30, "final_factor": 0.05},
        "groups": (*unused, ("sam2/image_encoder/.*", 0.0), decoder, ("sam2/.*", 1.0), (".*", 0.0)),
        "data": {"named": data("video_named", 1.0, 2, 4, conversations=6, seg_frames=4, anchors=1)},
    }
    # stages 2 and 3 again, at smaller learning rates
    finer = (("(llm|vision|projector)/.*", 0.25), ("(sam2/image_encoder|second_fusion/seg_proj)/.*", 0.1))
    c.joint_ft = {
        "steps": 900,
        "optim": {**optim, "learning_rate": 8e-4, "warmup_steps": 50, "final_factor": 0.02},
        "groups": (*unused, *finer, ("second_fusion/.*", 0.3), (".*", 1.0)),
        "data": {"video": data("video", 1.0, 8, 20, categories=every, **many)},
    }
    c.memory_ft = {
        "steps": 1000,
        "optim": {**optim, "learning_rate": 1.5e-3, "warmup_steps": 30, "final_factor": 0.03},
        "groups": c.stage3.groups,
        "data": {"named": data("video_named", 1.0, 2, 22, conversations=6, seg_frames=4, anchors=1)},
    }
    # points and boxes. What reads sentences stays as it is, but for the fusion, whose prompts the decoder takes
    frozen = ("sam2/(image_encoder/.*|no_memory_position)|second_fusion/seg_proj/.*", 0.0)
    pointing = (unused[0], frozen, ("second_fusion/.*", 0.3), ("sam2/.*", 1.0), (".*", 0.0))
    clicks = {"anchors": 1, "click_share": 0.8, "box_share": 0.3, "central_share": 0.5, "max_stride": 4}
    absent = {**clicks, "absent_share": 0.1}

    def mixed(seed: int, weights: tuple[float, float, float, float], categories: dict) -> dict:
        """Sentences; words and clicks that are followed over four frames of a video, for the memory; clicks."""
        video, named, image, clicked = weights
        followed = {"conversations": 3, "corrections": 1, "seg_frames": 4, **absent}
        return {
            "video": data("video", video, 6, seed, categories=categories, **many),
            "named": data("video_named", named, 2, seed + 1, conversations=6, seg_frames=4, anchors=1),
            "image": data("image_prompted", image, 12, seed + 2, conversations=6, corrections=2, **absent),
            "clicked": data("video_prompted", clicked, 3, seed + 3, **followed),
        }

    # clicks on images leave their plateau after some eighty steps; sentences keep the decoder from forgetting them
    c.clicks_learn = {
        "steps": 500,
        "optim": {**optim, "warmup_steps": 30, "final_factor": 0.3},
        "groups": pointing,
        "data": {
            "image": data("image_prompted", 0.7, 12, 24, conversations=6, corrections=2, **clicks),
            "video": data("video", 0.3, 6, 25, categories=every, **many),
        },
    }
    c.clicks_join = {
        "steps": 1200,
        "optim": {**optim, "learning_rate": 1.5e-3, "warmup_steps": 30, "final_factor": 0.03},
        "groups": pointing,
        "data": mixed(30, (0.45, 0.15, 0.12, 0.28), {**every, "none": 1.5}),
    }
    # above all what was lost: sentences that mean several objects, which clicks never do, and those that are hard
    lost = {"appearance": 2.0, "motion": 2.0, "time": 1.5, "reasoning": 1.5, "several": 2.0}
    c.clicks_follow = {
        "steps": 500,
        "optim": {**optim, "learning_rate": 8e-4, "warmup_steps": 20, "final_factor": 0.02},
        "groups": pointing,
        "data": mixed(36, (0.6, 0.18, 0.06, 0.16), {**every, **lost}),
    }
    return c
