"""`virst metrics` and `virst submit`, called as the command line calls them."""

import argparse
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from helpers.dataset_layouts import write_layout
from helpers.evaluation_cases import predict_shifted, predict_truth
from virst_jax.commands import metrics, submit
from virst_jax.data.datasets.registry import open_dataset
from virst_jax.errors import UserError
from virst_jax.evaluation.runner import evaluate


def call(command, *arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(a) for a in arguments]))


def write_pngs(source, predict, folder, value=255, flat=False):
    """Another system's results."""
    for i in range(len(source)):
        video = source[i]
        name = video.name.rsplit("/", 1)[-1] if flat else video.name
        for t, masks, _ in predict(video, range(len(video.expressions))):
            for mask, expression in zip(masks, video.expressions, strict=True):
                place = folder / name / expression.id
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(value * mask.astype(np.uint8)).save(place / f"{video.frame_names[t]}.png")


def data_set(name, tmp_path, split=""):
    write_layout(name, tmp_path / "data", num_videos=2, seed=5)
    return open_dataset(name, tmp_path / "data", split)


@pytest.mark.parametrize(("name", "value", "flat"), [("mevis", 255, False), ("revos", 1, True)])
def test_metrics_of_pngs_are_those_of_eval(tmp_path, capsys, name, value, flat):
    source = data_set(name, tmp_path)
    write_pngs(source, predict_shifted, tmp_path / "theirs", value, flat)
    known = evaluate(source, predict_shifted, tmp_path / "ours", {}, progress=False)
    common = ("--dataset", name, "--data-root", tmp_path / "data", "--quiet")
    for folder, workers in (("theirs", 0), ("theirs", 2), ("ours", 0)):
        assert call(metrics, tmp_path / folder, *common, "--workers", workers, "--out", tmp_path / "report") == 0
        summary = json.loads((tmp_path / "report/summary.json").read_text())
        assert summary["headline"]["value"] == known.summary.main
        assert f"{100 * known.summary.main:.2f}" in capsys.readouterr().out
    assert (tmp_path / "report/worst.html").exists()


def test_metrics_of_palette_pngs(tmp_path, capsys):
    source = data_set("ref_davis17", tmp_path)
    for i in range(len(source)):
        video = source[i]
        for annotator in range(4):
            folder = tmp_path / f"theirs/anno_{annotator}" / video.name
            folder.mkdir(parents=True)
            for t in range(video.num_frames):
                image = Image.fromarray(video.read_masks.labels(t).astype(np.uint8))
                image.putpalette(list(range(256)) * 3)
                image.save(folder / f"{video.frame_names[t]}.png")
    common = ("--dataset", "ref_davis17", "--data-root", tmp_path / "data", "--quiet", "--workers", 0)
    assert call(metrics, tmp_path / "theirs", *common, "--out", tmp_path / "report") == 0
    out = capsys.readouterr().out
    assert "official" in out
    assert "per expression" not in out
    assert json.loads((tmp_path / "report/summary.json").read_text())["headline"]["value"] == 1


def test_a_missing_expression_is_named(tmp_path, capsys):
    source = data_set("mevis", tmp_path)
    write_pngs(source, predict_truth, tmp_path / "theirs")
    gone = tmp_path / "theirs" / source.names[1] / "2"
    shutil.rmtree(gone)
    common = ("--dataset", "mevis", "--data-root", tmp_path / "data", "--quiet", "--workers", 0)
    assert call(metrics, tmp_path / "theirs", *common) == 1
    shown = capsys.readouterr()
    assert "INCOMPLETE" in shown.out
    assert str(gone) in shown.out
    assert "1 of 2 videos could not be scored" in shown.err
    shutil.rmtree(tmp_path / "theirs" / source.names[0])
    with pytest.raises(UserError, match=f"no video could be scored; the first: .*{source.names[0]}"):
        call(metrics, tmp_path / "theirs", *common)


def test_bad_folders_are_told(tmp_path):
    data_set("mevis", tmp_path)
    common = ("--dataset", "mevis", "--data-root", tmp_path / "data", "--quiet")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        call(metrics, tmp_path / "nowhere", *common)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: is empty"):
        call(metrics, tmp_path / "empty", *common)
    with pytest.raises(UserError, match="unknown data set"):
        call(metrics, tmp_path, "--dataset", "x", "--data-root", tmp_path)


def test_submit_writes_and_checks(tmp_path, capsys):
    source = data_set("mevis", tmp_path, "valid")

    def predict(video, expressions):
        for t in range(video.num_frames):
            yield t, np.ones((len(expressions), *video.size), bool), np.ones(len(expressions))

    evaluate(source, predict, tmp_path / "ours", {}, progress=False)
    common = ("--dataset", "mevis", "--data-root", tmp_path / "data", "--split", "valid", "--quiet")
    path = tmp_path / "mevis.zip"
    assert call(submit, tmp_path / "ours", *common, "--out", path) == 0
    assert "masks of 2 videos, checked" in capsys.readouterr().out
    assert call(submit, *common, "--check", path) == 0
    assert "complete" in capsys.readouterr().out
    write_pngs(source, predict, tmp_path / "theirs")
    assert call(submit, tmp_path / "theirs", *common, "--out", tmp_path / "theirs.zip") == 0
    assert (tmp_path / "theirs.zip").read_bytes() == path.read_bytes()

    before = path.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        call(submit, tmp_path / "ours", *common, "--out", path)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="--out ZIP is missing"):
        call(submit, tmp_path / "ours", *common)
    with pytest.raises(UserError, match="give either"):
        call(submit, *common)
