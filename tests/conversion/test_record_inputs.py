"""What reaches the network: the cases reading, sizes and tokens, and how they are recorded."""

import importlib.util
import json
import shutil

import numpy as np
import pytest

from conversion import parity, record
from conversion.recording.clips import COUNT, KINDS, write_clip
from conversion.recording.texts import make_texts
from helpers.places import PARITY as CASES
from virst_jax.io.video import open_video


@pytest.mark.parametrize("name", ["plain", "variable_rate", "ten_bit", "odd_420"])
def test_clips_can_be_read(tmp_path, name):
    kind = KINDS[name]
    write_clip(tmp_path / f"a{kind.suffix}", kind, 0)
    reader = open_video(tmp_path / f"a{kind.suffix}")
    assert (reader.num_frames, reader.size) == (COUNT, kind.size)
    if kind.times:
        times = reader.times_of(range(COUNT))
        np.testing.assert_allclose(times, np.array(kind.times) / 100, atol=1e-3)


def test_texts_are_always_the_same():
    texts = make_texts(300)
    assert texts == json.loads((CASES / "tokens.json").read_text())["texts"][:300]
    assert len(set(texts)) == 300


@pytest.mark.parametrize(
    ("name", "array", "output"),
    [("reading", "bt709.decord", "bt709"), ("sizes", "37x53.sam", "37x53 sam"), ("tokens", "0.ids", "ids")],
)
def test_a_changed_input_fails(tmp_path, name, array, output):
    for path in CASES.glob(f"{name}.*"):
        shutil.copy(path, tmp_path)
    arrays = dict(np.load(tmp_path / f"{name}.npz"))
    arrays[array] = arrays[array].copy()
    arrays[array].flat[-1] += 2
    np.savez(tmp_path / f"{name}.npz", **arrays)
    checks, _ = parity.run_case(tmp_path, name, tokenizer=CASES.parent / "tokenizer")
    assert [check.output for check in checks if not check.passed] == [output]


def test_another_tokenizer_is_told(tmp_path):
    """Another vocabulary splits texts otherwise, which is no error of ours."""
    shutil.copytree(CASES.parent / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "vocab.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "more": 700}))
    (check,), _ = parity.run_case(CASES, "tokens", tokenizer=tmp_path / "tokenizer")
    assert not check.passed
    assert "was recorded with those of [764, 151647]" in check.note


@pytest.mark.skipif(importlib.util.find_spec("decord") is not None, reason="decord is installed")
def test_a_missing_reader_is_told(tmp_path, capsys):
    assert record.main(["inputs", "--release", str(tmp_path), "--out", str(tmp_path / "cases")]) == 2
    assert "pip install decord" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("sam2") is not None, reason="sam2 is installed")
def test_a_missing_sam2_is_told(tmp_path, capsys):
    assert record.main(["sam2", "--out", str(tmp_path)]) == 2
    assert "pip install" in capsys.readouterr().err
