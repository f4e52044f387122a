"""The conversation that carries an expression: its wording, its tokens and the labels they are trained on.

The answer is teacher-forced, so a prompt holds question and answer, and the labels tell where the `[SEG]` tokens
stand. L is the number of tokens. The video stands at the one position whose id is IMAGE_TOKEN.
Follows utils/preprocess.py (preprocess_virst) and utils/utils.py of the release; a checkpoint was trained with
this very wording, so none of it may change.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from virst_jax.config import IGNORE, IMAGE_TOKEN
from virst_jax.errors import UserError
from virst_jax.io import regular
from virst_jax.io.json_files import is_whole

IMAGE, SEG = "<image>", "[SEG]"
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

SYSTEM = "You are a helpful assistant."
_HEAD = "Reference {modality}: " + IMAGE + " \n"
# by how the expression ends, or by what is asked; an index beyond a row's end starts over
QUESTIONS: dict[str, tuple[str, ...]] = {
    "short": (
        _HEAD
        + "What is {sent} in the Reference {modality}? Please respond with segmentation mask in the Target Image.",
        _HEAD + "What is {sent} in the Reference {modality}? Please output segmentation mask in the Target Image.",
        _HEAD + "Please find {sent} in the Reference {modality} and segment it in the Target Image.",
    ),
    "long": (
        _HEAD
        + "{sent} Please find it in the Reference {modality} and respond with segmentation mask in the Target Image.",
        _HEAD + "{sent} Please find it in the Reference {modality} and output segmentation mask in the Target Image.",
    ),
    "explain": tuple(
        f"Reference Video: {IMAGE} \n{{sent}} Please output segmentation mask in the Target Image and {what}."
        for what in ("explain why", "explain the reason", "give some explanation")
    ),
}
ANSWERS = ("It is {seg}.", "Sure, {seg}.", "Sure, it is {seg}.", "Sure, the segmentation result is {seg}.")
# text that a tokenizer would take for a token of its own; in any case, for it may be lower-cased later
_CONTROL = re.compile(r"<image>|\[seg\]|<\|\w+\|>", re.IGNORECASE)
MODALITIES = ("image", "video")  # the release says "image" of videos too


CACHED_PIECES = 20_000


class Message(TypedDict):
    role: str  # system | user | assistant
    content: str


@dataclass(frozen=True, eq=False)
class Prompt:
    """A tokenised conversation."""

    input_ids: np.ndarray  # int32[L], IMAGE_TOKEN where the video goes
    labels: np.ndarray  # int32[L], IGNORE where nothing is learnt
    conversation: list[Message]


class Tokenizer:
    """Qwen2's byte-level BPE with the `[SEG]` token. `load_tokenizer` makes one."""

    def __init__(self, backend: Any, ids: dict[str, int]):
        """Wraps a transformers tokenizer; `ids` of SEG, START, END, PAD and a newline."""
        self._backend = backend
        self.seg_id, self.start_id, self.end_id = ids[SEG], ids[START], ids[END]
        self.pad_id, self.newline_id = ids[PAD], ids["\n"]
        self._pieces: dict[str, tuple[int, ...]] = {}

    @property
    def num_rows(self) -> int:
        """Rows that an embedding table needs: one more than the highest id."""
        return max(self._backend.get_vocab().values()) + 1

    def __len__(self) -> int:
        """How many tokens there are, the added ones among them."""
        return len(self._backend.get_vocab())

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text in which `<image>` has no meaning."""
        ids: list[int] = self._backend(text, add_special_tokens=False).input_ids
        return ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, IMAGE_TOKEN for each `<image>` in it."""
        ids: list[int] = []
        for i, piece in enumerate(text.split(IMAGE)):
            if i:
                ids.append(IMAGE_TOKEN)
            # the same messages come again and again in training; the backend takes a millisecond for each
            found = self._pieces.get(piece)
            if found is None:
                if len(self._pieces) >= CACHED_PIECES:  # another thread may clear it, too
                    self._pieces.clear()
                found = self._pieces[piece] = tuple(self.encode_text(piece))
            ids += found
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; negative ids (video, ignored) are left out."""
        return self._backend.decode([int(i) for i in ids if i >= 0], skip_special_tokens=False)


def load_tokenizer(path: str | Path, seg_token_id: int | None = None) -> Tokenizer:
    """The tokenizer of a folder (that of a VideoChat-Flash checkpoint, for one) with `[SEG]` added.

    Reads files of that folder only and runs no code from it.

    Args:
      path: folder with vocab.json, merges.txt and tokenizer_config.json, or with tokenizer.json.
      seg_token_id: the id that `[SEG]` must have (that of the network's configuration), if known.

    Raises:
      UserError: a file is missing or broken, a chat token is missing, or `[SEG]` has another id.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"no tokenizer folder at {folder}: give a folder with vocab.json and merges.txt")
    regular.require_plain(folder, "copy the tokenizer's files again")
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: {name} is missing; copy it from the VideoChat-Flash checkpoint")
    # Imported here because it takes seconds. Not AutoTokenizer: it asks to run the checkpoint's own code.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses PyTorch, which tokenizers do not need
    from transformers import Qwen2Tokenizer

    try:
        backend = Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True)
        backend.add_tokens([SEG])
        encoded = {text: backend(text, add_special_tokens=False).input_ids for text in (SEG, START, END, PAD, "\n")}
    except Exception as error:  # transformers and tokenizers raise all sorts for a broken file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: not a readable Qwen2 tokenizer ({reason}); copy its files again") from error
    for text, ids in encoded.items():
        if len(ids) != 1:
            raise UserError(
                f"{folder}: {text!r} is not a single token; copy tokenizer_config.json from the VideoChat-Flash "
                "checkpoint"
            )
    tokenizer = Tokenizer(backend, {text: ids[0] for text, ids in encoded.items()})
    if seg_token_id is not None and tokenizer.seg_id != seg_token_id:
        raise UserError(
            f"{folder}: [SEG] has id {tokenizer.seg_id}, the network expects {seg_token_id}; "
            "use the tokenizer that belongs to the checkpoint"
        )
    return tokenizer


