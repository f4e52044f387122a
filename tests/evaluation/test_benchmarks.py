"""Every benchmark's table on a small data set in its official layout."""

import json

import numpy as np
import pytest

from helpers.dataset_layouts import write_layout
from helpers.evaluation_cases import plain_j, plain_scores, predict_empty, predict_shifted, predict_truth
from virst_jax.data.datasets.mevis import NO_TARGET
from virst_jax.data.datasets.registry import open_dataset
from virst_jax.errors import UserError
from virst_jax.evaluation import bitmask
from virst_jax.evaluation.benchmarks import JF, Subset, VideoScores, protocol_of, score_video, summarize
from virst_jax.io.json_files import parse_json

VIDEOS = ("mevis", "mevis_v2", "custom", "ref_youtube_vos", "ref_davis17", "revos", "reasonvos", "lvvis")
IMAGES = ("refcoco", "refcoco+", "refcocog", "refclef", "reasonseg")
SCRIPT = ("A (0/255 script)", "R (0/255 script)")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    opened = {}

    def get(name):
        if name not in opened:
            root = tmp_path_factory.mktemp(name)
            write_layout(name, root, num_videos=2, seed=1)
            opened[name] = open_dataset(name, root)
        return opened[name]

    return get


def predicted(video, predict):
    """bool[N, T, H, W]"""
    return np.stack([m for _, m, _ in predict(video, range(len(video.expressions)))], axis=1)


def annotated(video):
    return np.stack([video.read_masks(i, range(video.num_frames)) for i in range(len(video.expressions))])


def score(source, predict):
    """The summary, and prediction, annotation and expression of everything."""
    scores, cases = [], []
    for i in range(len(source)):
        video = source[i]
        pred, gt = predicted(video, predict), annotated(video)
        scores.append(score_video(source, video, lambda v, k, frames, p=pred: bitmask.pack(p[k][list(frames)])))
        cases += zip(pred, gt, video.expressions, strict=True)
    return summarize(source.name, source.split, source[0].is_image, scores), cases


def mean_scores(cases, rounded):
    """Mean J and F; ReVOS's script rounds every expression's percentage."""
    scores = np.array([plain_scores(p, g) for p, g, _ in cases])
    return np.mean(np.round(100 * scores, 2) / 100 if rounded else scores, axis=0)


@pytest.mark.parametrize("name", [*VIDEOS, *IMAGES])
def test_truth_scores_one(sources, name):
    summary, _ = score(sources(name), predict_truth)
    assert summary.main == 1
    for group in summary.groups:
        assert {m: v for m, v in group.scores.items() if v != 1 and m not in SCRIPT} == {}


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("predict", [predict_empty, predict_shifted])
def test_video_scores_follow_the_rules(sources, name, predict):
    """Mean over frames, then over expressions; an empty prediction scores where nothing is annotated."""
    summary, cases = score(sources(name), predict)
    headline = summary.headline[0]
    parts = [cases]
    if name == "revos":
        parts = [[case for case in cases if case[2].category == kind] for kind in ("referring", "reasoning")]
    j, f = np.mean([mean_scores(part, rounded=name == "revos") for part in parts], 0)
    got = [summary.value(headline, m) for m in ("J", "F", JF)]
    assert got == pytest.approx([j, f, (j + f) / 2], abs=1e-12)
    assert summary.headline == ("overall" if name == "revos" else headline, JF)
    if predict is predict_empty:
        away = np.mean([np.mean([(~g.any((1, 2))).mean() for _, g, _ in part]) for part in parts])
        assert j == pytest.approx(away, abs=1e-4)
        assert f == j
    else:
        assert 0.2 < j < 1


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("predict", [predict_empty, predict_shifted])
def test_image_scores_follow_the_rules(sources, name, predict):
    source = sources(name)
    summary, cases = score(source, predict)
    if name == "reasonseg":
        ignored = {source[i].name: source[i].read_masks.ignored() for i in range(len(source))}
        kept = [~ignored[source[i].name] for i in range(len(source)) for _ in source[i].expressions]
        whole = [(p, g) for p, g, _ in cases]
        group = summary.groups[-1]
        assert group.name == "ignore as background"
        assert group.scores["gIoU"] == pytest.approx(np.mean([plain_j(p, g) for p, g in whole]))
        cases = [(p & k, g & k, e) for (p, g, e), k in zip(cases, kept, strict=True)]
        assert any(not k.all() for k in kept)
    overlap = sum((p & g).sum() for p, g, _ in cases)
    union = sum((p | g).sum() for p, g, _ in cases)
    assert summary.value("all", "gIoU") == pytest.approx(np.mean([plain_j(p, g) for p, g, _ in cases]), abs=1e-12)
    assert summary.value("all", "cIoU") == pytest.approx(overlap / union, abs=1e-12)
    assert (summary.main == 0) == (predict is predict_empty)


