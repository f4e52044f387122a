import contextlib
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.io.video import StridedReader, VideoWriter, open_video, prefetch


def clip(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A bright square that moves over a dark ramp; a frame differs from all others even after compression."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = np.linspace(0, 80, width, dtype=np.uint8)[None, None, :, None]
    for t in range(count):
        x = 2 + t * (width - 20) // max(1, count - 1)
        frames[t, 8:24, x : x + 16] = (240, 200 - 5 * t, 40 + 6 * t)
    return frames


def write(
    path: Path, frames: np.ndarray, *, codec: str = "libx264", pts: list[int] | None = None, **options: str
) -> Path:
    formats = {"gif": "rgb8"}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = formats.get(codec, "yuv420p")
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for t, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[t], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


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
    video = open_video(write(tmp_path / name, frames, codec=codec))
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
    video = open_video(write(tmp_path / "a.mp4", frames, pts=[0, 10, 500, 510, 1500, 4000]))
    assert video.num_frames == 6
    assert np.abs(np.stack(list(video)).astype(int) - frames).mean() < 12


def test_a_container_that_does_not_count_its_frames(tmp_path):
    path = write(tmp_path / "a.webm", clip(5), codec="libvpx")
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
    with pytest.raises(UserError, match=r"a\.mp4: damaged or truncated after frame \d+; copy the file again"):
        _ = open_video(path).num_frames


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "cannot be read as a video"), (b"words " * 99, "cannot be read")]
)
def test_no_video(tmp_path, content, message):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_video(path)


def test_no_pictures_in_it(tmp_path):
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
    with pytest.raises(UserError, match=r"frame2\.png: cannot be read as a picture"):
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
        (np.zeros((2, 4, 4, 3), np.float32), r"array uint8\[T, H, W, 3\], not float32\[2, 4, 4, 3\]"),
        (np.zeros((4, 4, 3), np.uint8), "not uint8"),
    ],
)
def test_bad_arrays(array, message):
    with pytest.raises(UserError, match=message):
        open_video(array)


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
