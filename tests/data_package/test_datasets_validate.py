"""Faults put into good data sets: each is named with its path, and the rest goes on."""

import json

import numpy as np
import pytest
from PIL import Image

from helpers.dataset_layouts import write_layout
from virst_jax.data.datasets.registry import open_dataset
from virst_jax.data.datasets.validate import Report, check, inspect, summarize
from virst_jax.errors import UserError


def change(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-60])


@pytest.fixture
def mevis(tmp_path):
    write_layout("mevis", tmp_path, num_videos=3, seed=1)
    return tmp_path / "mevis" / "train"


def report_of(name, root, split="train", **options):
    return check(open_dataset(name, root, split), **options)


def own(report):
    """Problems of the report but for the official counts, which a small data set never has."""
    return [problem for problem in report.problems if "the official" not in problem.what]


def test_a_good_data_set(mevis):
    counted = []
    report = report_of("mevis", mevis.parent, progress=lambda: counted.append(1))
    assert own(report) == []
    assert report.dropped == ()
    assert (report.kept_samples, report.kept_expressions, len(counted)) == (3, 12, 3)
    assert [str(p.what) for p in report.problems] == [
        "3 samples, the official train has 1662",
        "12 expressions, the official train has 23051",
    ]


@pytest.mark.parametrize("quick", [False, True])
def test_a_missing_frame(mevis, quick):
    path = mevis / "JPEGImages" / "train_01" / "00010.jpg"
    path.unlink()
    report = report_of("mevis", mevis.parent, quick=quick)
    (problem,) = own(report)
    assert (problem.where, problem.dropped) == (str(path), "video train_01")
    assert "no such file" in problem.what
    assert (report.num_samples, report.kept_samples, report.kept_expressions) == (3, 2, 8)


def test_a_missing_first_frame_is_found_when_the_video_is_opened(mevis):
    path = mevis / "JPEGImages" / "train_00" / "00000.jpg"
    path.unlink()
    report = report_of("mevis", mevis.parent)
    (problem,) = own(report)
    assert (problem.where, problem.dropped) == (str(path), "sample train_00")
    assert report.kept_samples == 2
    with pytest.raises(UserError, match=r"train_00/00000\.jpg: no such file"):
        open_dataset("mevis", mevis.parent, "train")[0]


def test_a_truncated_frame(mevis):
    path = mevis / "JPEGImages" / "train_02" / "00005.jpg"
    truncate(path)
    (problem,) = own(report_of("mevis", mevis.parent))
    assert (problem.where, problem.dropped) == (str(path), "video train_02")
    assert "truncated" in problem.what
    video = open_dataset("mevis", mevis.parent, "train")[2]
    assert video.read_frames([0, 2]).shape[0] == 2
    with pytest.raises(UserError, match=r"train_02/00005\.jpg: truncated"):
        video.read_frames([0, 1])


def test_a_frame_of_another_size(mevis):
    path = mevis / "JPEGImages" / "train_00" / "00015.jpg"
    Image.new("RGB", (20, 10)).save(path)
    (problem,) = own(report_of("mevis", mevis.parent))
    assert problem.where == str(path)
    assert problem.what == "10x20 pixels where 48x64 are expected"
    with pytest.raises(UserError, match=r"00015\.jpg: 10x20 pixels, but 00000\.jpg has 48x64"):
        open_dataset("mevis", mevis.parent, "train")[0].read_frames([0, 3])


def test_an_image_that_is_none(mevis):
    (mevis / "JPEGImages" / "train_00" / "00005.jpg").write_text("<html>404</html>")
    (problem,) = own(report_of("mevis", mevis.parent))
    assert "cannot be read as an image" in problem.what


