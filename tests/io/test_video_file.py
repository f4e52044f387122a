"""Video files as people have them: odd streams, odd times, odd pixels, and damage."""

import contextlib
import dataclasses
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from helpers.places import DATA
from helpers.video_files import damage, packets, texture, write
from virst_jax.errors import UserError
from virst_jax.io.containers import what_is_missing
from virst_jax.io.reader import VideoFormat
from virst_jax.io.video import FileReader, StridedReader, VideoWriter, open_video
from virst_jax.io.video_file import ranges

CASES = DATA / "cases"


def test_a_cover_is_not_the_video():
    video = open_video(CASES / "cover_first.mp4")
    assert (video.num_frames, video.size) == (24, (64, 96))


def test_only_a_cover(tmp_path):
    source = (CASES / "cover_first.mp4").read_bytes()
    at = source.rindex(b"avc1")
    (tmp_path / "a.mp4").write_bytes(source[:at] + b"none" + source[at + 4 :])
    with pytest.raises(UserError) as info:
        _ = open_video(tmp_path / "a.mp4").num_frames
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("axis", [0, 1])
def test_mirrored_files_are_read_as_players_show_them(tmp_path, axis):
    path = CASES / ("mirror_v.mp4" if axis == 0 else "mirror_h.mp4")
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    one, zero, last = (1 << 16).to_bytes(4, "big"), bytes(4), (1 << 30).to_bytes(4, "big")
    data[at : at + 36] = b"".join([one, zero, zero, zero, one, zero, zero, zero, last])
    (tmp_path / "plain.mp4").write_bytes(data)
    plain, shown = (np.stack(list(open_video(p))) for p in (tmp_path / "plain.mp4", path))
    assert (plain != np.flip(plain, 1 + axis)).any()
    np.testing.assert_array_equal(shown, np.flip(plain, 1 + axis))


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1, (1, 2))),
        ((0, -1, 1, 0), lambda x: np.rot90(x, 1, (1, 2))),
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2, (1, 2))),
        ((0, 1, 1, 0), lambda x: np.swapaxes(x, 1, 2)),
        ((0, -1, -1, 0), lambda x: np.rot90(np.swapaxes(x, 1, 2), 2, (1, 2))),
        ((0.7071, 0.7071, -0.7071, 0.7071), None),
    ],
)
def test_display_matrices(tmp_path, matrix, expected):
    path = write(tmp_path / "a.mp4", texture(3, 48, 64), aspect=Fraction(4, 3))
    plain = np.stack(list(open_video(path)))
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(65536 * x).to_bytes(4, "big", signed=True) for x in matrix)
    zero, last = bytes(4), (1 << 30).to_bytes(4, "big")
    data[at : at + 36] = b"".join([a, b, zero, c, d, zero, zero, zero, last])
    path.write_bytes(data)
    if expected is None:
        with pytest.raises(UserError, match="turned by an angle other than 90 degrees"):
            open_video(path)
        return
    video = open_video(path)
    np.testing.assert_array_equal(np.stack(list(video)), expected(plain))
    assert video.size == expected(plain).shape[1:3]
    turned = video.size != (48, 64)
    assert video.format.sample_aspect == (Fraction(3, 4) if turned else Fraction(4, 3))


TIMES = [0, 10, 500, 510, 1500, 4000]


def test_true_times_of_a_variable_rate(tmp_path):
    video = open_video(write(tmp_path / "a.mp4", texture(6), times=TIMES))
    np.testing.assert_allclose(video.times_of(range(6)), np.array(TIMES) / 1000)
    thin = StridedReader(video, every=2)
    np.testing.assert_allclose(thin.times_of(range(3)), [0, 0.5, 1.5])
    assert 4.0 <= video.duration < 4.2  # not 6 frames of the announced rate


def test_a_constant_rate_is_told_as_before(tmp_path):
    video = open_video(write(tmp_path / "a.mp4", texture(12)))
    assert video.duration == pytest.approx(video.num_frames / video.fps, abs=1e-9) == pytest.approx(1.2)
    np.testing.assert_allclose(video.times_of([0, 5, 11]), [0, 0.5, 1.1])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi"])
