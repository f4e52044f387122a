"""The Python interface: load a model, segment videos and images by sentences, ask about them.

Axes: N expressions, T frames of the video, H, W its size, F segmentation frames, A anchors, L tokens of a text.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from virst_jax.config import VirstConfig
from virst_jax.data.prompts import Tokenizer, build_chat, load_tokenizer
from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.inference.chat import answer_question
from virst_jax.inference.instances import InstanceStream
from virst_jax.inference.live import EVERY, ROOM, LiveOptions, LiveStream
from virst_jax.inference.placement import Context, find_placement, keep_compiled
from virst_jax.inference.plan import Options, Plan, ReleaseRandom, Seed, call_sizes, check_options
from virst_jax.inference.resizing import HOST, check_place
from virst_jax.inference.results import FrameMasks, Segmentation, read_result
from virst_jax.inference.resume import State
from virst_jax.inference.session import BUDGET, HOST_BUDGET
from virst_jax.inference.shared_batches import StreamEncoder
from virst_jax.inference.steps import Network
from virst_jax.inference.stream import SegmentationStream
from virst_jax.inference.survey import Progress, Survey
from virst_jax.inference.text_session import TextSession
from virst_jax.inference.texts import check_expressions
from virst_jax.io import arrays, model_folder, remote, tracker_folder
from virst_jax.io.address import is_address
from virst_jax.io.run_length_masks import RunLengthMasks
from virst_jax.io.small_model import EMBEDDED, NO_ANSWERS, is_small
from virst_jax.io.video import Reader, open_video
from virst_jax.types import PyTree

__all__ = [
    "FrameMasks",
    "ImageLike",
    "Model",
    "Plan",
    "Segmentation",
    "SegmentationStream",
    "VideoLike",
    "load",
    "read_result",
]

DTYPES = ("float32", "bfloat16")

ImageLike = str | os.PathLike[str] | np.ndarray | jax.Array | Image.Image
VideoLike = str | os.PathLike[str] | np.ndarray | jax.Array | Iterable[ImageLike] | Reader | Video


def load(
    path: str | os.PathLike[str] = "tiny",
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    device: str | jax.Device | None = None,
    compilation_cache: bool | str | os.PathLike[str] = True,
    check: bool = True,
    resize: str = HOST,
) -> "Model":
    """Loads a model.

    Args:
      path: a folder that `conversion.convert` or training wrote, or "tiny", the small model of this package.
      dtype: of parameters and activations, "float32" or "bfloat16"; None: parameters as stored, activations as the
        model was made for on accelerators and float32 on CPUs. The tracker's prompt encoder stays in float32, and
        the integer kernels of a quantized model stay what they are, with their scales.
      mesh: of sharding.make_mesh, to split the parameters over devices; None: one device.
      device: which, as "cpu", "gpu" or "cuda:1"; None: JAX's default.
      compilation_cache: compiled programs are kept on disk, so that they need not be compiled again by the next
        process: True: where JAX is told to (JAX_COMPILATION_CACHE_DIR), or else in virst_jax under XDG_CACHE_HOME or
        ~/.cache; a path: there; False: JAX's settings are left alone.
      check: compare the parameters with the digests in the folder. A damaged model would go unseen without it.
      resize: where frames are resized: "host", while the device computes, or "device", which gets them as they are,
        padded to multiples of 256 pixels. The pixels are the same, byte for byte.

    Raises:
      UserError: no such model or device, a broken model, one without tokenizer, or one of another config; another
        place to resize.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"a model is loaded from a folder or by its name, not from {type(path).__name__} {path!r}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: choose {' or '.join(DTYPES)}")
    check_place(resize)
    folder = find_model(path)
    cfg = model_folder.read_config(folder)
    # before the parameters, which take long
    tokenizer = load_tokenizer(folder / model_folder.TOKENIZER, cfg.seg_token_id)
    shardings, context = find_placement(cfg, mesh, device)
    keep_compiled(compilation_cache)
    cfg, params = model_folder.load_model(folder, dtype, shardings, check=check)
    return Model(
        cfg,
        params,
        tokenizer,
        name=str(path),
        dtype=dtype,
        context=context,
        answers=not is_small(folder),
        resize=resize,
    )


def find_model(path: str | os.PathLike[str]) -> Path:
    """The folder of a model by its path, name or address (gs://, s3://, hf://OWNER/NAME), which is copied first.

    Raises:
      UserError: there is none.
    """
    folder = find_folder(path)
    if tracker_folder.is_tracker(folder):
        raise UserError(
            f"{path}: holds SAM 2.1 alone, without the language model that reads sentences; convert it together with "
            "VideoChat-Flash: virst convert --videochat DIR --sam2 FILE.pt --virst FILE.pt"
        )
    if not (folder / model_folder.CONFIG).is_file():
        raise UserError(
            f"{path}: no model there; give a folder that `virst convert` or `virst train` wrote, or "
            f"{', '.join(map(repr, EMBEDDED))}, the small one of this package"
        )
    return folder


