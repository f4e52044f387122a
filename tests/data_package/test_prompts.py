"""Conversations, token ids and labels against the release's, and what is refused."""

import json
import pickle
import shutil

import numpy as np
import pytest

from helpers.places import DATA
from virst_jax.data import prompts
from virst_jax.errors import UserError

ROWS = json.loads((DATA / "parity/prompts.json").read_text(encoding="utf-8"))["rows"]
VARIANTS = json.loads((DATA / "parity/prompt_variants.json").read_text(encoding="utf-8"))
RESULTS = ("input_ids", "labels", "conversation")


@pytest.fixture(scope="module")
def tokenizer():
    return prompts.load_tokenizer(DATA / "tokenizer", seg_token_id=151646)


@pytest.mark.parametrize("row", ROWS + VARIANTS["rows"], ids=lambda row: row["expression"].replace("\n", " ")[:20])
def test_prompt_is_that_of_the_release(tokenizer, row):
    options = {k: v for k, v in row.items() if k not in RESULTS}
    prompt = prompts.build_prompt(tokenizer, options.pop("expression"), **options)
    assert prompt.conversation == row["conversation"]
    assert prompt.input_ids.dtype == prompt.labels.dtype == np.int32
    assert prompt.input_ids.tolist() == row["input_ids"]
    assert prompt.labels.tolist() == row["labels"]


@pytest.mark.parametrize("case", VARIANTS["chat"], ids=lambda case: f"{len(case['history'])} turns before")
def test_chat_is_that_of_the_release(tokenizer, case):
    history = [tuple(turn) for turn in case["history"]]
    prompt = prompts.build_chat(tokenizer, case["question"], time=case["time_message"], history=history)
    assert prompt.input_ids.tolist() == case["input_ids"]
    assert set(prompt.labels.tolist()) == {prompts.IGNORE}
    assert tokenizer.decode(prompt.input_ids) == case["prompt"].replace("<image>", "")


def test_time_message():
    told = VARIANTS["chat"][0]["time_message"].strip()
    assert prompts.time_message(12.3456, 64) == told


def test_seg_tokens_are_labelled_and_counted(tokenizer):
    prompt = prompts.build_prompt(tokenizer, "the cat", num_seg_tokens=4)
    assert (prompt.labels == tokenizer.seg_id).sum() == 4
    assert (prompt.input_ids == prompts.IMAGE_TOKEN).sum() == 1
    image = prompt.input_ids == prompts.IMAGE_TOKEN
    assert prompt.labels[image].tolist() == [prompts.IGNORE]


def test_expression_is_normalised_as_at_evaluation():
    assert prompts.normalize_expression("  The  LEFT\tcat\n runs ") == "the left cat runs"


def test_braces_are_kept(tokenizer):
    content = prompts.build_prompt(tokenizer, "the {sent} {0}").conversation[1]["content"]
    assert "What is the {sent} {0} in" in content


def test_templates_are_chosen_evenly_and_repeatably():
    chosen = [prompts.choose_templates(f"video {i}", seed=3) for i in range(1200)]
    assert chosen == [prompts.choose_templates(f"video {i}", seed=3) for i in range(1200)]
    assert chosen != [prompts.choose_templates(f"video {i}", seed=4) for i in range(1200)]
    assert prompts.choose_templates("the cat") == (3, 2)  # of every run and machine
    for length in (2, 3):
        counts = np.bincount([q % length for q, _ in chosen])
        assert counts.shape == (length,)
        assert counts.min() > 0.8 * 1200 / length
    assert np.bincount([a for _, a in chosen]).min() > 0.8 * 1200 / 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expression is empty"),
        (" \n", "expression is empty"),
        ("the <image> cat", "control token <image>"),
        ("the <IMAGE> cat", "control token <IMAGE>"),
        ("it is [SEG]", "control token"),
        ("cat<|im_end|>", "control token <|im_end|>"),
        ("cat <|vision_start|>", "control token <|vision_start|>"),
        (None, "must be text, not NoneType"),
    ],
)
def test_bad_expression_is_refused(tokenizer, text, says):
    for call in (lambda: prompts.build_prompt(tokenizer, text), lambda: prompts.normalize_expression(text)):
        with pytest.raises(UserError) as error:
            call()
        assert says in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modality": "sound"}, "unknown modality"),
        ({"num_seg_tokens": 0}, "at least 1"),
        ({"text_only": True}, "needs the text of its answer"),
        ({"has_image": False}, "without a video"),
        ({"explanation": "so [SEG]"}, "explanation contains"),
        ({"explanation": " "}, "explanation is empty"),
    ],
)
def test_bad_option_is_refused(tokenizer, options, says):
    with pytest.raises(UserError, match=says):
        prompts.build_prompt(tokenizer, "the cat", **options)


def test_bad_chat_is_refused(tokenizer):
    with pytest.raises(UserError, match="question is empty"):
        prompts.build_chat(tokenizer, " ")
    with pytest.raises(UserError, match="answer contains the control token <image>"):
        prompts.build_chat(tokenizer, "and then?", history=[("what?", "an <image>")])


def test_half_a_character_is_refused_before_the_tokenizer(tokenizer):
    """As a shell gives bytes that are not UTF-8."""
    half = "the \udcff dog"
    for use in (
        lambda: prompts.normalize_expression(half),
        lambda: prompts.build_prompt(tokenizer, half),
        lambda: prompts.build_chat(tokenizer, half),
        lambda: prompts.build_chat(tokenizer, "and then?", history=[("what?", half)]),
    ):
        with pytest.raises(UserError, match="holds half of a character") as info:
            use()
        str(info.value).encode()


def test_tokenizer_ids(tokenizer):
    ids = (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id, tokenizer.seg_id, tokenizer.newline_id)
    assert ids == (151643, 151644, 151645, 151646, 198)
    assert tokenizer.num_rows == 151647
    assert tokenizer.encode("<image>a<image>") == [-200, tokenizer.encode("a")[0], -200]
    text = "any text at all: ünïcode 黑猫 🐕"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_seg_token_is_added_where_the_folder_lacks_it(tokenizer, tmp_path):
    shutil.copytree(DATA / "tokenizer", tmp_path, dirs_exist_ok=True)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    del vocab["[SEG]"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    again = prompts.load_tokenizer(tmp_path, seg_token_id=151646)
    assert again.encode("it is (0) [SEG].") == tokenizer.encode("it is (0) [SEG].")


def test_tokenizer_travels_to_worker_processes(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    text = "two lizards [SEG] moving"
    assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_incomplete_tokenizer_folder_is_refused(tmp_path, missing):
    folder = tmp_path / "tokenizer"
    shutil.copytree(DATA / "tokenizer", folder, ignore=shutil.ignore_patterns(missing))
    with pytest.raises(UserError, match=missing):
        prompts.load_tokenizer(folder)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_broken_tokenizer_folder_is_refused(tmp_path, name):
    folder = tmp_path / "tokenizer"
    shutil.copytree(DATA / "tokenizer", folder)
    (folder / name).write_text("{ broken", encoding="utf-8")
    with pytest.raises(UserError, match=str(folder)) as error:
        prompts.load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_wrong_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer folder"):
        prompts.load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="has id 151646, the network expects 2047"):
        prompts.load_tokenizer(DATA / "tokenizer", seg_token_id=2047)
