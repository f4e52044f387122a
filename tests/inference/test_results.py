"""A result in all its forms: probabilities, run lengths, other packages' types, read from a folder again."""

import json
import sys
import types

import numpy as np
import pytest

import virst_jax
from helpers.segmenting import CAT, DOG, video
from virst_jax.commands.progress import Progress
from virst_jax.commands.segment_run import SegmentRun, claimed
from virst_jax.errors import UserError
from virst_jax.inference.plan import Plan
from virst_jax.inference.results import Segmentation
from virst_jax.io.foreign_labels import probability
from virst_jax.io.run_length_masks import RunLengthMasks
from virst_jax.io.video import open_video


@pytest.fixture(scope="module")
def result(model):
    return model.segment(video(6), [DOG, CAT], soft=True)


def test_probabilities(model, result):
    assert result.soft.dtype == np.uint8
    assert result.soft.shape == result.masks.shape
    # where the logit is 0 both roundings meet: 127.5
    assert (result.soft[result.masks] >= 127).all()
    assert (result.soft[~result.masks] <= 128).all()
    assert len(np.unique(result.soft)) > 20
    plain = model.segment(video(6), [DOG, CAT])
    assert plain.soft is None
    np.testing.assert_array_equal(plain.masks, result.masks)
    several = model.segment(video(6), DOG, soft=True, instances=True)
    assert several.soft.shape == several.masks.shape


def test_run_lengths_in_place_of_an_array(model, result, tmp_path):
    lazy = model.segment(video(6), [DOG, CAT], lazy=True)
    assert isinstance(lazy.masks, RunLengthMasks)
    np.testing.assert_array_equal(lazy.masks, result.masks)
    assert lazy == result
    assert repr(lazy) == repr(result)
    assert lazy.to_coco() == result.to_coco()
    assert lazy.save(tmp_path / "lazy", "csv").name == "lazy"
    np.testing.assert_array_equal(np.asarray(lazy.plot(3)), np.asarray(result.plot(3)))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "out"
    with claimed(out):
        source = {"path": "films/dog.mp4"}
        SegmentRun(
            model, open_video(video(6), fps=5), [DOG, CAT], out, source=source, progress=Progress(quiet=True), soft=True
        ).run()
    return out


def test_a_folder_is_read_again(model, result, folder):
    read = virst_jax.read_result(folder)
    assert isinstance(read.masks, RunLengthMasks)
    np.testing.assert_array_equal(read.masks, result.masks)
    np.testing.assert_allclose(read.scores, result.scores, rtol=0, atol=6e-5)  # four digits are written
    assert (read.plan.sampled, read.plan.segmentation) == (result.plan.sampled, result.plan.segmentation)
    assert read.anchors == result.anchors
    assert read.expressions == result.expressions
    assert read.fps == 5
    assert read.times == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert read.timings["total"] > 0
    with pytest.raises(UserError, match=r"holds no whole result\.json"):
        virst_jax.read_result(folder / "01-the-dog")


def test_a_folder_with_damaged_masks(folder, tmp_path):
    told = json.loads((folder / "result.json").read_text())
    told["objects"][0]["rle"][2]["counts"] = "!"
    (tmp_path / "result.json").write_text(json.dumps(told))
    read = virst_jax.read_result(tmp_path)
    assert read.masks_of(1).shape[0] == 2
    with pytest.raises(UserError, match="'the dog': damaged run-length code"):
        read.masks_of(2)


def test_probabilities_are_written(result, folder):
    from PIL import Image

    for i, name in enumerate(("01-the-dog", "02-a-red-cat-that-runs")):
        files = sorted((folder / "soft" / name).iterdir())
        assert [file.name for file in files] == [f"{t:05d}.png" for t in range(6)]
        np.testing.assert_array_equal(np.stack([np.asarray(Image.open(f)) for f in files]), result.soft[i])


def small(count=2):
    masks = np.zeros((3, count, 20, 30), bool)
    masks[0, 0, 5:9, 10:22] = masks[2, :, 0:4, 0:6] = True
    scores = np.array([[2.0, -3.0], [-1.0, np.nan], [0.0, 4.0]], np.float32)[:, :count]
    return Segmentation(("a dog", "a cat", "a dog"), masks, scores, Plan((0,), (0,), (0,)), 5.0, {}, (1, 2, 5))


def test_supervision():
    supervision = pytest.importorskip("supervision")
    found = small().to_supervision(0)
    assert isinstance(found, supervision.Detections)
    np.testing.assert_array_equal(found.xyxy, [[10, 5, 22, 9], [0, 0, 6, 4]])
    np.testing.assert_array_equal(found.mask, small().masks[[0, 2], 0])
    assert found.tracker_id.tolist() == [1, 5]
    assert found.class_id.tolist() == [0, 0]
    assert found["class_name"].tolist() == ["a dog", "a dog"]
    np.testing.assert_allclose(found.confidence, [1 / (1 + np.exp(-2)), 0.5])
    np.testing.assert_array_equal(found.area, small().masks[[0, 2], 0].sum((1, 2)))
    assert len(small().to_supervision(1)) == 1
    nothing = Segmentation((), np.zeros((0, 1, 4, 4), bool), np.zeros((0, 1), np.float32), Plan((), (), ()), 0.0, {})
    assert len(nothing.to_supervision(0)) == 0


@pytest.fixture
def fiftyone(monkeypatch):
    """Stands in for the package where it is not installed: it brings 80 others, a database among them."""
    try:
        import fiftyone
    except ModuleNotFoundError:
        fiftyone = types.ModuleType("fiftyone")
        fiftyone.Detection = lambda **given: types.SimpleNamespace(**given)
        fiftyone.Detections = lambda detections: types.SimpleNamespace(detections=detections)
        monkeypatch.setitem(sys.modules, "fiftyone", fiftyone)
    return fiftyone


def test_fiftyone(fiftyone):
    found = small().to_fiftyone(0).detections
    assert [x.label for x in found] == ["a dog", "a dog"]
    assert found[0].bounding_box == pytest.approx([10 / 30, 5 / 20, 12 / 30, 4 / 20])
    assert found[0].mask.shape == (4, 12)
    assert found[0].mask.all()
    assert [x.index for x in found] == [1, 5]
    assert found[1].confidence == pytest.approx(0.5)


@pytest.mark.parametrize("package", ["supervision", "fiftyone"])
def test_a_missing_package_is_one_line(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is not installed; pip install 'virst-jax\[{package}\]'"):
        getattr(small(), f"to_{package}")()


def test_how_a_result_looks():
    shown = small()
    assert repr(shown) == (
        "Segmentation(masks=bool[3, 2, 20, 30], frames in which each is found: "
        "'a dog' (1): 1, 'a cat' (2): 0, 'a dog' (5): 2)"
    )
    page = shown._repr_html_()
    assert page.count("data:image/png;base64,") == 2
    assert "<td>a cat</td>" in page.replace(" style='text-align:left'", "")
    assert "2 of 2" in page
    hostile = Segmentation(("<script>",), shown.masks[:1], shown.scores[:1], shown.plan, 0.0, {})
    assert "<script>" not in hostile._repr_html_()
    with pytest.raises(UserError, match="there is no frame 2"):
        shown.masks_of(2)
    assert probability(-1e9) == pytest.approx(0)
    assert np.isnan(probability(float("nan")))