def find_folder(path: str | os.PathLike[str]) -> Path:
    """As `find_model`, whatever there is in the folder.

    Raises:
      UserError: an address that cannot be read, or no name at all.
    """
    given = os.fspath(path)
    if not given:
        raise UserError("the model's name is empty; give a folder")
    folder = remote.fetch(given) if is_address(given) else Path(given)
    if given in EMBEDDED and not os.path.lexists(folder):
        return EMBEDDED[given]
    return folder


class Model:
    """A network with its tokenizer. `load` makes one.

    Args:
      cfg, params: of the network.
      tokenizer: with [SEG].
      name: for reports.
      dtype: of the activations; None: on accelerators bfloat16 if the model was made for it, on CPUs float32.
      context: entered around every step of the network, such as a mesh.
      answers: whether it was taught to answer in text; `chat` refuses otherwise.
      batch: frames that are encoded at a time; None: 1 on CPUs, else 4.
      chunk: frames that are tracked in one call.
      group_size: expressions that are read and tracked in one call, a power of two; None: 1 on CPUs, else 8. More take
        several calls a chunk, which share the frames' encodings. An expression takes some 10 MB of device memory at the
        release's size.
      resize: as of `load`.

    The results do not depend on chunk; on batch and group_size they depend by rounding only.
    """

    def __init__(
        self,
        cfg: VirstConfig,
        params: PyTree,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        dtype: str | None = None,
        context: Context | None = None,
        answers: bool = True,
        batch: int | None = None,
        chunk: int = 4,
        group_size: int | None = None,
        resize: str = HOST,
    ):
        embedding = params["llm"]["embed_tokens"]["embedding"]
        on_cpu = _platform(embedding) == "cpu"
        if dtype is None:
            # a converted model says it by its parameters, a trained one, which keeps float32 ones, by its config
            low = "bfloat16" in (cfg.compute.dtype, str(embedding.dtype))
            dtype = "bfloat16" if low and not on_cpu else "float32"
        self.cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, dtype=dtype))
        self.name, self.tokenizer, self.answers = name, tokenizer, answers
        self.network = Network(self.cfg, params, context or contextlib.nullcontext, resize)
        self.batch, self.group_size = call_sizes(on_cpu, batch, group_size)
        self.chunk = chunk

    def __repr__(self) -> str:
        count = sum(x.size for x in jax.tree.leaves(self.network.params))
        return f"Model({self.name!r}, {self.cfg.name}, {count / 1e6:,.1f} M parameters, {self.cfg.compute.dtype})"

    def segment(
        self,
        video: VideoLike,
        expressions: str | Sequence[str],
        *,
        fps: float | None = None,
        seed: Seed = 0,
        exact: bool = False,
        anchors: Sequence[int] | None = None,
        release_random: ReleaseRandom | None = None,
        instances: bool = False,
        soft: bool = False,
        lazy: bool = False,
        progress: Progress | None = None,
    ) -> Segmentation:
        """Segments what expressions describe in all frames of a video.

        All masks are held in memory: use `lazy` or `segment_stream` for long videos.

        Args:
          video: a file (mp4, mov, webm, gif, ...), a folder of frames, an array [T, H, W, 3] (also [T, 3, H, W], grey
            or RGBA; integers of 0 to 255 or floats of 0 to 1), frames one by one (arrays, PIL images or paths), a
            reader of `io.video.open_video` or a data set's `Video`.
          expressions: one or many.
          fps: frames a second of a video that states none: a folder, an array, frames one by one.
          seed: of the frames that are sampled and of the wording around the expressions.
          exact: to the letter of the release: segmentation frames are resized bilinear for the fusion and bicubic for
            the tracker, and so encoded twice. Otherwise both share the bicubic ones.
          anchors: numbers of the frames to prompt, in place of evenly spaced ones.
          release_random: numpy's and Python's generators, drawn from as the release does for one expression.
          instances: an object with a number of its own for each instance that an expression means, in place of one mask
            for all: `expressions` and `object_ids` of the result say what they are. See inference.instances.
          soft: also give probabilities, uint8[N, T, H, W] of 0 to 255, as `soft` of the result.
          lazy: hold masks as run lengths, which are decoded when they are looked at.
          progress: called with a stage (of STAGES), how much of it is done, and of how much.

        Raises:
          UserError: a video that cannot be read, or a bad expression.
        """
        stream = self.segment_stream(
            video,
            expressions,
            fps=fps,
            seed=seed,
            exact=exact,
            anchors=anchors,
            release_random=release_random,
            instances=instances,
            soft=soft,
            progress=progress,
        )
        stream.prepare()
        scores: list[np.ndarray] = []
        blurred: list[np.ndarray] = []

        def each() -> Iterator[np.ndarray]:
            for frame in stream:
                scores.append(frame.scores)
                if frame.soft is not None:
                    blurred.append(frame.soft)
                yield frame.masks

        count = len(stream.labels)
        masks: Any
        masks = RunLengthMasks.of_frames(each(), count, stream.reader.size) if lazy else np.stack(list(each()), axis=1)
        return Segmentation(
            stream.labels,
            masks,
            np.stack(scores, axis=1),
            stream.plan,
            stream.reader.fps,
            stream.timings,
            stream.object_ids if instances else (),
            np.stack(blurred, axis=1) if blurred else None,
        )

    def segment_stream(
        self,
        video: VideoLike,
        expressions: str | Sequence[str],
        *,
        fps: float | None = None,
        seed: Seed = 0,
        exact: bool = False,
        anchors: Sequence[int] | None = None,
        release_random: ReleaseRandom | None = None,
        still: bool = False,
        instances: bool = False,
        soft: bool = False,
        progress: Progress | None = None,
        state: State | None = None,
        survey: Survey | None = None,
        encoder: StreamEncoder | None = None,
    ) -> SegmentationStream:
        """As `segment`, frame by frame: an iterator of FrameMasks. Memory does not grow with the video's length.

        The work begins with the first frame that is asked for. A loop over the stream may be left at any frame.

        Args:
          still: the video is a single image; see `segment_image`.
          soft: as of `segment`.
          instances: as of `segment`; gives an `InstanceStream`, which takes no state.
          state: of an earlier stream's `state()` with the same arguments: goes on behind it.
          survey: of `inference.survey.take_survey` with the same video and options, if it was taken before.
          encoder: of `inference.shared_batches.SharedBatches.join`: frames are encoded in batches that are shared with
            streams of other threads.
        """
        expressions = check_expressions(self.tokenizer, expressions)  # before the video, which may be long
        reader = open_video(video, fps=fps)
        if still and reader.num_frames != 1:
            raise UserError(f"{reader.name}: {reader.num_frames} frames where one image is wanted; use segment")
        options = Options(
            seed,
            exact,
            anchors,
            release_random,
            still,
            soft,
            batch=self.batch,
            chunk=self.chunk,
            group_size=self.group_size,
        )
        if instances and state is not None:
            raise UserError("instances cannot be tracked on from a saved state; begin again without it")
        kind = InstanceStream if instances else SegmentationStream
        return kind(
            self.network, self.tokenizer, reader, expressions, options, progress, state, survey=survey, encoder=encoder
        )

    def session(
        self,
        video: VideoLike,
        *,
        fps: float | None = None,
        seed: Seed = 0,
        exclusive: bool = False,
        budget: int = BUDGET,
        host_budget: int = HOST_BUDGET,
    ) -> TextSession:
        """Begins a session on a video: objects by sentences, clicks, boxes and masks, corrected on any frame.

            session = model.session("dog.mp4")
            (dog,) = session.add_text("the dog")
            for frame in session.propagate():
                frame.index, frame.object_ids, frame.masks
            session.add_points(dog, 40, [(120, 340)], [0], replace=False)  # not there
            for frame in session.propagate(40): ...

        Args:
          video, fps, seed: as of `segment`.
          exclusive: masks of different objects do not overlap.
          budget: bytes of frames' features to keep on the device, so that no frame is encoded twice while they suffice.
          host_budget: bytes of masks and memories of tracked frames to keep in the host's memory; the rest goes to a
            temporary file.

        Raises:
          UserError: a video that cannot be read.
        """
        options = Options(seed, batch=self.batch, chunk=self.chunk, group_size=self.group_size)
        check_options(self.cfg, options)
        reader = open_video(video, fps=fps)
        options = dataclasses.replace(options, still=reader.still)
        return TextSession(
            self.network, self.tokenizer, reader, options, exclusive=exclusive, budget=budget, host_budget=host_budget
        )

    def live(
        self,
        source: Any,
        expressions: str | Sequence[str],
        *,
        every: int = EVERY,
        window: int | None = None,
        late: str | None = None,
        room: int = ROOM,
        seed: int = 0,
        format: str | None = None,
        options: dict[str, str] | None = None,
    ) -> LiveStream:
        """Segments frames as they come, each seen once: an iterator of LiveFrame. Memory does not grow.

            with model.live("/dev/video0", "the cup") as stream:
                for frame in stream:
                    frame.index, frame.image, frame.masks, frame.latency, frame.dropped
            stream.stats

        Args:
          source: a camera ("/dev/video0"), "-" for this program's input, an address (rtsp://, http://, udp://), a file,
            a named pipe, an open binary file, or an iterable of frames: arrays, PIL images or paths.
          expressions: one or many.
          every: the sentence is read again every so many frames; those in between are tracked.
          window: frames that a reading looks back on; None: four times `every`.
          late: frames that come faster than they are computed: "drop" leaves out the oldest that wait, "block" lets the
            source wait; None: "drop" for cameras and network streams, otherwise "block".
          room: how many frames may wait.
          seed: of the wording around the expressions.
          format, options: for FFmpeg, of what it cannot find out: "mjpeg"; {"video_size": "1280x720"}.

        Raises:
          UserError: bad expressions or numbers. While it runs: a source that cannot be opened, or that breaks off.
        """
        settings = LiveOptions(every, window, late, room, seed)
        run = Options(seed, chunk=1, group_size=self.group_size)
        return LiveStream(self.network, self.tokenizer, source, expressions, settings, run, format, options)

    def segment_image(
        self,
        image: ImageLike,
        expressions: str | Sequence[str],
        *,
        seed: Seed = 0,
        exact: bool = False,
        progress: Progress | None = None,
    ) -> Segmentation:
        """As `segment` for one image: a file, an array [H, W, 3] (also [3, H, W], grey or RGBA) or a PIL image. Masks
        are bool[N, H, W], scores float32[N].

        The language model reads it as a still image (with tokens_per_image visual tokens).
        """
        video = image if isinstance(image, (str, os.PathLike)) else arrays.to_image(image)[None]
        stream = self.segment_stream(video, expressions, seed=seed, exact=exact, still=True, progress=progress)
        (frame,) = stream
        return Segmentation(stream.expressions, frame.masks, frame.scores, stream.plan, 0.0, stream.timings)

    def chat(
        self,
        video: VideoLike,
        question: str,
        *,
        fps: float | None = None,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = 256,
        max_frames: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """Answers a question about a video in text.

        Follows `chat` of model/videochat/modeling_videochat_flash.py.

        Args:
          video, fps: as of `segment`.
          history: earlier questions and answers.
          max_new_tokens: where the answer is cut off.
          max_frames: frames to read at most; None: cfg.max_video_frames.
          temperature: 0: the most probable token each time; above: drawn, by `seed`.

        Raises:
          UserError: a model that was not taught to answer, a video that cannot be read, an empty question, or a
            number out of range.
        """
        if not self.answers:
            raise UserError(NO_ANSWERS)
        _check_integers(max_new_tokens=max_new_tokens, max_frames=max_frames, seed=seed)
        is_number = isinstance(temperature, (int, float, np.floating)) and not isinstance(temperature, bool)
        if not is_number or not 0 <= temperature < math.inf:
            raise UserError(f"temperature is {temperature!r}; give a number of 0 or more")
        if max_new_tokens is None or max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; give 1 or more")
        if seed is None or not 0 <= seed < 1 << 63:
            raise UserError(f"seed is {seed}; give an integer of 0 to 2**63 - 1")
        history = _checked_history(history)
        build_chat(self.tokenizer, question, history=history)  # what is wrong with the texts shows before the video
        return answer_question(
            self.network,
            self.tokenizer,
            open_video(video, fps=fps),
            question,
            history=history,
            max_new_tokens=max_new_tokens,
            max_frames=max_frames or self.cfg.max_video_frames,
            temperature=temperature,
            seed=seed,
        )


def _check_integers(**values: object) -> None:
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer))):
            raise UserError(f"{name} is {value!r}; give an integer")


def _checked_history(history: object) -> list[tuple[str, str]]:
    given = list(history) if isinstance(history, Iterable) and not isinstance(history, str) else [history]
    pairs: list[tuple[str, str]] = []
    for pair in given:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise UserError(f"history holds {pair!r}; give pairs of a question and its answer")
        pairs.append((pair[0], pair[1]))
    return pairs


def _platform(x: jax.Array | np.ndarray) -> str:
    """Of the device that holds an array; of JAX's default for arrays of the host."""
    devices = getattr(x, "devices", None)
    return next(iter(devices())).platform if devices else jax.default_backend()
