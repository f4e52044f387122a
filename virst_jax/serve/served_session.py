"""One video that somebody works on: its objects, their masks as they are sent and saved, and what undo takes back.

A session of the network holds its masks on the device. Here they are kept as run-length codes, so that any thread can
read them while the device is busy: each change puts a new `View` in the place of the old one.

Axes: N objects, T frames, H height, W width.
"""

import contextlib
import math
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from virst_jax.api import Model
from virst_jax.errors import UserError
from virst_jax.inference.prompts import Clicks, GivenMask, Prompt, check_clicks
from virst_jax.inference.session import ObjectMasks, Session
from virst_jax.inference.text_session import TextSession
from virst_jax.io.masks import encode_mask
from virst_jax.io.small_model import NO_ANSWERS
from virst_jax.io.video import StridedReader
from virst_jax.serve.jobs import Cancelled, Job
from virst_jax.serve.limits import Limits, Refusal
from virst_jax.serve.video_upload import Upload, read_upload, times_of
from virst_jax.tracking import TrackerModel

NO_TEXT = "this model tracks what is pointed at and reads no sentences; add clicks or boxes"


@dataclass(frozen=True)
class Found:
    """An object on a frame."""

    score: float  # logit: the object is there where it is above 0
    counts: str  # run-length code of its mask, as COCO compresses it


@dataclass(frozen=True)
class ObjectView:
    """An object, its prompts by frame."""

    object_id: int
    label: str
    prompts: Mapping[int, Prompt]


@dataclass(frozen=True)
class View:
    """What is known of a video's objects at a moment; nothing in it ever changes."""

    version: int = 0
    objects: tuple[ObjectView, ...] = ()
    frames: Mapping[int, Mapping[int, Found]] = field(default_factory=dict)  # by frame, by object
    num_undo: int = 0

    @property
    def object_ids(self) -> tuple[int, ...]:
        return tuple(x.object_id for x in self.objects)

    def scores(self, object_id: int, num_frames: int) -> list[float | None]:
        """Of an object on every frame, logits; None: it was not tracked there."""
        found = [self.frames.get(frame, {}).get(object_id) for frame in range(num_frames)]
        return [None if x is None else round(x.score, 4) for x in found]


@dataclass(frozen=True)
class _Step:
    """What undo needs: the masks before a change, and how many changes of the network's session it was."""

    frames: Mapping[int, Mapping[int, Found]]
    changes: int


