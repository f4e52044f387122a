"""The Python interface: load a model, segment videos and pictures by sentences, ask about them.

Axes: N expressions, T frames of the video, H, W its size, F segmentation frames, A anchors, L tokens of a text.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import VirstConfig
from virst_jax.data.frames import get_frame_indices
from virst_jax.data.prompts import Tokenizer, build_chat, load_tokenizer, time_message
from virst_jax.data.sequence import splice
from virst_jax.data.transforms import resize_frames
from virst_jax.errors import UserError
from virst_jax.inference.plan import Options, Plan, ReleaseRandom, Seed
from virst_jax.inference.steps import Network
from virst_jax.inference.stream import FrameMasks, Progress, SegmentationStream
from virst_jax.inference.texts import TEXT_BUCKET, round_up
from virst_jax.io import model_folder, remote
from virst_jax.io.address import is_address
from virst_jax.io.video import ArrayReader, open_video
from virst_jax.models.generate import generate
from virst_jax.models.qwen2 import Qwen2

__all__ = ["FrameMasks", "Model", "Plan", "Segmentation", "SegmentationStream", "load"]

EMBEDDED = {"tiny": Path(__file__).parent / "assets" / "tiny"}
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Segmentation:
    """The masks of a video."""

    expressions: tuple[str, ...]
    masks: np.ndarray  # bool[N, T, H, W]; of segment_image bool[N, H, W]
    scores: np.ndarray  # float32[N, T], logits: the object is there where it is above 0; of segment_image float32[N]
    plan: Plan
    fps: float  # 0: unknown
    timings: Mapping[str, float]  # seconds by stage

    @property
    def anchors(self) -> tuple[int, ...]:
        """Numbers of the anchors' frames."""
        return self.plan.anchor_frames


def load(path: str | Path = "tiny", *, dtype: str | None = None, mesh: Any = None) -> "Model":
    """Loads a model.

    Args:
      path: a folder that `conversion.convert` or training wrote, or "tiny", the small model of this package.
      dtype: of parameters and activations, "float32" or "bfloat16"; None: parameters as stored, activations the same
        on accelerators and float32 on CPUs.
      mesh: of sharding.make_mesh, to split the parameters over devices; None: the default device.

    Raises:
      UserError: no such model, a broken one, one without tokenizer, or one of another config.
    """
    folder = find_model(path)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: choose {' or '.join(DTYPES)}")
    cfg = model_folder.read_config(folder)
    # before the parameters, which take long
    tokenizer = load_tokenizer(folder / model_folder.TOKENIZER, cfg.seg_token_id)
    if mesh is None:
        cfg, params = model_folder.load_model(folder, dtype)
        return Model(cfg, params, tokenizer, name=str(path), dtype=dtype)
    from virst_jax.parallel import sharding

    sharding.check_mesh(cfg, mesh)
    cfg, params = model_folder.load_model(folder, dtype, sharding.parameter_shardings(cfg, mesh))
    context = functools.partial(sharding.use_mesh, mesh)
    return Model(cfg, params, tokenizer, name=str(path), dtype=dtype, context=context)


def find_model(path: str | Path) -> Path:
    """The folder of a model by its path, name or address (gs://, s3://, hf://OWNER/NAME), which is copied first.

    Raises:
      UserError: there is none.
    """
    folder = remote.fetch(path) if is_address(path) else Path(path)
    if not folder.exists() and str(path) in EMBEDDED:
        folder = EMBEDDED[str(path)]
    if not (folder / model_folder.CONFIG).is_file():
        raise UserError(
            f"{path}: no model there; give a folder that `python -m conversion.convert` wrote, or one of "
            f"{', '.join(EMBEDDED)}"
        )
    return folder