def test_empty_expressions_unknown_ids_and_keys(mevis):
    def edit(meta):
        expressions = meta["videos"]["train_00"]["expressions"]
        expressions["0"]["exp"] = "  "
        expressions["1"]["anno_id"] = [0, 9999]
        expressions["2"]["mood"] = "good"
        expressions["3"]["obj_id"] = None
        meta["videos"]["train_01"]["frames"] = []
        meta["videos"]["train_02"]["expressions"] = {"0": {"exp": ""}}

    change(mevis / "meta_expressions.json", edit)
    source = open_dataset("mevis", mevis.parent, "train")
    assert [(v.name, [e.id for e in v.expressions]) for v in source] == [("train_00", ["2", "3"])]
    meta = str(mevis / "meta_expressions.json")
    found = [(p.where.removeprefix(meta).removeprefix(": "), p.what, p.dropped) for p in source.problems]
    assert found == [
        ("train_00, expression 0", "the expression is empty", "expression 0 of train_00"),
        ("train_00, expression 1", f"annotation 9999 is not in {mevis / 'mask_dict.json'}", "expression 1 of train_00"),
        ("train_00, expression 2", "unknown keys, which are ignored: mood", ""),
        ("train_01", "lists no frames", "video train_01"),
        ("train_02, expression 0", "the expression is empty", "expression 0 of train_02"),
        ("train_02", "no expression is left", "video train_02"),
    ]
    report = check(source)
    assert report.kept_expressions == 2
    assert set(source.problems) < set(report.problems)


def test_masks_of_another_size_or_number(mevis):
    def edit(masks):
        masks["0"] = masks["0"][:-1]
        masks["1"][2]["size"] = [10, 10]
        masks["2"][0] = {"size": [48, 64], "counts": 7}

    change(mevis / "mask_dict.json", edit)
    report = report_of("mevis", mevis.parent)
    dropped = {p.dropped: p for p in own(report)}
    # the union of all objects goes with each of its parts
    assert set(dropped) == {f"expression {i} of train_00" for i in range(4)} | {"video train_00"}
    assert "5 masks for 6 frames" in dropped["expression 0 of train_00"].what
    assert (
        "annotation 1, frame 2: a mask of 10x10 pixels for frames of 48x64" in dropped["expression 1 of train_00"].what
    )
    assert "not a mask" in dropped["expression 2 of train_00"].what
    assert all(p.where == str(mevis / "mask_dict.json") for d, p in dropped.items() if d.startswith("expression"))
    assert report.kept_samples == 2


def test_the_rest_of_a_video_is_kept(mevis):
    change(mevis / "mask_dict.json", lambda masks: masks["1"].pop())
    source = open_dataset("mevis", mevis.parent, "train")
    kept, problems = inspect(source[0])
    assert [e.id for e in kept.expressions] == ["0", "2"]
    assert [p.dropped for p in problems] == ["expression 1 of train_00", "expression 3 of train_00"]
    for position, original in enumerate((0, 2)):
        np.testing.assert_array_equal(kept.read_masks(position, [0, 1]), source[0].read_masks(original, [0, 1]))


def test_masks_that_are_empty_throughout_are_mentioned_but_kept(mevis):
    change(mevis / "mask_dict.json", lambda masks: masks.update({"0": [None] * 6}))
    report = report_of("mevis", mevis.parent)
    assert [p.what for p in own(report)] == ["its masks are empty on all frames"]
    assert report.dropped == ()


def test_no_target_expressions_are_no_problem(tmp_path):
    write_layout("mevis_v2", tmp_path, num_videos=1, seed=1)
    assert own(report_of("mevis_v2", tmp_path)) == []


def test_label_images(tmp_path):
    write_layout("ref_youtube_vos", tmp_path, num_videos=2, seed=1)
    train = tmp_path / "Ref-Youtube-VOS" / "train"
    (train / "Annotations" / "train100" / "00005.png").unlink()
    change(train / "meta.json", lambda meta: meta["videos"]["train101"]["objects"].pop("3"))
    report = report_of("ref_youtube_vos", tmp_path)
    by_video = {name: [p for p in own(report) if name in p.where + p.dropped] for name in ("train100", "train101")}
    assert {p.what for p in by_video["train101"]} == {"object 3 of train101 is not in meta.json"}
    assert all(p.where.endswith("train100/00005.png") for p in by_video["train100"][:-1])
    assert (report.num_samples, report.kept_samples, report.kept_expressions) == (2, 1, 8)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_mask_images_of_another_size(tmp_path, split):
    write_layout("ref_youtube_vos", tmp_path, num_videos=1, seed=1)
    folder = tmp_path / "Ref-Youtube-VOS" / split / "Annotations" / f"{split}100"
    path = (folder / "3" if split == "valid" else folder) / "00005.png"
    Image.new("L", (64, 1), 255).save(path)
    found = [p for p in own(report_of("ref_youtube_vos", tmp_path, split)) if p.where == str(path)]
    assert {p.what for p in found} == {"a mask of 1x64 pixels for frames of 48x64"}
    assert len(found) == (11 if split == "train" else 1)


