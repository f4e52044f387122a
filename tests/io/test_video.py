import contextlib
import os
import shutil
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from helpers.places import DATA
from helpers.video_files import write
from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.io.video import StridedReader, VideoWriter, open_video, prefetch

CASES = DATA / "cases"


def clip(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A bright square that moves over a dark ramp; a frame differs from all others even after compression."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = np.linspace(0, 80, width, dtype=np.uint8)[None, None, :, None]
    for t in range(count):
        x = 2 + t * (width - 20) // max(1, count - 1)
        frames[t, 8:24, x : x + 16] = (240, 200 - 5 * t, 40 + 6 * t)
    return frames


def write_folder(folder: Path, frames: np.ndarray, name: str = "frame{}.png") -> Path:
    folder.mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(t))
    return folder


@pytest.mark.parametrize(
    ("name", "codec", "error"),
    [("a.mp4", "libx264", 12), ("a.mov", "libx264", 12), ("a.webm", "libvpx", 16), ("a.gif", "gif", 40)],
)
def test_files(tmp_path, name, codec, error):
    frames = clip(12)
    video = open_video(write(tmp_path / name, frames, codec, pix_fmt="rgb8" if codec == "gif" else "yuv420p"))
    assert (video.num_frames, video.size, video.fps) == (12, (48, 64), 10.0)
    assert list(video.frame_names[:2]) == ["00000", "00001"]
    decoded = np.stack(list(video))
    assert np.abs(decoded.astype(int) - frames).mean() < error
    np.testing.assert_array_equal(video.read([7, 0, 7]), decoded[[7, 0, 7]])
    np.testing.assert_array_equal(np.stack(list(video.pick([2, 11]))), decoded[[2, 11]])
    np.testing.assert_array_equal(np.stack(list(video)), decoded)
    with pytest.raises(UserError, match="no frame 12; the video has frames 0 to 11"):
        video.read([12])


def test_variable_frame_rate(tmp_path):
    frames = clip(6)
    video = open_video(write(tmp_path / "a.mp4", frames, times=[0, 10, 500, 510, 1500, 4000]))
    assert video.num_frames == 6
    assert np.abs(np.stack(list(video)).astype(int) - frames).mean() < 12


def test_a_container_that_does_not_count_its_frames(tmp_path):
    path = write(tmp_path / "a.webm", clip(5), "libvpx")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert open_video(path).num_frames == 5


def test_rotation(tmp_path):
    frames = clip(4)
    path = write(tmp_path / "a.mp4", frames)
    upright = np.stack(list(open_video(path)))
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the matrix that a player applies
    one = (1 << 16).to_bytes(4, "big")
    minus, zero, last = (-(1 << 16)).to_bytes(4, "big", signed=True), bytes(4), (1 << 30).to_bytes(4, "big")
    data[at : at + 36] = b"".join([zero, one, zero, minus, zero, zero, zero, zero, last])  # a quarter turn clockwise
    path.write_bytes(data)
    video = open_video(path)
    assert video.size == (64, 48)
    np.testing.assert_array_equal(np.stack(list(video)), np.rot90(upright, -1, axes=(1, 2)))


def test_truncated(tmp_path):
    path = write(tmp_path / "a.mp4", clip(30), movflags="faststart", preset="ultrafast")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(
        UserError, match=r"a\.mp4: cut short after frame \d+: [\d,]+ bytes missing at its end.*copy the file again"
    ):
        _ = open_video(path).num_frames


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "cannot be read as a video"), (b"words " * 99, "cannot be read")]
)
def test_no_video(tmp_path, content, message):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_video(path)


def test_no_images_in_it(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="holds no video stream"):
        open_video(path)
    with pytest.raises(UserError, match=r"none\.mp4: no such video"):
        open_video(tmp_path / "none.mp4")


def test_folders_are_sorted_by_number(tmp_path):
    frames = clip(12)
    video = open_video(write_folder(tmp_path / "v", frames, "img{}.png"))
    assert video.num_frames == 12
    assert video.frame_names[10] == "img10"
    np.testing.assert_array_equal(np.stack(list(video)), frames)
    np.testing.assert_array_equal(video.read([3, 1]), frames[[3, 1]])
    single = open_video(tmp_path / "v" / "img4.png")
    np.testing.assert_array_equal(np.stack(list(single)), frames[4:5])