class Model:
    """A network with its tokenizer. `load` makes one.

    Args:
      cfg, params: of the network.
      tokenizer: with [SEG].
      name: for reports.
      dtype: of the activations; None: that of the parameters on accelerators, float32 on CPUs.
      context: entered around every step of the network, such as a mesh.
      batch: frames that are encoded at a time; None: 1 on CPUs, else 4.
      chunk: frames that are tracked in one call.
      group_size: expressions that are read and tracked in one call, a power of two; more take several calls a chunk,
        which share the frames' encodings. An expression takes some 10 MB of device memory at the release's size.

    The results do not depend on chunk; on batch and group_size they depend by rounding only.
    """

    def __init__(
        self,
        cfg: VirstConfig,
        params: Any,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        dtype: str | None = None,
        context: Any = None,
        batch: int | None = None,
        chunk: int = 4,
        group_size: int = 8,
    ):
        on_cpu = jax.default_backend() == "cpu"
        if dtype is None:
            stored = str(params["llm"]["embed_tokens"]["embedding"].dtype)
            dtype = "float32" if on_cpu else stored
        self.cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, dtype=dtype))
        self.name, self.tokenizer = name, tokenizer
        self.network = Network(self.cfg, params, **({"context": context} if context else {}))
        # one at a time on CPUs: more are not faster there, and a frame's features do not depend on its neighbours
        self.batch = batch or (1 if on_cpu else 4)
        self.chunk, self.group_size = chunk, group_size

    def segment(
        self,
        video: Any,
        expressions: str | Sequence[str],
        *,
        seed: Seed = 0,
        exact: bool = False,
        anchors: Sequence[int] | None = None,
        release_random: ReleaseRandom | None = None,
        progress: Progress | None = None,
    ) -> Segmentation:
        """Segments what expressions describe in all frames of a video.

        All masks are held in memory: use `segment_stream` for long videos.

        Args:
          video: a file (mp4, mov, webm, gif, ...), a folder of frames, an array uint8[T, H, W, 3], a reader of
            `video_io.open_video` or a data set's `Video`.
          expressions: one or many.
          seed: of the frames that are sampled and of the wording around the expressions.
          exact: to the letter of the release: segmentation frames are resized bilinear for the fusion and bicubic for
            the tracker, and so encoded twice. Otherwise both share the bicubic ones.
          anchors: numbers of the frames to prompt, in place of evenly spaced ones.
          release_random: numpy's and Python's generators, drawn from as the release does for one expression.
          progress: called with a stage (of STAGES), how much of it is done, and of how much.

        Raises:
          UserError: a video that cannot be read, or a bad expression.
        """
        stream = self.segment_stream(
            video,
            expressions,
            seed=seed,
            exact=exact,
            anchors=anchors,
            release_random=release_random,
            progress=progress,
        )
        frames = list(stream)
        return Segmentation(
            stream.expressions,
            np.stack([frame.masks for frame in frames], axis=1),
            np.stack([frame.scores for frame in frames], axis=1),
            stream.plan,
            stream.reader.fps,
            stream.timings,
        )

    def segment_stream(
        self,
        video: Any,
        expressions: str | Sequence[str],
        *,
        seed: Seed = 0,
        exact: bool = False,
        anchors: Sequence[int] | None = None,
        release_random: ReleaseRandom | None = None,
        still: bool = False,
        progress: Progress | None = None,
        state: Mapping[str, np.ndarray] | None = None,
    ) -> "SegmentationStream":
        """As `segment`, frame by frame: an iterator of FrameMasks. Memory does not grow with the video's length.

        Args:
          still: the video is a single picture; see `segment_image`.
          state: of an earlier stream's `state()` with the same arguments: goes on behind it.
        """
        reader = open_video(video)
        if still and reader.num_frames != 1:
            raise UserError(f"{reader.name}: {reader.num_frames} frames where one picture is wanted; use segment")
        options = Options(
            seed, exact, anchors, release_random, still, batch=self.batch, chunk=self.chunk, group_size=self.group_size
        )
        return SegmentationStream(self.network, self.tokenizer, reader, expressions, options, progress, state)

    def segment_image(
        self,
        image: Any,
        expressions: str | Sequence[str],
        *,
        seed: Seed = 0,
        exact: bool = False,
        progress: Progress | None = None,
    ) -> Segmentation:
        """As `segment` for one picture: a file or an array uint8[H, W, 3]. Masks bool[N, H, W], scores float32[N].

        The language model reads it as a still image (with tokens_per_image visual tokens).
        """
        video = image if isinstance(image, (str, Path)) else ArrayReader(np.asarray(image)[None])
        stream = self.segment_stream(video, expressions, seed=seed, exact=exact, still=True, progress=progress)
        (frame,) = stream
        return Segmentation(stream.expressions, frame.masks, frame.scores, stream.plan, 0.0, stream.timings)

    def chat(
        self,
        video: Any,
        question: str,
        *,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = 256,
        max_frames: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """Answers a question about a video in text.

        Follows `chat` of model/videochat/modeling_videochat_flash.py.

        Args:
          video: as of `segment`.
          history: earlier questions and answers.
          max_new_tokens: where the answer is cut off.
          max_frames: frames to read at most; None: cfg.max_video_frames.
          temperature: 0: the most probable token each time; above: drawn, by `seed`.

        Raises:
          UserError: a video that cannot be read, an empty question, or a number out of range.
        """
        cfg, clip = self.cfg, self.cfg.vision.clip_frames
        reader = open_video(video)
        limit = (max_frames or cfg.max_video_frames) // clip * clip
        if limit < clip:
            raise UserError(f"max_frames is {max_frames}; give at least {clip}")
        local, count = min(8, limit), reader.num_frames
        if reader.fps > 0:
            numbers = get_frame_indices(
                limit,
                count,
                "dynamic_fps1",
                fps=reader.fps,
                min_num_frames=min(limit, cfg.max_video_frames),
                max_num_frames=limit,
                local_num_frames=local,
            )
            time_text = time_message(reader.duration, len(numbers))
        else:
            # frames without times: as many as there are, in whole clips
            numbers = get_frame_indices(min(limit, max(clip, count // clip * clip)), count, "middle")
            time_text = ""
        numbers += [numbers[-1]] * (-len(numbers) % clip)
        prompt = build_chat(self.tokenizer, question, time=time_text, history=history)
        unique = sorted(set(numbers))
        side = cfg.vision.image_size
        resized = {n: resize_frames(f[None], side, "bicubic")[0] for n, f in zip(unique, reader.pick(unique))}
        clips = np.stack([resized[n] for n in numbers]).reshape(-1, clip, side, side, 3)
        visual = self.network.encode_visual(clips, max(len(clips), cfg.max_video_frames // clip))
        count = len(clips) * visual[0].shape[0]
        length = round_up(len(prompt.input_ids) - 1 + count, TEXT_BUCKET)
        row = splice(prompt.input_ids.tolist(), prompt.labels.tolist(), count, cfg.seg_token_id, length)
        ends = (self.tokenizer.end_id, self.tokenizer.pad_id)
        tokens, lengths = generate(
            Qwen2(cfg.llm, cfg.compute),
            self.network.params["llm"],
            self.network.embed(visual, row.token_ids[None], row.visual_index[None]),
            jnp.asarray(row.mask[None]),
            max_new_tokens=max_new_tokens,
            eos_ids=ends,
            temperature=temperature,
            rng=jax.random.key(seed) if temperature > 0 else None,
        )
        answer = np.asarray(tokens)[0, : int(lengths[0])].tolist()
        return self.tokenizer.decode(token for token in answer if token not in ends).strip()