@pytest.mark.parametrize("front", [False, True])
def test_cut_files_are_told(tmp_path, name, front):
    codec = {"a.webm": "libvpx", "a.avi": "mpeg4"}.get(name, "libx264")
    options = {"movflags": "faststart"} if front and name == "a.mp4" else {}
    path = write(tmp_path / name, texture(40), codec, **options)
    assert open_video(path).num_frames == 40
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 5])
    with pytest.raises(
        UserError, match=rf"{name}: (cut short|cannot be read as a video \(cut short).* missing at its end"
    ):
        _ = open_video(path).num_frames
    with pytest.raises(UserError, match="cut short"):
        list(open_video(path))
    if name != "a.mp4" or front:
        video = open_video(path, allow_damaged=True)
        assert 0 < video.num_frames < 40
        assert video.is_cut
        assert len(list(video)) == video.num_frames


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.avi", "mpeg4"),
        ("a.ts", "libx264"),
        ("a.flv", "flv1"),
        ("a.wmv", "wmv2"),
        ("a.gif", "gif"),
        ("a.webm", "libvpx-vp9"),
    ],
)
def test_other_cut_files_are_told(tmp_path, name, codec):
    frames = texture(8)
    whole = write(tmp_path / name, frames, codec, pix_fmt="rgb8" if codec == "gif" else "yuv420p")
    assert what_is_missing(whole) == ""
    assert open_video(whole).num_frames == len(frames)
    content = whole.read_bytes()
    for share in (0.35, 0.6, 0.85):
        cut = tmp_path / f"cut_{name}"
        size = int(share * len(content))
        cut.write_bytes(content[: size + (size % 188 == 0)])  # MPEG-TS that is cut between packets cannot be told
        with pytest.raises(UserError, match=r"cut short") as info:
            list(open_video(cut))
        assert "frame -1" not in str(info.value)
        with contextlib.suppress(UserError):  # nothing is left
            assert open_video(cut, allow_damaged=True).num_frames <= len(frames)


def test_damaged_frames_are_named(tmp_path):
    path = write(tmp_path / "a.mp4", texture(40))
    whole = np.stack(list(open_video(path)))
    damage(path, 20)
    with pytest.raises(UserError, match=r"a\.mp4: damaged: frames [\d, -]+ cannot be trusted; .*--allow-damaged"):
        _ = open_video(path).num_frames
    with pytest.raises(UserError, match="cannot be trusted"):
        list(open_video(path))
    with pytest.raises(UserError, match="cannot be trusted"):
        open_video(path).read([39])
    video = open_video(path, allow_damaged=True)
    frames = np.stack(list(video))
    assert len(frames) == video.num_frames
    changed = [i for i, frame in enumerate(frames) if i >= len(whole) or (frame != whole[i]).any()]
    if len(frames) == len(whole):
        assert set(changed) <= set(video.damaged)
    np.testing.assert_array_equal(np.stack(list(video)), frames)  # the same each time


def test_frames_before_the_damage_can_be_had(tmp_path):
    path = write(tmp_path / "a.mp4", texture(40), movflags="faststart", bf="0")
    whole = np.stack(list(open_video(path)))
    data = bytearray(path.read_bytes())
    at, size = packets(path)[21]
    data[at + 8 : at + size] = bytes(size - 8)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged: frames 21-39 "):
        _ = open_video(path).num_frames
    thin = StridedReader(open_video(path), max_frames=5)
    np.testing.assert_array_equal(np.stack(list(thin)), whole[:5])
    assert (thin.num_frames, list(thin.numbers), list(thin.damaged)) == (5, [0, 1, 2, 3, 4], [])
    assert thin.frame_names == [f"{i:05d}" for i in range(5)]
    every = StridedReader(open_video(path), every=4, max_frames=6)  # the last of them is frame 20
    np.testing.assert_array_equal(np.stack(list(every)), whole[0:21:4])
    with pytest.raises(UserError, match="frames 21"):
        _ = StridedReader(open_video(path), every=4, max_frames=7).num_frames
    going_on = open_video(path, allow_damaged=True)
    assert list(going_on.damaged) == []  # not looked at yet
    assert going_on.num_frames in (39, 40)
    assert list(going_on.damaged) == list(range(21, going_on.num_frames))
    assert going_on.num_frames + going_on.num_lost == 40
    assert list(StridedReader(going_on, every=10).damaged) == [3]


