"""A session on one video whose objects may also be begun by sentences.

Axes: A anchor slots, O objects.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from virst_jax.data.prompts import Tokenizer
from virst_jax.errors import UserError
from virst_jax.inference.objects import ObjectState
from virst_jax.inference.outcomes import Outcome
from virst_jax.inference.plan import Options
from virst_jax.inference.prompts import Sentence
from virst_jax.inference.session import Progress, Session
from virst_jax.inference.steps import ExpressionBatch, Network
from virst_jax.inference.stream import SegmentationStream
from virst_jax.io.video import Reader


class TextSession(Session):
    """As `Session`, for a whole VIRST model: a sentence sets anchors, as it does in `Model.segment`.

    The anchors stay when a person corrects the object, and a corrected frame becomes one more of them. Tracked from
    frame 0 on, an object that nobody has corrected has the masks that `Model.segment` gives.

    Args:
      network, tokenizer: of the model.
      reader: the video.
      options: how sentences are read.
      settings: as of `Session`.
    """

    def __init__(self, network: Network, tokenizer: Tokenizer, reader: Reader, options: Options, **settings: Any):
        given = {"batch": options.batch, "chunk": options.chunk, "group_size": options.group_size}
        super().__init__(network, reader, **given | settings)
        self._virst, self._tokenizer, self._options = network, tokenizer, options

    def add_text(
        self,
        sentences: str | Sequence[str],
        *,
        object_ids: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> tuple[int, ...]:
        """Begins an object by a sentence, or several by one each, which are read in one go.

        Args:
          object_ids: their numbers, 1 or more, which must be new; None: the next ones.
          progress: as of `Model.segment`.

        Returns:
          The objects' numbers.

        Raises:
          UserError: a bad sentence, or numbers that are taken or too few.
        """
        with self._change():
            known = {number: self.features.get(number) for number in self.features.kept}
            with SegmentationStream(
                self._virst, self._tokenizer, self.reader, sentences, self._options, progress, known=known
            ) as stream:
                numbers = self._new_ids(len(stream.expressions), object_ids)
                stream.prepare()
                self.features.keep(stream.features)
                outcomes = [anchors for batch in stream.batches for anchors in _anchors(batch)]
            for object_id, text, anchors in zip(numbers, stream.expressions, outcomes):
                prompts = dict.fromkeys(anchors, Sentence(text))
                for outcome in anchors.values():
                    self._store.keep(outcome)
                self._objects[object_id] = ObjectState(object_id, text, True, dict(prompts), anchors)
        return numbers

    def _new_ids(self, count: int, given: Sequence[int] | None) -> tuple[int, ...]:
        if given is None:
            first = max(self._objects, default=0) + 1
            return tuple(range(first, first + count))
        numbers = tuple(self._checked_id(object_id) for object_id in given)
        if len(set(numbers)) != count or len(numbers) != count:
            raise UserError(f"object_ids are {list(numbers)}; give {count} different numbers, one for each sentence")
        taken = [object_id for object_id in numbers if object_id in self._objects]
        if taken:
            raise UserError(f"object {taken[0]} is there already; a sentence begins an object, give another number")
        return numbers


def _anchors(batch: ExpressionBatch) -> list[dict[int, Outcome]]:
    """The anchors of every expression, by frame."""
    anchors = jax.device_get(batch.anchors)
    p, slots = anchors.prediction, np.flatnonzero(anchors.valid)
    return [
        {
            int(anchors.frames[a]): Outcome(
                p.low_res[a, i].copy(),
                p.pointer[a, i].copy(),
                anchors.memory[a, i].copy(),
                float(p.object_score[a, i]),
                float(p.iou[a, i]),
            )
            for a in slots
        }
        for i in range(batch.count)
    ]
