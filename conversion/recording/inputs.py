"""The inputs of a recording: a video's frames, which of them are used, pixels, and the tokens of the conversation.

A video goes the way of the release's evaluation (data/rvos_dataset.py, policy "flex"): its frames are laid out on disk
as a data set of one video and one expression, and the release's own data set class reads it. An earlier case is
followed instead where one is given. Axes: T frames, H height, W width.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io.json_files import read_json
from virst_jax.io.npz import read_npz

from ..weights_rule import make_input, make_video
from .checkout import IMAGE_TOKEN, Release

_IMAGES = (".jpg", ".jpeg", ".png")
_VIDEO = "recorded"  # name of the one video in the data set on disk


@dataclass
class Inputs:
    """What goes into the network."""

    frames: np.ndarray  # uint8[T, H, W, 3], the whole video
    folder: Path  # the frames as files, which the release's tracker reads
    input_ids: list[int]
    labels: list[int]
    sam_idx: list[int]  # video frame numbers of the segmentation frames
    vlm_idx: list[int] | None  # video frame numbers that the VLM sees; None where its pixels are made by the rule
    images_clip: Any  # torch float32[T, 3, h, w]
    images_sam: Any  # torch float32[T, 3, S, S]
    video: dict[str, Any]  # how the runner gets the frames: {"from": "npz"} or {"from": "make_video", ...}
    clip: dict[str, Any]  # how it gets the VLM's pixels: {"from": "frames"} or {"from": "make_input", ...}
    expression: str | None = None
    prompt: str | None = None


@dataclass
class Like:
    """An earlier case to follow: its JSON, and where its arrays are."""

    path: Path
    facts: dict[str, Any]

    @property
    def arrays(self) -> Path:
        return self.path.with_suffix(".npz")


def read_like(path: Path) -> Like:
    """Reads the JSON of an end-to-end case.

    Raises:
      UserError: no such file, not JSON, or not an end-to-end case.
    """
    facts = read_json(path, advice="give the JSON of a case as --like").value
    keys = ("case", "config", "n_frames", "hw", "sam_idx", "t_vlm", "input_ids", "labels")
    missing = [k for k in keys if not isinstance(facts, dict) or k not in facts]
    if missing:
        raise UserError(f"{path}: not an end-to-end case ({missing[0]!r} is missing); give one named e2e_*.json")
    return Like(path, facts)


def read_frames(path: Path, limit: int | None = None) -> np.ndarray:
    """uint8[T, H, W, 3]: the first `limit` frames of a video file or of a folder of images, as decoded.

    Raises:
      UserError: nothing is there, it does not decode, or its frames differ in size.
    """
    if path.is_dir():
        frames = _read_folder(path, limit)
    elif path.is_file():
        frames = _read_file(path, limit)
    else:
        raise UserError(f"{path}: no such video; give a video file or a folder of JPEG frames as --video")
    if not frames:
        raise UserError(f"{path}: holds no frame; give a video file or a folder of JPEG frames as --video")
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1:
        raise UserError(f"{path}: its frames differ in size ({', '.join(map(str, sorted(sizes)))}); resize them first")
    return np.stack(frames)


def _read_folder(path: Path, limit: int | None) -> list[np.ndarray]:
    from PIL import Image

    names = [p for p in path.iterdir() if p.suffix.lower() in _IMAGES]
    numbers = {p: re.search(r"\d+", p.stem) for p in names}  # the release orders by the first number in the name
    unnumbered = [p.name for p, found in numbers.items() if not found]
    if unnumbered:
        raise UserError(f"{path}: {unnumbered[0]} has no frame number in its name; name it 00000.jpg or so")
    ordered = sorted(names, key=lambda p: (int(numbers[p].group()), p.name))  # type: ignore[union-attr]
    frames = []
    for name in ordered[:limit]:
        try:
            with Image.open(name) as image:
                frames.append(np.asarray(image.convert("RGB")))
        except Exception as error:  # PIL raises anything on damaged files
            raise UserError(f"{name}: does not decode ({error})") from error
    return frames


def _read_file(path: Path, limit: int | None) -> list[np.ndarray]:
    try:
        import av
    except ImportError as error:
        raise UserError(f"{path}: a video file needs PyAV (pip install av); or give a folder of frames") from error
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                if limit is not None and len(frames) == limit:
                    break
                frames.append(frame.to_ndarray(format="rgb24"))
    except Exception as error:  # PyAV's errors have many bases
        raise UserError(f"{path}: does not decode as a video ({error})") from error
    return frames


def lay_out(frames: np.ndarray, root: Path, expression: str) -> Path:
    """Writes the frames and one expression as a data set that the release reads; returns the frames' folder.

    The files are PNG under the name .jpg: both of the release's decoders go by content, and nothing is lost.
    """
    from PIL import Image

    folder = root / "JPEGImages" / _VIDEO
    folder.mkdir(parents=True)
    names = [f"{t:05d}" for t in range(len(frames))]
    for name, frame in zip(names, frames):
        Image.fromarray(frame).save(folder / f"{name}.jpg", format="PNG", compress_level=1)
    videos = {_VIDEO: {"frames": names, "expressions": {"0": {"exp": expression}}}}
    (root / "meta_expressions.json").write_text(json.dumps({"videos": videos}))
    return folder


def from_video(
    release: Release, tokenizer: Any, processor: Any, frames: np.ndarray, expression: str, seed: int, root: Path
) -> Inputs:
    """The inputs that the release's evaluation makes of a video and an expression.

    Args:
      tokenizer: with `[SEG]`.
      processor: the vision tower's image processor.
      frames: uint8[T, H, W, 3].
      seed: of random, numpy and torch, set right before frames and prompt are drawn.
      root: an empty folder for the frames.
    """
    import torch

    folder = lay_out(frames, root, expression)
    datasets = release.module("data.rvos_dataset")
    base = release.module("data.base_dataset")
    # the values of the release's scripts/eval_mevis.sh
    arguments = release.module("utils.argument").DataArguments(
        local_num_frames=4, seg_image_length=32, seg_image_size=1024, image_aspect_ratio="anyres_nopad"
    )
    arguments.image_processor = processor
    place = (str(root), str(root / "meta_expressions.json"))
    datasets._DATA_INFO["mevis_test"] = place  # a split without masks
    dataset = datasets.RVOSDataset(
        tokenizer=tokenizer,
        data_args=arguments,
        num_frames_sample_range="8,8",
        rvos_seg_data="mevis_test",
        rvos_sample_policy="flex",
        train=False,
        rvos_root=str(root),
    )
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the release draws from numpy's global generator
    torch.manual_seed(seed)
    item = dataset._get_item(0)
    batch = base.collate_fn([item], tokenizer)
    input_ids = batch["input_ids"][0].tolist()
    if not bool(batch["attention_masks"].all()):
        raise UserError(f"{expression!r}: the tokenized conversation holds padding; reword the expression")
    return Inputs(
        frames=frames,
        folder=folder,
        input_ids=input_ids,
        labels=batch["labels"][0].tolist(),
        sam_idx=[int(i) for i in batch["frame_ids"][0][0]],
        vlm_idx=[int(Path(name).stem) for name in item["image_path"].split(",")],
        images_clip=torch.as_tensor(item["images_clip"]).float(),
        images_sam=item["images_sam"].float(),
        video={"from": "npz"},
        clip={"from": "frames"},
        expression=" ".join(expression.lower().split()),
        prompt=_decode(tokenizer, input_ids),
    )


def from_like(release: Release, processor: Any, like: Like, root: Path) -> Inputs:
    """The inputs of an earlier case: the same video, frames, pixels and tokens.

    Raises:
      UserError: the case's frames are not where it says.
    """
    from PIL import Image

    import torch

    facts = like.facts
    video, frames = _like_frames(like)
    folder = lay_out(frames, root, facts.get("expression") or "")
    sam_idx = [int(i) for i in facts["sam_idx"]]
    transform = release.module("data.transforms").SAM2Transform(size=int(facts["config"]["image_size"]))
    images_sam = transform([Image.fromarray(frames[i]) for i in sam_idx])
    vlm_idx = facts.get("vlm_idx")
    if vlm_idx is None:
        size = processor.size[0]
        made = {"name": f"{facts['case']}.clip", "salt": facts.get("salt") or 0, **(facts.get("clip") or {})}
        clip = {"from": "make_input", "name": made["name"], "salt": made["salt"]}
        pixels = make_input(clip["name"], (1, facts["t_vlm"], 3, size, size), clip["salt"])[0]
    else:
        clip = {"from": "frames"}
        pixels = processor.preprocess(frames[vlm_idx], return_tensors="pt")["pixel_values"]
    return Inputs(
        frames=frames,
        folder=folder,
        input_ids=list(facts["input_ids"]),
        labels=list(facts["labels"]),
        sam_idx=sam_idx,
        vlm_idx=vlm_idx,
        images_clip=torch.as_tensor(pixels).float(),
        images_sam=images_sam.float(),
        video=video,
        clip=clip,
        expression=facts.get("expression"),
        prompt=facts.get("prompt"),
    )


def _like_frames(like: Like) -> tuple[dict[str, Any], np.ndarray]:
    facts = like.facts
    if (facts.get("video") or {}).get("from") == "npz":
        arrays = read_npz(like.arrays, f"it belongs to {like.path}")
        if "frames" not in arrays:
            raise UserError(f"{like.arrays}: holds no frames; it belongs to {like.path}")
        return {"from": "npz"}, arrays["frames"]
    height, width = facts["hw"]
    salt = int(facts.get("video_salt", facts.get("salt") or 0))
    return {"from": "make_video", "salt": salt}, make_video(facts["n_frames"], height, width, salt)


def _decode(tokenizer: Any, input_ids: list[int]) -> str:
    at = input_ids.index(IMAGE_TOKEN)
    return tokenizer.decode(input_ids[:at]) + "<image>" + tokenizer.decode(input_ids[at + 1 :])
