"""What people's data sets have in them: names, orders, masks and types that readers must take rightly or refuse."""

import json
import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from helpers.dataset_layouts import Clip, encode, make_clip, write_binary, write_frames, write_json, write_layout
from virst_jax import cli
from virst_jax.data.datasets.registry import open_dataset
from virst_jax.data.datasets.validate import check
from virst_jax.errors import UserError


def write_custom(root, names, count=None, listed=None, anno_id=(0,), video="v", exp_id="0"):
    """A folder in MeViS layout: one video of frames with these names, one expression, whose object moves."""
    clip = make_clip(1, 0, num_frames=count or len(names))
    clip = Clip(clip.frames, clip.labels, list(names))
    write_frames(root / "JPEGImages" / video, clip)
    write_json(root / "mask_dict.json", {"0": [encode(mask) for mask in clip.mask(1)], "12": [None] * len(names)})
    expression = {"exp": "the red square", "obj_id": [0], "anno_id": anno_id}
    entry = {"frames": list(names if listed is None else listed), "expressions": {exp_id: expression}}
    write_json(root / "meta_expressions.json", {"videos": {video: entry}})
    return clip


def agreement(video):
    """IoU of every frame's mask and its red pixels."""
    frames, masks = (read(range(video.num_frames)) for read in (video.read_frames, lambda i: video.read_masks(0, i)))
    red = (frames[..., 0] > 180) & (frames[..., 1] < 90)
    return [(a & b).sum() / (a | b).sum() for a, b in zip(red, masks)]


