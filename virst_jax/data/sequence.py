"""Puts visual tokens into a prompt, and conversations into one row: arrays of a fixed length that the model gathers by.

Axes: L positions of the sequence, P of them that conversations share, R = L - P others, Q of all conversations in one
row, O conversations, N [SEG] tokens.
Source: model/videochat/modeling_videochat_flash.py, prepare_inputs_labels_for_multimodal.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Ints
from dataclasses import dataclass

import numpy as np

from virst_jax.config import IGNORE, IMAGE_TOKEN
from virst_jax.errors import UserError


@dataclass(frozen=True)
class Sequence:
    """One conversation with room for its visual tokens."""

    token_ids: np.ndarray  # int32[L]; 0 where a visual token stands and on padding
    visual_index: np.ndarray  # int32[L], number of the visual token; -1: text
    labels: np.ndarray  # int32[L]
    mask: np.ndarray  # bool[L], False on padding
    seg_positions: np.ndarray  # int32[N], where the label is [SEG]


def splice(
    input_ids: Ints[int] | np.ndarray,
    labels: Ints[int] | np.ndarray,
    num_visual: int,
    seg_token_id: int,
    length: int | None = None,
) -> Sequence:
    """Replaces the image token by `num_visual` visual tokens and pads on the right to `length`.

    Raises:
      UserError: more than one image token, or the sequence is longer than `length`.
    """
    ids, targets = np.asarray(input_ids), np.asarray(labels)
    places = np.flatnonzero(ids == IMAGE_TOKEN)
    if len(places) > 1:
        raise UserError(f"the prompt holds {len(places)} image tokens: give one video or image a conversation")
    text_ids, visual = ids, np.full(ids.shape, -1)
    if len(places):
        at, after = places[0], places[0] + 1
        text_ids = np.concatenate([ids[:at], np.zeros(num_visual, int), ids[after:]])
        visual = np.concatenate([visual[:at], np.arange(num_visual), visual[after:]])
        targets = np.concatenate([targets[:at], np.full(num_visual, IGNORE), targets[after:]])
    count = len(text_ids)
    length = count if length is None else length
    if count > length:
        raise UserError(
            f"the conversation takes {count} positions, more than the {length} there are: shorten the expression or "
            "use fewer frames"
        )

    def pad(x: np.ndarray, value: int) -> np.ndarray:
        return np.pad(x, (0, length - count), constant_values=value).astype(np.int32)

    return Sequence(
        token_ids=pad(text_ids, 0),
        visual_index=pad(visual, -1),
        labels=pad(targets, IGNORE),
        mask=np.arange(length) < count,
        seg_positions=np.flatnonzero(targets == seg_token_id).astype(np.int32),
    )


def pack(arrays: Mapping[str, np.ndarray], count: int, prefix_len: int, length: int) -> dict[str, np.ndarray]:
    """Conversations one behind the other in one row, which their common prefix begins.

    Args:
      arrays: "token_ids", "visual_index", "labels" int32[O, L] and "mask" bool[O, L]; may have "seg_positions"
        int32[O, N], -1: nowhere.
      count: so many first conversations are packed. The others fill up and are left out.
      prefix_len: P.
      length: Q; the conversations must fit.

    Returns:
      The same arrays of shapes [1, P + Q], and seg_positions in that row, -1 for conversations that are left out;
      "places" int32[O, R], which of the Q positions each conversation's tokens take, -1: there is none.
    """
    own = arrays["mask"][:, prefix_len:].copy()
    own[count:] = False
    places = np.full(own.shape, -1, np.int32)
    places[own] = np.arange(own.sum())

    def row(name: str, padding: int) -> np.ndarray:
        values = arrays[name]
        tail = np.full(length, padding, values.dtype)
        tail[: own.sum()] = values[:, prefix_len:][own]
        return np.concatenate([values[0, :prefix_len], tail])[None]

    packed = {
        "token_ids": row("token_ids", 0),
        "visual_index": row("visual_index", -1),
        "labels": row("labels", IGNORE),
        "mask": row("mask", False),
        "places": places,
    }
    if "seg_positions" in arrays:
        seg = arrays["seg_positions"]
        found = np.take_along_axis(places, np.maximum(seg - prefix_len, 0), axis=1)
        packed["seg_positions"] = np.where((seg >= 0) & (found >= 0), prefix_len + found, -1).astype(np.int32)
    return packed