def test_labels_without_images(tmp_path):
    write_layout("ade20k", tmp_path, num_videos=3, seed=1)
    folder = tmp_path / "sem_seg" / "ade20k"
    (folder / "images" / "training" / "0001.jpg").unlink()
    (folder / "annotations" / "training" / "0002.png").unlink()
    Image.new("L", (64, 48), 0).save(folder / "annotations" / "training" / "0000.png")  # nothing is labelled
    report = report_of("ade20k", tmp_path)
    assert [p.dropped for p in report.problems] == ["image 0001", "image 0002", "image 0000"]
    assert report.kept_samples == 0


def test_reasonseg_files_one_by_one(tmp_path):
    write_layout("reasonseg", tmp_path, num_videos=4, seed=1)
    folder = tmp_path / "reason_seg" / "train"
    (folder / "train_0.json").write_text("{")
    change(folder / "train_1.json", lambda fields: fields.update(text=["", "a red thing"]))
    fields = json.loads((folder / "train_2.json").read_text())
    fields["text"] = ["the café"]
    (folder / "train_2.json").write_bytes(json.dumps(fields, ensure_ascii=False).encode("cp1252"))
    source = open_dataset("reasonseg", tmp_path, "train")
    assert source.names == ["train_1", "train_2", "train_3"]
    assert [[e.text for e in image.expressions] for image in source][:2] == [["a red thing"], ["the café"]]
    assert [p.dropped for p in source.problems] == ["image train_0", "text 0 of train_1"]


def test_refs_to_what_is_not_there(tmp_path):
    write_layout("refcoco", tmp_path, num_videos=2, seed=1)
    folder = tmp_path / "refer_seg" / "refcoco"

    def edit(instances):
        instances["images"].pop(0)
        instances["annotations"].pop(-1)

    change(folder / "instances.json", edit)
    problems = {s: open_dataset("refcoco", tmp_path, s).problems for s in ("train", "testB")}
    assert [p.what for p in problems["train"]] == ["is not in instances.json"]
    assert ["annotation" in p.what for p in problems["testB"]] == [True]


def test_questions(tmp_path):
    write_layout("llava_video", tmp_path, num_videos=3, seed=1)
    path = tmp_path / "0_30_s_academic_v0_1_cap_processed.json"

    def edit(entries):
        entries[0]["conversations"].pop()
        entries[1]["conversations"] = []
        entries[2]["video"] = "academic_source/gone.mp4"

    change(path, edit)
    source = open_dataset("llava_video", tmp_path)
    assert [question.turns for question in [source[0]]] == [
        (("Describe the video.", "Squares of three colours move."),)
    ]
    report = check(source)
    assert [p.what.split(";")[0] for p in report.problems] == ["no question with an answer", "no frames (*.jpg)"]
    assert (report.num_samples, report.kept_samples) == (2, 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], 'expected an object with "videos"'),
        ({"videos": {"a": {"frames": ["0"]}}}, 'has no "expressions"'),
        ({"videos": {"a": {"frames": ["0"], "expressions": {"0": "a cat"}}}}, 'expected an object with "exp"'),
    ],
)
def test_a_wrong_layout_is_one_clear_line(mevis, value, message):
    (mevis / "meta_expressions.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=message) as error:
        open_dataset("mevis", mevis.parent, "train")
    assert "meta_expressions.json" in str(error.value)


def test_the_report_is_written_and_summed_up(mevis, tmp_path):
    for i in (0, 5):
        (mevis / "JPEGImages" / "train_01" / f"{i + 5:05d}.jpg").unlink()
    report = report_of("mevis", mevis.parent)
    report.write(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["kept_samples"] == 2
    assert len(read["problems"]) == len(report.problems)
    assert isinstance(report, Report)
    assert summarize(own(report)) == [("no such file", 2)]


def test_an_interrupted_check_stops(mevis):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report_of("mevis", mevis.parent, progress=stop)
