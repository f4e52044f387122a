"""Recording how the release trains: steps of AdamW on a small network in its place, and the command's bad input."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from conversion import parity, record
from conversion.recording.training import run_batch, run_curve, without_dropout
from conversion.targets import KEPT, thinned
from helpers.places import PARITY
from virst_jax.training.optim import OptimConfig, learning_rate

torch = pytest.importorskip("torch")
nn = torch.nn

OPTIM = {"learning_rate": 0.02, "warmup_steps": 3, "total_steps": 12, "schedule": "cosine", "final_factor": 0.1}
OPTIM |= {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.05, "clip_norm": 1.0, "accumulate": 2}
FACTS = {
    "salt": 0,
    "t_vlm": 4,
    "steps": 12,
    "kept_steps": [1, 12],
    "optim": OPTIM,
    "groups": [["head\\..*", 2.0], ["table\\..*", 1.0], [".*", 0.0]],
    "batches": [{"clip": f"clip{i}", "input_ids": [i, 3, 4], "labels": [3, 4, 0]} for i in range(2)],
}


class Network(nn.Module):
    """Guesses the next token, with the clip's mean; half of everything is dropped."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.frozen = nn.Embedding(6, 5), nn.Linear(5, 6), nn.Linear(2, 2)
        self.drop = nn.Dropout(0.5)

    def get_vision_tower(self):
        return SimpleNamespace(image_processor=SimpleNamespace(size=(8, 8)))

    def forward(self, input_ids, labels, attention_mask, images_clip, **_):
        logits = self.head(self.drop(self.table(input_ids)) + images_clip.mean())
        return {"loss": nn.functional.cross_entropy(logits[0], labels[0])}


def test_a_run_of_training():
    network = Network()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    curve = run_curve(network, FACTS)
    assert curve.losses.shape == (24,)
    assert curve.losses[-2:].mean() < 0.6 * curve.losses[:2].mean()
    rate = learning_rate(OptimConfig(**OPTIM))
    np.testing.assert_allclose(curve.rates, [float(rate(step)) for step in range(12)], rtol=1e-6)
    assert set(curve.parameters) == {1, 12}
    assert set(curve.parameters[12]) == {"table.weight", "head.weight", "head.bias"}
    first = np.abs(curve.parameters[1]["head.bias"] - before["head.bias"].numpy())
    np.testing.assert_allclose(first, 2 * curve.rates[0], rtol=1e-3)  # Adam's first step, at twice the rate
    np.testing.assert_array_equal(curve.parameters[12]["head.bias"], network.head.bias.detach())
    torch.testing.assert_close(network.frozen.weight, before["frozen.weight"], rtol=0, atol=0)


class Listening(Network):
    """Keeps what it is given."""

    def forward(self, **given):
        self.given = given
        return {"loss": torch.tensor(1.0), "ce_loss": torch.tensor(0.5), "pred_mask": []}


def test_conversations_are_padded_as_the_release_does():
    module = SimpleNamespace(
        SAM2Transform=lambda size: lambda frames: torch.zeros(len(frames), 3, size, size), select_keyframes=print
    )
    release = SimpleNamespace(module=lambda name: module)
    ellipse = {"center": [4, 4], "velocity": [0, 0], "radii": [2, 2], "absent": [1]}
    facts = {"salt": 0, "t_vlm": 4, "hw": [6, 8], "n_frames": 2, "image_size": 8, "clip": {"name": "a"}, "config": {}}
    facts |= {"cond_frames": [0], "frames_used": [0]}
    facts["conversations"] = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "ellipse": ellipse},
        {"input_ids": [4], "labels": [4]},
    ]
    network = Listening()
    assert run_batch(release, network, facts) == {"loss": 1.0, "ce_loss": 0.5}
    given = network.given
    assert given["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert given["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert given["attention_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert (given["image_ids"], given["modalities"]) == ([0, 0], ["video", "video"])
    assert given["images_sam"].shape == (1, 2, 3, 8, 8)
    assert given["gt_masks"][0].amax((1, 2, 3)).tolist() == [1.0, 0.0]
    assert given["gt_masks"][1] is None
    for row in facts["conversations"]:
        row.pop("ellipse", None)
    run_batch(release, network, facts)
    assert network.given["images_sam"] is None


def test_nothing_is_dropped():
    network = Network()
    with without_dropout(network):
        assert network.training
        x = torch.ones(50)
        torch.testing.assert_close(network.drop(x), x)
    assert not network.training
    assert network.drop.p == 0.5


def test_thinned():
    np.testing.assert_array_equal(thinned(np.arange(6).reshape(2, 3)), np.arange(6))
    assert thinned(np.zeros((KEPT, 3))).shape == (KEPT,)
    assert thinned(np.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert thinned(np.arange(2 * KEPT + 1))[:2].tolist() == [0, 3]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("train_loss.json", None, "no such file"),
        ("train_loss.json", "{", "not valid JSON"),
        ("train_loss.json", '{"losses": {}}', "'cond_frames' is missing"),
        ("train_batch_a.json", "{}", "'conversations' is missing"),
        ("loss_curve.json", "[]", "'optim' is missing"),
        ("hiera.json", "{}", "begins with train_loss, train_batch, loss_curve"),
    ],
)
def test_bad_cases(tmp_path, capsys, name, text, told):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    assert record.main(["training", str(path), "--release", str(tmp_path), "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.heavy
def test_another_optimizer_fails(tmp_path):
    shutil.copy(PARITY / "loss_curve.npz", tmp_path)
    facts = json.loads((PARITY / "loss_curve.json").read_text())
    facts |= {"steps": 10, "kept_steps": [1, 10]}
    wrong = {**facts, "optim": {**facts["optim"], "weight_decay": 0.04}}
    results = []
    for given in (facts, wrong):
        (tmp_path / "loss_curve.json").write_text(json.dumps(given))
        checks, _ = parity.run_case(tmp_path, "loss_curve")
        results.append([check.output for check in checks if not check.passed])
    assert results[0] == []
    assert "parameters, step 10" in results[1]
