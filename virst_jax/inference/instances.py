"""Several instances of what a sentence means, each with a number of its own.

The network gives one mask for all that a sentence means. On every anchor this mask falls apart into connected
components. On the first anchor each is an instance. On a later one, the tracker predicts where the instances so far
are, from their masks on the anchors before; a component that agrees with a prediction belongs to that instance, one
that no prediction covers is a new instance. The components are then the anchors of their instances, as masks that a
person would give, and all frames are tracked with them.

What this cannot do: instances that touch each other on every anchor are one. Parts of an instance that lie apart, such
as behind a pole, are several where they were never seen together. What the sentence's mask leaves out on all anchors is
not found, and between two anchors nothing new is.

Axes: N instances, O objects of a call, A anchors, T frames, K components, H, W size of the video, L mask side.
"""

import functools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import label
from scipy.optimize import linear_sum_assignment

from virst_jax.errors import UserError
from virst_jax.inference import objects as store
from virst_jax.inference.objects import ObjectState, Outcome
from virst_jax.inference.prompts import GivenMask, mask_for_network
from virst_jax.inference.results import FrameMasks
from virst_jax.inference.steps import ExpressionBatch, Network
from virst_jax.inference.stream import Run, SegmentationStream, ahead, encode_in_order
from virst_jax.inference.tiles import MaskTiles
from virst_jax.models.sam2.sam2 import Features
from virst_jax.models.sam2.tracker import Tracked

LEAST_AREA = 1e-3  # of the frame: a smaller component is a speck
AGREES, COVERED = 0.5, 0.5  # IoU with a prediction; share of a component that known instances cover
MOST = 64  # instances of a sentence: a mask that falls into more pieces is no mask of objects


@dataclass(frozen=True)
class Instance:
    """One of the objects that a sentence means."""

    sentence: str
    state: ObjectState


class Finder:
    """Finds the instances of sentences on their anchors.

    Args:
      features: of the anchors' frames, by their numbers.
      size: height, width of the video.
      num_frames: of the video.
      group_size: objects that are predicted in one call, a power of two.
    """

    def __init__(
        self,
        network: Network,
        features: Mapping[int, Features],
        size: tuple[int, int],
        num_frames: int,
        group_size: int,
    ):
        self.network, self.features, self.num_frames, self.group_size = network, features, num_frames, group_size
        self._tiles = MaskTiles(size, network.cfg.sam2.low_res_size)

    def find(self, sentences: Sequence[str], batches: Sequence[ExpressionBatch]) -> list[Instance]:
        """The instances of all sentences, numbered from 1, in the order of sentences and of first appearance."""
        found: list[Instance] = []
        rows = [(batch, row) for batch in batches for row in range(batch.count)]
        for sentence, (batch, row) in zip(sentences, rows):
            states = self._of_sentence(batch, row, len(found))
            found += [Instance(sentence, state) for state in states]
        return found

    def _of_sentence(self, batch: ExpressionBatch, row: int, numbered: int) -> list[ObjectState]:
        valid, frames = (np.asarray(x) for x in (batch.anchors.valid, batch.anchors.frames))
        low_res = np.asarray(batch.anchors.prediction.low_res[:, row])
        states: list[ObjectState] = []
        for slot in sorted(np.flatnonzero(valid), key=lambda slot: frames[slot]):
            frame = int(frames[slot])
            parts = components(self._full(low_res[slot][None])[0])
            known = self._predict(states, frame) if states else np.zeros((0, *parts.shape[1:]), bool)
            states, known = merge(states, known)
            for part, index in zip(parts, assign(known, parts)):
                if index is None:
                    continue  # known instances cover it
                if index < 0:
                    if len(states) == MOST:
                        continue
                    states.append(ObjectState(0, ""))
                    index = len(states) - 1
                self._anchor(states[index], frame, part)
        for i, state in enumerate(states):
            state.object_id, state.label = numbered + i + 1, f"object {numbered + i + 1}"
        return states

    def _anchor(self, state: ObjectState, frame: int, mask: np.ndarray) -> None:
        side = self.network.cfg.sam2.image_size
        got: Tracked = jax.device_get(self.network.use_masks(self.features[frame], mask_for_network(mask, side)))
        p = got.prediction
        low_res, pointer, memory = (np.asarray(x)[0] for x in (p.low_res, p.pointer, got.memory))
        state.prompts[frame] = GivenMask(mask)
        state.anchors[frame] = Outcome(low_res, pointer, memory, float(p.object_score[0]), float(p.iou[0]))

    def _predict(self, states: Sequence[ObjectState], frame: int) -> np.ndarray:
        """Where the instances so far are on a frame, bool[N, H, W]."""
        cfg, found = self.network.cfg.sam2, []
        for group, count in store.groups_of(states, self.group_size):
            anchors, bank = store.gather_anchors(group), store.gather_bank(cfg, group, frame, 1)
            features = [self.features[frame]]
            _, out = self.network.propagate(anchors, bank, features, [frame], 1, self.num_frames, 1)
            found.append(self._full(out.prediction.low_res[0])[:count])
        return np.concatenate(found)

    def _full(self, low_res: np.ndarray | jax.Array) -> np.ndarray:
        """Logits float32[O, L, L] -> masks bool[O, H, W]."""
        on_device = jnp.asarray(low_res)[None]
        tiles = [[self.network.resize_masks(on_device, *m) for m in row] for row in self._tiles.matrices]
        return self._tiles.join(tiles)[0]


