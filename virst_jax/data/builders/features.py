"""What a sample looks like in an ArrayRecord file: to a dict of features, and back.

Frames are the JPEG bytes of the data set, unchanged. Masks are COCO run lengths: per expression one JSON list with a
code or null for every frame. Axes: n frames asked for, H height, W width.
"""

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from virst_jax.data.samples import Expression, Question, Video
from virst_jax.errors import UserError
from virst_jax.io import images
from virst_jax.io.json_files import parse_json
from virst_jax.io.masks import decode_mask, encode_mask

_QUALITY = 95  # of frames that are not JPEG files already
_CHUNK = 16  # frames whose masks are held at once
EXPRESSION = tuple(field.name for field in dataclasses.fields(Expression))  # all of them texts


def video_features() -> tfds.features.FeaturesDict:
    """Features of a `Video`."""
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "name": text(),
            "size": tfds.features.Tensor(shape=(2,), dtype=np.int32),  # height, width
            "is_image": tfds.features.Scalar(dtype=np.bool_),
            "frames": tfds.features.Sequence(tfds.features.Image(encoding_format="jpeg")),
            "frame_names": tfds.features.Sequence(text()),
            "expressions": tfds.features.Sequence({name: text() for name in EXPRESSION}),
            "has_masks": tfds.features.Scalar(dtype=np.bool_),
            "masks": tfds.features.Sequence(text()),
            "ignored": text(),  # run length of the pixels that scoring leaves out; empty: none
        }
    )


def question_features() -> tfds.features.FeaturesDict:
    """Features of a `Question`."""
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "name": text(),
            "is_image": tfds.features.Scalar(dtype=np.bool_),
            "frames": tfds.features.Sequence(tfds.features.Image(encoding_format="jpeg")),
            "turns": tfds.features.Sequence({"question": text(), "answer": text()}),
        }
    )


def encode_sample(sample: Video | Question) -> dict[str, Any]:
    """A sample as features. Reads all of its frames and masks."""
    frames = [_jpeg(sample, index) for index in range(sample.num_frames)]
    if isinstance(sample, Question):
        turns = [{"question": question, "answer": answer} for question, answer in sample.turns]
        return {"name": sample.name, "is_image": sample.is_image, "frames": frames, "turns": turns}
    ignored = getattr(sample.read_masks, "ignored", None)
    positions = range(len(sample.expressions)) if sample.read_masks is not None else ()
    return {
        "name": sample.name,
        "size": np.array(sample.size, np.int32),
        "is_image": sample.is_image,
        "frames": frames,
        "frame_names": list(sample.frame_names),
        "expressions": [{name: getattr(e, name) for name in EXPRESSION} for e in sample.expressions],
        "has_masks": sample.read_masks is not None,
        "masks": [_codes(sample, position) for position in positions],
        "ignored": json.dumps(_code(ignored())) if ignored is not None else "",
    }


def decode_video(example: dict[str, Any]) -> Video:
    """The `Video` of features that were read with the frames left encoded."""
    frames = JpegFrames(example["name"].decode(), tuple(example["frames"]))
    size = (int(example["size"][0]), int(example["size"][1]))
    stated = example["expressions"]
    expressions = tuple(
        Expression(*(value.decode() for value in values))
        for values in zip(*(stated[name] for name in EXPRESSION), strict=True)
    )
    masks = None
    if example["has_masks"]:
        masks = CodeMasks(frames.name, tuple(bytes(m) for m in example["masks"]), size, bytes(example["ignored"]))
    names = tuple(name.decode() for name in example["frame_names"])
    return Video(frames.name, len(frames.data), size, expressions, frames, masks, names, bool(example["is_image"]))


def decode_question(example: dict[str, Any]) -> Question:
    """The `Question` of features that were read with the frames left encoded."""
    frames = JpegFrames(example["name"].decode(), tuple(example["frames"]))
    stated = example["turns"]
    turns = tuple((q.decode(), a.decode()) for q, a in zip(stated["question"], stated["answer"], strict=True))
    return Question(frames.name, len(frames.data), turns, frames, bool(example["is_image"]))


@dataclass(frozen=True)
class JpegFrames:
    """Frames held as JPEG bytes."""

    name: str
    data: tuple[bytes, ...]

    def __call__(self, indices: Sequence[int]) -> np.ndarray:
        frames = []
        for index in indices:
            if not 0 <= index < len(self.data):
                raise UserError(f"{self.name}: frame {index} was asked for, it has {len(self.data)}")
            called = f"{self.name}: frame {index}"
            frames.append(images.read_image(self.data[index], name=called, upright=False, remedy="build it again"))
        return np.stack(frames) if frames else np.zeros((0, 0, 0, 3), np.uint8)


@dataclass(frozen=True)
class CodeMasks:
    """Masks held as JSON lists of run lengths, one a expression."""

    name: str
    codes: tuple[bytes, ...]
    size: tuple[int, int]
    ignored_code: bytes = b""

    def __call__(self, position: int, indices: Sequence[int]) -> np.ndarray:
        codes = parse_json(self.codes[position], self.name)
        out = np.zeros((len(indices), *self.size), bool)
        for row, index in zip(out, indices, strict=True):
            code = codes[index]
            if code.value is not None:
                row |= decode_mask(code.value, self.size, f"{self.name}: frame {index}")
        return out

    def ignored(self) -> np.ndarray:
        """Pixels that scoring leaves out: bool[H, W]."""
        if not self.ignored_code:
            return np.zeros(self.size, bool)
        return decode_mask(parse_json(self.ignored_code, self.name).value, self.size, self.name)


class RawFrames(tfds.decode.Decoder):
    """Leaves encoded images as they are: TFDS's own SkipDecoding does not reach into a sequence."""

    def decode_example(self, serialized_image: Any) -> Any:
        return serialized_image

    def decode_batch_example_np(self, serialized_images: Any) -> list[bytes]:
        return [bytes(image) for image in serialized_images]


def _jpeg(sample: Video | Question, index: int) -> io.BytesIO:
    path = getattr(sample.read_frames, "path", None)
    path = path(index) if callable(path) else path
    if isinstance(path, str) and path.lower().endswith((".jpg", ".jpeg")):
        with open(path, "rb") as file:
            data = file.read()
        if data[:2] == b"\xff\xd8":  # else an image of another kind under that name
            return io.BytesIO(data)
    buffer = io.BytesIO()
    Image.fromarray(sample.read_frames([index])[0]).save(buffer, "JPEG", quality=_QUALITY)
    buffer.seek(0)
    return buffer


def _codes(video: Video, position: int) -> str:
    assert video.read_masks is not None
    codes: list[dict[str, Any] | None] = []
    for start in range(0, video.num_frames, _CHUNK):
        masks = video.read_masks(position, range(start, min(start + _CHUNK, video.num_frames)))
        codes += [_code(mask) if mask.any() else None for mask in masks]
    return json.dumps(codes)


def _code(mask: np.ndarray) -> dict[str, Any]:
    return {"size": list(mask.shape), "counts": encode_mask(mask)}