@dataclass(eq=False)
class ServedSession:
    """A video and its objects. Methods with a job run on the worker's thread, the others on any.

    Attributes:
      upload: the video's file.
      exclusive: masks of different objects do not overlap.
      used: when somebody last asked for it.
    """

    upload: Upload
    limits: Limits
    exclusive: bool = False
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    used: float = field(default_factory=time.monotonic)
    view: View = field(default_factory=View)
    reader: StridedReader | None = None
    times: list[float] | None = None
    network: Session | None = None  # the session on the device, begun when it is first needed
    history: list[tuple[str, str]] = field(default_factory=list)  # questions and answers
    _steps: deque[_Step] = field(default_factory=deque)
    _last_id: int = 0
    _reserved: set[int] = field(default_factory=set)  # numbers of objects that are to begin
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # what any thread may ask

    @property
    def num_frames(self) -> int:
        return self.ready.num_frames

    @property
    def ready(self) -> StridedReader:
        """The video. Raises Refusal: it was not read yet, or it could not be."""
        if self.reader is None:
            raise Refusal("the video is not read yet; wait for its job", 409)
        return self.reader

    def touch(self) -> None:
        self.used = time.monotonic()

    def new_object(self) -> int:
        """The number for an object that is to begin; no other request gets it.

        Raises:
          Refusal: there are too many.
        """
        with self._lock:
            if len(self.view.objects) >= self.limits.objects:
                raise Refusal(f"a session has {self.limits.objects} objects at most; remove one first", 409)
            self._last_id += 1
            self._reserved.add(self._last_id)
            return self._last_id

    def check_object(self, object_id: int) -> int:
        """The number of an object that is there, or that is to begin. Raises Refusal: it is neither."""
        with self._lock:
            known = self.view.object_ids
            if object_id not in known and object_id not in self._reserved:
                there = f"there are {', '.join(map(str, known))}" if known else "there is none yet"
                raise Refusal(f"there is no object {object_id}; {there}", 404)
        return object_id

    def check_frame(self, frame: int) -> int:
        """Raises Refusal: there is no such frame."""
        if not 0 <= frame < self.num_frames:
            raise Refusal(f"there is no frame {frame}; the video has frames 0 to {self.num_frames - 1}", 404)
        return frame

    def close(self) -> None:
        """Deletes the files."""
        self.network = None
        shutil.rmtree(self.upload.folder, ignore_errors=True)

    # work

    def read(self, job: Job) -> dict[str, Any]:
        """Decodes the video."""
        with self._named():
            reader = read_upload(self.upload, self.limits, job.progress)
            self.times = times_of(reader)
        self.reader = reader
        return {}

    def begin(self, model: Model | TrackerModel) -> Session:
        """The session on the device."""
        if self.network is None:
            self.network = model.session(self.ready, exclusive=self.exclusive, budget=self.limits.feature_bytes)
        return self.network

    def add_text(self, model: Model | TrackerModel, sentences: Sequence[str], job: Job) -> dict[str, Any]:
        """Objects by sentences, tracked through the video."""
        session = self.begin(model)
        if not isinstance(session, TextSession):
            raise Refusal(NO_TEXT, 409)
        self._check_room(len(sentences))
        with self._change(session, job) as (frames, counted):
            ids = [self.new_object() for _ in sentences]
            session.add_text(sentences, object_ids=ids, progress=job.progress)
            counted.append("text")
            for object_id in ids:
                for frame in session.anchors[object_id]:
                    _note(frames, session.masks(frame))
            self._show(session, frames)
            self._track(session, job, frames, counted, None, "both")
        return {"objects": ids}

    def add_points(
        self,
        model: Model | TrackerModel,
        object_id: int,
        frame: int,
        points: Sequence[Sequence[float]],
        labels: Sequence[int],
        box: Sequence[float] | None,
        replace: bool,
        job: Job,
    ) -> dict[str, Any]:
        """Clicks and a box. They are added to earlier ones of the frame, or take their place."""
        session = self.begin(model)
        check_clicks(session.reader.size, points, labels, box)
        if object_id in session.object_ids:
            earlier = session.prompts(object_id).get(frame)
            if isinstance(earlier, Clicks) and not replace:
                # the session reads a box together with its clicks
                points = [*earlier.coords.tolist(), *points]
                labels = [*earlier.labels.tolist(), *labels]
                box = earlier.box.tolist() if box is None and earlier.box is not None else box
        else:
            self.check_object(object_id)
            self._check_room(1)
        if len(points) > self.limits.clicks:
            raise Refusal(f"an object has {self.limits.clicks} clicks on a frame at most; undo some", 409)
        with self._change(session, job) as (frames, counted):
            shown = session.add_points(object_id, frame, points or None, labels or None, box=box)
            counted.append("points")
            _note(frames, shown)
        return {"objects": [object_id]}

    def add_mask(
        self, model: Model | TrackerModel, object_id: int, frame: int, mask: np.ndarray, job: Job
    ) -> dict[str, Any]:
        """A mask bool[H, W], in place of what was given on the frame."""
        session = self.begin(model)
        if object_id not in session.object_ids:
            self.check_object(object_id)
            self._check_room(1)
        with self._change(session, job) as (frames, counted):
            shown = session.add_mask(object_id, frame, mask)
            counted.append("mask")
            _note(frames, shown)
        return {"objects": [object_id]}

    def clear(self, model: Model | TrackerModel, object_id: int, frame: int, job: Job) -> dict[str, Any]:
        """Forgets what was given for an object on a frame."""
        session = self.begin(model)
        with self._change(session, job) as (frames, counted):
            shown = session.clear(object_id, frame)
            counted.append("clear")
            _note(frames, shown)
        return {}

    def remove(self, model: Model | TrackerModel, object_id: int, job: Job) -> dict[str, Any]:
        """Forgets an object."""
        session = self.begin(model)
        with self._change(session, job) as (frames, counted):
            session.remove(object_id)
            counted.append("remove")
            for frame, found in frames.items():
                frames[frame] = {k: x for k, x in found.items() if k != object_id}
        return {}

    def propagate(self, model: Model | TrackerModel, start: int | None, direction: str, job: Job) -> dict[str, Any]:
        """Tracks all objects through the video."""
        session = self.begin(model)
        with self._change(session, job) as (frames, counted):
            self._track(session, job, frames, counted, start, direction)
        return {}

    def undo(self, job: Job) -> dict[str, Any]:
        """Takes back the last change."""
        if not self._steps or self.network is None:
            raise UserError("there is nothing to undo")
        step = self._steps.pop()
        for _ in range(step.changes):
            self.network.undo()
        self._show(self.network, step.frames)
        return {}

    def chat(self, model: Model | TrackerModel, question: str, job: Job) -> dict[str, Any]:
        """Answers a question about the video; earlier ones are remembered."""
        if not isinstance(model, Model):
            raise Refusal("this model tracks what is pointed at and answers no questions", 409)
        if not model.answers:
            raise Refusal(NO_ANSWERS, 409)
        job.progress("answer", 0, 0)
        answer = model.chat(self.ready, question, history=self.history)
        job.check()
        self.history = [*self.history, (question, answer)]
        return {"answer": answer}

    # inside

    def _track(
        self,
        session: Session,
        job: Job,
        frames: dict[int, Mapping[int, Found]],
        counted: list[str],
        start: int | None,
        direction: str,
    ) -> None:
        # what is done is noted before anybody may end the work: its frames are kept
        passed = session.propagate(start, direction=direction, progress=job.note)
        counted.append("propagate")
        count = 0
        try:
            with contextlib.closing(passed):
                for shown in passed:
                    count += 1
                    _note(frames, shown)
                    self._show(session, frames)
                    job.check()
        except BaseException as error:
            if not count:
                session.undo()
                counted.pop()
            elif isinstance(error, Cancelled):
                raise Cancelled(f"cancelled; {count} tracked frames are kept") from None
            raise

    @contextlib.contextmanager
    def _change(self, session: Session, job: Job) -> Iterator[tuple[dict[int, Mapping[int, Found]], list[str]]]:
        """A change of the objects: masks to change, and a list that takes a name for each change of the session."""
        job.check()
        before = self.view.frames
        frames, counted = dict(before), list[str]()
        with self._named():
            try:
                yield frames, counted
            finally:
                if counted:
                    self._steps.append(_Step(before, len(counted)))
                    left = session.limit_undo(self.limits.undo_bytes)
                    while sum(step.changes for step in self._steps) > left:
                        self._steps.popleft()
                self._show(session, frames)

    def _show(self, session: Session, frames: Mapping[int, Mapping[int, Found]]) -> None:
        """Puts a new view in place."""
        objects = tuple(
            ObjectView(object_id, label, session.prompts(object_id)) for object_id, label in session.labels.items()
        )
        with self._lock:
            self._reserved -= set(session.object_ids)
        self.view = View(self.view.version + 1, objects, MappingProxyType(dict(frames)), len(self._steps))

    def _check_room(self, more: int) -> None:
        """Raises Refusal if so many objects more would take too much memory, or are too many."""
        assert self.network is not None
        count = len(self.view.objects) + more
        if count > self.limits.objects:
            raise Refusal(f"a session has {self.limits.objects} objects at most; remove one first", 409)
        cfg = self.network.network.tracker_cfg
        each = cfg.low_res_size**2 * 4 + cfg.feature_size**2 * cfg.memory_dim * 2  # mask in float32, memory in bfloat16
        need = count * self.num_frames * each
        if need > self.limits.outcome_bytes:
            raise Refusal(
                f"{count} objects on {self.num_frames} frames take more memory than this server gives to a session; "
                "remove an object, or upload a shorter video",
                409,
            )

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Messages call the video as its user does; where it lies here is nobody's business."""
        try:
            yield
        except UserError as error:
            text = str(error).replace(str(self.upload.path), self.upload.name)
            if text == str(error):
                raise
            raise Refusal(text, 400) from error


def _note(frames: dict[int, Mapping[int, Found]], shown: ObjectMasks) -> None:
    """Puts the masks of a frame in their place. Objects that were not tracked to it have none."""
    found = zip(shown.object_ids, shown.masks, shown.scores)
    frames[shown.index] = {
        object_id: Found(float(score), encode_mask(mask)) for object_id, mask, score in found if not math.isnan(score)
    }


def prompts_of(view: ObjectView) -> list[dict[str, Any]]:
    """An object's prompts as JSON, by rising frame."""
    out: list[dict[str, Any]] = []
    for frame, prompt in sorted(view.prompts.items()):
        if isinstance(prompt, Clicks):
            box = None if prompt.box is None else np.round(prompt.box, 2).tolist()
            points = np.round(prompt.coords, 2).tolist()
            out.append(
                {"frame": frame, "kind": "points", "points": points, "labels": prompt.labels.tolist(), "box": box}
            )
        else:
            out.append({"frame": frame, "kind": "mask" if isinstance(prompt, GivenMask) else "sentence"})
    return out