def components(mask: np.ndarray) -> np.ndarray:
    """The connected parts of a mask bool[H, W], without specks: bool[K, H, W], the largest first, at most `MOST`.

    Pixels are connected that touch at a side or at a corner.
    """
    labels, count = label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.reshape(-1), minlength=count + 1)[1:]
    order = [i for i in np.argsort(-areas, kind="stable") if areas[i] >= LEAST_AREA * mask.size][:MOST]
    parts = [labels == i + 1 for i in order]
    return np.stack(parts) if parts else np.zeros((0, *mask.shape), bool)


def assign(known: np.ndarray, parts: np.ndarray) -> list[int | None]:
    """To which instance each component belongs: its index, -1 for a new one, None for what belongs to several.

    Args:
      known: predictions bool[N, H, W].
      parts: components bool[K, H, W].
    """
    if not len(known) or not len(parts):
        return [-1] * len(parts)
    flat, pieces = (x.reshape(len(x), -1).astype(np.float32) for x in (known, parts))
    common = flat @ pieces.T
    union = flat.sum(1)[:, None] + pieces.sum(1)[None] - common
    iou = common / np.maximum(union, 1)
    out: list[int | None] = [-1] * len(parts)
    for i, k in zip(*linear_sum_assignment(iou, maximize=True)):
        if iou[i, k] >= AGREES:
            out[k] = int(i)
    covered = (parts & known.any(0)).reshape(len(parts), -1).mean(1) / parts.reshape(len(parts), -1).mean(1)
    return [None if index == -1 and share >= COVERED else index for index, share in zip(out, covered)]


def merge(states: list[ObjectState], known: np.ndarray) -> tuple[list[ObjectState], np.ndarray]:
    """Instances that have come to be predicted in one place become one, unless they were seen apart on an anchor.

    Args:
      known: predictions bool[N, H, W].

    Returns:
      The instances that are left, and their predictions.
    """
    kept: list[int] = []
    for i in range(len(states)):
        for k in kept:
            union = (known[i] | known[k]).sum()
            same = union and (known[i] & known[k]).sum() / union >= AGREES
            if same and not states[i].anchors.keys() & states[k].anchors.keys():
                states[k].anchors |= states[i].anchors
                states[k].prompts |= states[i].prompts
                break
        else:
            kept.append(i)
    return [states[i] for i in kept], known[kept]