def test_damage_ends_at_a_key_frame(tmp_path):
    path = write(tmp_path / "a.mp4", texture(40), movflags="faststart", bf="0", g="10", sc_threshold="0")
    whole = np.stack(list(open_video(path)))
    data = bytearray(path.read_bytes())
    at, size = packets(path)[13]
    data[at + 8 : at + size] = bytes(size - 8)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged: frames 13-19 cannot"):
        _ = open_video(path).num_frames
    video = open_video(path, allow_damaged=True)
    if video.num_frames == 40:
        frames = np.stack(list(video))
        np.testing.assert_array_equal(frames[20:], whole[20:])


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3"}),
        ("a.mkv", "libx264", {"x264-params": "open-gop=1:keyint=8"}),
        ("a.ts", "libx264", {"g": "8"}),
        ("a.mp4", "libx265", {"x265-params": "log-level=none:keyint=8"}),
        ("a.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "10"}),
        ("a.webm", "libvpx-vp9", {"lag-in-frames": "10", "g": "8"}),
        ("a.avi", "mpeg4", {}),
        ("a.mpg", "mpeg2video", {"bf": "2"}),
    ],
)
def test_sound_files_are_not_called_damaged(tmp_path, name, codec, options):
    try:
        path = write(tmp_path / name, texture(30), codec, **options)
    except (ValueError, av.error.FFmpegError) as error:
        pytest.skip(str(error))
    video = open_video(path)
    assert video.num_frames == 30
    assert len(list(video)) == 30
    assert (list(video.damaged), video.is_cut) == ([], False)


def test_most_damage_is_found(tmp_path):
    path = write(tmp_path / "a.mp4", texture(40))
    content, found = path.read_bytes(), 0
    for seed in range(10):
        path.write_bytes(content)
        damage(path, 5, seed)
        try:
            _ = open_video(path).num_frames
        except UserError:
            found += 1
    assert found >= 9


@pytest.mark.parametrize("sound", ["aac", "pcm_s16le"])
def test_an_overlay_keeps_what_the_file_states(tmp_path, sound):
    frames = texture(6)
    source = write(tmp_path / "a.mov", frames, times=TIMES, sound=sound, aspect=Fraction(4, 3), colours=(1, 1, 1, 1))
    video = open_video(source)
    assert video.format.audio == source
    decoded = list(video)
    with VideoWriter(tmp_path / "b.mp4", video.size, video.fps, video.format) as out:
        for frame, time in zip(decoded, video.times_of(range(6))):
            out.write(frame, time)
    back = open_video(tmp_path / "b.mp4")
    np.testing.assert_allclose(back.times_of(range(6)), np.array(TIMES) / 1000, atol=1e-3)
    same = dataclasses.replace(video.format, audio=None, time_base=None)
    assert dataclasses.replace(back.format, audio=None, time_base=None) == same
    assert (same.colorspace, same.sample_aspect) == (1, Fraction(4, 3))
    assert np.abs(np.stack(list(back)).astype(int) - np.stack(decoded)).mean() < 8
    with av.open(str(tmp_path / "b.mp4")) as container:
        heard = list(container.decode(audio=0))
        assert container.streams.audio[0].codec_context.name == "aac"
    assert sum(frame.samples for frame in heard) >= 0.5 * 16000


def overlay_of(source: Path, out: Path) -> VideoWriter:
    video = open_video(source)
    with VideoWriter(out, video.size, video.fps, video.format) as writer:
        for frame in video:
            writer.write(frame)
    return writer


