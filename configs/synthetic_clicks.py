"""The small model of the package, taught points and boxes: the example of training from prompts that needs no data.

virst train --config=synthetic_clicks --workdir=runs/synthetic_clicks

Two stages go on from `tiny`; batches with words in place of sentences are mixed in. A click is learned late,
after hundreds of steps, and costs some of what sentences can do: docs/notes/clicks.md has the scores.
"""

from ml_collections import ConfigDict

from . import synthetic


def get_config() -> ConfigDict:
    c = synthetic.get_config()
    c.model.init = "tiny"
    # as of sentences, whose batches share the decoder: the focal loss puts the edges of masks elsewhere
    c.model.overrides.prompt_loss = {"focal": 2.0, "focal_alpha": -1.0, "focal_gamma": 0.0}
    optim = c.memory_ft.optim.to_dict()
    groups = (
        ("(occ_predictor|initial_fusion)/.*", 0.0),
        ("sam2/(image_encoder/.*|no_memory_position)", 0.0),
        ("sam2/.*", 1.0),
        (".*", 0.0),
    )

    def data(weights: tuple[float, float, float], seed: int) -> dict:
        def source(number: int, sentences: int = 1) -> dict:
            return {"shapes": {"kind": "synthetic", "num_videos": 10**6, "seed": number, "expressions": sentences}}

        named = {"kind": "video_named", "batch_size": 2, "conversations": 6, "vlm_frames": 4, "seg_frames": 4}
        clicks = {"anchors": 1, "click_share": 0.8, "box_share": 0.3, "central_share": 0.5, "max_stride": 4}
        image = {"kind": "image_prompted", "batch_size": 8, "conversations": 6, "corrections": 2, **clicks}
        video = {"kind": "video_prompted", "batch_size": 3, "conversations": 3, "corrections": 1, **clicks}
        video |= {"vlm_frames": 4, "seg_frames": 4}
        return {
            "named": {**named, "anchors": 1, "weight": weights[0], "sources": source(seed, 6)},
            "image": {**image, "weight": weights[1], "sources": source(seed + 1)},
            "video": {**video, "weight": weights[2], "sources": source(seed + 2)},
        }

    c.stages = ("clicks_ft", "clicks_ft2")
    c.clicks_ft = {
        "steps": 1200,
        "optim": {**optim, "learning_rate": 2e-3, "warmup_steps": 30, "final_factor": 0.03},
        "groups": groups,
        "data": data((0.4, 0.35, 0.25), 24),
    }
    c.clicks_ft2 = {
        "steps": 700,
        "optim": {**optim, "learning_rate": 1e-3, "warmup_steps": 20, "final_factor": 0.02},
        "groups": groups,
        "data": data((0.55, 0.15, 0.3), 27),
    }
    return c
