"""Runs what `virst export-model` wrote: video and sentence -> masks, without Flax and without this network's code.

    from virst_jax import exported

    model = exported.load("folder")
    masks = model.segment(frames, "the dog")  # uint8[T, H, W, 3] -> bool[T, H, W]

The steps are StableHLO that JAX compiles for the device that is there. Which frames are read, prompted and tracked, and
the wording around the sentence, are those of `Model.segment`.

Axes: T frames, H, W the video's size, F segmentation frames, R side of the tracker's image, S side of the video
encoder's image.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from virst_jax.data.prompts import load_tokenizer
from virst_jax.data.transforms import MEAN, STD, resize_frames
from virst_jax.errors import UserError, no_device
from virst_jax.inference.plan import Options, Plan, Seed, check_options, plan_frames
from virst_jax.inference.texts import build_texts, check_expressions
from virst_jax.inference.tiles import MaskTiles
from virst_jax.io import exported_folder
from virst_jax.io.exported_folder import AGAIN, Manifest, StepSpec

SCALE = (np.array(255, np.float32), MEAN, STD)  # of 8-bit pixels: divisor, mean and deviation
# what a folder must hold for a device
STEPS = (
    "encode_batch",
    "encode_clip",
    "read_video",
    "read_text",
    "fuse",
    "prompt_anchors",
    "start_bank",
    "track",
    "resize_masks",
)
Named = dict[str, jax.Array]  # what a step gives, by names such as "1.prediction.low_res"


def load(folder: str | os.PathLike[str], *, device: str | None = None) -> "ExportedModel":
    """Reads a folder that `virst export-model` wrote, and compares all of its files with their digests.

    Args:
      device: "cpu", "gpu" or "tpu"; None: JAX's default.

    Raises:
      UserError: no such folder, a damaged one, one that was exported for other platforms, or no such device; or
        flatbuffers is not installed.
    """
    path = Path(folder)
    exported_folder.require_flatbuffers()
    try:
        found = jax.local_devices(backend=device)[0]
    except RuntimeError as error:
        raise UserError(no_device(device or os.environ.get("JAX_PLATFORMS", "default"))) from error
    manifest = exported_folder.read_manifest(path)
    platform = _platform(found)
    if platform not in manifest.platforms:
        raise UserError(
            f"{path}: was exported for {', '.join(manifest.platforms)}, and this device is {platform}; export the "
            f"model with --platforms {platform}, or choose another device"
        )
    return ExportedModel(path, manifest, platform, found)


class ExportedModel:
    """The exported steps on a device. `load` makes one.

    Attributes:
      manifest: what the folder holds, the network's config among it.
    """

    def __init__(self, folder: Path, manifest: Manifest, platform: str, device: jax.Device):
        self.manifest, self._cfg, self._device = manifest, manifest.cfg, device
        self._tokenizer = load_tokenizer(folder / exported_folder.TOKENIZER, self._cfg.seg_token_id)
        self._steps: dict[str, list[tuple[StepSpec, Any]]] = {name: [] for name in STEPS}
        specs = [spec for spec in manifest.steps if spec.platform == platform and spec.step in self._steps]
        for spec in specs:
            self._steps[spec.step].append((spec, jax.jit(_read_step(folder, spec).call)))
        lacking = [name for name, found in self._steps.items() if not found]
        if lacking:
            raise UserError(f"{folder}: the step {lacking[0]} for {platform} is missing; {AGAIN}")
        wanted = {name for spec in specs for name in spec.parameters}
        stored = exported_folder.read_parameters(folder)
        self._parameters = {name: jax.device_put(value, device) for name, value in stored if name in wanted}
        missing = sorted(wanted - self._parameters.keys())
        if missing:
            raise UserError(f"{folder}: the parameter {missing[0]} is missing; {AGAIN}")

    def segment(self, frames: np.ndarray, sentence: str, *, seed: Seed = 0) -> np.ndarray:
        """Segments what a sentence describes in all frames of a video.

        Args:
          frames: uint8[T, H, W, 3].
          sentence: one.
          seed: of the frames that are sampled and of the wording around the sentence.

        Returns:
          bool[T, H, W].

        Raises:
          UserError: no such video, or a sentence that is bad or longer than the folder was exported for.
        """
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise UserError(f"frames must be uint8[T, H, W, 3], not {frames.dtype}{list(frames.shape)}")
        if not isinstance(sentence, str):
            raise UserError(f"an exported model takes one sentence, which is text, not {sentence!r}")
        (text,) = check_expressions(self._tokenizer, sentence)
        options = Options(seed, batch=self.manifest.batch, chunk=self.manifest.chunk)
        check_options(self._cfg, options)
        plan = plan_frames(self._cfg, len(frames), options)
        with jax.default_device(self._device):
            features = self._encode(frames, sorted(set(plan.segmentation)))
            maps = [features[number]["top"] for number in plan.segmentation]
            prompts = self._read(frames, text, plan, maps, options)
            anchors = self._prompt(plan, features, prompts)
            return self._track(frames, features, anchors)

    def _encode(self, frames: np.ndarray, numbers: Sequence[int]) -> dict[int, Named]:
        """Features of frames, by their numbers."""
        features: dict[int, Named] = {}
        batch = self.manifest.batch
        for first in range(0, len(numbers), batch):
            some = numbers[first : first + batch]
            pixels = resize_frames(frames[list(some)], self._cfg.sam2.image_size, "bicubic")
            pixels = np.concatenate([pixels, np.repeat(pixels[-1:], batch - len(some), axis=0)])
            out = self._run("encode_batch", pixels, *SCALE)
            features |= {number: _below(out, str(i)) for i, number in enumerate(some)}
        return features

    def _read(self, frames: np.ndarray, text: str, plan: Plan, maps: list[jax.Array], options: Options) -> jax.Array:
        """What the sentence says of the video: the prompts of the anchors."""
        cfg, vision = self._cfg, self._cfg.vision
        sampled = resize_frames(frames[list(plan.sampled)], vision.image_size, "bicubic")
        clips = sampled.reshape(-1, vision.clip_frames, *sampled.shape[1:])
        visual: list[Any] = [_only(self._run("encode_clip", clip, *SCALE)) for clip in clips]
        tokens, slots = visual[0].shape[0], cfg.max_video_frames // vision.clip_frames
        visual += [np.zeros(visual[0].shape, visual[0].dtype)] * (slots - len(clips))
        texts = build_texts(cfg, self._tokenizer, (text,), len(clips) * tokens, slots * tokens, options)
        cache = self._run("read_video", *visual, texts.prefix_ids, texts.prefix_visual, texts.prefix_mask)
        ids, mask, seg = texts.batch(0, 1, 1)
        self._check_length(ids.shape[1])
        tops = maps if cfg.fusion.initial else ()
        hidden = _only(self._run("read_text", *cache.values(), ids, mask, seg, *tops))
        anchors = np.pad(np.asarray(plan.anchors, np.int32), (0, cfg.max_anchors - len(plan.anchors)))
        return self._run("fuse", hidden, *maps, anchors)["0"]

    def _check_length(self, length: int) -> None:
        longest = max(x.shape[1] for spec, _ in self._steps["read_text"] for x in spec.inputs if x.name == "ids")
        if length > longest:
            raise UserError(
                f"the sentence and the wording around it take up to {length} tokens, and the model was exported for "
                f"{longest}: shorten the sentence, or export the model with --text-tokens {length}"
            )

    def _prompt(self, plan: Plan, features: dict[int, Named], prompts: jax.Array) -> Named:
        """The anchors, segmented."""
        numbers, slots = plan.anchor_frames, self._cfg.max_anchors
        padded = _padded([features[number] for number in numbers], slots)
        frames = np.pad(np.asarray(numbers, np.int32), (0, slots - len(numbers)))
        return self._run("prompt_anchors", *padded, frames, np.arange(slots) < len(numbers), prompts)

    def _track(self, frames: np.ndarray, features: dict[int, Named], anchors: Named) -> np.ndarray:
        """Masks bool[T, H, W]. Features are forgotten when their frames were tracked."""
        total, chunk, batch = len(frames), self.manifest.chunk, self.manifest.batch
        tiles = MaskTiles(frames.shape[1:3], self._cfg.sam2.low_res_size)
        masks = np.empty(frames.shape[:3], bool)
        bank = self._run("start_bank", *anchors.values())
        missing = [number for number in range(total) if number not in features]
        for first in range(0, total, chunk):
            numbers = np.arange(first, first + chunk, dtype=np.int32)
            taken = []
            for number in range(first, min(first + chunk, total)):
                if number not in features:
                    features |= self._encode(frames, missing[:batch])
                    missing = missing[batch:]
                taken.append(features.pop(number))
            past, padded = (*anchors.values(), *bank.values()), _padded(taken, chunk)
            out = self._run("track", *past, *padded, numbers, numbers < total, np.int32(total))
            bank, tracked = _below(out, "0"), _below(out, "1")
            if not np.isfinite(np.asarray(tracked["prediction.object_score"])[: len(taken)]).all():
                raise UserError(f"the network gives no numbers for frames {first} to {first + len(taken) - 1}")
            low_res = tracked["prediction.low_res"]
            packed = [[_only(self._run("resize_masks", low_res, *m)) for m in row] for row in tiles.matrices]
            masks[first : first + len(taken)] = tiles.join(packed)[: len(taken), 0]
        return masks

    def _run(self, step: str, *arrays: Any) -> Named:
        """Calls the step that was exported for arrays of these shapes."""
        shapes = [np.shape(x) for x in arrays]
        for spec, call in self._steps[step]:
            if [x.shape for x in spec.inputs] == shapes:
                out = call(*(self._parameters[name] for name in spec.parameters), *arrays)
                return dict(zip((x.name for x in spec.outputs), out))
        raise UserError(f"the step {step} was not exported for arrays of the shapes {shapes}; export the model again")


def _read_step(folder: Path, spec: StepSpec) -> jax.export.Exported:
    """A step's artefact, compared with what the manifest says of it."""
    path = folder / spec.file
    try:
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
    except Exception as error:  # flatbuffers and MLIR raise all sorts; JAX refuses artefacts of versions it cannot read
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: JAX {jax.__version__} cannot read it ({reason}); export the model again") from error
    shapes = [tuple(x.shape) for x in exported.in_avals[len(spec.parameters) :]]
    if spec.platform not in exported.platforms or shapes != [x.shape for x in spec.inputs]:
        raise UserError(f"{path}: is another step than {exported_folder.MANIFEST} says; {AGAIN}")
    return exported


def _platform(device: jax.Device) -> str:
    """What jax.export calls a device's platform."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def _below(out: Named, prefix: str) -> Named:
    """What lies below the first part of a name, without that."""
    start = f"{prefix}."
    return {name.removeprefix(start): x for name, x in out.items() if name.startswith(start)}


def _only(out: Named) -> jax.Array:
    """The array of a step that gives one."""
    (x,) = out.values()
    return x


def _padded(features: Sequence[Named], count: int) -> list[jax.Array]:
    """The arrays of `count` frames, the last one again where there are fewer."""
    return [x for frame in (*features, *[features[-1]] * (count - len(features))) for x in frame.values()]