def test_bad_folders(tmp_path):
    folder = write_folder(tmp_path / "v", clip(3))
    (folder / "frame2.png").write_bytes((folder / "frame2.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"frame2\.png: truncated"):
        list(open_video(folder))
    Image.fromarray(clip(1, 48, 60)[0]).save(folder / "frame2.png")
    with pytest.raises(UserError, match=r"frame2\.png: 60x48 pixels where the first frame has 64x48"):
        list(open_video(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no frames"):
        open_video(tmp_path / "empty")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), "the video is empty"),
        (np.full((2, 4, 4, 3), 255.0), "floats of 255 to 255; give floats of 0 to 1"),
        (np.full((2, 4, 4, 3), np.nan), "floats of nan to nan"),
        (np.full((2, 4, 4, 3), 300), "int64 of 300 to 300 have no known scale"),
        (np.full((2, 4, 4, 3), 200, np.uint16), "may be 8 or 16 bits"),
        (np.zeros((4, 4, 3), np.uint8), "not one image"),
        (np.zeros((2, 7, 5, 6), np.uint8), r"not uint8\[2, 7, 5, 6\]"),
        (np.zeros((2, 4, 4, 3), bool), "an array of bool"),
        ([], "the video is empty"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "frame 1 of the list has 5x4 pixels"),
        (None, "cannot be made of NoneType"),
        (7, "cannot be made of int"),
        ("https://host/a.mp4", "https://host/a.mp4: addresses are not read"),
    ],
)
def test_bad_arrays(array, message):
    with pytest.raises(UserError, match=message):
        open_video(array)


@pytest.mark.parametrize(
    ("convert", "grey"),
    [
        (lambda x: x.transpose(0, 3, 1, 2), False),
        (lambda x: (x / 255).astype(np.float32), False),
        (lambda x: x.astype(np.uint16) * 257, False),
        (lambda x: x.astype(np.int64), False),
        (lambda x: np.concatenate([x, x[..., :1]], axis=-1), False),
        (lambda x: x[..., 0], True),
        (lambda x: x[..., :1], True),
        (lambda x: (x / 255).astype(np.float64).transpose(0, 3, 1, 2), False),
        (list, False),
        (lambda x: (frame for frame in x), False),
        (lambda x: [Image.fromarray(frame) for frame in x], False),
        (lambda x: [Image.fromarray(frame).convert("RGBA") for frame in x], False),
        (lambda x: [frame.transpose(2, 0, 1) / 255 for frame in x], False),
    ],
)
def test_arrays_of_any_layout_and_type(convert, grey):
    frames = clip(5)
    video = open_video(convert(frames), fps=4)
    expected = np.repeat(frames[..., :1], 3, axis=-1) if grey else frames
    np.testing.assert_array_equal(np.stack(list(video)), expected)
    assert (video.num_frames, video.size, video.fps, video.duration) == (5, (48, 64), 4.0, 1.25)
    assert video.times_of([0, 3]) == [0.0, 0.75]
    np.testing.assert_array_equal(np.stack(list(video)), expected)  # a generator, too, is read twice


def test_tensors():
    torch = pytest.importorskip("torch")
    frames = clip(3)
    tensor = torch.tensor(frames.transpose(0, 3, 1, 2) / 255.0, requires_grad=True)
    np.testing.assert_array_equal(open_video(tensor).read([2]), frames[[2]])


def test_lists_of_files(tmp_path):
    frames = clip(4)
    folder = write_folder(tmp_path / "v", frames)
    files = [folder / f"frame{i}.png" for i in (3, 0, 2)]
    video = open_video(files)  # in the order of the list
    np.testing.assert_array_equal(np.stack(list(video)), frames[[3, 0, 2]])
    assert video.frame_names == ["frame3", "frame0", "frame2"]
    assert open_video([str(files[0]), files[0]]).frame_names == ["00000", "00001"]
    still = open_video(Image.fromarray(frames[1]))
    assert still.still
    np.testing.assert_array_equal(still.read([0]), frames[[1]])


def test_whole_names_are_in_natural_order(tmp_path):
    folder = tmp_path / "v"
    folder.mkdir()
    ordered = ["2023-08-07_2", "2024-08-07_0", "2024-08-07_1", "2024-08-07_10", "cam2_frame_1", "cam2_frame_2"]
    ordered += ["cam2_frame_10", "cam10_frame_1", "x.jpg"]
    for name in ordered:
        Image.new("RGB", (8, 8)).save(folder / f"{name}.{'JPG' if name.endswith('1') else 'jpg'}")
    assert open_video(folder).frame_names == ordered


def test_two_files_of_one_name_are_refused(tmp_path):
    folder = write_folder(tmp_path / "v", clip(2), "{:05d}.png")
    Image.new("RGB", (64, 48)).save(folder / "00001.jpg")
    with pytest.raises(UserError, match=r"v: 00001\.jpg and 00001\.png would be two frames of one name"):
        open_video(folder)


