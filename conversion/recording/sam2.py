"""Runs the original SAM 2.1 (PyPI sam2) with parameters by the rule, and keeps what its predictors give.

Cases of three kinds: `sam2_image_*`, the image predictor; `sam2_video_*`, the video predictor, told what to do by a
list of operations; `sam2_blocks`, blocks of the image encoder at full width. The first two have the depth, windows and
global blocks of a published size, a narrow image encoder and a small image; all other parts are as wide as published.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..targets import ellipse_mask
from ..weights_rule import make_input, make_tensor, make_video

CONFIGS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
IMAGE_SIZE, EMBED_DIM = 128, 16
BLOCK_GRID = 28
PREFIX = "image_encoder.trunk."


def build(size: str, salt: int) -> tuple[Any, dict[str, list[int]]]:
    """The video predictor of a published size, narrowed and filled by the rule, and its manifest."""
    from sam2.build_sam import build_sam2_video_predictor

    import torch

    grid = IMAGE_SIZE // 16
    widths = [EMBED_DIM << i for i in (3, 2, 1, 0)]
    memory = "model.memory_attention.layer"
    predictor = build_sam2_video_predictor(
        f"configs/sam2.1/sam2.1_hiera_{CONFIGS[size]}.yaml",
        device="cpu",
        hydra_overrides_extra=[
            f"model.image_size={IMAGE_SIZE}",
            f"model.image_encoder.trunk.embed_dim={EMBED_DIM}",
            f"model.image_encoder.neck.backbone_channel_list={widths}",
            f"{memory}.self_attention.feat_sizes=[{grid},{grid}]",
            f"{memory}.cross_attention.feat_sizes=[{grid},{grid}]",
            "++model.add_all_frames_to_correct_as_cond=true",
        ],
    )
    predictor.fill_hole_area = 0  # holes are filled on GPUs only
    manifest = {name: list(value.shape) for name, value in predictor.state_dict().items()}
    state = {name: torch.from_numpy(np.asarray(make_tensor(name, tuple(s), salt))) for name, s in manifest.items()}
    predictor.load_state_dict(state)

    def in_float32(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        # memories are kept in bfloat16; autocast, which is off here, would do this
        return args, {key: x.float() if key in ("memory", "memory_pos") else x for key, x in kwargs.items()}

    predictor.memory_attention.register_forward_pre_hook(in_float32, with_kwargs=True)
    return predictor, manifest


def run_images(predictor: Any, image: np.ndarray, prompts: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Masks and scores of every prompt on an image uint8[S, S, 3]; a prompt with `previous` also reads a mask of that
    prompt."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    images = SAM2ImagePredictor(predictor)
    images._bb_feat_sizes = [(IMAGE_SIZE // scale,) * 2 for scale in (4, 8, 16)]  # written out for 1024 pixels
    images.set_image(image)
    arrays: dict[str, np.ndarray] = {}
    for number, prompt in enumerate(prompts):
        previous = prompt.get("previous")
        _, ious, logits = images.predict(
            point_coords=np.array(prompt["points"]) if "points" in prompt else None,
            point_labels=np.array(prompt["labels"]) if "points" in prompt else None,
            box=np.array(prompt["box"]) if "box" in prompt else None,
            mask_input=None if previous is None else arrays[f"{previous}.logits"][:1],
            multimask_output=prompt["several"],
        )
        arrays |= {f"{number}.logits": logits, f"{number}.ious": ious}
    return arrays


def run_video(predictor: Any, video: np.ndarray, operations: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What is known of every object behind each operation, on the frames that it concerns.

    For operation k, object o and frame t: `k.o.t.mask`, the logits, thinned by 2; `.pointer` and `.score`; behind
    tracking also `.memory`, thinned by 8 in depth.
    """
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        for number, frame in enumerate(video):
            Image.fromarray(frame).save(Path(folder) / f"{number:05d}.jpg", format="PNG")
        state = predictor.init_state(folder)
    arrays: dict[str, np.ndarray] = {}
    for number, operation in enumerate(operations):
        frames = _apply(predictor, state, operation)
        for object_id, index in state["obj_id_to_idx"].items():
            if operation["do"] != "track" and object_id != operation["object"]:
                continue
            kept, new = state["output_dict_per_obj"][index], state["temp_output_dict_per_obj"][index]
            for frame in frames:
                found = next(
                    source[kind][frame]
                    for source in (new, kept)
                    for kind in ("cond_frame_outputs", "non_cond_frame_outputs")
                    if frame in source[kind]
                )
                name = f"{number}.{object_id}.{frame}"
                arrays[f"{name}.mask"] = found["pred_masks"][0, 0, ::2, ::2].float().numpy()
                arrays[f"{name}.pointer"] = found["obj_ptr"][0].float().numpy()
                arrays[f"{name}.score"] = found["object_score_logits"][0, 0].float().numpy()
                if operation["do"] == "track":
                    arrays[f"{name}.memory"] = found["maskmem_features"][0, ::8].float().numpy()
    return arrays


def _apply(predictor: Any, state: Any, operation: Mapping[str, Any]) -> list[int]:
    """Does what an operation says and returns the frames that it concerns."""
    if operation["do"] == "track":
        way = predictor.propagate_in_video(
            state, start_frame_idx=operation["start"], reverse=operation.get("backward", False)
        )
        return [number for number, *_ in way]
    frame, object_id = operation["frame"], operation["object"]
    if operation["do"] == "mask":
        mask = ellipse_mask(operation["ellipse"], state["video_height"], state["video_width"])
        predictor.add_new_mask(state, frame, object_id, mask)
    else:
        predictor.add_new_points_or_box(
            state,
            frame,
            object_id,
            points=operation.get("points"),
            labels=operation.get("labels"),
            box=operation.get("box"),
            clear_old_points=operation.get("replace", True),
        )
    return [frame]


def run_blocks(blocks: Mapping[str, list[int]], salt: int) -> tuple[dict[str, list[int]], dict[str, np.ndarray]]:
    """Some blocks of the published sizes at full width: a manifest, whose names begin with the size, and outputs."""
    from hydra import compose
    from hydra.utils import instantiate

    import torch

    manifest: dict[str, list[int]] = {}
    arrays: dict[str, np.ndarray] = {}
    for size, numbers in blocks.items():
        config = compose(config_name=f"configs/sam2.1/sam2.1_hiera_{CONFIGS[size]}.yaml")
        trunk = instantiate(config.model.image_encoder.trunk)
        for number in numbers:
            block, name = trunk.blocks[number], f"{size}/{PREFIX}blocks.{number}."
            shapes = {name + key: list(value.shape) for key, value in block.state_dict().items()}
            manifest |= shapes
            block.load_state_dict(
                {
                    key.removeprefix(name): torch.from_numpy(np.asarray(make_tensor(key, tuple(shape), salt)))
                    for key, shape in shapes.items()
                }
            )
            x = make_input(f"{size}.{number}", (1, BLOCK_GRID, BLOCK_GRID, block.dim), salt)
            with torch.inference_mode():
                arrays[f"{size}.{number}"] = block(torch.from_numpy(x))[0, ::4, ::4, ::4].numpy()
    return manifest, arrays


def video_of(facts: Mapping[str, Any]) -> np.ndarray:
    """uint8[T, H, W, 3], of a case's facts."""
    height, width = facts["hw"]
    return make_video(facts["n_frames"], height, width, salt=facts["salt"])
