"""A session on one video: objects that a person points at, on any frame, tracked through the others and corrected.

Semantics are those of SAM 2's video predictor. On a frame that was not tracked yet, clicks segment the object without
memory; such a frame is an anchor, to which all frames attend. On a tracked frame they correct what the tracker has
found: it sees its memories, the mask so far and the clicks. The corrected frame becomes an anchor too, as SAM 2 does
with add_all_frames_to_correct_as_cond (without it, its next propagation would undo the correction). Tracking may begin
at any frame, and runs forward and backward.

What differs: small holes of masks are not filled.

Axes: N objects of the session, O objects of a call, T frames, H, W size of the video, R side of the tracker's image,
L mask side.
"""

import collections
import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.errors import UserError
from virst_jax.inference import objects as store
from virst_jax.inference.frame_features import FrameFeatures
from virst_jax.inference.objects import ObjectState
from virst_jax.inference.outcomes import Outcome, OutcomeStore
from virst_jax.inference.plan import padded_rows
from virst_jax.inference.prompts import Clicks, Prompt, check_clicks, check_mask, mask_for_network
from virst_jax.inference.tiles import MaskTiles
from virst_jax.inference.tracker_steps import Past, TrackerNetwork
from virst_jax.io.video import Reader
from virst_jax.models.sam2.sam2 import NO_OBJECT_LOGIT
from virst_jax.models.sam2.tracker import Tracked

BUDGET = 2 * 2**30  # bytes of frames' features that a session keeps on the device
HOST_BUDGET = 4 * 2**30  # bytes of frames' outcomes that a session keeps in the host's memory
UNDO_STEPS = 32
DIRECTIONS = ("forward", "backward", "both")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class ObjectMasks:
    """The objects of a session on one frame."""

    index: int  # number of the frame
    object_ids: tuple[int, ...]
    masks: np.ndarray  # bool[N, H, W]
    scores: np.ndarray  # float32[N], logits: there where above 0; nan: the object was not tracked to this frame

    def __repr__(self) -> str:
        count, height, width = self.masks.shape
        return f"ObjectMasks(index={self.index}, object_ids={self.object_ids}, masks=bool[{count}, {height}, {width}])"

    def of(self, object_id: int) -> np.ndarray:
        """The mask of one object, bool[H, W]. Raises KeyError: there is no such object."""
        if object_id not in self.object_ids:
            raise KeyError(object_id)
        mask: np.ndarray = self.masks[self.object_ids.index(object_id)]
        return mask


