"""The tracker's state between two frames as plain arrays, to be kept with np.savez, and back.

    next                 int, the number of the first frame that is not tracked yet
    K.count              int, expressions of batch K
    K.anchors.J          leaf J of its Anchors, in the order of jax.tree.leaves
    K.bank.J             leaf J of its MemoryBank; earlier versions wrote K.recent.J
    ... .bfloat16        behind a key: the bits of a bfloat16 array as uint16, which .npy files cannot name

Without any batch, nothing was done yet.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from virst_jax.errors import UserError
from virst_jax.inference.steps import ExpressionBatch, Steps
from virst_jax.models.sam2.tracker import Anchors, MemoryBank
from virst_jax.types import PyTree

State = Mapping[str, np.ndarray]
ANCHORS, BANK, BANK_BEFORE = "anchors", "bank", "recent"


def pack(next_frame: int, batches: Sequence[ExpressionBatch], banks: Sequence[MemoryBank]) -> dict[str, np.ndarray]:
    """The state before frame `next_frame`.

    Args:
      banks: of every batch, as they were before that frame.
    """
    state = {"next": np.array(next_frame)}
    for i, (batch, bank) in enumerate(zip(batches, banks)):
        state[f"{i}.count"] = np.array(batch.count)
        for name, tree in ((ANCHORS, batch.anchors), (BANK, bank)):
            for j, leaf in enumerate(jax.tree.leaves(jax.device_get(tree))):
                low = leaf.dtype.name == "bfloat16"
                state[f"{i}.{name}.{j}" + (".bfloat16" if low else "")] = leaf.view(np.uint16) if low else leaf
    return state


def unpack(state: State, steps: Steps, num_expressions: int) -> tuple[int, list[ExpressionBatch]]:
    """What `pack` was given.

    Args:
      steps: of the network that goes on.
      num_expressions: that it goes on with.

    Raises:
      UserError: something is missing, or belongs to another network or to other expressions.
    """
    if not isinstance(state, Mapping):
        raise _unfit(f"it is {type(state).__name__}, no arrays by name")
    first = _integer(state, "next")
    batches: list[ExpressionBatch] = []
    while f"{len(batches)}.count" in state:
        i = len(batches)
        count = _integer(state, f"{i}.count")
        if not 1 <= count <= num_expressions:
            raise _unfit(f"{i}.count is {count}")
        rows = _rows(state, i, count)
        anchors, bank = steps.state_shapes(rows)
        before = f"{i}.{BANK_BEFORE}.0" in state
        restored_anchors: Anchors = _restore(state, f"{i}.{ANCHORS}", anchors)
        restored_bank: MemoryBank = _restore(state, f"{i}.{BANK_BEFORE if before else BANK}", bank)
        batches.append(ExpressionBatch(restored_anchors, restored_bank, count))
    total = sum(batch.count for batch in batches)
    if first < 0 or (first and not batches) or (batches and total != num_expressions):
        raise _unfit(f"{total} of {num_expressions} expressions before frame {first}")
    return first, batches


def _rows(state: State, index: int, count: int) -> int:
    """Rows of a batch: of its object scores, [A, O]."""
    scores = state.get(f"{index}.{ANCHORS}.4")
    if scores is None or np.ndim(scores) != 2 or not count <= np.shape(scores)[1] < 2 * count:
        raise _unfit(f"{index}.{ANCHORS}.4 does not hold {count} expressions")
    return int(np.shape(scores)[1])


def _integer(state: State, key: str) -> int:
    value = state.get(key)
    if value is None or np.shape(value) != () or np.asarray(value).dtype.kind not in "iu":
        raise _unfit(f"{key} is missing or no integer")
    return int(value)


def _restore(state: State, prefix: str, shapes: PyTree) -> PyTree:
    leaves = []
    for j, expected in enumerate(jax.tree.leaves(shapes)):
        key, low = f"{prefix}.{j}", expected.dtype.name == "bfloat16"
        leaf = state.get(f"{key}.bfloat16" if low else key)
        if leaf is None:
            raise _unfit(f"{key} is missing or of another type than {expected.dtype}")
        if leaf.dtype != (np.uint16 if low else expected.dtype) or leaf.shape != expected.shape:
            raise _unfit(f"{key} is {leaf.dtype}{list(leaf.shape)}, not {expected.dtype}{list(expected.shape)}")
        leaves.append(leaf.view(expected.dtype) if low else leaf)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _unfit(what: str) -> UserError:
    return UserError(
        f"the saved state of the tracker does not fit ({what}): it is damaged, or of another model, dtype or set of "
        "expressions; start again without it"
    )