def test_mevis_v2_tells_targets_from_none(sources):
    source = sources("mevis_v2")
    assert any(e.category == NO_TARGET for e in source[0].expressions)
    empty, _ = score(source, predict_empty)
    assert (empty.value("all", "N-acc"), empty.value("all", "T-acc")) == (1, 0)
    assert empty.value("no-target", JF) == 1
    assert empty.value("target", JF) < 0.2

    def predict_everything(video, expressions):
        for t in range(video.num_frames):
            yield t, np.ones((len(expressions), *video.size), bool), np.ones(len(expressions))

    everything, cases = score(source, predict_everything)
    assert (everything.value("all", "N-acc"), everything.value("all", "T-acc")) == (0, 1)
    assert everything.value("no-target", JF) < 0.51  # no outline in the prediction: F is 1, J is 0
    counts = {g.name: g.count for g in everything.groups}
    assert counts["target"] + counts["no-target"] == counts["all"] == len(cases)


def test_davis_gives_both_ways(sources):
    summary, _ = score(sources("ref_davis17"), predict_shifted)
    names = [g.name for g in summary.groups]
    assert names == ["per expression", "official", *(f"annotator {i}" for i in range(4))]
    for measure in ("J", "F", JF):
        mean = np.mean([summary.value(f"annotator {i}", measure) for i in range(4)])
        assert summary.value("official", measure) == pytest.approx(mean)
    assert summary.value("official", JF) != summary.value("per expression", JF)


def test_revos_leaves_out_the_third_type_and_labels_both_ways(sources):
    source = sources("revos")
    summary, cases = score(source, predict_truth)
    counts = {g.name: g.count for g in summary.groups}
    others = [e for _, _, e in cases if e.category == "other"]
    assert counts["referring"] + counts["reasoning"] == counts["overall"] == len(cases) - len(others)
    assert others
    shares = [(~g).mean((1, 2)).mean() for _, g, e in cases if e.category == "referring"]
    background = np.mean(np.round(100 * np.array(shares), 2))
    assert 100 * summary.value("referring", SCRIPT[0]) == pytest.approx(background, abs=1e-9)
    empty, _ = score(source, predict_empty)
    assert empty.value("overall", "R") == empty.value("overall", SCRIPT[1]) == 1


def test_parts_of_a_data_set_keep_its_name(sources):
    source = sources("mevis")
    part = Subset(source, (1,))
    assert (part.name, part.split, part.root, len(part)) == ("mevis", "valid_u", source.root, 1)
    assert part.names == [source.names[1]]
    assert part[0].name == source[1].name


def test_scores_survive_json(sources):
    source = sources("ref_davis17")
    video = source[0]
    scores = score_video(source, video, lambda v, k, frames: bitmask.pack(v.read_masks(k, frames)))
    content = json.dumps(scores.as_dict()).encode()
    assert VideoScores.from_json(parse_json(content, "scores.json")) == scores


def test_nothing_scored_is_an_error():
    with pytest.raises(UserError, match="no expression was scored"):
        summarize("mevis", "valid_u", False, [])
    assert protocol_of("ade20k", True) == "image"
    assert protocol_of("unheard of", False) == "video"