class Session:
    """Prompts, corrections and tracking on one video. `Model.session` and `TrackerModel.session` make one.

    Whatever raises an error leaves the session as it was. Prompts return the masks of all objects on their frame;
    `propagate` tracks the others. Shapes are padded to powers of two (clicks, objects, anchors), so that nothing is
    compiled for a number of clicks, objects or frames that has had its bucket before.

    Args:
      network: the tracker.
      reader: the video.
      exclusive: masks do not overlap: a pixel belongs to the object with the largest logit.
      keep_previous: clicks on a frame that has a mask are read together with it, as SAM 2 does.
      budget: bytes of frames' features that are kept on the device, so that no frame is encoded twice while they
        suffice.
      host_budget: bytes of the outcomes of tracked frames, those that `undo` needs among them, that are kept in the
        host's memory; the rest lies in a temporary file. See `num_bytes` and `num_bytes_on_disk`.
      batch: frames that are encoded at a time.
      chunk: frames that are tracked in one call.
      group_size: objects that are tracked in one call, a power of two.

    Attributes:
      reader: the video.
      features: of its frames.
    """

    def __init__(
        self,
        network: TrackerNetwork,
        reader: Reader,
        *,
        exclusive: bool = False,
        keep_previous: bool = True,
        budget: int = BUDGET,
        host_budget: int = HOST_BUDGET,
        batch: int = 1,
        chunk: int = 4,
        group_size: int = 8,
    ):
        for name, value in (("budget", budget), ("host_budget", host_budget)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
                raise UserError(f"the {name} is {value!r}; give a number of bytes")
        self.network, self.reader = network, reader
        self.exclusive, self.keep_previous = bool(exclusive), keep_previous
        self.chunk, self.group_size = chunk, group_size
        self.num_frames = reader.num_frames
        self.features = FrameFeatures(network, reader, int(budget), batch)
        self._store = OutcomeStore(int(host_budget))
        self._objects: dict[int, ObjectState] = {}
        self._past: collections.deque[dict[int, ObjectState]] = collections.deque(maxlen=UNDO_STEPS)
        self._tiles = MaskTiles(reader.size, network.tracker_cfg.low_res_size)
        self._lock = threading.RLock()
        self._tracking = False

    def __repr__(self) -> str:
        height, width = self.reader.size
        shown = f"{self.num_frames} frames of {width}x{height}"
        return f"{type(self).__name__}({self.reader.name!r}, {shown}, objects={list(self.object_ids)})"

    # what there is

    @property
    def object_ids(self) -> tuple[int, ...]:
        """Numbers of the objects, in the order in which they were begun."""
        return tuple(self._objects)

    @property
    def labels(self) -> dict[int, str]:
        """What each object is called: its sentence, or "object 3"."""
        return {object_id: state.label for object_id, state in self._objects.items()}

    @property
    def anchors(self) -> dict[int, tuple[int, ...]]:
        """The prompted frames of each object."""
        return {object_id: tuple(sorted(state.anchors)) for object_id, state in self._objects.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory that the outcomes of frames take now, those that `undo` needs among them."""
        return self._store.num_bytes

    @property
    def num_bytes_on_disk(self) -> int:
        """Bytes of the temporary file with the outcomes that `host_budget` has no room for."""
        return self._store.num_bytes_on_disk

    @property
    def num_undo(self) -> int:
        """How many changes `undo` can take back now, at most UNDO_STEPS."""
        return len(self._past)

    def prompts(self, object_id: int) -> dict[int, Prompt]:
        """What was given for an object, by frame. Raises UserError: there is no such object."""
        return dict(self._known(object_id).prompts)

    # prompts

    def add_points(
        self,
        object_id: int,
        frame: int,
        points: Sequence[Sequence[float]] | np.ndarray | None = None,
        labels: Sequence[int] | np.ndarray | None = None,
        *,
        box: Sequence[float] | np.ndarray | None = None,
        replace: bool = True,
    ) -> ObjectMasks:
        """Clicks on or beside an object, a box around it, or both.

        Args:
          object_id: 1 or more; a new number begins an object.
          frame: number of the frame.
          points: number[P, 2], (x, y) in pixels of the video.
          labels: 1 for points on the object, 0 for points beside it; None: all are on it.
          box: (x0, y0, x1, y1) in pixels of the video.
          replace: earlier clicks, box or mask of this object on this frame are forgotten; otherwise the points are
            added to the clicks.

        Returns:
          The masks of all objects on this frame.

        Raises:
          UserError: something outside of the frame or the video, or that is no click, box or number.
        """
        frame, object_id = self._frame(frame), self._checked_id(object_id)
        clicks = check_clicks(self.reader.size, points, labels, box)
        with self._change():
            state = self._state(object_id)
            earlier = state.prompts.get(frame)
            if not replace and isinstance(earlier, Clicks):
                if clicks.box is not None:
                    raise UserError("a box comes before clicks; give it with replace=True, together with the points")
                clicks = clicks.after(earlier)
            self._set_anchor(state, frame, clicks, self._segment(state, frame, clicks))
        return self.masks(frame)

    def add_mask(self, object_id: int, frame: int, mask: Any) -> ObjectMasks:
        """A mask of an object on a frame, in place of what was there.

        Args:
          object_id, frame: as of `add_points`.
          mask: bool[H, W] of the video's size, or numbers that are above 0 on the object. An empty one says that the
            object is not on this frame.

        Raises:
          UserError: as of `add_points`, or a mask of another size.
        """
        frame, object_id = self._frame(frame), self._checked_id(object_id)
        given = check_mask(self.reader.size, mask)
        with self._change():
            state = self._state(object_id)
            side = self.network.tracker_cfg.image_size
            out = self.network.use_masks(self.features.get(frame), mask_for_network(given.mask, side))
            self._set_anchor(state, frame, given, _outcomes(out)[0])
        return self.masks(frame)

    def clear(self, object_id: int, frame: int) -> ObjectMasks:
        """Forgets what was given for an object on a frame, which is an anchor no more.

        Raises:
          UserError: there is no such object or frame, or nothing was given there.
        """
        frame, state = self._frame(frame), self._known(object_id)
        if frame not in state.prompts:
            raise UserError(
                f"object {object_id} has no prompt on frame {frame}; it has some on {sorted(state.prompts)}"
            )
        with self._change():
            self._state(object_id).clear(frame)
        return self.masks(frame)

    def remove(self, object_id: int) -> None:
        """Forgets an object. Raises UserError: there is none of this number."""
        self._known(object_id)
        with self._change():
            del self._objects[object_id]

    def reset(self) -> None:
        """Forgets all objects; `undo` brings them back."""
        with self._change():
            self._objects = {}

    def undo(self) -> None:
        """Takes back the last change: a prompt, an object that was removed or cleared, or a propagation.

        Raises:
          UserError: there is nothing to take back.
        """
        with self._lock:
            self._refuse_while_tracking()
            if not self._past:
                raise UserError("there is nothing to undo")
            self._objects = self._past.pop()

    def limit_undo(self, num_bytes: int) -> int:
        """Forgets the oldest changes until what only `undo` needs takes no more than so many bytes.

        Returns:
          How many changes are left.
        """
        with self._lock:
            seen = {id(outcome) for state in self._objects.values() for outcome in state.outcomes()}
            left, keep = num_bytes, 0
            for objects in reversed(self._past):  # the newest first
                only_here = {id(x): x for state in objects.values() for x in state.outcomes() if id(x) not in seen}
                left -= sum(outcome.num_bytes for outcome in only_here.values())
                if left < 0:
                    break
                seen |= only_here.keys()
                keep += 1
            while len(self._past) > keep:
                self._past.popleft()
        return keep

    # tracking

    def propagate(
        self,
        start: int | None = None,
        *,
        direction: str = "both",
        first: int = 0,
        last: int | None = None,
        progress: Progress | None = None,
    ) -> Generator[ObjectMasks, None, None]:
        """Tracks all objects through frames and yields their masks, frame by frame in the order of tracking.

        What was tracked is kept when the loop over it is left at any frame.

        Args:
          start: the frame to begin at; None: the earliest prompted one, or frame 0 if a sentence has begun an object.
          direction: "forward" from there to `last`, "backward" from there to `first`, or "both", one after the other.
          first, last: the range of frames; last None: the video's last.
          progress: called with "track", how many frames are done, and of how many.

        Raises:
          UserError: no object, one without any prompt, or a frame out of range.
        """
        if direction not in DIRECTIONS:
            raise UserError(f"the direction is {direction!r}; choose {', '.join(DIRECTIONS)}")
        self._refuse_while_tracking()
        if not self._objects:
            raise UserError("there is no object to track; add points, a box, a mask or a sentence first")
        for state in self._objects.values():
            if not state.anchors:
                raise UserError(f"{state.label} has no prompt left; give one, or remove the object")
        first, last = self._frame(first), self._frame(self.num_frames - 1 if last is None else last)
        if start is None:
            by_sentence = any(state.by_sentence for state in self._objects.values())
            earliest = min(min(state.anchors) for state in self._objects.values())
            start = min(max(0 if by_sentence else earliest, first), last)
        start = self._frame(start)
        if not first <= start <= last:
            raise UserError(f"frame {start}, where tracking begins, is not among frames {first} to {last}")
        ways: list[tuple[range, int]] = []
        if direction != "backward":
            ways.append((range(start, last + 1), 1))
        if direction == "backward":
            ways.append((range(start, first - 1, -1), -1))
        elif direction == "both" and start > first:
            ways.append((range(start - 1, first - 1, -1), -1))
        return self._propagate(ways, progress or (lambda stage, done, total: None))

    def masks(self, frame: int) -> ObjectMasks:
        """The masks of all objects on a frame, as far as they are known.

        Raises:
          UserError: there is no such frame.
        """
        frame = self._frame(frame)
        with self._lock:
            states = list(self._objects.values())
            outcomes = [state.on(frame) for state in states]
        return self._shown([frame], states, [outcomes])[0]

    def logits(self, object_id: int, frame: int) -> np.ndarray:
        """The tracker's mask of an object on a frame, logits float32[L, L].

        Raises:
          UserError: there is no such object or frame, or it was not tracked to this frame.
        """
        return self.outcome(object_id, frame).low_res

    def outcome(self, object_id: int, frame: int) -> Outcome:
        """All that is kept of an object on a frame. Raises as `logits` does."""
        outcome = self._known(object_id).on(self._frame(frame))
        if outcome is None:
            raise UserError(f"object {object_id} was not tracked to frame {frame}; propagate first")
        return outcome

    # inside

    def _propagate(self, ways: Sequence[tuple[range, int]], progress: Progress) -> Generator[ObjectMasks, None, None]:
        with self._lock:
            self._refuse_while_tracking()
            self._tracking = True
        self._past.append(store.snapshot(self._objects))
        total, done = sum(len(frames) for frames, _ in ways), 0
        try:
            for frames, sign in ways:
                for shown in self._track(frames, sign):
                    done += 1
                    progress("track", done, total)
                    yield shown
        finally:
            self._tracking = False

    def _track(self, frames: range, sign: int) -> Iterator[ObjectMasks]:
        """Tracks one way."""
        states = list(self._objects.values())
        for state in states:
            state.settle()
        groups = store.groups_of(states, self.group_size)
        anchors = [store.gather_anchors(group) for group, _ in groups]
        cfg = self.network.tracker_cfg
        banks = [store.gather_bank(cfg, group, frames[0], sign) for group, _ in groups]
        with contextlib.closing(self.features.walk(frames)) as features:
            for begin in range(0, len(frames), self.chunk):
                numbers = frames[begin : begin + self.chunk]
                taken = [next(features) for _ in numbers]
                outcomes: list[list[Outcome]] = [[] for _ in numbers]
                for i, (_, count) in enumerate(groups):
                    banks[i], out = self.network.propagate(
                        anchors[i], banks[i], taken, numbers, sign, self.num_frames, self.chunk
                    )
                    for t, found in enumerate(_by_frame(out, len(numbers), count)):
                        outcomes[t] += found
                for number, found in zip(numbers, outcomes):
                    for state, outcome in zip(states, found):
                        if number not in state.anchors:
                            state.tracked[number] = outcome
                        state.backward[number] = sign < 0
                for outcome in (outcome for found in outcomes for outcome in found):
                    self._store.keep(outcome)
                yield from self._shown(numbers, states, [[s.on(n) for s in states] for n in numbers])

    def _segment(self, state: ObjectState, frame: int, clicks: Clicks) -> Outcome:
        """An object on one frame from clicks."""
        cfg = self.network.tracker_cfg
        earlier = state.on(frame) if self.keep_previous else None
        prompt = np.zeros((cfg.low_res_size,) * 2, np.float32) if earlier is None else earlier.low_res
        past: Past | None = None
        if frame in state.backward and state.settled:
            sign, seen = -1 if state.backward[frame] else 1, [state.before_prompts()]
            bank = store.gather_bank(cfg, seen, frame, sign)
            numbers = [jnp.asarray(x, jnp.int32) for x in (frame, sign, self.num_frames)]
            past = (store.gather_anchors(seen), bank, numbers[0], numbers[1], numbers[2])
        tokens = clicks.tokens(self.reader.size, cfg.image_size)
        out = self.network.prompt_objects(self.features.get(frame), tokens, prompt[None], earlier is not None, past)
        return _outcomes(out)[0]

    def _set_anchor(self, state: ObjectState, frame: int, prompt: Prompt, outcome: Outcome) -> None:
        state.prompts[frame] = prompt
        state.anchors[frame] = self._store.keep(outcome)
        self._objects[state.object_id] = state

    def _shown(
        self, numbers: Sequence[int], states: Sequence[ObjectState], outcomes: Sequence[Sequence[Outcome | None]]
    ) -> list[ObjectMasks]:
        """Masks of the video's size."""
        ids, side = tuple(state.object_id for state in states), self.network.tracker_cfg.low_res_size
        if not states:
            nothing = np.zeros((0, *self.reader.size), bool)
            return [ObjectMasks(number, ids, nothing, np.zeros(0, np.float32)) for number in numbers]
        rows = padded_rows(len(states))
        shown = []
        for number, found in zip(numbers, outcomes):
            low_res = np.full((1, rows, side, side), NO_OBJECT_LOGIT, np.float32)
            for row, outcome in enumerate(found):
                if outcome is not None:
                    low_res[0, row] = outcome.low_res
            on_device = jax.device_put(low_res)
            tiles = [
                [self.network.resize_masks(on_device, *matrices, exclusive=self.exclusive) for matrices in row]
                for row in self._tiles.matrices
            ]
            masks = self._tiles.join(tiles)[0, : len(states)]
            scores = np.array([np.nan if outcome is None else outcome.score for outcome in found], np.float32)
            shown.append(ObjectMasks(number, ids, masks, scores))
        return shown

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """A change of the objects, which either happens as a whole or not at all, and can be undone."""
        with self._lock:
            self._refuse_while_tracking()
            before = self._objects
            self._objects = store.snapshot(before)
            try:
                yield
            except BaseException:
                self._objects = before
                raise
            self._past.append(before)

    def _refuse_while_tracking(self) -> None:
        if self._tracking:
            raise UserError("the objects are being tracked; wait until that has ended, or close its iterator")

    def _state(self, object_id: int) -> ObjectState:
        """An object that is there, or a new one that is not kept yet."""
        return self._objects.get(object_id) or ObjectState(object_id, f"object {object_id}")

    def _known(self, object_id: int) -> ObjectState:
        if object_id not in self._objects:
            there = f"there are {', '.join(map(str, self._objects))}" if self._objects else "there is none yet"
            raise UserError(f"there is no object {object_id!r}; {there}")
        return self._objects[object_id]

    @staticmethod
    def _checked_id(object_id: int) -> int:
        if isinstance(object_id, bool) or not isinstance(object_id, (int, np.integer)) or object_id < 1:
            raise UserError(f"the object is {object_id!r}; objects are numbered from 1")
        return int(object_id)

    def _frame(self, frame: int) -> int:
        if isinstance(frame, bool) or not isinstance(frame, (int, np.integer)):
            raise UserError(f"the frame is {frame!r}; give its number")
        if not 0 <= frame < self.num_frames:
            raise UserError(f"there is no frame {frame}; the video has frames 0 to {self.num_frames - 1}")
        return int(frame)


def _outcomes(out: Tracked) -> list[Outcome]:
    """Of one frame, by object."""
    got: Tracked = jax.device_get(out)
    p = got.prediction
    arrays = [np.asarray(x) for x in (p.low_res, p.pointer, got.memory)]
    # each owns its arrays: one object's may go to the file while another's stay
    return [
        Outcome(low_res.copy(), pointer.copy(), memory.copy(), float(p.object_score[i]), float(p.iou[i]))
        for i, (low_res, pointer, memory) in enumerate(zip(*arrays))
    ]


def _by_frame(out: Tracked, frames: int, count: int) -> list[list[Outcome]]:
    """Of a chunk of frames, the first `count` objects."""
    got: Tracked = jax.device_get(out)
    per_frame = [jax.tree.map(lambda x, t=t: x[t, :count], got) for t in range(frames)]
    return [_outcomes(tracked) for tracked in per_frame]
