"""Every layout through its reader: what comes out is what the generator drew."""

import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from helpers.dataset_layouts import COLORS, NUM_OBJECTS, WRITERS, make_clip, write_layout
from virst_jax.data.datasets.registry import ALIASES, DATASETS, guess_name, open_dataset, resolve
from virst_jax.data.samples import Question, Video
from virst_jax.errors import UserError

SEED, COUNT = 3, 2
RVOS = [(name, split) for name, d in DATASETS.items() if d.group == "rvos" for split in d.splits]
RVOS = [(name, split) for name, split in RVOS if name != "custom"] + [("custom", "")]
HIDDEN = {("mevis", "valid"), ("mevis_v2", "valid"), ("ref_youtube_vos", "test")}
STILL = [(n, s) for n, d in DATASETS.items() if d.group in ("refer_seg", "reason_seg", "sem_seg") for s in d.splits]


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Folder of a data set, written when first asked for. Do not change what is in it."""
    written = {}

    def root(name):
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name.replace("+", "_plus"))
            write_layout(name, written[name], num_videos=COUNT, seed=SEED)
        return written[name]

    return root


def test_every_data_set_has_a_layout():
    assert set(WRITERS) == set(DATASETS)
    assert all(name in DATASETS for name, _ in ALIASES.values())


def offset_of(name, split):
    """Where the generator starts to number the clips of a split."""
    return 100 * DATASETS[name].splits.index(split) if len(DATASETS[name].splits) > 1 and split else 0


@pytest.mark.parametrize(("name", "split"), RVOS)
def test_videos(roots, name, split):
    source = pickle.loads(pickle.dumps(open_dataset(name, roots(name), split)))
    assert (source.name, source.split, source.problems) == (name, split, ())
    assert len(source) == len(list(source)) == len(source.names) == COUNT
    assert (source[1].read_masks is None) == ((name, split) in HIDDEN)
    for index, video in enumerate(source):
        assert isinstance(video, Video)
        assert video.name == source.names[index]
        clip = make_clip(SEED, offset_of(name, split) + index)
        assert video.size == clip.frames.shape[1:3]
        assert video.num_frames == len(clip.frames) == len(video.frame_names)
        assert video.frame_names == tuple(clip.names)
        assert len({e.id for e in video.expressions}) == len(video.expressions) >= 3
        order = [video.num_frames - 1, 0, 2]
        frames = video.read_frames(order)
        assert frames.dtype == np.uint8
        assert np.abs(frames.astype(int) - clip.frames[order]).mean() < 6  # JPEG
        for position, expression in enumerate(video.expressions):
            if video.read_masks is None:
                continue
            masks = video.read_masks(position, order)
            assert masks.dtype == bool
            np.testing.assert_array_equal(masks, clip.mask(*meant(expression.text))[order])
        assert video.read_frames([]).shape[0] == 0


def meant(text):
    """The objects that a text of the generator means."""
    text = text.replace("_", " ")
    if "squares" in text or "things" in text:
        return range(1, NUM_OBJECTS + 1)
    return [number for number, (color, _) in enumerate(COLORS, start=1) if f" {color} " in f"{text.strip('?')} "]


@pytest.mark.parametrize(("name", "split"), STILL)
def test_images(roots, name, split):
    source = pickle.loads(pickle.dumps(open_dataset(name, roots(name), split)))
    assert source.problems == ()
    assert len(source) == COUNT
    for image in source:
        assert image.is_image
        assert image.num_frames == 1
        frame = image.read_frames([0])[0]
        assert frame.shape == (*image.size, 3)
        assert image.read_masks is not None
        assert image.expressions
        for position, expression in enumerate(image.expressions):
            mask = image.read_masks(position, [0, 0])
            assert mask.shape == (2, *image.size)
            assert mask.any()
            numbers = meant(expression.text)
            if numbers:  # a colour is named, and shown where the mask is
                color = np.array(COLORS[numbers[0] - 1][1])
                inside = np.median(frame[mask[0]], axis=0)
                assert np.abs(inside - color).max() < 40
        with pytest.raises(UserError, match="a still image has one"):
            image.read_frames([1])


def test_questions(roots):
    source = pickle.loads(pickle.dumps(open_dataset("llava_video", roots("llava_video"))))
    question = source[0]
    assert isinstance(question, Question)
    assert question.turns[0] == ("Describe the video.", "Squares of three colours move.")  # <image> is taken out
    assert len(question.turns) == 2
    assert question.read_frames(range(question.num_frames)).shape[0] == question.num_frames == 6


def test_semantic_names(roots):
    def texts(name):
        return [e.text for e in open_dataset(name, roots(name), "train")[0].expressions]

    assert texts("ade20k") == ["wall", "building", "sky"]
    assert texts("cocostuff") == ["person", "bird"]  # building-other is left out
    assert texts("mapillary") == ["ambiguous barrier", "bird", "road", "sky"]
    paco, pascal = texts("paco_lvis"), texts("pascal_part")
    assert paco[0] == "trash_can"  # as the release has it
    assert paco[1] in ("bottle cap", "the cap of the bottle")
    assert pascal[0] in ("dog head", "the head of the dog")


def test_both_ways_to_name_a_part(tmp_path):
    write_layout("pascal_part", tmp_path, num_videos=8, seed=0)
    texts = {e.text for image in open_dataset("pascal_part", tmp_path) for e in image.expressions}
    assert {"dog head", "the head of the dog"} <= texts


def test_categories(roots):
    def categories(name, split=""):
        return [e.category for e in open_dataset(name, roots(name), split)[0].expressions]

    assert categories("revos") == ["referring", "reasoning", "other", "reasoning"]
    assert categories("mevis_v2") == ["target"] * 4 + ["no-target"]
    assert categories("mevis_v2", "valid") == [""] * 5  # not public
    assert categories("reasonvos") == ["sentence", "phrase", "phrase"]
    assert set(categories("mevis")) == {""}


def test_a_no_target_expression_has_empty_masks(roots):
    video = open_dataset("mevis_v2", roots("mevis_v2"))[0]
    assert not video.read_masks(4, range(video.num_frames)).any()


def test_ids_are_in_order_as_text(roots):
    for name in ("ref_youtube_vos", "ref_davis17"):
        ids = [e.id for e in open_dataset(name, roots(name))[0].expressions]
        assert ids == sorted(ids)
        assert ids.index("10") < ids.index("2")


def test_test_videos_are_taken_from_those_of_valid(roots, tmp_path):
    root = roots("ref_youtube_vos")
    assert all(video.startswith("valid") for video in open_dataset("ref_youtube_vos", root, "valid").names)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    (copy / "Ref-Youtube-VOS/meta_expressions/test/meta_expressions.json").unlink()
    source = open_dataset("ref_youtube_vos", copy, "valid")
    assert len(source) == 2 * COUNT
    assert "no such file" in str(source.problems[0])
    path = copy / "Ref-Youtube-VOS/meta_expressions/valid/meta_expressions.json"
    entry = {"frames": ["00000"], "expressions": {"0": {"exp": "a cat"}}}
    path.write_text(json.dumps({"videos": {f"{i:03d}": entry for i in range(203)}}))
    with pytest.raises(UserError, match="test videos among the 203"):
        open_dataset("ref_youtube_vos", copy, "valid")


def test_davis_objects_and_annotators(roots):
    from virst_jax.data.datasets.davis import expression_parts

    video = open_dataset("ref_davis17", roots("ref_davis17"))[0]
    for position, expression in enumerate(video.expressions):
        number, annotator = expression_parts(expression.id)
        assert expression.text == f"a {COLORS[number - 1][0]} square, says annotator {annotator}"
        labels = video.read_masks.labels(0)
        np.testing.assert_array_equal(video.read_masks(position, [0])[0], labels == number)


def test_foreground_of_revos(roots, tmp_path):
    from virst_jax.data.datasets.revos import foreground_reader

    root = roots("revos")
    video = open_dataset("revos", root)[0]
    expected = make_clip(SEED, offset_of("revos", "valid")).labels > 0
    np.testing.assert_array_equal(foreground_reader(root, video)(range(6)), expected)
    np.testing.assert_array_equal(foreground_reader(None, video)([2, 1]), expected[[2, 1]])
    copy = tmp_path / "copy"
    shutil.copytree(root / "ReVOS", copy / "ReVOS")
    (copy / "ReVOS/mask_dict_foreground.json").unlink()
    np.testing.assert_array_equal(foreground_reader(copy, video)([0]), expected[:1])


def test_ignored_pixels_and_explanations_of_reasonseg(roots):
    from virst_jax.data.datasets.reasonseg import read_explanations

    root = roots("reasonseg")
    image = open_dataset("reasonseg", root, "train")[0]
    clip = make_clip(SEED, 0, num_frames=1)
    np.testing.assert_array_equal(image.read_masks(0, [0])[0], clip.mask(3)[0])
    ignored = image.read_masks.ignored()
    assert ignored.any()
    assert not (ignored & image.read_masks(0, [0])[0]).any()
    assert [e.category for e in image.expressions] == ["sentence", "sentence"]
    assert read_explanations(root)["train_0"] == "It is blue."
    assert [e.explanation for e in image.expressions] == ["It is blue.", "It is blue."]
    assert open_dataset("reasonseg", root, "val")[0].expressions[0].explanation == ""


def test_videos_are_in_the_order_of_their_names_where_the_benchmark_has_them_so(tmp_path):
    write_layout("ref_youtube_vos", tmp_path, num_videos=3, seed=0)
    path = tmp_path / "Ref-Youtube-VOS/meta_expressions/train/meta_expressions.json"
    names = open_dataset("ref_youtube_vos", tmp_path, "train").names
    videos = json.loads(path.read_text())["videos"]
    path.write_text(json.dumps({"videos": dict(reversed(videos.items()))}))
    assert open_dataset("ref_youtube_vos", tmp_path, "train").names == names


def test_frames_of_questions_are_in_order(roots, monkeypatch):
    from virst_jax.io import names

    source = open_dataset("llava_video", roots("llava_video"))
    frames = source[0].read_frames(range(6))
    listed = names.os.listdir
    monkeypatch.setattr(names.os, "listdir", lambda folder: sorted(listed(folder), reverse=True))
    np.testing.assert_array_equal(source[0].read_frames(range(6)), frames)


def test_categories_of_lvvis_are_words(roots):
    assert open_dataset("lvvis", roots("lvvis"))[0].expressions[0].text == "the red square"


def test_a_small_shape_lies_over_a_large_one(tmp_path):
    write_layout("reasonseg", tmp_path, num_videos=1, seed=0)
    path = tmp_path / "reason_seg" / "train" / "train_0.json"
    fields = json.loads(path.read_text())

    def square(label, low, high):
        return {"label": label, "points": [[low, low], [high, low], [high, high], [low, high]]}

    fields["shapes"] = [square("target", 8, 16), square("Ignore", 4, 30), square("ignore", 10, 12)]
    path.write_text(json.dumps(fields))
    masks = open_dataset("reasonseg", tmp_path, "train")[0].read_masks
    target = masks(0, [0])[0]
    assert target.sum() == 64
    ignored = masks.ignored()
    assert ignored.sum() == 26 * 26 - 64 + 4  # the target lies over the large shape, under the small one
    assert ignored[10, 10]
    assert not ignored[8, 8]


def test_own_frames_may_be_png(roots, tmp_path):
    shutil.copytree(roots("custom"), tmp_path / "copy")
    for path in (tmp_path / "copy" / "JPEGImages").rglob("*.jpg"):
        with Image.open(path) as image:
            image.save(path.with_suffix(".png"))
        path.unlink()
    a, b = (open_dataset("custom", folder)[0].read_frames([1, 0]) for folder in (roots("custom"), tmp_path / "copy"))
    np.testing.assert_array_equal(a, b)


def test_roots_and_names(roots):
    root = roots("mevis")
    assert open_dataset("mevis_valid", root / "mevis").names == open_dataset("mevis", root, "valid_u").names
    assert open_dataset("mevis_test", root).split == "valid"
    assert resolve("refcoco") == ("refcoco", "val")
    assert resolve("lvvis") == ("lvvis", "train")
    assert guess_name(root / "mevis") == "mevis"
    assert guess_name(roots("custom")) == "custom"
    with pytest.raises(UserError, match="--dataset"):
        guess_name(root)
    with pytest.raises(UserError, match="no such folder"):
        guess_name(root / "nothing")


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("cats", "", "unknown data set 'cats': choose one of mevis"),
        ("mevis", "test", "has no split 'test': choose one of train, valid_u, valid"),
        ("mevis_valid", "train", "is the split 'valid_u' of mevis"),
    ],
)
def test_unknown_names_and_splits(tmp_path, name, split, message):
    with pytest.raises(UserError, match=message):
        open_dataset(name, tmp_path, split)


@pytest.mark.parametrize("name", DATASETS)
def test_an_empty_folder_is_one_clear_line(tmp_path, name):
    with pytest.raises(UserError) as error:
        open_dataset(name, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no such folder|holds no"):
        open_dataset(name, tmp_path / "nothing")