def change(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def kinds(source):
    return [(p.what, p.dropped) for p in source.problems]


# order and identity of frames


def test_names_without_zeros_keep_the_order_of_the_masks(tmp_path):
    """Case 05."""
    clip = write_custom(tmp_path, [str(i) for i in range(12)])
    source = open_dataset("custom", tmp_path)
    assert source.problems == ()
    assert source[0].frame_names == tuple(clip.names)
    assert min(agreement(source[0])) > 0.8


@pytest.mark.parametrize("order", ["backwards", "as text", "any"])
def test_frames_in_any_order(tmp_path, order):
    names = [str(i) for i in range(12)]
    listed = {"backwards": names[::-1], "as text": sorted(names), "any": [*names[5:], *names[:5]]}[order]
    clip = make_clip(1, 0, num_frames=12)
    turn = [names.index(name) for name in listed]
    write_custom(tmp_path, names)
    write_frames(tmp_path / "JPEGImages" / "v", Clip(clip.frames, clip.labels, names))
    masks = clip.mask(1)
    write_json(tmp_path / "mask_dict.json", {"0": [encode(masks[i]) for i in turn]})
    change(tmp_path / "meta_expressions.json", lambda meta: meta["videos"]["v"].update(frames=listed))
    source = open_dataset("custom", tmp_path)
    assert source[0].frame_names == tuple(listed)
    assert min(agreement(source[0])) > 0.8
    assert kinds(source) == [("its frames are not in the order of their names; the file's order is kept", "")]


def test_a_frame_that_is_listed_twice(tmp_path):
    write_custom(tmp_path, ["0", "1"], listed=["0", "0"])
    assert kinds(open_dataset("custom", tmp_path)) == [("lists the frame '0' twice", "video v")]


def test_two_files_of_one_frame(tmp_path):
    """Case 07, within a data set."""
    write_custom(tmp_path, ["00000", "00001"])
    Image.new("RGB", (64, 48)).save(tmp_path / "JPEGImages/v/00001.png")
    report = check(open_dataset("custom", tmp_path))
    assert report.kept_samples == 0
    assert "holds 00001.jpg and 00001.png, two images of one name" in str(report.problems[0])


def test_suffixes_of_all_kinds(tmp_path):
    names = ["0", "1", "2", "3", "4.jpg"]
    write_custom(tmp_path, names)
    folder = tmp_path / "JPEGImages" / "v"
    (folder / "1.jpg").rename(folder / "1.JPG")
    (folder / "2.jpg").rename(folder / "2.jpeg")
    Image.open(folder / "3.jpg").save(folder / "3.PNG")
    (folder / "3.jpg").unlink()
    assert (folder / "4.jpg.jpg").is_file()
    video = open_dataset("custom", tmp_path)[0]
    assert video.frame_names == tuple(names)
    assert min(agreement(video)) > 0.8
    change(tmp_path / "meta_expressions.json", lambda m: m["videos"]["v"].update(frames=[f"{n}.jpg" for n in "034"]))
    change(tmp_path / "mask_dict.json", lambda m: m.update({"0": m["0"][:3]}))
    (folder / "4.jpg.jpg").rename(folder / "4.jpg")
    (folder / "3.PNG").rename(folder / "3.jpg")
    video = open_dataset("custom", tmp_path)[0]
    assert video.frame_names == ("0", "3", "4")  # masks will be 0.png, 3.png, 4.png
    video.read_frames([0, 1, 2])


def test_accents_in_both_forms(tmp_path):
    composed, apart = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    write_custom(tmp_path, [composed, "x"], listed=[apart, "x"], video=composed)
    change(tmp_path / "meta_expressions.json", lambda m: m["videos"].update({apart: m["videos"].pop(composed)}))
    video = open_dataset("custom", tmp_path)[0]
    assert video.name == apart
    assert min(agreement(video)) > 0.8
    change(tmp_path / "meta_expressions.json", lambda m: m["videos"][apart].update(frames=[apart, composed]))
    assert "twice" in open_dataset("custom", tmp_path).problems[0].what


# masks


@pytest.mark.parametrize("counts", ["", [100, 50], "R;;U1"])
def test_codes_that_cover_less_than_the_frame(tmp_path, counts):
    write_custom(tmp_path, ["0", "1"])
    change(tmp_path / "mask_dict.json", lambda masks: masks["0"][1].update(counts=counts))
    report = check(open_dataset("custom", tmp_path))
    assert report.kept_expressions == 0
    assert "annotation 0, frame 1: damaged run-length code" in report.problems[0].what


@pytest.mark.parametrize(("anno_id", "ids"), [(0, "0"), ("0", "0"), ([0], "0"), (["0"], "0"), ("12", "12"), (12, "12")])
def test_annotations_as_number_text_or_list(tmp_path, anno_id, ids):
    """Case 15: 0 is an id, and "12" is one id."""
    write_custom(tmp_path, ["0", "1"], anno_id=anno_id)
    source = open_dataset("custom", tmp_path)
    assert source.problems == ()
    assert source.records[0].targets == ((ids,),)
    assert source[0].read_masks(0, [0]).any() == (ids == "0")
    shutil.copy(tmp_path / "meta_expressions.json", tmp_path / "meta_expressions_v2.json")
    (tmp_path / "train").symlink_to(tmp_path)
    assert open_dataset("mevis_v2", tmp_path, "train")[0].expressions[0].category == "target"


@pytest.mark.parametrize("anno_id", [None, {}, True, [None], [[0]], 0.5, [1e400], "3", [12, -1]])
def test_annotations_that_are_none(tmp_path, anno_id):
    write_custom(tmp_path, ["0"], anno_id=anno_id)
    source = open_dataset("custom", tmp_path)
    assert [p.dropped for p in source.problems] == ["expression 0 of v", "video v"]
    assert all("meta_expressions.json: v" in p.where for p in source.problems)


def test_objects_of_davis_as_a_mask_of_one(tmp_path):
    write_layout("ref_davis17", tmp_path, num_videos=1, seed=1)
    folder = tmp_path / "davis17/valid/Annotations/valid-00"
    clip = make_clip(1, 100)
    write_binary(folder, clip.mask(1), clip.names)
    report = check(open_dataset("ref_davis17", tmp_path, "valid"))
    assert report.kept_samples == 0
    assert "holds 0 and 255 as the mask of one object does" in str(report.problems)


@pytest.mark.parametrize(
    "points", [None, [[0, 0]], [[0, 0, 0]], [[0, None], [1, 1], [2, 2]], [["a", "b"]] * 3, [[1e30, 0]] * 4]
)
def test_shapes_that_are_none(tmp_path, points):
    write_layout("reasonseg", tmp_path, num_videos=2, seed=1)
    change(tmp_path / "reason_seg/train/train_0.json", lambda fields: fields["shapes"][0].update(points=points))
    report = check(open_dataset("reasonseg", tmp_path, "train"))
    assert report.kept_samples == 1
    assert any("train_0.json" in p.where for p in report.dropped)


@pytest.mark.parametrize("polygon", [[None] * 6, ["x"] * 6, [1e300] * 8, [float("nan")] * 6, [float("inf")] * 6])
def test_polygons_that_ended_the_process(tmp_path, polygon):
    write_layout("pascal_part", tmp_path, num_videos=2, seed=0)
    path = tmp_path / "sem_seg/vlpart/pascal_part/train.json"
    change(path, lambda top: top["annotations"][0].update(segmentation=[polygon]))
    report = check(open_dataset("pascal_part", tmp_path, "train"))
    assert (report.num_samples, report.kept_samples) == (2, 2)
    assert sum("annotation at byte" in p.what for p in report.dropped) == 1


# names that lead elsewhere

OUTSIDE = ["../x", "/etc", "..", "", "a\\..\\b", "a\x00b", "\ud800", "con", "x" * 300]


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_names_of_videos_expressions_and_frames(tmp_path, name):
    def edit(meta):
        first = meta["videos"]["clip 00"]
        meta["videos"][name] = first
        meta["videos"]["clip 01"]["frames"][1] = name
        first["expressions"][name] = first["expressions"]["0"]

    write_layout("custom", tmp_path, num_videos=3, seed=1)
    change(tmp_path / "meta_expressions.json", edit)
    source = open_dataset("custom", tmp_path)
    assert source.names == ["clip 00", "clip 02"]
    assert [e.id for e in source[0].expressions] == ["0", "1", "2", "3"]
    assert len([p for p in source.problems if p.dropped]) == 3
    for problem in source.problems:
        str(problem).encode()
        assert "\x00" not in str(problem)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "."])
