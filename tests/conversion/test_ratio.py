"""Low precision judged by the release's own noise: two made-up recordings, and a run in their place."""

import json

import numpy as np
import pytest

from conversion import parity, ratio
from conversion.ratio import compare, units

HW, FRAMES = (6, 10), 4


def bits(masks):
    return np.packbits(masks, axis=-1)


@pytest.fixture
def cases(tmp_path, monkeypatch):
    """Writes both recordings; gives their paths, and a function that decides what our run computes."""
    rng = np.random.default_rng(0)
    truth = {"prompts": rng.normal(size=(1, 50)), "low_res_masks": rng.normal(size=(FRAMES, 3, 3))}
    truth["object_score_logits"] = np.array([1.0, 1.0, 0.1, -1.0])
    truth["video_mask_bits"] = np.tile(np.arange(10) < 5, (FRAMES, 6, 1))
    release = {name: value * 1.01 for name, value in truth.items() if name != "video_mask_bits"}
    release["object_score_logits"] = np.array([1.0, 1.0, -0.1, -1.0])
    release["video_mask_bits"] = truth["video_mask_bits"].copy()
    release["video_mask_bits"][0, 0, :3] = False
    meta = {"sam_idx": [0], "hw": HW, "n_frames": FRAMES, "input_ids": [1]}
    for name, arrays, dtype in (("e2e_true", truth, "float32"), ("e2e_low", release, "bfloat16")):
        (tmp_path / f"{name}.json").write_text(json.dumps({**meta, "dtype": dtype}))
        packed = {**arrays, "video_mask_bits": bits(arrays["video_mask_bits"])}
        np.savez(tmp_path / f"{name}.npz", **packed)

    def ours(**changes):
        def run(case):
            case.kept.update({**truth, **changes})

        monkeypatch.setattr(ratio, "run_e2e", run)

    return tmp_path / "e2e_true", tmp_path / "e2e_low", truth, ours


def test_noise_of_the_same_size_passes(cases, tmp_path, capsys):
    true, low, truth, ours = cases
    ours(prompts=truth["prompts"] * 0.99)
    given = ["ratio", str(true), "--low", str(low), "--json", str(tmp_path / "out.json")]
    assert parity.main(given) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1].split()[:4] == ["prompts", "1.0e-02", "1.0e-02", "1.00"]
    assert told[-1].startswith("masks: mean IoU release 0.9667, ours 1.0000 over 3 frames")
    assert told[-1].endswith("presence flips: release [2], ours none")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["masks"]["flips_release"] == [2]
    assert found["outputs"][0]["ratio"] == pytest.approx(1.0)


def test_more_noise_fails(cases, capsys):
    true, low, truth, ours = cases
    ours(prompts=truth["prompts"] * 1.013)
    assert parity.main(["ratio", str(true), "--low", str(low)]) == 1
    assert "1.30" in next(line for line in capsys.readouterr().out.splitlines() if "LARGER" in line)


def test_worse_masks_fail(cases, capsys):
    true, low, truth, ours = cases
    masks = truth["video_mask_bits"].copy()
    masks[0, 0, :4] = False
    ours(video_mask_bits=masks)
    assert parity.main(["ratio", str(true), "--low", str(low)]) == 1
    # a frame on which presence differs does not count
    masks = truth["video_mask_bits"].copy()
    masks[2] = False
    ours(video_mask_bits=masks)
    assert parity.main(["ratio", str(true), "--low", str(low)]) == 0


def test_cases_that_do_not_belong_together(cases, tmp_path, capsys):
    true, low, _, _ = cases
    facts = json.loads(low.with_suffix(".json").read_text())

    def told(**changes):
        low.with_suffix(".json").write_text(json.dumps(facts | changes))
        assert parity.main(["ratio", str(true), "--low", str(low)]) == 2
        return capsys.readouterr().err

    assert "has to be recorded in float32" in told(dtype="float32")
    assert "not the same inputs" in told(n_frames=5)
    assert "no such directory" in (
        parity.main(["ratio", str(tmp_path / "x" / "y"), "--low", str(low)]) and capsys.readouterr().err
    )


def test_units_of_the_last_place():
    truth = np.array([1.0, 1.5, 2.0, 0.75])
    step = 2.0**-7  # of bfloat16 at 1
    np.testing.assert_allclose(units(np.array([step, step, step, step]), truth, "bfloat16"), [1, 1, 0.5, 2])
    ours, release = truth + np.array([0, step, 0, 0]), truth + np.array([0, 0, step, 0])
    row = compare("x", ours, release, truth, "bfloat16")
    assert row.ratio == pytest.approx(1.0)
    assert (row.median, row.largest) == (0, 1)
