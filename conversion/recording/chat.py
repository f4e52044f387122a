"""How the release answers in text: greedily, token by token, with the logits of every token.

Axes: P positions of the prompt, N tokens of the answer, V vocabulary, K kept logits of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .checkout import IMAGE_TOKEN, Release

KEPT = 1024  # K: the largest logits of a token; what the others come to is kept as one number


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
      tokens: of the answer, one for every step.
      ids: int32[N, K], the tokens of the largest logits, falling.
      logits: float32[N, K], theirs.
      rest: float32[N], log of the summed exponentials of all other logits; -inf where there are none.
    """

    tokens: list[int]
    ids: np.ndarray
    logits: np.ndarray
    rest: np.ndarray


def question_ids(release: Release, tokenizer: Any, question: str) -> list[int]:
    """The prompt of VideoChat-Flash's `chat` for a question, without times; IMAGE_TOKEN where the video goes."""
    conversation = release.module("model.videochat.conversation").conv_templates["qwen_2"].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n {question}")
    conversation.append_message(conversation.roles[1], None)
    pieces = conversation.get_prompt().split("<image>")
    return [*tokenizer(pieces[0]).input_ids, IMAGE_TOKEN, *tokenizer(pieces[1]).input_ids]


def before_answer(input_ids: Sequence[int], labels: Sequence[int]) -> list[int]:
    """A conversation's prompt: all before the answer, which is what is labelled to the end."""
    start = len(labels)
    while start and labels[start - 1] != -100:
        start -= 1
    return list(input_ids[:start])


def run_answer(virst: Any, images_clip: Any, prompt: list[int], count: int, ends: Sequence[int], device: str) -> Answer:
    """The most probable answer of at most `count` tokens; every step reads the whole conversation again."""
    import torch

    tokens: list[int] = []
    rows: list[tuple[Any, Any, float]] = []
    pixels = images_clip[None].to(device=device, dtype=next(virst.parameters()).dtype)
    with torch.inference_mode():
        while len(tokens) < count and (not tokens or tokens[-1] not in ends):
            ids = torch.tensor([[*prompt, *tokens]], device=device)
            out = virst(
                input_ids=ids,
                attention_mask=torch.ones_like(ids, dtype=torch.bool),
                images_clip=pixels,
                image_ids=[0],
                modalities=["video"],
                generation=True,
            )
            logits = out.logits[0, -1].float().cpu()
            largest, at = logits.sort(descending=True, stable=True)
            rest = float(largest[KEPT:].logsumexp(0)) if len(largest) > KEPT else float("-inf")
            rows.append((at[:KEPT], largest[:KEPT], rest))
            tokens.append(int(at[0]))
    return Answer(
        tokens,
        np.stack([row[0].numpy().astype(np.int32) for row in rows]),
        np.stack([row[1].numpy() for row in rows]),
        np.array([row[2] for row in rows], np.float32),
    )
