"""The report: numbers, files, images."""

import base64
import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from helpers.dataset_layouts import write_layout
from helpers.evaluation_cases import files_of, predict_shifted
from virst_jax.data.datasets.registry import open_dataset
from virst_jax.evaluation import report
from virst_jax.evaluation.predictions import StoredReader
from virst_jax.evaluation.runner import evaluate


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Of a data set: its source, the outcome and a reader of the masks."""
    done = {}

    def get(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            write_layout(name, folder, num_videos=2, seed=2)
            source = open_dataset(name, folder)
            outcome = evaluate(source, predict_shifted, folder / "out", {}, progress=False)
            done[name] = source, outcome, StoredReader(str(folder / "out/masks"))
        return done[name]

    return get


def write(evaluated, name, folder, **options):
    source, outcome, reader = evaluated(name)
    table = report.write_report(
        folder, outcome.summary, outcome.scores, source=source, read_pred=reader, progress=False, **options
    )
    return table, outcome


@pytest.mark.parametrize("name", ["revos", "ref_davis17", "reasonseg"])
def test_report_files(evaluated, name, tmp_path):
    table, outcome = write(evaluated, name, tmp_path)
    rows = [row for video in outcome.scores for row in video.rows]
    assert (tmp_path / "table.txt").read_text() == table
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["headline"]["value"] == outcome.summary.main
    assert summary["complete"] is True
    assert [g["name"] for g in summary["groups"]] == [g.name for g in outcome.summary.groups]
    for group in outcome.summary.groups:
        line = next(line for line in table.splitlines() if line.startswith(f"│ {group.name} "))
        shown = [float(cell) for cell in line.strip("│").split("│")[2:] if cell.strip()]
        assert shown == [pytest.approx(100 * v, abs=0.0051) for v in group.scores.values()]
        assert int(line.strip("│").split("│")[1]) == group.count

    with (tmp_path / "expressions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(x["video"], x["expression"], x["text"]) for x in lines] == [(r.video, r.expression, r.text) for r in rows]
    assert [float(x["J"]) for x in lines] == [r.J for r in rows]
    assert ("R" in lines[0]) == (name == "revos")
    assert (tmp_path / "objects.csv").exists() == (name == "ref_davis17")
    with Image.open(tmp_path / "expressions.png") as plot:
        assert np.asarray(plot.convert("L")).std() > 5


def test_worst_page_shows_the_worst(evaluated, tmp_path):
    _, outcome = write(evaluated, "revos", tmp_path, worst=2)
    rows = sorted((row for video in outcome.scores for row in video.rows), key=lambda row: row.JF)
    page = (tmp_path / "worst.html").read_text()
    assert re.findall(r"<h2>\d+\. (.*)</h2>", page) == [row.text for row in rows[:2]]
    images = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(images) == 2 * report.IMAGES
    with Image.open(io.BytesIO(base64.b64decode(images[0]))) as image:
        assert image.format == "JPEG"
        assert image.size in [(64, 48), (56, 40)]
    assert "http" not in page  # one file, nothing fetched


def test_texts_are_escaped(evaluated):
    _, outcome, _ = evaluated("revos")
    row = dataclasses.replace(outcome.scores[0].rows[0], text="<script>alert(1)</script>")
    page = report.render_page(outcome.summary, [report.Case(row, ())], "a < b")
    assert "<script>" not in page
    assert "a &lt; b" in page


def test_a_report_is_the_same_every_time_and_says_what_failed(evaluated, tmp_path):
    write(evaluated, "revos", tmp_path / "a")
    write(evaluated, "revos", tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    table, _ = write(evaluated, "revos", tmp_path / "c", errors={"v": "v/0.png: truncated"})
    assert "INCOMPLETE: 1 videos failed" in table
    assert "failed: v: v/0.png: truncated" in table
    assert json.loads((tmp_path / "c/summary.json").read_text())["complete"] is False


def test_tint_of_right_missed_and_false():
    frame = np.full((2, 2, 3), 100, np.uint8)
    pred, gt = np.array([[1, 1], [0, 0]], bool), np.array([[1, 0], [1, 0]], bool)
    out = report.tint(frame, pred, gt).astype(int)
    assert out[0, 0].argmax() == 1  # green: right
    assert out[0, 1].argmax() == 0  # red: false
    assert out[1, 0].argmax() == 2  # blue: missed
    assert out[1, 1].tolist() == [100, 100, 100]
