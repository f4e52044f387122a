"""Reading a video from a frame on, without decoding all that comes before: the same frames, numbers and times."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from helpers.video_files import damage, texture, write
from virst_jax.errors import UserError
from virst_jax.io import video_file, video_seek
from virst_jax.io.video import FileReader, StridedReader, open_video

COUNT = 160
CLOSED = {"g": "40", "bf": "3"}
X265 = {"x265-params": "keyint=40:min-keyint=40:bframes=3:log-level=none"}
FILES = {
    "mp4 with B-frames": ("a.mp4", "libx264", CLOSED),
    "mkv with B-frames": ("a.mkv", "libx264", CLOSED),
    "mov of a phone": ("a.mov", "libx264", {**CLOSED, "sound": "aac", "movflags": "faststart"}),
    "key frames alone": ("a.mp4", "libx264", {"g": "1", "bf": "0"}),
    "fragments": ("a.mp4", "libx264", {**CLOSED, "movflags": "frag_keyframe+empty_moov"}),
    "open groups": ("a.mp4", "libx264", {**CLOSED, "x264-params": "open-gop=1:keyint=40:bframes=3:log-level=-1"}),
    "hevc": ("a.mp4", "libx265", {"x265-params": X265["x265-params"] + ":open-gop=0"}),
    "hevc, open groups": ("a.mp4", "libx265", {"x265-params": X265["x265-params"] + ":open-gop=1"}),
    "vp9": ("a.webm", "libvpx-vp9", {"g": "40", "auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime"}),
    "transport stream": ("a.ts", "libx264", CLOSED),
    "another codec": ("a.avi", "mpeg4", {"g": "40"}),
}
FROM_THE_START = {"open groups", "transport stream", "another codec"}  # these do not tell enough


def clip(folder: Path, case: str, **more: Any) -> Path:
    name, codec, options = FILES[case]
    if codec not in av.codecs_available:
        pytest.skip(f"FFmpeg has no {codec} here")
    return write(folder / name, texture(COUNT, 48, 64), codec, **options, **more)


class Decoded:
    """Counts the frames that are decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count, noted = 0, video_file._Scan.frame

        def frame(scan: video_file._Scan, found: av.VideoFrame) -> None:
            self.count += 1
            noted(scan, found)

        monkeypatch.setattr(video_file._Scan, "frame", frame)


def same(path: Path, start: int, every: int = 1) -> StridedReader:
    """A reader from a frame on, that was compared with one of the whole video."""
    whole, part = open_video(path), StridedReader(open_video(path), every, start=start)
    frames = np.stack(list(whole))
    numbers = range(start, len(frames), every)
    assert part.num_frames == len(numbers)
    np.testing.assert_array_equal(np.stack(list(part)), frames[start::every])
    np.testing.assert_array_equal(np.stack(list(part.survey([0, 3]))), frames[[numbers[0], numbers[3]]])
    assert list(part.names_of(range(len(numbers)))) == list(whole.names_of(numbers))
    assert part.times_of(range(len(numbers))) == whole.times_of(numbers)
    assert not list(part.damaged)
    return part


@pytest.mark.parametrize("case", FILES)
def test_frames_are_those_of_the_whole_video(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clip(tmp_path, case)
    assert len(list(open_video(path))) == COUNT
    for start in (119, 120, 121, 135):  # about the key frame, and between two
        same(path, start)
    same(path, 130, every=3)
    part, decoded = open_video(path), Decoded(monkeypatch)
    part.begin_at(135)
    assert part.num_frames == COUNT
    if case in FROM_THE_START:
        assert decoded.count >= COUNT
    else:
        assert decoded.count <= COUNT - 80


def test_times_of_a_variable_rate(tmp_path: Path) -> None:
    steps = np.random.default_rng(0).integers(10, 90, COUNT)
    path = clip(tmp_path, "mp4 with B-frames", times=np.cumsum(steps).tolist())
    part = same(path, 130)
    assert part.reader._entry is not None  # type: ignore[attr-defined]
    assert part.duration == pytest.approx(steps[131:].sum() / 1000, abs=0.1)


def test_earlier_frames_can_still_be_read(tmp_path: Path) -> None:
    path = clip(tmp_path, "mp4 with B-frames")
    frames, reader = np.stack(list(open_video(path))), open_video(path)
    reader.begin_at(130)
    np.testing.assert_array_equal(reader.read([5, 140, 100]), frames[[5, 140, 100]])
    np.testing.assert_array_equal(np.stack(list(reader)), frames)
    with pytest.raises(UserError, match="no frame 200; the video has frames 0 to 159"):
        list(reader.pick([150, 200]))
    assert reader.duration == open_video(path).duration


def test_numbers_beyond_the_end(tmp_path: Path) -> None:
    path = clip(tmp_path, "mp4 with B-frames")
    with pytest.raises(UserError, match="no frame 400; the video has frames 0 to 159"):
        list(StridedReader(open_video(path), start=400))
    assert StridedReader(open_video(path), start=120, end=400).num_frames == 40


def test_damage_is_told_where_it_is_read(tmp_path: Path) -> None:
    """With the numbers of the whole file; what lies before the first frame that is asked for does not matter."""
    path = clip(tmp_path, "mp4 with B-frames")
    with av.open(str(path)) as container:
        found = [(p.pos or 0, p.size) for p in container.demux(video=0) if p.size]
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)

    def spoiled(index: int) -> Path:
        pos, size = found[index]
        other = bytearray(content)
        other[pos + 12 : pos + size] = rng.bytes(size - 12)
        (tmp_path / "b.mp4").write_bytes(other)
        return tmp_path / "b.mp4"

    frames = np.stack(list(open_video(path)))
    early = spoiled(60)
    with pytest.raises(UserError, match="damaged"):
        list(open_video(early))
    np.testing.assert_array_equal(np.stack(list(StridedReader(open_video(early), start=125))), frames[125:])
    late = spoiled(141)
    words = []
    for start in (0, 125):
        with pytest.raises(UserError, match="damaged: frames 141-159") as error:
            list(StridedReader(open_video(late), start=start))
        words.append(str(error.value))
    assert words[0] == words[1]


def test_seeking_that_leads_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier key frame will do as well; if frames are not those that were expected, all are decoded."""
    path, land = clip(tmp_path, "mp4 with B-frames"), video_seek._land
    monkeypatch.setattr(video_seek, "_land", lambda opened, stamp, stamps: land(opened, stamps[70], stamps))
    monkeypatch.setattr(video_seek, "TRIES", 1)
    entry = video_seek.find_entry(open_video(path)._opened, 135)
    assert entry is not None
    assert entry.number == 40
    monkeypatch.setattr(video_seek, "_land", lambda opened, stamp, stamps: None)
    assert video_seek.find_entry(open_video(path)._opened, 135) is None
    monkeypatch.undo()
    stamps = tuple(range(0, 136 * 512, 512))  # a rate that the file does not have
    assert land(open_video(path)._opened, stamps[120], stamps) is None


def test_damaged_files_that_are_to_be_read_all_the_same(tmp_path: Path) -> None:
    path = damage(clip(tmp_path, "mp4 with B-frames"), 3)
    reader = open_video(path, allow_damaged=True)
    assert isinstance(reader, FileReader)
    reader.begin_at(120)
    assert reader._entry is None