class InstanceRun(Run):
    """As `Run`, with an object for each instance in place of each sentence."""

    instances: Sequence[Instance] = ()

    def prepare(self) -> None:
        if self.batches:
            return
        super().prepare()
        with self._timed("anchors"):
            finder = Finder(self.network, self.features, self.reader.size, self.num_frames, self.options.group_size)
            self.instances = finder.find(self.expressions, self.batches)

    def _frames(self) -> Generator[FrameMasks, None, None]:
        self.prepare()
        states = [instance.state for instance in self.instances]
        network, cfg, chunk = self.network, self.network.cfg.sam2, self.options.chunk
        tiles = MaskTiles(self.reader.size, cfg.low_res_size)
        groups = store.groups_of(states, self.options.group_size)
        anchors = [store.gather_anchors(group) for group, _ in groups]
        banks = [store.gather_bank(cfg, group, 0, 1) for group, _ in groups]
        with ahead(self.pixels()) as pixels:
            features = encode_in_order(self.encoder, pixels, self._known)
            for begin in range(0, self.num_frames, chunk):
                numbers = range(begin, min(begin + chunk, self.num_frames))
                with self._timed("track"):
                    taken = list(islice(features, len(numbers)))
                    if len(taken) < len(numbers):
                        raise UserError(f"the video ended before frame {numbers[-1]}; was it changed?")
                    masks, scores, soft = [], [], [np.zeros((len(numbers), 0, *self.reader.size), np.uint8)]
                    for i, (group, count) in enumerate(groups):
                        banks[i], out = network.propagate(
                            anchors[i], banks[i], taken, numbers, 1, self.num_frames, chunk
                        )
                        low_res, score = _with_anchors(group, numbers, out)
                        resized = [[network.resize_masks(low_res, *m) for m in row] for row in tiles.matrices]
                        masks.append(tiles.join(resized)[: len(numbers), :count])
                        scores.append(score[: len(numbers), :count])
                        if self.options.soft:
                            blurred = [[network.soften_masks(low_res, *m) for m in row] for row in tiles.matrices]
                            soft.append(tiles.join_soft(blurred)[: len(numbers), :count])
                    nothing = np.zeros((len(numbers), 0, *self.reader.size), bool)
                    joined = np.concatenate([nothing, *masks], axis=1)
                    joined_scores = np.concatenate([np.zeros((len(numbers), 0), np.float32), *scores], axis=1)
                    joined_soft = np.concatenate(soft, axis=1) if self.options.soft else None
                for t, number in enumerate(numbers):
                    self.progress("track", number + 1, self.num_frames)
                    yield FrameMasks(
                        number, joined[t], joined_scores[t], None if joined_soft is None else joined_soft[t]
                    )


def _with_anchors(group: Sequence[ObjectState], numbers: Sequence[int], out: Tracked) -> tuple[jax.Array, np.ndarray]:
    """Logits [T, O, L, L] and scores float32[T, O] of a chunk, those of the anchors in their places."""
    low_res, scores = out.prediction.low_res, np.array(out.prediction.object_score)
    for t, number in enumerate(numbers):
        for row, state in enumerate(group):
            if number in state.anchors:
                low_res = low_res.at[t, row].set(state.anchors[number].low_res)
                scores[t, row] = state.anchors[number].score
    return low_res, scores


class InstanceStream(SegmentationStream):
    """As `SegmentationStream`, with an object for each instance. How many there are is known behind `prepare`.

    It cannot go on from the state of an earlier one.
    """

    _run: InstanceRun
    _run_type = InstanceRun

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(instance.sentence for instance in self._run.instances)

    @property
    def object_ids(self) -> tuple[int, ...]:
        return tuple(instance.state.object_id for instance in self._run.instances)

    @functools.cached_property
    def anchors_of(self) -> dict[int, tuple[int, ...]]:
        """Of every instance, the frames on which its mask was given."""
        return {i.state.object_id: tuple(sorted(i.state.anchors)) for i in self._run.instances}
