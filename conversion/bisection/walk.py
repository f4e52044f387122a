"""Walks the operations of a case twice: on our own inputs, and on the recorded ones.

The first walk tells how errors add up, the second one which operation makes them.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from virst_jax.inference.plan import Plan
from virst_jax.inference.steps import Network

from ..cases.case import Case
from ..cases.network import anchors_of, video_clips, video_of
from .encoders import image_operations, video_operations
from .language import fusion_operations, language_operations
from .operation import Operation, conditioning, explained, relative_error
from .tracking import tracking_operations

FIXED: dict[str, np.ndarray] = {"scan.state": np.asarray(True)}  # known whatever was recorded


@dataclass(frozen=True)
class Row:
    """What was found about one operation. What was not recorded, or not asked for, is None.

    Attributes:
      output: of its recorded outputs, the one that is furthest from what rounding explains.
      accumulated: relative error on our own inputs.
      alone: on recorded inputs.
      explained: the relative error that rounding explains on these inputs.
      conditioning: relative change of the outputs over that of the inputs.
    """

    operation: str
    output: str
    accumulated: float | None = None
    alone: float | None = None
    explained: float | None = None
    conditioning: float | None = None

    @property
    def passed(self) -> bool:
        """Whether rounding explains the error."""
        return self.alone is None or self.explained is None or self.alone <= self.explained


def operations(case: Case, network: Network, anchors: Any = None) -> Iterator[Operation]:
    """All operations of an e2e case in the order of computation.

    anchors: the recorded choice, frame numbers; None: our own.
    """
    cfg, meta = network.cfg, case.meta
    video = video_of(case)
    clips, scale = video_clips(case, cfg, video)
    seg_frames = meta["sam_idx"]
    plan = Plan(tuple(range(clips.shape[0] * clips.shape[1])), tuple(seg_frames), anchors_of(cfg, seg_frames))
    yield from image_operations(network, video, seg_frames)
    yield from video_operations(network, clips, scale)
    yield from language_operations(network, meta, len(clips))
    yield from fusion_operations(network)
    yield from tracking_operations(network, video, plan, anchors)


@dataclass
class Walk:
    """Both walks over operations.

    Attributes:
      recorded: tensors by name; those that are missing are not compared.
      eps: distance from 1 to the next number, of the coarsest type that takes part.
      thorough: measure explained errors and conditioning everywhere, not only where an error is not small.
      accumulate: also walk on our own inputs.
      own: after the walk, our tensors.
    """

    recorded: Mapping[str, Any]
    eps: float
    thorough: bool = False
    accumulate: bool = True
    keep: bool = False  # all of our tensors, not only those that are needed still
    own: dict[str, Any] = field(default_factory=dict)
    _bounds: dict[str, float] = field(default_factory=dict)  # of the operations so far: what rounding explains

    def rows(self, steps: Iterable[Operation]) -> Iterator[Row]:
        """One row for each operation, as it is computed."""
        listed = list(steps)
        last = {name: i for i, step in enumerate(listed) for name in step.inputs}
        for i, step in enumerate(listed):
            outputs = step.run(step.params, *(self.own[n] for n in step.inputs)) if self.accumulate else None
            yield self._row(step, outputs)
            for name, value in zip(step.outputs, outputs or ()):
                self.own.setdefault(name, np.asarray(value))
            if not self.keep:
                for name in [n for n in self.own if last.get(n, -1) <= i]:
                    del self.own[name]

    def known(self, name: str) -> Any:
        return FIXED[name] if name in FIXED else self.recorded.get(name)

    def _row(self, step: Operation, own: tuple[Any, ...] | None) -> Row:
        theirs = [self.known(name) for name in step.outputs]
        compared = [k for k, value in enumerate(theirs) if value is not None]
        if not compared:
            return Row(step.name, step.outputs[0])
        accumulated = [relative_error(own[k], theirs[k]) for k in compared] if own is not None else None
        inputs = [self.recorded[name] for name in step.inputs if name in self.recorded]
        if len(inputs) < len(step.inputs):
            assert accumulated is not None or not self.accumulate
            worst = int(np.argmax(accumulated)) if accumulated else 0
            return Row(step.name, step.outputs[compared[worst]], accumulated[worst] if accumulated else None)
        outputs = own if own is not None and not step.inputs else step.run(step.params, *inputs)
        alone = [relative_error(outputs[k], theirs[k]) for k in compared]
        bounds, condition = [self._least(step)] * len(compared), None
        if self.thorough or any(a > b for a, b in zip(alone, bounds)):
            if all(np.isfinite(alone)):
                moved = explained(step, inputs, outputs, self.eps)
                bounds = [max(moved[k], bound) for k, bound in zip(compared, bounds)]
            condition = conditioning(step, inputs, outputs, self.eps)
        worst = int(np.argmax([a / b for a, b in zip(alone, bounds)]))
        self._bounds[step.name] = bounds[worst]
        return Row(
            step.name,
            step.outputs[compared[worst]],
            accumulated[worst] if accumulated else None,
            alone[worst],
            bounds[worst],
            condition,
        )

    def _least(self, step: Operation) -> float:
        """What rounding explains without a measurement: the errors of a stage's parts, as if they were independent."""
        parts = [bound for name, bound in self._bounds.items() if step.whole and name.startswith(step.whole)]
        return max(self.eps, float(np.linalg.norm(parts))) if parts else self.eps


def first_difference(rows: Iterable[Row]) -> Row | None:
    """The first operation whose error rounding does not explain."""
    return next(itertools.filterfalse(lambda row: row.passed, rows), None)
