"""Answers in text: how far distributions are apart, and how the release's answer is recorded."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from conversion import parity, record
from conversion.cases.chat import kl_divergence
from conversion.recording.chat import KEPT, before_answer, run_answer
from helpers.places import PARITY as CASES

torch = pytest.importorskip("torch")


def probabilities(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


@pytest.mark.parametrize("kept", [12, 40])
def test_divergence(kept):
    """Of all tokens, or of the most probable ones and of what the others come to."""
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=(3, 40))
    ours = theirs + 0.1 * rng.normal(size=theirs.shape)
    ids = np.argsort(-theirs, axis=1)
    rest = np.full(3, -np.inf)
    if kept < 40:
        rest = np.log(np.exp(np.take_along_axis(theirs, ids[:, kept:], 1)).sum(1))
    p, q = probabilities(theirs), probabilities(ours)
    rows = [[[*x[i, ids[i, :kept]].tolist(), x[i, ids[i, kept:]].sum()] for i in range(3)] for x in (p, q)]
    expected = [sum(a * np.log(a / b) for a, b in zip(*pair) if a > 0) for pair in zip(*rows)]
    found = kl_divergence(ours, ids[:, :kept], np.take_along_axis(theirs, ids[:, :kept], 1), rest)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    shifted = kl_divergence(theirs + 2, ids[:, :kept], np.take_along_axis(theirs, ids[:, :kept], 1), rest)
    np.testing.assert_allclose(shifted, 0, atol=1e-15)


def test_another_distribution_fails(tmp_path):
    for path in CASES.glob("chat_video.*"):
        shutil.copy(path, tmp_path)
    arrays = dict(np.load(tmp_path / "chat_video.npz"))
    arrays["logits"] = arrays["logits"] * np.float32(1.001)
    np.savez(tmp_path / "chat_video.npz", **arrays)
    facts = json.loads((tmp_path / "chat_video.json").read_text())
    facts["answer_ids"][3] = (facts["answer_ids"][3] + 1) % 500
    (tmp_path / "chat_video.json").write_text(json.dumps(facts))
    checks, _ = parity.run_case(tmp_path, "chat_video")
    assert [check.output for check in checks if not check.passed] == [
        "logits",
        "KL divergence",
        "top 5",
        "greedy answer",
    ]


def test_prompt_ends_where_the_answer_begins():
    assert before_answer([1, 2, 3, 4, 5], [-100, 2, -100, 4, 5]) == [1, 2, 3]


def test_an_answer_ends():
    """The next token is one more than the last; 5 ends the answer."""

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **given):
            assert given["generation"]
            logits = torch.linspace(0, -1, KEPT + 8)[None, None].clone()
            logits[0, 0, int(input_ids[0, -1]) + 1] = 3.0
            return SimpleNamespace(logits=logits)

    answer = run_answer(Counting(), torch.zeros(4, 3, 2, 2), [1, 2], 9, (5,), "cpu")
    assert answer.tokens == [3, 4, 5]
    assert answer.ids.shape == answer.logits.shape == (3, KEPT)
    assert answer.ids[:, 0].tolist() == [3, 4, 5]
    left = torch.linspace(0, -1, KEPT + 8)[KEPT:].logsumexp(0)
    np.testing.assert_allclose(answer.rest, float(left), atol=1e-2)


def test_bad_arguments(tmp_path, capsys):
    case = str(CASES / "e2e_video.json")
    common = ["chat", case, "--release", str(tmp_path), "--out", str(tmp_path)]
    assert record.main([*common, "--question", "why?"]) == 2
    assert "a case of a checkpoint" in capsys.readouterr().err
    assert record.main([*common, "--tokens", "0"]) == 2
    assert "give 1 or more" in capsys.readouterr().err
