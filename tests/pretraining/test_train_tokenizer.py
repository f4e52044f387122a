"""The small tokenizer: Qwen2's kind, whole words of the synthetic data, anything else in bytes."""

import json
import re
from pathlib import Path

import pytest

import virst_jax
from virst_jax.data import prompts
from virst_jax.data.synthetic.videos import SyntheticQuestions, SyntheticVideos
from virst_jax.errors import UserError
from virst_jax.pretraining import train_tokenizer

SHIPPED = Path(virst_jax.__file__).parent / "assets/tiny/tokenizer"
FOREIGN = ["the purple zebra", "Ünïcode 漢字 🦎\t\n\n  x", "it's 1234 o'clock!", "def f(x):\r\n    return x"]


@pytest.fixture(scope="module")
def shipped():
    return prompts.load_tokenizer(SHIPPED)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    rows = train_tokenizer.train_tokenizer(train_tokenizer.synthetic_corpus(1, 12), 400, folder)
    return folder, rows


def test_shipped_tokenizer_has_its_rows(shipped):
    vocabulary = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert shipped.seg_id == len(vocabulary) <= 1023
    assert shipped.num_rows == shipped.seg_id + 1
    assert [shipped.pad_id, shipped.start_id, shipped.end_id] == [0, 1, 2]


def test_words_of_the_data_are_whole_tokens(shipped):
    videos, questions = SyntheticVideos(60, 77), SyntheticQuestions(60, 78, categories={"reasoning": 1, "several": 1})
    texts = [e.text for i in range(60) for e in videos[i].expressions]
    texts += [part for i in range(60) for turn in questions[i].turns for part in turn]
    for text in texts:
        assert len(shipped.encode(text)) == len(re.findall(r"\w+|[^\w\s]", text)), text


@pytest.mark.parametrize("expression", ["the red circle", "what will leave the frame first?"])
def test_prompts_are_short(shipped, expression):
    for index in range(6):
        prompt = prompts.build_prompt(shipped, expression, question_index=index, num_seg_tokens=2)
        words = re.findall(r"<\|\w+\|>|\[SEG\]|<image>|\w+|[^\w\s]", "".join(m["content"] for m in prompt.conversation))
        assert len(prompt.input_ids) < 1.5 * len(words) + 3 * 4
        assert (prompt.labels == shipped.seg_id).sum() == 2


@pytest.mark.parametrize("text", FOREIGN)
def test_any_text_can_be_encoded(shipped, text):
    assert shipped.decode(shipped.encode(text)) == text


def test_words_are_cut_as_qwen2_cuts_them():
    from transformers.models.qwen2 import tokenization_qwen2

    assert train_tokenizer.WORDS == tokenization_qwen2.PRETOKENIZE_REGEX
    saved = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": train_tokenizer.WORDS}
    assert saved["normalizer"] == {"type": "NFC"}


def test_training_is_repeatable_and_bounded(trained, tmp_path):
    folder, rows = trained
    assert rows == 400
    again = train_tokenizer.train_tokenizer(train_tokenizer.synthetic_corpus(1, 12), 400, tmp_path / "new")
    assert again == rows
    for name in train_tokenizer.FILES:
        assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(f.name for f in folder.iterdir()) == sorted(train_tokenizer.FILES)
    assert prompts.load_tokenizer(folder, seg_token_id=400).num_rows == 401


def test_a_small_corpus_gives_few_rows(tmp_path):
    rows = train_tokenizer.train_tokenizer(["red red", "red"], 1000, tmp_path)
    assert 259 < rows < 265
    assert len(prompts.load_tokenizer(tmp_path).encode("red")) == 1


def test_corpus_holds_the_prompts():
    corpus = set(train_tokenizer.synthetic_corpus(0, 2))
    assert prompts.SYSTEM in corpus
    assert any("respond with segmentation mask" in text for text in corpus)
    assert "describe the scene." in corpus
    assert not any(prompts.SEG in text or prompts.IMAGE in text for text in corpus)


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "SCENES", 4)
    assert train_tokenizer.main([str(tmp_path / "out"), "--vocab-size", "300"]) == 0
    assert "[SEG] gets id 300" in capsys.readouterr().out
    assert train_tokenizer.main([str(tmp_path / "out"), "--vocab-size", "100"]) == 2
    error = capsys.readouterr().err
    assert "259" in error
    assert error.count("\n") == 1


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 259"):
        train_tokenizer.train_tokenizer(["a"], 258, tmp_path)