def normalize_expression(expression: str) -> str:
    """An expression as the release evaluates it: lower case, single spaces (data/rvos_dataset.py).

    Raises:
      UserError: it is empty or contains a control token.
    """
    _check_text(expression, "expression")
    return " ".join(expression.lower().split())


def choose_templates(key: str, seed: int = 0) -> tuple[int, int]:
    """Question and answer index for `build_prompt`, always the same for the same `key` and `seed`.

    Args:
      key: names the sample, such as video and expression.
    """
    digest = int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest(), "little")
    questions = math.lcm(*map(len, QUESTIONS.values()))  # even after the index is taken modulo any row's length
    return digest % questions, digest // questions % len(ANSWERS)


def build_prompt(
    tokenizer: Tokenizer,
    expression: str,
    *,
    question_index: int = 0,
    answer_index: int = 0,
    num_seg_tokens: int = 10,
    modality: str = "image",
    explanation: str | None = None,
    text_only: bool = False,
    question_only: bool = False,
    has_image: bool = True,
) -> Prompt:
    """Conversation, tokens and labels of one expression.

    The long questions serve expressions that end with "?", the short ones all others. Labelled are the answer,
    its header, and in every message the start, end and newline tokens.

    Args:
      question_index, answer_index: rows of QUESTIONS and ANSWERS, modulo their length.
      num_seg_tokens: `[SEG]` tokens in the answer.
      modality: word for the visual input, 'image' or 'video'; the release says 'image' always.
      explanation: text that follows the answer, or is the answer if `text_only`; the expression is lower-cased.
      text_only: a plain question about the video without `[SEG]`; needs `explanation`.
      question_only: leave the answer empty.
      has_image: False leaves the video out; for `text_only`.

    Raises:
      UserError: an empty text or one with a control token, an unknown modality, options that exclude each other.
    """
    _check_text(expression, "expression")
    if explanation is not None:
        _check_text(explanation, "explanation")
    if modality not in MODALITIES:
        raise UserError(f"unknown modality {modality!r}: choose {' or '.join(MODALITIES)}")
    if num_seg_tokens < 1:
        raise UserError(f"the number of [SEG] tokens must be at least 1, not {num_seg_tokens}")
    if text_only and explanation is None:
        raise UserError("a text-only prompt needs the text of its answer (explanation)")
    if not (has_image or text_only):
        raise UserError("a prompt without a video can only be answered with text: set text_only or has_image")

    seg = ", ".join(f"({i}) {SEG}" for i in range(num_seg_tokens))
    answer = ANSWERS[answer_index % len(ANSWERS)].format(seg=seg)
    if text_only:
        head = f"Reference {modality.capitalize()}: {IMAGE}" if has_image else ""
        question, answer = head + expression.lower(), explanation or ""
    elif explanation is not None:
        question = _pick("explain", question_index).format(sent=expression.lower())
        answer = f"{answer} {explanation}"
    else:
        kind = "long" if expression.endswith("?") else "short"
        question = _pick(kind, question_index).format(sent=expression, modality=modality)
    return _encode(
        tokenizer,
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "" if question_only else answer},
        ],
    )


