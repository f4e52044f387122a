"""Expressions as the conversations that the language model reads.

All conversations of a video begin alike, up to its visual tokens: this prefix is read once.

Axes: O expressions, N [SEG] tokens, P positions of the prefix, L tokens behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from virst_jax.config import VirstConfig
from virst_jax.data import sequence
from virst_jax.data.prompts import (
    ANSWERS,
    QUESTIONS,
    Tokenizer,
    build_prompt,
    choose_templates,
    normalize_expression,
)
from virst_jax.errors import UserError
from virst_jax.inference.plan import Options

MAX_EXPRESSION_TOKENS = 512
TEXT_BUCKET = 64  # texts are padded to multiples of so many tokens
PREFIX_BUCKET = 32


@dataclass(frozen=True)
class Texts:
    """Conversations of a video, cut behind its visual tokens."""

    prefix_ids: np.ndarray  # int32[1, P]
    prefix_visual: np.ndarray  # int32[1, P], which visual token stands here; -1: text
    prefix_mask: np.ndarray  # bool[1, P]
    rows: list[tuple[np.ndarray, np.ndarray]]  # of every expression its ids int32[L] and [SEG] positions int32[N]

    def batch(self, first: int, count: int, bucket: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`count` rows padded to `bucket` of one length: ids int32[O, L], mask bool[O, L], [SEG] int32[O, N]."""
        rows = self.rows[first : first + count]
        rows = rows + [rows[0]] * (bucket - count)
        length = round_up(max(len(ids) for ids, _ in rows), TEXT_BUCKET)
        ids = np.stack([np.pad(ids, (0, length - len(ids))) for ids, _ in rows])
        mask = np.stack([np.arange(length) < len(ids) for ids, _ in rows])
        return ids, mask, np.stack([seg for _, seg in rows])


def check_expressions(tokenizer: Tokenizer, expressions: str | Sequence[str]) -> tuple[str, ...]:
    """One or many expressions as the release evaluates them: lower case, single spaces.

    Raises:
      UserError: none, no texts, or one that is empty, too long or holds a control token.
    """
    if isinstance(expressions, str):
        given: tuple[str, ...] = (expressions,)
    else:
        try:
            given = tuple(expressions)
        except TypeError as error:
            raise UserError(
                f"expressions must be a text or a list of texts, not {type(expressions).__name__} {expressions!r}"
            ) from error
    if not given:
        raise UserError("no expression was given: describe at least one object in words")
    checked = tuple(normalize_expression(text) for text in given)
    for text in checked:
        length = len(tokenizer.encode(text))
        if length > MAX_EXPRESSION_TOKENS:
            raise UserError(
                f"the expression {text[:40]!r}... takes {length} tokens, at most {MAX_EXPRESSION_TOKENS} are read: "
                "shorten it"
            )
    return checked


def build_texts(
    cfg: VirstConfig, tokenizer: Tokenizer, expressions: Sequence[str], num_visual: int, slots: int, options: Options
) -> Texts:
    """The conversations of expressions.

    Args:
      expressions: from `check_expressions`.
      num_visual: visual tokens there are.
      slots: visual tokens there is room for.
    """
    conversations = []
    for expression in expressions:
        question, answer = _templates(expression, options)
        prompt = build_prompt(
            tokenizer, expression, question_index=question, answer_index=answer, num_seg_tokens=cfg.num_seg_tokens
        )
        ids, labels = prompt.input_ids.tolist(), prompt.labels.tolist()
        conversations.append(sequence.splice(ids, labels, num_visual, cfg.seg_token_id))
    return cut_behind_video(conversations, slots - num_visual)


def cut_behind_video(conversations: Sequence[sequence.Sequence], free_slots: int) -> Texts:
    """Parts conversations of one video, not padded, into their common prefix and the rest of each.

    Args:
      free_slots: visual tokens less than there is room for: so much longer is the padded prefix.

    Raises:
      ValueError: they do not begin alike.
    """
    rows, heads = [], []
    for row in conversations:
        cut = int(np.flatnonzero(row.visual_index >= 0)[-1]) + 1
        heads.append((row.token_ids[:cut], row.visual_index[:cut]))
        rows.append((row.token_ids[cut:], row.seg_positions - cut))
    ids, visual = heads[0]
    if any(not np.array_equal(ids, other) for other, _ in heads):
        raise ValueError("conversations of one video must begin alike")
    length = round_up(len(ids) + free_slots, PREFIX_BUCKET)
    pad = (0, length - len(ids))
    return Texts(
        np.pad(ids, pad)[None],
        np.pad(visual, pad, constant_values=-1)[None],
        (np.arange(length) < len(ids))[None],
        rows,
    )


def _templates(expression: str, options: Options) -> tuple[int, int]:
    if options.release_random is not None:
        draw, kind = options.release_random[1], "long" if expression.endswith("?") else "short"
        return draw.choice(range(len(QUESTIONS[kind]))), draw.choice(range(len(ANSWERS)))
    if isinstance(options.seed, (int, np.integer)):
        return choose_templates(expression, int(options.seed))
    return choose_templates(f"{[int(part) for part in options.seed]}:{expression}")


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step
