"""The recorded outputs of the release, through the parity runner."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conversion import parity
from conversion.cases import network
from conversion.cases.case import Case, case_names, load_case
from conversion.cases.training import ellipse_targets
from helpers.places import PARITY as CASES

FIELDS = ("shapes", "clip", "clip_frames", "memory_frames", "pointer_tokens", "image_size", "n_frames", "hw", "t_vlm")
HEAVY = ("e2e_", "train_", "loss_curve", "sam2_video", "sam2_image")
NEWER = ("reading", "sizes", "tokens", "sam2_", "chat_", "train_batch")  # kinds that have had fields from the start
NAMES = case_names(CASES)


def failures(name: str, folder: Path = CASES) -> list[str]:
    checks, _ = parity.run_case(folder, name, tokenizer=CASES.parent / "tokenizer")
    return [f"{c.output}: {c.note or c.relative}" for c in checks if not c.passed]


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(HEAVY)])
def test_module_equals_the_release(name):
    assert failures(name) == []


@pytest.mark.heavy
@pytest.mark.full_size
@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(HEAVY)])
def test_network_equals_the_release(name):
    assert failures(name) == []


def copy_case(name: str, target: Path) -> None:
    for path in CASES.glob(f"{name}.*"):
        shutil.copy(path, target)


def test_a_changed_output_fails(tmp_path, capsys):
    copy_case("losses", tmp_path)
    arrays = dict(np.load(tmp_path / "losses.npz"))
    np.savez(tmp_path / "losses.npz", **{**arrays, "bce": arrays["bce"] * np.float32(1.001)})
    report = tmp_path / "report.json"
    assert parity.main([str(tmp_path), "--case", "losses", "--json", str(report)]) == 1
    assert "FAIL" in capsys.readouterr().out
    (case,) = json.loads(report.read_text())
    assert {c["output"]: c["passed"] for c in case["checks"]} == {
        "dice": True,
        "bce": False,
        "dice_empty": True,
        "bce_empty": True,
    }


def test_report_of_a_bound_in_numpy(tmp_path):
    copy_case("transforms", tmp_path)
    report = tmp_path / "report.json"
    assert parity.main([str(tmp_path), "--json", str(report)]) == 0
    assert all(check["passed"] is True for check in json.loads(report.read_text())[0]["checks"])


def test_rows_are_printed_as_they_come(tmp_path, capsys, monkeypatch):
    copy_case("losses", tmp_path)
    for path in tmp_path.glob("losses.*"):
        shutil.copy(path, tmp_path / path.name.replace("losses", "losses_again"))
    seen: list[str] = []
    run_whole_case = parity.run_whole_case

    def spy(folder: Path, name: str, **given):
        seen.append(capsys.readouterr().out)
        return run_whole_case(folder, name, **given)

    monkeypatch.setattr(parity, "run_whole_case", spy)
    assert parity.main([str(tmp_path)]) == 0
    assert "losses" not in seen[0]
    assert "losses" in seen[1]
    assert "losses_again" not in seen[1]
    assert "losses_again" in capsys.readouterr().out


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(NEWER)])
def test_words_of_before_say_what_fields_say(name):
    """Cases without fields, of which there are some, are read from the sentence that says how inputs are made."""
    case = load_case(CASES, name)
    words = Case(name, {k: v for k, v in case.meta.items() if k not in ("shapes", "ellipse")}, case.outputs)
    for key, shape in case.meta.get("shapes", {}).items():
        if key in ("tome.x", "tome.z", "dec.toks", "stf.img2", "loss.x"):  # that a runner asks for
            assert words.shape(key, (-1,)) == case.shape(key, (-2,)) == tuple(shape)
    if "ellipse" in case.meta:
        np.testing.assert_array_equal(ellipse_targets(words, 6, 256), ellipse_targets(case, 6, 256))
        assert ellipse_targets(case, 6, 1024).any((1, 2)).tolist() == [True] * 5 + [False]
    bare = Case(name, {k: v for k, v in words.meta.items() if k not in FIELDS}, case.outputs)
    for key, pattern in PATTERNS.items():
        if key in case.meta and not (name.startswith("e2e_") and key == "n_frames"):
            assert bare.number(key, pattern, -1) == case.number(key, pattern, -2) == case.meta[key]
    if "clip" in case.meta:
        assert bare.clip_name("") == case.clip_name("") == case.meta["clip"]["name"]


PATTERNS = {
    "clip_frames": r"clips of (\d+) frames",
    "memory_frames": r"(\d+)\*HW",
    "pointer_tokens": r"(\d+) pointer tokens",
    "image_size": r"BILINEAR (\d+)",
    "n_frames": r"make_video\((\d+)",
}


def test_another_salt_fails(tmp_path):
    copy_case("token_merge", tmp_path)
    meta = json.loads((tmp_path / "token_merge.json").read_text())
    (tmp_path / "token_merge.json").write_text(json.dumps({**meta, "salt": 1}))
    assert len(failures("token_merge", tmp_path)) == 5


@pytest.mark.heavy
def test_another_prompt_fails(tmp_path):
    """A click that is read as one beside the object."""
    copy_case("sam2_image_large", tmp_path)
    meta = json.loads((tmp_path / "sam2_image_large.json").read_text())
    meta["prompts"][0]["labels"] = [0]
    (tmp_path / "sam2_image_large.json").write_text(json.dumps(meta))
    assert len(failures("sam2_image_large", tmp_path)) == 2


def test_memories_are_thinned_once():
    """As the recorder writes them: every eighth value of each axis, and the case says so."""
    side, depth = 16, 24
    memory = np.random.default_rng(0).normal(size=(1, 1, side * side, depth)).astype(np.float32)
    ones = np.ones((1, 1), np.float32)
    prediction = SimpleNamespace(low_res=np.ones((1, 1, 4, 4), np.float32), pointer=np.ones((1, 1, 5), np.float32))
    masks = np.ones((1, 1, 6, 8), bool)
    tracked = SimpleNamespace(prediction=prediction, memory=memory)
    chunk = SimpleNamespace(tracked=(tracked,), masks=masks, scores=ones, start=0)
    outputs = {"low_res_masks": prediction.low_res[0], "obj_ptr": prediction.pointer[0], "object_score_logits": ones[0]}
    outputs["video_mask_bits"] = np.packbits(masks[0], axis=-1)
    outputs["memory_0"] = memory.reshape(side, side, depth).transpose(2, 0, 1)[::8, ::8, ::8]
    case = Case("e2e_a", {"strides": {"memory_0": [8, 8, 8]}}, outputs)
    cfg = SimpleNamespace(sam2=SimpleNamespace(feature_size=side))
    network._tracking(network.Comparison(case), cfg, [chunk], (6, 8))
    assert {c.output: c.passed for c in case.checks}["memory_0"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "losses.npz").write_bytes(b"PK\3\4 no zip"), "damaged"),
        (lambda d: (d / "losses.npz").write_bytes((d / "losses.npz").read_bytes()[:200]), "damaged"),
        (lambda d: (d / "losses.json").write_text("{"), "damaged"),
        (lambda d: (d / "losses.npz").unlink(), "does not fit its kind"),
        (lambda d: [p.rename(d / p.name.replace("losses", "riddle")) for p in d.iterdir()], "unknown kind"),
    ],
)
def test_damaged_and_unknown_cases_fail(tmp_path, capsys, spoil, message):
    copy_case("losses", tmp_path)
    spoil(tmp_path)
    assert parity.main([str(tmp_path)]) == 1
    assert message in " ".join(capsys.readouterr().out.split())


def test_bad_arguments(tmp_path, capsys):
    assert parity.main([str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in capsys.readouterr().err
    assert parity.main([str(tmp_path)]) == 2
    assert "no cases" in capsys.readouterr().err
    copy_case("losses", tmp_path)
    assert parity.main([str(tmp_path), "--case", "missing"]) == 1
    assert "no case" in " ".join(capsys.readouterr().out.split())
