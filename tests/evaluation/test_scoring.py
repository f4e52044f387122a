"""Scores of a video's expressions against plain sums over arrays."""

import dataclasses
import json

import numpy as np
import pytest

from helpers.dataset_layouts import encode
from helpers.evaluation_cases import plain_scores, sequence_scores
from virst_jax.data.datasets.json_index import index_members
from virst_jax.data.datasets.readers import RleMasks
from virst_jax.data.samples import Expression, Video
from virst_jax.errors import UserError
from virst_jax.evaluation import bitmask
from virst_jax.evaluation.scoring import pack_annotations, score_expressions

SIZE, LENGTH = (45, 70), 20  # more frames than one piece


def boxes(seed, count):
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, LENGTH, *SIZE), bool)
    for mask in masks.reshape(-1, *SIZE):
        y, x = rng.integers(0, 30, 2)
        mask[y : y + rng.integers(0, 20), x : x + rng.integers(0, 40)] = True
    return masks


def make_video(masks, categories=None):
    categories = categories or [""] * len(masks)
    expressions = tuple(Expression(f"object {i}", str(i), c) for i, c in enumerate(categories))
    return Video("v", LENGTH, SIZE, expressions, None, lambda i, frames: masks[i][list(frames)])


def reader(pred):
    return lambda video, i, frames: bitmask.pack(pred[i][list(frames)])


def test_rows_are_plain_means():
    gt, pred = boxes(0, 3), boxes(1, 3)
    gt[2], pred[2] = False, False
    rows = score_expressions(make_video(gt, ["a", "", "b"]), reader(pred))
    for i, row in enumerate(rows):
        j, f = plain_scores(pred[i], gt[i])
        assert pytest.approx((j, f, (j + f) / 2), abs=1e-12) == (row.J, row.F, row.JF)
        known = sequence_scores(pred[i], gt[i])
        assert pytest.approx((known["J"], known["F"]), abs=1e-12) == (row.J, row.F)
        assert row.intersection == (pred[i] & gt[i]).sum()
        assert row.union == (pred[i] | gt[i]).sum()
        assert (row.pred_pixels, row.gt_pixels) == (pred[i].sum(), gt[i].sum())
        assert row.frames == LENGTH
        assert row.A is None
    assert [row.category for row in rows] == ["a", "", "b"]
    assert rows[2].J == rows[2].F == 1
    assert rows[0].J < 1


def script_scores(pred, counts, foreground):
    """A and R as the release's script has them: 8-bit masks, predictions of 0 and 255."""
    gt, files = counts.astype(np.uint8), np.where(pred, np.uint8(255), np.uint8(0))
    a, r = [], []
    for g, p, f in zip(gt, files, foreground.astype(np.uint8), strict=True):
        a.append(np.mean(g == p))
        r.append(max(1 - ((1 - g) * p).sum() / (f.sum() + 1e-6), 0.0))
    return np.mean(a), np.mean(r)


def test_accuracy_and_robustness_both_ways(tmp_path):
    """Annotations that overlap, as the script adds them up in 8 bits."""
    parts, pred = boxes(2, 3), boxes(3, 2)
    parts[1] |= parts[0] & (np.random.default_rng(0).random(parts[0].shape) > 0.5)
    path = tmp_path / "mask_dict.json"
    path.write_text(
        json.dumps({str(i): [encode(m) if m.any() else None for m in part] for i, part in enumerate(parts)})
    )
    read_masks = RleMasks(index_members(path), (("0", "1", "2"), ("2",)), LENGTH, SIZE)
    foreground = parts.any(0) | boxes(4, 1)[0]
    pred[0] &= np.random.default_rng(1).random(pred[0].shape) > 0.9  # few enough false pixels for R above 0
    video = dataclasses.replace(make_video(parts[:2]), read_masks=read_masks)
    rows = score_expressions(video, reader(pred), foreground=lambda frames: foreground[list(frames)])
    for row, one, counts in zip(rows, pred, (parts.sum(0), parts[2].astype(int)), strict=True):
        gt = counts > 0
        known = sequence_scores(one, gt, foreground)
        assert pytest.approx((known["A"], known["R"]), abs=1e-12) == (row.A, row.R)
        assert (row.A_script, row.R_script) == pytest.approx(script_scores(one, counts, foreground), abs=1e-12)
    assert parts.sum(0).max() > 1
    assert rows[0].R_script > 0
    perfect = score_expressions(video, reader([parts.any(0), parts[2]]), foreground=lambda f: foreground[list(f)])
    assert [(r.A, r.R) for r in perfect] == [(1, 1)] * 2
    assert perfect[0].R_script < 1  # rightly set pixels of two annotations count as false there


