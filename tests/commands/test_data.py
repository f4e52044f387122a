import argparse
import json

import numpy as np
import pytest
from PIL import Image

from helpers.dataset_layouts import write_layout
from virst_jax.commands import data
from virst_jax.data.builders.builder import open_built
from virst_jax.errors import UserError
from virst_jax.io import visualize


def run(*arguments):
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    return data.run(parser.parse_args([str(a) for a in arguments]))


def test_check_one_folder_without_a_name(tmp_path, capsys):
    write_layout("custom", tmp_path, num_videos=2, seed=0)
    assert run("check", tmp_path) == 0
    out = capsys.readouterr().out
    assert "custom" in out
    (tmp_path / "JPEGImages" / "clip 01" / "00000.jpg").unlink()
    assert run("check", tmp_path, "--report", tmp_path / "report.json") == 1
    out = capsys.readouterr().out
    assert "clip 01/00000.jpg: no such file" in out
    (report,) = json.loads((tmp_path / "report.json").read_text())
    assert (report["num_samples"], report["kept_samples"]) == (2, 1)
    assert run("check", tmp_path, "--quick", "--workers", "1") == 1


def test_check_takes_all_splits_that_are_there(tmp_path, capsys):
    write_layout("mevis", tmp_path, num_videos=1, seed=0)
    assert run("check", tmp_path / "mevis") == 0
    out = capsys.readouterr().out
    assert all(f" {split} " in out for split in ("train", "valid_u", "valid"))
    assert run("check", tmp_path, "--dataset", "mevis_valid") == 0
    out = capsys.readouterr().out
    assert " valid_u " in out
    assert " train " not in out


def test_many_problems_are_summed_up(tmp_path, capsys):
    write_layout("ref_youtube_vos", tmp_path, num_videos=3, seed=0)
    (tmp_path / "Ref-Youtube-VOS" / "train" / "meta.json").write_text('{"videos": {}}')
    with pytest.raises(UserError, match="no sample can be shown"):
        run("show", tmp_path, "--dataset", "refytvos_train", "--out", tmp_path / "sheet.png")
    assert run("check", tmp_path, "--dataset", "ref_youtube_vos", "--split", "train") == 1
    out = capsys.readouterr().out
    assert "more, by kind" in out
    assert "33 x object # of train### is not in meta.json" in out


def test_show_draws_masks(tmp_path, capsys):
    write_layout("revos", tmp_path, num_videos=3, seed=0)
    out = tmp_path / "sheet.png"
    assert run("show", tmp_path, "--dataset", "revos", "--out", out, "--count", "2", "--frames", "3") == 0
    assert "2 of 3 samples" in capsys.readouterr().out
    with Image.open(out) as image:
        sheet = np.asarray(image.convert("RGB"))
    # the second expression means the green square: its edge is drawn in the second colour
    assert (sheet == visualize.color(1)).all(-1).sum() > 50
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["llava_video", "reasonseg", "mevis"])
def test_show_other_kinds(tmp_path, name):
    write_layout(name, tmp_path, num_videos=1, seed=0)
    out = tmp_path / "sheet.jpg"
    assert (
        run("show", tmp_path, "--dataset", name, "--out", out, *(["--split", "valid"] if name == "mevis" else [])) == 0
    )
    with Image.open(out) as image:
        assert image.width > 100


def test_show_goes_on_after_a_bad_sample(tmp_path, capsys):
    write_layout("lvvis", tmp_path, num_videos=2, seed=0)
    (tmp_path / "lvvis" / "train" / "JPEGImages" / "00" / "00000.jpg").unlink()
    assert run("show", tmp_path, "--dataset", "lvvis", "--out", tmp_path / "s.png") == 0
    captured = capsys.readouterr()
    assert "00/00000.jpg" in captured.err
    assert "1 of 2 samples" in captured.out


def test_build(tmp_path, capsys):
    write_layout("refcoco+", tmp_path / "LISA", num_videos=1, seed=0)
    arguments = (
        "build",
        tmp_path / "LISA",
        "--dataset",
        "refcoco+",
        "--split",
        "train",
        "val",
        "--out",
        tmp_path / "b",
    )
    assert run(*arguments) == 0
    assert "1 samples, 6 expressions" in capsys.readouterr().out
    assert len(open_built("refcoco+", tmp_path / "b", "val")) == 1
    assert run(*arguments) == 0
    assert "was built before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "{}"), "cannot tell which data set"),
        (("check", "{}", "--dataset", "cats"), "unknown data set"),
        (("check", "{}", "--dataset", "mevis"), "holds no train or valid_u or valid"),
        (("show", "{}", "--dataset", "mevis", "--count", "0"), "--count must be at least 1"),
        (("show", "{}", "--dataset", "mevis", "--out", "sheet.gif"), "write to a .png or .jpg file"),
        (("show", "{}", "--dataset", "mevis", "--split", "train", "valid"), "show takes one split"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        run(*(a.format(tmp_path) for a in arguments))


def test_a_sheet_that_cannot_be_written(tmp_path):
    write_layout("custom", tmp_path, num_videos=1, seed=0)
    with pytest.raises(UserError, match="cannot be written"):
        run("show", tmp_path, "--out", tmp_path / "nothing" / "sheet.png")


def test_a_report_that_cannot_be_written_is_known_before_anything_is_read(tmp_path, capsys):
    write_layout("custom", tmp_path, num_videos=1, seed=0)
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "nothing" / "report.json", tmp_path / "file" / "report.json"):
        with pytest.raises(UserError, match="cannot be written"):
            run("check", tmp_path, "--report", place)
        assert capsys.readouterr().out == ""