def test_names_with_accents_are_found_in_either_spelling(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    folder = write_folder(tmp_path / apart, clip(2), "\u00e9{}.png")
    video = open_video(tmp_path / composed)
    assert video.num_frames == 2
    assert open_video(tmp_path / composed / "e\u03010.png").still
    (folder / "e\u03010.png").write_bytes((folder / "\u00e90.png").read_bytes())
    with pytest.raises(UserError, match="two frames of one name"):
        open_video(folder)


def test_animations_are_videos(tmp_path):
    frames = clip(5)
    stills = [Image.fromarray(frame) for frame in frames]
    for name, options in (("a.webp", {"lossless": True}), ("a.png", {}), ("a.tif", {}), ("a.gif", {})):
        path = tmp_path / name
        stills[0].save(path, save_all=True, append_images=stills[1:], duration=[200, 200, 400, 200, 200], **options)
        video = open_video(path)
        assert (video.num_frames, video.size, video.still) == (5, (48, 64), False), name
        found = np.stack(list(video)).astype(int)
        assert np.abs(found - frames).mean() < (40 if name == "a.gif" else 0.01)
        np.testing.assert_array_equal(video.read([4, 1]), found[[4, 1]])
        if name != "a.tif":
            np.testing.assert_allclose(video.times_of(range(5)), [0, 0.2, 0.4, 0.8, 1.0])
            assert abs(video.duration - 1.2) < 0.01
    folder = tmp_path / "frames"
    folder.mkdir()
    (tmp_path / "a.webp").rename(folder / "1.webp")
    with pytest.raises(UserError, match=r"1\.webp: an animation of 5 frames where one image"):
        open_video(folder)


def test_users_images_are_upright_and_scaled(tmp_path):
    assert open_video(CASES / "orientation_6.jpg").size == (96, 64)
    folder = tmp_path / "v"
    folder.mkdir()
    shutil.copy(CASES / "orientation_6.jpg", folder)
    assert open_video(folder).size == (96, 64)
    deep = open_video(CASES / "sixteen_bit.png").read([0])
    assert len(np.unique(deep)) > 2  # it was black and white
    assert deep.max() == 220
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(UserError, match="is a pipe, a socket or a device"):
        open_video(tmp_path / "pipe.mp4")


def test_frames_a_second_of_what_states_none(tmp_path):
    folder = write_folder(tmp_path / "v", clip(4))
    video = open_video(folder, fps=2.5)
    assert (video.fps, video.duration, video.times_of([0, 2])) == (2.5, 1.6, [0.0, 0.8])
    assert open_video(folder).times_of([0]) is None
    with pytest.raises(UserError, match="states itself when its frames are shown"):
        open_video(write(tmp_path / "a.mp4", clip(4)), fps=5)
    for bad in (0, -1, float("nan"), "x"):
        with pytest.raises(UserError, match="frames a second cannot be"):
            open_video(folder, fps=bad)


def test_samples_and_readers():
    frames = clip(5)
    sample = Video("v", 5, (48, 64), (), lambda indices: frames[list(indices)], None, frame_names=tuple("abcde"))
    video = open_video(sample)
    assert open_video(video) is video
    assert video.frame_names[3] == "d"
    np.testing.assert_array_equal(np.stack(list(video)), frames)
    np.testing.assert_array_equal(video.read([4, 2]), frames[[4, 2]])


def test_thinned():
    frames = clip(11)
    thin = StridedReader(open_video(frames), every=3, max_frames=3)
    assert (thin.num_frames, list(thin.numbers), list(thin.frame_names)) == (3, [0, 3, 6], ["00000", "00003", "00006"])
    np.testing.assert_array_equal(np.stack(list(thin)), frames[[0, 3, 6]])
    np.testing.assert_array_equal(thin.read([2, 0]), frames[[6, 0]])
    assert StridedReader(open_video(frames), every=3).num_frames == 4
    for bad in ({"every": 0}, {"max_frames": 0}):
        with pytest.raises(UserError, match="give 1 or more"):
            StridedReader(open_video(frames), **bad)


@pytest.mark.parametrize("size", [(48, 64), (33, 51)])
def test_writer(tmp_path, size):
    frames = clip(6, *size)
    path = tmp_path / "out.mp4"
    with VideoWriter(path, size, 12.5) as video:
        for frame in frames:
            video.write(frame)
        assert not path.exists()
    back = open_video(path)
    assert back.fps == 12.5
    assert np.abs(np.stack(list(back))[:, : size[0], : size[1]].astype(int) - frames).mean() < 12


def test_a_failed_writer_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="dtype"), VideoWriter(tmp_path / "out.mp4", (32, 32), 10) as video:
        video.write(np.zeros((32, 32, 3), np.float64))
    assert not list(tmp_path.iterdir())


def test_prefetch():
    assert list(prefetch(iter(range(20)), 3)) == list(range(20))

    def broken():
        yield 1
        raise UserError("no more")

    items = prefetch(broken(), 2)
    assert next(items) == 1
    with pytest.raises(UserError, match="no more"):
        next(items)


def test_prefetch_stays_near_and_ends():
    made = []

    def endless():
        while True:
            made.append(len(made))
            yield made[-1]

    before = threading.active_count()
    with contextlib.closing(prefetch(endless(), 3)) as items:
        assert next(items) == 0
        deadline = time.monotonic() + 5
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(made) == 5  # one taken, three waiting, one in hand
    assert threading.active_count() == before
