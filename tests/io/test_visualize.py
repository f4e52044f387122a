import os

import numpy as np
import pytest
from PIL import ImageFont

from virst_jax.io import fonts, visualize


def test_colors_differ():
    colors = [visualize.color(i) for i in range(40)]
    assert len(set(colors)) == 40
    assert all(0 <= value <= 255 for color in colors for value in color)
    apart = [np.abs(np.subtract(a, b)).sum() for i, a in enumerate(colors[:12]) for b in colors[:i]]
    assert min(apart) > 40


def test_overlay():
    frame = np.full((20, 30, 3), 100, np.uint8)
    masks = np.zeros((3, 20, 30), bool)
    masks[0, 2:10, 2:12] = True
    masks[1, 5:20, 20:30] = True  # up to the frame's edge; the third is empty
    before = frame.copy()
    out = visualize.overlay(frame, masks, opacity=0.5)
    np.testing.assert_array_equal(frame, before)
    nothing = ~masks.any(0)
    np.testing.assert_array_equal(out[nothing], frame[nothing])
    first, second = (np.array(visualize.color(i)) for i in (0, 1))
    assert np.abs(out[5, 5] - (100 + first) / 2).max() <= 0.5
    assert (out[2, 2:12] == first).all()
    assert (out[2:10, 2] == first).all()
    assert (out[9, 11] == first).all()
    assert (out[5, 20:30] == second).all()
    # the edge of the frame is no edge of the mask
    assert np.abs(out[19, 25] - (100 + second) / 2).max() <= 0.5
    assert np.abs(out[10, 29] - (100 + second) / 2).max() <= 0.5


def test_overlapping_masks_keep_their_colours():
    frame = np.full((60, 80, 3), 100, np.uint8)
    masks = np.zeros((3, 60, 80), bool)
    masks[:2, 10:50, 10:70] = True  # the same twice
    masks[2, 30:55, 40:75] = True
    out = visualize.overlay(frame, masks)
    filled = [((100 + np.array(visualize.color(i))) / 2).round() for i in range(3)]
    own = np.stack([(np.abs(out.astype(int) - f) <= 1).all(-1) for f in filled])
    edge = np.stack([(out == visualize.color(i)).all(-1) for i in range(3)])
    assert (own | edge).any(0)[masks.any(0)].all()  # no colour that the legend lacks
    both = np.s_[:, 12:28, 12:38]
    assert own[both][0].mean() == pytest.approx(0.5, abs=0.1)
    assert own[both][1].mean() == pytest.approx(0.5, abs=0.1)
    assert edge[0, 10, 10:70].sum() + edge[1, 10, 10:70].sum() == 60
    assert min(edge[0, 10, 10:70].sum(), edge[1, 10, 10:70].sum()) > 20
    assert own[2, 35:45, 45:65].any()


def test_a_legend_never_shows_empty_boxes(capsys, monkeypatch):
    monkeypatch.setattr(fonts, "_files", lambda: ())
    fonts._tell.cache_clear()
    strip = visualize.legend(["the dog", "\u732b"], 320)
    assert "no font here shows \u732b" in capsys.readouterr().err
    np.testing.assert_array_equal(strip, visualize.legend(["the dog", "<732b>"], 320))
    assert capsys.readouterr().err == ""
    visualize.legend(["the dog", "\u00e9lan"], 320)
    assert capsys.readouterr().err == ""


def test_a_font_is_chosen_by_what_it_shows(tmp_path, monkeypatch):
    cjk = next((f for f in fonts._files() if fonts._has(ImageFont.truetype(f, 12), "\u732b")), None)
    if cjk is None:
        pytest.skip("no font with CJK here")
    font, lacking = fonts.font_for(["the \u732b"], 12)
    assert not lacking
    assert fonts._has(font, "\u732b")


@pytest.mark.parametrize("kind", ["pipe", "folder", "text", "missing"])
def test_a_font_that_is_none_is_told(tmp_path, monkeypatch, capsys, kind):
    path = tmp_path / "font.ttf"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("no font")
    monkeypatch.setenv(fonts.VARIABLE, str(path))
    monkeypatch.setattr(fonts, "_FOLDERS", ())
    fonts._files.cache_clear()
    fonts._tell.cache_clear()
    try:
        visualize.legend(["the \u72ac"], 200)
    finally:
        monkeypatch.undo()
        fonts._files.cache_clear()
    assert f"{fonts.VARIABLE}: {path} is no font that can be used" in capsys.readouterr().err


def test_overlay_in_given_colors():
    frame = np.full((6, 6, 3), 100, np.uint8)
    mask = np.zeros((6, 6), bool)
    mask[1:5, 1:5] = True
    out = visualize.overlay(frame, [mask], colors=[(200, 0, 0)])
    assert out[0, 0].tolist() == [100, 100, 100]
    assert out[1, 1].tolist() == [200, 0, 0]  # the edge
    assert out[2, 2].tolist() == [150, 50, 50]
    assert visualize.overlay(frame, [mask], colors=[(200, 0, 0)], outlined=False)[1, 1].tolist() == [150, 50, 50]


def test_images_one_below_the_other():
    low, wide = visualize.heading("clip   00\nx", 40), np.full((3, 60, 3), 7, np.uint8)
    out = visualize.stack([low, wide])
    assert out.shape == (low.shape[0] + 3, 60, 3)
    np.testing.assert_array_equal(out[: low.shape[0], :40], low)
    assert (out[: low.shape[0], 40:] == visualize.BACKGROUND).all()
    assert (out[low.shape[0] :] == 7).all()


@pytest.mark.parametrize("opacity", [0.0, 1.0])
def test_opacity(opacity):
    frame = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((1, 16, 16), bool)
    mask[0, 4:12, 4:12] = True
    inner = visualize.overlay(frame, mask, opacity)[5:11, 5:11]
    expected = frame[5:11, 5:11] if opacity == 0 else np.broadcast_to(visualize.color(0), (6, 6, 3))
    np.testing.assert_array_equal(inner, expected)


def test_legend():
    one = visualize.legend(["the dog"], 320)
    two = visualize.legend(["the dog", "a very long expression " * 20], 320)
    assert one.shape[1] == two.shape[1] == 320
    assert two.shape[0] > one.shape[0]
    for i in range(2):
        assert (two == visualize.color(i)).all(-1).sum() > 50
    # the long line was cut before the edge
    assert (two[:, -4:] == visualize.BACKGROUND).all()
    assert (one == visualize.TEXT).all(-1).any()


@pytest.mark.parametrize(("count", "columns"), [(1, 4), (4, 4), (5, 4), (8, 3)])
def test_contact_sheet(count, columns):
    frames = [np.full((45, 80, 3), 10 * i + 100, np.uint8) for i in range(count)]
    plain = visualize.contact_sheet(frames, [f"frame {i}" for i in range(count)], columns=columns)
    assert plain.dtype == np.uint8
    for i in range(count):
        assert (plain == 10 * i + 100).all(-1).sum() >= 45 * 80 * 0.9
    named = visualize.contact_sheet(frames, ["x"] * count, ["the dog", "the cat"], columns=columns)
    assert named.shape[1] == plain.shape[1]
    assert named.shape[0] > plain.shape[0]