@pytest.mark.parametrize("fps", [0.0, 1e-9, 1e-4, 1e-3, 29.97, 1000.0, 9999.9, 1e5, 1e9])
@pytest.mark.parametrize("timed", [False, True])
def test_overlays_of_any_rate_can_be_played(tmp_path, fps, timed):
    for base in (None, Fraction(1, 90_000), Fraction(1, 1), Fraction(1001, 30_000)):
        with VideoWriter(tmp_path / "a.mp4", (32, 48), fps, VideoFormat(time_base=base)) as out:
            for i in range(4):
                out.write(np.full((32, 48, 3), 40 * i, np.uint8), i / fps if timed and fps else None)
        assert open_video(tmp_path / "a.mp4").num_frames == 4, (fps, base)


def test_colours_that_no_encoder_knows_and_jumps_in_time(tmp_path):
    odd = VideoFormat(
        colorspace=99, color_primaries=300, color_trc=77, color_range=9, sample_aspect=Fraction(1, 100_000)
    )
    with VideoWriter(tmp_path / "a.mp4", (32, 48), 10, odd) as out:
        for time in (0.0, 1e6, 1e6 + 0.1, 1e15):
            out.write(np.zeros((32, 48, 3), np.uint8), time)
    assert open_video(tmp_path / "a.mp4").num_frames == 4


def test_sound_without_headers_is_coded_again(tmp_path):
    """MPEG-TS repeats in the stream what MP4 wants to have in its header."""
    source = write(tmp_path / "a.ts", texture(6), sound="aac")
    assert overlay_of(source, tmp_path / "b.mp4").sound_fault == ""
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) >= 0.5 * 16000


@pytest.mark.parametrize("method", ["add_stream_from_template", "mux"])
def test_sound_that_cannot_be_kept_is_told(tmp_path, monkeypatch, method):
    source = write(tmp_path / "a.mp4", texture(6), sound="aac")
    real = getattr(av.container.OutputContainer, method)

    class Refusing:
        """An output that takes frames alone."""

        def __init__(self, container):
            self._container = container

        def __getattr__(self, name):
            return self._refuse if name == method else getattr(self._container, name)

        def _refuse(self, given, *rest):
            packets = given if isinstance(given, list) else [given]
            if method == "mux" and all(packet.stream.type == "video" for packet in packets):
                return real(self._container, given, *rest)
            raise av.error.InvalidDataError(1, "no such sound")

    opened = av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: Refusing(opened(*a, **k)) if "w" in a else opened(*a, **k))
    writer = overlay_of(source, tmp_path / "b.mp4")
    assert "a.mp4" in writer.sound_fault
    assert "b.mp4" in writer.sound_fault
    assert "no such sound" in writer.sound_fault
    monkeypatch.undo()
    assert open_video(tmp_path / "b.mp4").num_frames == 6


def test_colours_survive_the_way_through_an_overlay(tmp_path):
    flat = np.full((2, 32, 32, 3), (200, 60, 20), np.uint8)
    for number, colours in enumerate([None, (1, 1, 1, 1), (5, 5, 6, 1), (1, 1, 1, 2)]):
        source = write(tmp_path / f"{number}.mp4", flat, colours=colours)
        video = open_video(source)
        before = video.read([0])
        with VideoWriter(tmp_path / f"{number}_out.mp4", video.size, 10, video.format) as out:
            out.write(before[0])
        after = open_video(tmp_path / f"{number}_out.mp4").read([0])
        # coding again moves a pixel by up to 5; BT.601 read as BT.709 moves this red by 12, a wrong range by more
        assert np.abs(after.astype(int) - before).max() <= 8, colours


def test_ranges():
    assert ranges([3, 5, 6, 7, 9]) == "3, 5-7, 9"
    assert ranges(range(0, 40, 2), limit=2) == "0, 2 and 18 more stretches"


def test_what_is_not_asked_for_is_not_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", texture(60))
    video = open_video(path)
    decoded = []
    image = FileReader._image
    monkeypatch.setattr(
        FileReader, "_image", lambda self, frame, *rest: (decoded.append(frame.pts), image(self, frame, *rest))[1]
    )
    assert len(list(StridedReader(video, every=3, max_frames=4))) == 4
    assert len(decoded) == 4
    with pytest.raises(UserError, match="no frame 60; the video has frames 0 to 59"):
        list(video.pick([1, 60]))