def test_ignored_pixels_are_left_out():
    gt, pred = boxes(5, 2), boxes(6, 2)
    ignored = np.zeros(SIZE, bool)
    ignored[10:30, 20:50] = True
    rows = score_expressions(make_video(gt), reader(pred), ignored=ignored, boundaries=False)
    plain = score_expressions(make_video(gt), reader(pred), boundaries=False)
    masked = score_expressions(make_video(gt & ~ignored), reader(pred & ~ignored), boundaries=False)
    for row, whole, kept in zip(rows, plain, masked, strict=True):
        assert (row.J, row.intersection, row.union) == (kept.J, kept.intersection, kept.union)
        assert (row.J_unignored, row.intersection_unignored, row.union_unignored) == (
            whole.J,
            whole.intersection,
            whole.union,
        )
        assert row.J != whole.J
        assert row.F == row.J


def test_bad_masks_are_named():
    gt = boxes(7, 1)
    hidden = dataclasses.replace(make_video(gt), read_masks=None)
    with pytest.raises(UserError, match="video v: its masks are not public"):
        score_expressions(hidden, reader(gt))
    small = dataclasses.replace(make_video(gt), read_masks=lambda i, frames: gt[i][list(frames), :-1])
    with pytest.raises(UserError, match=r"video v: its masks are \[44, 70\]"):
        score_expressions(small, reader(gt))


def test_codes_are_scored_as_the_masks_they_mean(tmp_path):
    """Several annotations, missing ones, none at all, and codes of another form."""
    parts = boxes(8, 3)
    parts[0, :5] = False
    ids = (("0", "1"), ("2",), ())
    path = tmp_path / "mask_dict.json"
    codes = {str(i): [encode(m) if m.any() else None for m in part] for i, part in enumerate(parts)}
    path.write_text(json.dumps(codes))
    reader = RleMasks(index_members(path), ids, LENGTH, SIZE)
    video = dataclasses.replace(make_video(boxes(0, 3)), read_masks=reader)
    for position in range(3):
        expected = bitmask.pack(reader(position, [3, 7, 19]))
        np.testing.assert_array_equal(pack_annotations(video, position, [3, 7, 19]), expected)

    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], parts[2, 7].T.reshape(-1).astype(int), [2]]))))
    first = int(np.argmax(parts[2, 7].T.reshape(-1)))
    codes["2"][7] = {"size": list(SIZE), "counts": [first, *map(int, runs)]}
    path.write_text(json.dumps(codes))
    listed = dataclasses.replace(video, read_masks=RleMasks(index_members(path), ids, LENGTH, SIZE))
    np.testing.assert_array_equal(pack_annotations(listed, 1, [7]), bitmask.pack(parts[2, [7]]))

    codes["2"][7] = {"size": list(SIZE), "counts": "zzzz"}
    path.write_text(json.dumps(codes))
    broken = dataclasses.replace(video, read_masks=RleMasks(index_members(path), ids, LENGTH, SIZE))
    with pytest.raises(UserError, match=r"mask_dict\.json: annotation 2, video v: damaged"):
        pack_annotations(broken, 1, [7])