def test_ids_of_expressions_are_names_of_files(tmp_path, name):
    write_custom(tmp_path, ["0"], exp_id=name)
    assert [p.dropped for p in open_dataset("custom", tmp_path).problems] == [f"expression {name} of v", "video v"]


def test_files_of_images_that_lead_elsewhere(tmp_path):
    for name in ("refcoco", "pascal_part", "llava_video"):
        write_layout(name, tmp_path, num_videos=2, seed=0)
    for path in ("refer_seg/refcoco/instances.json", "sem_seg/vlpart/pascal_part/train.json"):
        change(tmp_path / path, lambda top: top["images"][0].update(file_name="../../x.jpg"))
    change(tmp_path / "0_30_s_academic_v0_1_cap_processed.json", lambda top: top[0].update(video="/etc/../x.mp4"))
    for name in ("refcoco", "pascal_part", "llava_video"):
        source = open_dataset(name, tmp_path, "train")
        assert len(source) == 1
        assert any("leads out of its folder" in p.what for p in source.problems)


def test_the_masks_of_reasonvos_are_below_its_folder(tmp_path):
    write_layout("reasonvos", tmp_path, num_videos=2, seed=0)
    change(tmp_path / "ReasonVOS/meta_expressions.json", lambda m: m["videos"]["v00"].update(source="../../a"))
    source = open_dataset("reasonvos", tmp_path)
    assert source.names == ["v01"]
    assert "leads out of its folder" in source.problems[0].what


# one bad item


def test_half_a_character_in_one_expression(tmp_path):
    write_layout("custom", tmp_path, num_videos=1, seed=1)
    change(
        tmp_path / "meta_expressions.json", lambda m: m["videos"]["clip 00"]["expressions"]["1"].update(exp="a\ud800")
    )
    source = open_dataset("custom", tmp_path)
    assert [e.id for e in source[0].expressions] == ["0", "2", "3"]
    assert kinds(source) == [
        (
            "videos.clip 00.expressions.1.exp: holds half of a character (a lone surrogate); get the file again",
            "expression 1 of clip 00",
        )
    ]


def test_files_with_a_byte_order_mark(tmp_path):
    """Case 13."""
    write_custom(tmp_path, ["0", "1"])
    for path in tmp_path.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert min(agreement(open_dataset("custom", tmp_path)[0])) > 0.8
    for path in tmp_path.glob("*.json"):
        path.write_bytes(b'\xef\xbb\xbf{"videos": {}}')
    assert len(open_dataset("custom", tmp_path)) == 0


@pytest.mark.parametrize("file", ["meta_expressions.json", "mask_dict.json", "JPEGImages/v/0.jpg"])
def test_a_pipe_where_a_file_is_expected(tmp_path, file):
    write_custom(tmp_path, ["0", "1"])
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises(UserError, match=r"pipe"):
        open_dataset("custom", tmp_path)[0].read_frames([0])


@pytest.mark.parametrize(
    "edit",
    [
        lambda meta: meta["videos"]["clip 00"]["expressions"]["0"].update(exp=3),
        lambda meta: meta["videos"]["clip 00"]["expressions"].update({"0": None}),
        lambda meta: meta["videos"]["clip 00"].update(frames={"a": 1}),
        lambda meta: meta["videos"].update({"clip 00": 7}),
        lambda meta: meta["videos"]["clip 00"].update(expressions=[1]),
        lambda meta: meta["videos"]["clip 00"]["frames"].append([1]),
    ],
)
def test_the_command_gives_lines_and_no_traceback(tmp_path, capsys, edit):
    write_layout("custom", tmp_path, num_videos=2, seed=1)
    change(tmp_path / "meta_expressions.json", edit)
    assert cli.main(["data", "check", str(tmp_path)]) == 1
    assert "clip 00" in capsys.readouterr().out


def test_the_command_on_an_annotation_as_a_number(tmp_path, capsys):
    """Case 15 as it stands."""
    write_json(tmp_path / "mask_dict.json", {"1": [None]})
    expression = {"exp": "a", "obj_id": [1], "anno_id": 1}
    write_json(
        tmp_path / "meta_expressions.json", {"videos": {"v": {"frames": ["0"], "expressions": {"0": expression}}}}
    )
    assert cli.main(["data", "check", str(tmp_path)]) == 1
    assert "0.jpg: no such file" in capsys.readouterr().out


def test_masks_that_are_no_lists(tmp_path):
    write_custom(tmp_path, ["0", "1"])
    for value in (None, 3, {}, "ab", [None], [3, "x"]):
        change(tmp_path / "mask_dict.json", lambda masks, value=value: masks.update({"0": value}))
        report = check(open_dataset("custom", tmp_path))
        assert report.kept_samples == 0
        assert "annotation 0" in str(report.problems[0])


def test_sixteen_bit_frames(tmp_path):
    """Case 08: scaled, not white."""
    write_custom(tmp_path, ["0"])
    folder = tmp_path / "JPEGImages" / "v"
    (folder / "0.jpg").unlink()
    values = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    Image.fromarray(values).save(folder / "0.png")
    frame = open_dataset("custom", tmp_path)[0].read_frames([0])[0]
    assert abs(int(frame[24, 32, 0]) - 128) < 3
