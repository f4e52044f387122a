"""What the recorder is made of: the checkout, stubs for packages, the files that it reads and writes."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from conversion.recording import case, checkout, inputs, state, stubs
from conversion.weights_rule import make_video
from helpers.fake_release import write_release
from virst_jax.errors import UserError

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("checkout") / "VIRST")


@pytest.fixture(autouse=True)
def needed(monkeypatch):
    for name in ("hydra", "omegaconf"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


# the checkout


def git(folder, *arguments):
    subprocess.run(["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments], check=True)


def test_another_commit_is_warned_of(tmp_path):
    root = write_release(tmp_path / "VIRST")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "x")
    warnings = []
    with checkout.open_checkout(root, warnings.append) as release:
        pass
    (line,) = warnings
    assert line.startswith("warning: ")
    assert f"is at commit {release.commit[:7]}; parity is stated for 954276f" in line


def test_checkout_leaves_no_trace(fake, monkeypatch):
    ours = types.ModuleType("model")
    monkeypatch.setitem(sys.modules, "model", ours)
    path = list(sys.path)
    with contextlib.suppress(KeyError), checkout.open_checkout(fake) as release:
        assert release.module("model.VIRST").__file__.startswith(str(fake))
        raise KeyError
    assert sys.modules["model"] is ours
    assert "model.VIRST" not in sys.modules
    assert sys.path == path
    assert not list(fake.rglob("__pycache__"))


# stubs


def test_stubs_only_for_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("from . import part\nimport not_there_at_all\n")
    (tmp_path / "broken_package" / "part.py").touch()
    table = {
        "json": ("json.decoder",),
        "broken_package": ("broken_package.part",),
        "missing_package": ("missing_package.a.b",),
    }
    table["missing_package"] = ("missing_package.a", "missing_package.a.b")
    with stubs.stubbed(table) as names:
        assert names == ["broken_package", "missing_package"]
        import json as again

        import missing_package.a.b
        from broken_package.part import anything

        assert again is json
        with pytest.raises(UserError, match=r"calls missing_package.a.b.read, .*: pip install missing_package"):
            missing_package.a.b.read("x")
        with pytest.raises(UserError, match="No module named 'not_there_at_all'"):
            anything()
        assert missing_package.a.b.decorator(str) is str
        assert not hasattr(missing_package, "__version__")
    assert not [name for name in sys.modules if name.startswith(("broken_package", "missing_package"))]


def test_stub_functions_of_torchvision(monkeypatch):
    image = Image.fromarray(make_video(1, 24, 32)[0])
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with stubs.stubbed({"torchvision": stubs.OPTIONAL["torchvision"]}):
        import torchvision.transforms.functional as F

        resized = F.resize(image, (8, 20))
        tensor = F.normalize(F.to_tensor(resized), mean=[0.5, 0.25, 0.0], std=[0.5, 1.0, 2.0])
        with pytest.raises(UserError, match="pip install torchvision"):
            F.resize(tensor, (4, 4))
    expected = np.asarray(image.resize((20, 8), Image.Resampling.BILINEAR), np.float32) / 255
    expected = (expected - np.float32([0.5, 0.25, 0.0])) / np.float32([0.5, 1.0, 2.0])
    np.testing.assert_allclose(tensor.numpy(), expected.transpose(2, 0, 1), atol=1e-6)


# files


def test_description_of_a_file(tmp_path):
    data = bytes(range(256)) * 4
    (tmp_path / "a.pt").write_bytes(data)
    told = {"name": "a.pt", "bytes": 1024, "sha256_sample": hashlib.sha256(data).hexdigest()}
    assert state.describe(tmp_path / "a.pt") == told
    mib = 1 << 20
    large = np.zeros(5 * mib, np.uint8)
    for at, changes in ((0, True), (mib + 5, False), (2 * mib + mib // 2, True), (5 * mib - 1, True)):
        one, two = large.copy(), large.copy()
        two[at] = 1
        for name, content in (("one", one), ("two", two)):
            content.tofile(tmp_path / name)
        digests = {state.describe(tmp_path / name)["sha256_sample"] for name in ("one", "two")}
        assert len(digests) == (2 if changes else 1), at


def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch):
    arrays, rename = {"a": np.arange(3.0)}, os.replace
    calls = []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(UserError, match="cannot be written"):
        case.write_case(tmp_path / "out", "e2e_x", {"case": "e2e_x"}, arrays)
    assert [c.name for c in calls] == ["e2e_x.npz", "e2e_x.json"]
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    as_json, as_npz = case.write_case(tmp_path / "out", "e2e_x", {"case": "e2e_x"}, arrays)
    assert json.loads(as_json.read_text()) == {"case": "e2e_x"}
    assert np.load(as_npz)["a"].tolist() == [0, 1, 2]


def test_differences(tmp_path):
    theirs = {
        "a": np.array([1.0, -4.0]),
        "b": np.zeros(2),
        "c": np.ones(3),
        "d": np.ones(2),
        "m_bits": np.uint8([255, 0]),
    }
    np.savez(tmp_path / "x.npz", **theirs)
    mine = {"a": np.array([1.0, -3.0]), "b": np.zeros(2), "c": np.ones(4), "m_bits": np.uint8([254, 0])}
    found = case.differences(mine, {}, tmp_path / "x.npz", {})
    assert found == {"a": 0.25, "b": 0.0, "c": float("inf"), "m_bits": 1 / 16}
    found = case.differences(mine, {"a": [2]}, tmp_path / "x.npz", {"a": [4]})
    assert "a" not in found


def test_frames_of_a_folder(tmp_path):
    frames, video = make_video(10, 24, 32), tmp_path / "video"
    video.mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(video / f"img_{t + 5}.png")  # in the order of the numbers, not of the names
    tmp_path = tmp_path / "bad"
    tmp_path.mkdir()
    np.testing.assert_array_equal(inputs.read_frames(video), frames)
    np.testing.assert_array_equal(inputs.read_frames(video, 4), frames[:4])
    with pytest.raises(UserError, match="holds no frame"):
        inputs.read_frames(tmp_path)
    Image.fromarray(frames[0]).save(tmp_path / "0.png")
    Image.fromarray(frames[0][:5]).save(tmp_path / "1.png")
    with pytest.raises(UserError, match="differ in size"):
        inputs.read_frames(tmp_path)
    (tmp_path / "1.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"1\.png: does not decode"):
        inputs.read_frames(tmp_path)
    (tmp_path / "1.png").rename(tmp_path / "one.png")
    with pytest.raises(UserError, match=r"one\.png has no frame number"):
        inputs.read_frames(tmp_path)


def test_frames_of_a_file(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    with pytest.raises(UserError, match=r"bad\.mp4: (does not decode|a video file needs PyAV)"):
        inputs.read_frames(tmp_path / "bad.mp4")
    av = pytest.importorskip("av")
    video = make_video(5, 32, 48)
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    np.testing.assert_array_equal(inputs.read_frames(tmp_path / "v.mkv"), video)
    np.testing.assert_array_equal(inputs.read_frames(tmp_path / "v.mkv", 2), video[:2])
