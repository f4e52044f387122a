"""The evaluation of a data set: shared out, interrupted, damaged, repaired; always the same files and numbers."""

import json
import subprocess
import sys

import numpy as np
import pytest

from helpers.dataset_layouts import write_layout
from helpers.evaluation_cases import SETTINGS, files_of, predict_shifted, predict_truth
from helpers.places import ROOT
from virst_jax.data.datasets.registry import open_dataset
from virst_jax.errors import UserError
from virst_jax.evaluation.predictions import mask_file, read_masks
from virst_jax.evaluation.runner import evaluate, fingerprint_of, missing_expressions

PROGRAM = ROOT / "tests" / "helpers" / "evaluation_cases.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_layout("revos", root, num_videos=4, seed=3)
    return root


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    """Files and outcome of one process that nobody disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    outcome = run(root, out)
    return files_of(out), outcome


def run(root, out, predict=predict_shifted, settings=SETTINGS, **options):
    return evaluate(open_dataset("revos", root), predict, out, settings, progress=False, **options)


def start(root, out, index=0, count=1, die_after=0):
    command = [sys.executable, str(PROGRAM), "revos", str(root), str(out), str(index), str(count), str(die_after)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def counting(calls):
    def predict(video, expressions):
        calls.append((video.name, tuple(expressions)))
        yield from predict_shifted(video, expressions)

    return predict


def test_outcome_and_files(root, undisturbed):
    files, outcome = undisturbed
    source = open_dataset("revos", root)
    assert (outcome.videos, outcome.finished, outcome.errors, outcome.pending) == (4, 4, {}, 0)
    assert sorted(outcome.computed) == sorted(source.names)
    assert 0 < outcome.summary.main < 1
    assert len(files) == 1 + 4 + 4 * len(source[0].expressions)
    masks = json.loads(files["masks/UVO/all/-valid0/1.json"])
    assert masks["text"] == source[0].expressions[1].text
    assert masks["fingerprint"] == fingerprint_of(SETTINGS)
    assert len(masks["counts"]) == source[0].num_frames


def test_three_processes_give_the_same(root, undisturbed, tmp_path):
    processes = [start(root, tmp_path / "out", index, 3) for index in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert files_of(tmp_path / "out") == undisturbed[0]
    # whoever comes last sums up; here all is done before
    outcome = run(root, tmp_path / "out", process_index=1, process_count=3)
    assert outcome.computed == ()
    assert outcome.summary == undisturbed[1].summary


@pytest.mark.parametrize("die_after", [3, 13])
def test_killed_and_restarted_gives_the_same(root, undisturbed, tmp_path, die_after):
    killed = start(root, tmp_path / "out", die_after=die_after)
    killed.communicate(timeout=120)
    assert killed.returncode == -9
    before = files_of(tmp_path / "out")
    assert len(before) < len(undisturbed[0])
    calls = []
    outcome = run(root, tmp_path / "out", counting(calls))
    assert files_of(tmp_path / "out") == undisturbed[0]
    assert outcome.summary == undisturbed[1].summary
    assert len(calls) == (4 if die_after == 3 else 2)  # the second video was killed, or the third


def test_workers_do_not_change_the_scores(root, undisturbed, tmp_path):
    outcome = run(root, tmp_path / "out", workers=2)
    assert files_of(tmp_path / "out") == undisturbed[0]
    assert outcome.summary == undisturbed[1].summary


def test_a_rerun_computes_nothing_and_repairs_what_is_damaged(root, undisturbed, tmp_path):
    out, calls = tmp_path / "out", []
    run(root, out)
    assert run(root, out, counting(calls)).computed == ()
    assert calls == []

    video = open_dataset("revos", root)[1]
    truncated = mask_file(out / "masks", video.name, "2")
    truncated.write_bytes(truncated.read_bytes()[:-40])
    changed = mask_file(out / "masks", open_dataset("revos", root)[2].name, "0")
    content = json.loads(changed.read_text())
    content["counts"] = content["counts"][:-1]
    changed.write_text(json.dumps(content))
    other = mask_file(out / "masks", open_dataset("revos", root)[3].name, "1")
    other.unlink()
    assert [position for position, _ in missing_expressions(video, out / "masks")] == [2]

    outcome = run(root, out, counting(calls))
    # all expressions of a video together, so that a repaired mask is the one of an undisturbed run
    assert sorted(calls) == [(f"UVO/all/-valid{i}", (0, 1, 2, 3)) for i in (1, 2, 3)]
    assert files_of(out) == undisturbed[0]
    assert outcome.summary == undisturbed[1].summary


def test_other_masks_are_scored_again(root, tmp_path):
    out = tmp_path / "out"
    first = run(root, out)
    better = run(root, out, predict_truth, {"predictor": "truth"}, overwrite=True)
    assert better.summary.main == 1 > first.summary.main


def test_other_settings_are_refused(root, tmp_path):
    run(root, tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=r"other settings \(predictor 'shifted' then, 'truth' now\)"):
        run(root, tmp_path, predict_truth, {"predictor": "truth"})
    assert files_of(tmp_path) == before


def test_an_error_in_one_video_is_named_and_the_rest_goes_on(tmp_path):
    write_layout("revos", tmp_path / "data", num_videos=4, seed=3)
    source = open_dataset("revos", tmp_path / "data")
    broken = tmp_path / "data/ReVOS/JPEGImages" / source.names[1] / "00010.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:300])

    def predict(video, expressions):
        for t, masks, scores in predict_shifted(video, expressions):
            video.read_frames([t])
            yield t, masks, scores

    outcome = evaluate(source, predict, tmp_path / "out", SETTINGS, progress=False)
    assert set(outcome.errors) == {source.names[1]}
    assert str(broken) in outcome.errors[source.names[1]]
    assert outcome.finished == 3
    assert outcome.summary is not None  # of the others

    broken.write_bytes(whole)
    second = evaluate(source, predict, tmp_path / "out", SETTINGS, progress=False)
    assert second.errors == {}
    assert second.computed == (source.names[1],)
    assert not list((tmp_path / "out/errors").rglob("*.json"))


@pytest.mark.parametrize("workers", [0, 1])
def test_masks_of_another_size_are_an_error_of_their_video(tmp_path, workers):
    write_layout("ref_youtube_vos", tmp_path / "data", num_videos=2, seed=3)
    source = open_dataset("ref_youtube_vos", tmp_path / "data")
    annotation = tmp_path / "data/Ref-Youtube-VOS/valid/Annotations" / source.names[0] / "3" / "00005.png"
    from PIL import Image

    Image.new("L", (10, 10)).save(annotation)

    def predict(video, expressions):
        for t in range(video.num_frames):
            yield t, np.zeros((len(expressions), *video.size), bool), np.zeros(len(expressions))

    outcome = evaluate(source, predict, tmp_path / "out", SETTINGS, workers=workers, progress=False)
    assert set(outcome.errors) == {source.names[0]}
    assert str(annotation) in outcome.errors[source.names[0]]
    assert outcome.finished == 1


def test_a_model_that_skips_frames_is_an_error(root, tmp_path):
    def short(video, expressions):
        yield from list(predict_shifted(video, expressions))[:-1]

    def small(video, expressions):
        return ((t, masks[:, :-1], scores) for t, masks, scores in predict_shifted(video, expressions))

    assert "gave 5 of 6 frames" in run(root, tmp_path / "a", short).errors["UVO/all/-valid0"]
    assert "expected frame 0 with [4, 48, 64]" in run(root, tmp_path / "b", small).errors["UVO/all/-valid0"]


def test_masks_that_are_not_public_are_kept_unscored(tmp_path):
    write_layout("mevis", tmp_path / "data", num_videos=2, seed=0)
    source = open_dataset("mevis", tmp_path / "data", "valid")

    def predict(video, expressions):
        for t in range(video.num_frames):
            yield t, np.ones((len(expressions), *video.size), bool), np.zeros(len(expressions))

    outcome = evaluate(source, predict, tmp_path / "out", SETTINGS, progress=False)
    assert (outcome.finished, outcome.scores, outcome.summary) == (2, (), None)
    assert read_masks(mask_file(tmp_path / "out/masks", source.names[0], "0")).fingerprint == fingerprint_of(SETTINGS)


def test_other_processes_may_be_pending(root, tmp_path):
    first = run(root, tmp_path, process_index=0, process_count=2)
    assert (first.finished, first.pending, first.summary) == (2, 2, None)
    second = run(root, tmp_path, process_index=1, process_count=2)
    assert (second.finished, second.pending) == (4, 0)
    assert second.summary is not None
    assert not set(first.computed) & set(second.computed)
    with pytest.raises(UserError, match="process 2 of 2"):
        run(root, tmp_path, process_index=2, process_count=2)
