"""Frames resized on the device are those of the host, byte for byte."""

import jax
import numpy as np
import pytest

import virst_jax
from helpers.network import CFG, params
from helpers.places import TOKENIZER
from helpers.segmenting import CAT, DOG, three_expressions, video
from virst_jax import cli
from virst_jax.api import Model
from virst_jax.data.prompts import load_tokenizer
from virst_jax.data.transforms import resize_frames
from virst_jax.errors import UserError
from virst_jax.inference.resizing import DeviceResizer, resize_on_host
from virst_jax.tracking import TrackerModel

METHODS = ("bilinear", "bicubic")
# height, width, side: larger, smaller, of odd sizes, one pixel wide, portrait, the same, and shrunk to 1/127
SIZES = [(40, 56, 64), (480, 854, 448), (257, 129, 65), (37, 1, 64), (1, 300, 64), (1, 1, 8), (500, 90, 64)]
SIZES += [(64, 64, 64), (64, 200, 64), (2032, 33, 16)]


def frame(height: int, width: int, kind: str) -> np.ndarray:
    """Noise; black and white, where the cubic filter overshoots; a ramp, whose sums lie on the edge of rounding."""
    rng = np.random.default_rng(height)
    if kind == "ramp":
        return ((np.arange(height)[:, None, None] + np.arange(width)[:, None] + np.arange(3)) % 256).astype(np.uint8)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return noise if kind == "noise" else np.where(noise > 127, 255, 0).astype(np.uint8)


@pytest.fixture(scope="module")
def resizer() -> DeviceResizer:
    return DeviceResizer()


@pytest.fixture(scope="module")
def on_device() -> Model:
    tokenizer = load_tokenizer(TOKENIZER, CFG.seg_token_id)
    return Model(CFG, params(), tokenizer, chunk=2, group_size=2, resize="device")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_device_gives_the_hosts_bytes(resizer, size):
    height, width, side = size
    for method in METHODS:
        for kind in ("noise", "black and white", "ramp"):
            given = frame(height, width, kind)
            ours = resizer(given, side, method)
            assert isinstance(ours, jax.Array)
            np.testing.assert_array_equal(ours, resize_on_host(given, side, method))


def test_sizes_of_one_bucket_share_a_program():
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    resizer = DeviceResizer()
    resizer(frame(40, 300, "noise"), 24, "bicubic")
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        resizer(frame(256, 512, "noise"), 24, "bilinear")
        resizer(frame(7, 257, "noise"), 24, "bicubic")
        assert not compiled
        resizer(frame(257, 257, "noise"), 24, "bicubic")
        assert len(compiled) == 1
        DeviceResizer()(frame(270, 300, "noise"), 24, "bicubic")  # that of the first pass and that of the model
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_masks_are_the_same(on_device, monkeypatch):
    uploaded: list[tuple[int, ...]] = []
    resize = on_device.network.resize
    monkeypatch.setattr(on_device.network, "resize", lambda x, *rest: uploaded.append(x.shape) or resize(x, *rest))
    three = three_expressions()
    result = on_device.segment(video(11), list(three.expressions))
    np.testing.assert_array_equal(result.masks, three.masks)
    np.testing.assert_array_equal(result.scores, three.scores)
    # the frames themselves went there, of both passes
    assert set(uploaded) == {(40, 56, 3)}
    assert len(uploaded) > 11


def test_several_frames_of_a_batch(on_device):
    """Frames on the device are put together there, with what the host has."""
    frames, side = video(3), CFG.sam2.image_size
    network = on_device.network
    resized = [network.resize(x, side, "bicubic") for x in frames[:2]] + [resize_on_host(frames[2], side, "bicubic")]
    expected = network.encode_batch(resize_frames(frames, side, "bicubic"), 4)
    for ours, theirs in zip(network.encode_batch(resized, 4), expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_sessions_and_live(on_device):
    frames = video(5)
    models = [TrackerModel(CFG.sam2, params()["sam2"], resize=place) for place in ("host", "device")]
    sessions = [model.session(frames) for model in models]
    for session in sessions:
        session.add_points(1, 1, [(20, 20)])
    for ours, theirs in zip(*(session.propagate() for session in sessions), strict=True):
        np.testing.assert_array_equal(ours.masks, theirs.masks)
        np.testing.assert_array_equal(ours.scores, theirs.scores)
    plain = Model(CFG, params(), on_device.tokenizer, chunk=2, group_size=2)
    for ours, theirs in zip(*(list(m.live(iter(frames), [DOG, CAT])) for m in (on_device, plain)), strict=True):
        np.testing.assert_array_equal(ours.scores, theirs.scores)


def test_bad_places_and_frames_take_one_line(resizer, tmp_path, capsys):
    for place in ("gpu", None, ["host"]):
        with pytest.raises(UserError, match="give 'host' or 'device'"):
            virst_jax.load("tiny", resize=place)
        with pytest.raises(UserError, match="give 'host' or 'device'"):
            TrackerModel(CFG.sam2, params()["sam2"], resize=place)
    with pytest.raises(UserError, match="must be a non-empty uint8 array"):
        resizer(np.zeros((4, 4, 3), np.float32), 8, "bicubic")
    with pytest.raises(UserError, match="unknown resampling 'nearest'"):
        resizer(np.zeros((4, 4, 3), np.uint8), 8, "nearest")
    for command in (["segment", "a.mp4", "x"], ["track", "a.mp4", "--point", "1,1"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--out", str(tmp_path / "out"), "--resize", "gpu"])
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1
        assert "--resize" in error