def time_message(duration: float, num_frames: int) -> str:
    """What VideoChat-Flash is told of the video, as model/videochat/mm_utils.py (load_video) words it.

    Args:
      duration: of the video, seconds.
      num_frames: sampled frames.
    """
    return f"The video lasts for {duration:.2f} seconds, and {num_frames} frames are uniformly sampled from it."


def build_chat(
    tokenizer: Tokenizer, question: str, *, time: str = "", history: Sequence[tuple[str, str]] = ()
) -> Prompt:
    """A chat with the video VLM, ready for its next answer to be generated.

    Follows `chat` in model/videochat/modeling_videochat_flash.py with its conversation "qwen_2". The first
    question carries the video and `time`.

    Args:
      time: of `time_message`.
      history: earlier questions and answers.

    Returns:
      A prompt that ends with the assistant's header; every label is IGNORE.

    Raises:
      UserError: an empty question, or a text with a control token.
    """
    questions = [*(asked for asked, _ in history), question]
    for text in questions:
        _check_text(text, "question")
    questions[0] = f"{IMAGE}\n{time.strip()} {questions[0]}"
    conversation: list[Message] = [{"role": "system", "content": SYSTEM}]
    for i, text in enumerate(questions):
        conversation.append({"role": "user", "content": text})
        if i < len(history):
            _check_control(history[i][1], "answer")
            conversation.append({"role": "assistant", "content": history[i][1]})
    # the release leaves an empty message open: its header, and no end token
    parts = [_message_text(m) if m["content"] else _header(m["role"]) for m in conversation]
    ids = tokenizer.encode("".join([*parts, _header("assistant")]))
    return Prompt(np.array(ids, np.int32), np.full(len(ids), IGNORE, np.int32), conversation)


def _pick(kind: str, index: int) -> str:
    return QUESTIONS[kind][index % len(QUESTIONS[kind])]


def _header(role: str) -> str:
    return f"{START}{role}\n"


def _message_text(message: Message) -> str:
    return f"{_header(message['role'])}{message['content']}{END}\n"


def _encode(tokenizer: Tokenizer, conversation: list[Message]) -> Prompt:
    # one message at a time gives the tokens of the whole: special tokens bound every message
    always = [tokenizer.start_id, tokenizer.end_id, tokenizer.newline_id]
    input_ids, labels = [], []
    for message in conversation:
        ids = np.array(tokenizer.encode(_message_text(message)), np.int32)
        learnt = np.isin(ids, always) | (message["role"] == "assistant")
        input_ids.append(ids)
        labels.append(np.where(learnt, ids, np.int32(IGNORE)))
    return Prompt(np.concatenate(input_ids), np.concatenate(labels), conversation)


def _check_text(text: str, what: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"the {what} must be text, not {type(text).__name__} {text!r}")
    if not text.strip():
        raise UserError(f"the {what} is empty: describe the object in words")
    _check_control(text, what)


def _check_control(text: str, what: str) -> None:
    if not is_whole(text):
        raise UserError(f"the {what} {text!r} holds half of a character: write it in UTF-8")
    found = _CONTROL.search(text)
    if found:
        raise UserError(f"the {what} contains the control token {found[0]}: remove it from {text[:80]!r}")
