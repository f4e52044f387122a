"""A folder of made-up videos in MeViS layout."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from virst_jax.data.synthetic.videos import SyntheticVideos


def write_folder(folder: Path, *, num_videos: int, size: tuple[int, int], num_frames: int, seed: int = 0) -> None:
    """Writes JPEGImages, meta_expressions.json and mask_dict.json; three expressions a video.

    Args:
      size: height and width.
    """
    source = SyntheticVideos(num_videos, seed, size=size, num_frames=num_frames, expressions=3)
    videos, masks = {}, {}
    for number in range(num_videos):
        video = source[number]
        assert video.read_masks is not None  # they are made up
        name, frames = f"v{number:04d}", [f"{i:05d}" for i in range(num_frames)]
        images = folder / "JPEGImages" / name
        images.mkdir(parents=True)
        for frame, pixels in zip(frames, video.read_frames(range(num_frames))):
            Image.fromarray(pixels).save(images / f"{frame}.jpg", quality=90)
        expressions = {}
        assert video.read_masks is not None
        for i, expression in enumerate(video.expressions):
            key = 3 * number + i
            expressions[str(i)] = {"exp": expression.text, "obj_id": [i], "anno_id": [key]}
            codes = [coco.encode(np.asfortranarray(m.astype(np.uint8))) for m in video.read_masks(i, range(num_frames))]
            masks[str(key)] = [{**code, "counts": code["counts"].decode()} for code in codes]
        videos[name] = {"vid_id": number, "frames": frames, "expressions": expressions}
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": videos}))
    (folder / "mask_dict.json").write_text(json.dumps(masks))
