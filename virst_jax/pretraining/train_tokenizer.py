"""Trains the small tokenizer of the tiny model: byte-level BPE of Qwen2's kind, on the synthetic data's words.

`python -m virst_jax.pretraining.train_tokenizer OUT` writes the one that the package ships, always the same. Text of
any kind can be encoded; what the corpus does not hold falls into bytes.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from virst_jax.data import prompts
from virst_jax.data.synthetic.questions import KINDS, ask_who, questions
from virst_jax.data.synthetic.text import CATEGORIES, candidates, find_facts
from virst_jax.data.synthetic.videos import SyntheticVideos
from virst_jax.errors import UserError
from virst_jax.io import atomic

SPECIAL = (prompts.PAD, prompts.START, prompts.END)
# how Qwen2 cuts text into words before merging (the tokenizer.json of its checkpoints)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FILES = ("tokenizer.json", "tokenizer_config.json")
SCENES = 400  # of the shipped tokenizer's corpus


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> int:
    """Trains on texts and writes tokenizer.json and tokenizer_config.json, for `prompts.load_tokenizer`.

    The special tokens come first; `[SEG]` is not among the rows: load_tokenizer adds it as the next id. Pairs that
    occur once are not merged, so a small corpus gives a smaller vocabulary than asked for.

    Args:
      vocab_size: rows at most.
      folder: made if it is missing.

    Returns:
      The number of rows, which is the id that `[SEG]` gets.

    Raises:
      UserError: `vocab_size` has no room for the bytes and special tokens.
    """
    least = 256 + len(SPECIAL)
    if vocab_size < least:
        raise UserError(f"vocab_size is {vocab_size}; bytes and special tokens need at least {least}")
    # imported here because it takes seconds
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=backend,
        vocab=backend.get_vocab(),
        eos_token=prompts.END,
        pad_token=prompts.PAD,
        additional_special_tokens=[prompts.START, prompts.END],
        model_max_length=32768,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as beside:
        tokenizer.save_pretrained(beside)
        backend.save(str(Path(beside) / "tokenizer.json"))
        for name in FILES:
            atomic.write_bytes(folder / name, (Path(beside) / name).read_bytes())
    return int(backend.get_vocab_size())


def synthetic_corpus(seed: int, count: int) -> list[str]:
    """Texts of synthetic scenes: every expression, question and answer, and the prompts that carry expressions.

    Args:
      seed: of the scenes.
      count: scenes.
    """
    texts: list[str] = []
    for source in (SyntheticVideos(count, seed), SyntheticVideos(max(1, count // 4), seed, is_image=True)):
        for index in range(len(source)):
            facts = find_facts(source.scene(index))
            for category in CATEGORIES if not source.is_image else ("appearance", "relation", "several", "none"):
                for referral in candidates(facts, category):
                    texts += [referral.text, *ask_who(facts, referral)]
            for kind in KINDS:
                texts += [text for turn in questions(facts, kind) for text in turn]
            texts += _conversations(source[index].expressions[0].text)
    return texts


def _conversations(expression: str) -> list[str]:
    """An expression in every wording of the prompts, control tokens left out."""
    texts = [prompts.SYSTEM, "system\n", "user\n", "assistant\n", prompts.time_message(2.0, 16)]
    for templates in prompts.QUESTIONS.values():
        for template in templates:
            for modality in prompts.MODALITIES:
                texts += template.format(sent=expression, modality=modality).split(prompts.IMAGE)
    seg = ", ".join(f"({i}) {prompts.SEG}" for i in range(10))
    for template in prompts.ANSWERS:
        texts += template.format(seg=seg).split(prompts.SEG)
    return texts


def main(argv: list[str] | None = None) -> int:
    """The command line: writes the shipped tokenizer to a folder."""
    parser = argparse.ArgumentParser(description="Trains the small tokenizer of the tiny model.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=1023, help="rows at most, before [SEG] (default: 1023)")
    args = parser.parse_args(argv)
    try:
        rows = train_tokenizer(synthetic_corpus(seed=0, count=SCENES), args.vocab_size, args.out)
    except (UserError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {rows} rows; [SEG] gets id {rows}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
