"""A video is decoded twice: once to count its frames and take the sample, once to track and paint."""

import argparse
import itertools

import numpy as np
import pytest
from PIL import Image

from virst_jax.commands.progress import Progress
from virst_jax.commands.segment_run import SegmentRun, claimed
from virst_jax.errors import UserError
from virst_jax.inference.plan import Options, plan_frames
from virst_jax.inference.survey import take_survey
from virst_jax.io import video_file
from virst_jax.io.shared_pass import SharedPass
from virst_jax.io.video import FileReader, StridedReader, VideoWriter, open_video

COUNT = 30


@pytest.fixture
def clip(tmp_path):
    with VideoWriter(tmp_path / "clip.mp4", (20, 32), 5) as video:
        for frame in np.random.default_rng(0).integers(0, 256, (COUNT, 20, 32, 3), dtype=np.uint8):
            video.write(frame)
    return tmp_path / "clip.mp4"


@pytest.fixture
def decoded(monkeypatch):
    """How many frames were decoded so far."""
    counted = itertools.count()
    frames = video_file._frames

    def counting(*arguments):
        for frame in frames(*arguments):
            next(counted)
            yield frame

    monkeypatch.setattr(video_file, "_frames", counting)
    return lambda: counted.__reduce__()[1][0]


def run(model, reader, out):
    with claimed(out, resume=out.exists()):
        return SegmentRun(model, reader, ["the dog"], out, source={}, progress=Progress(quiet=True)).run()


def test_segmenting_takes_two_passes(model, clip, tmp_path, decoded):
    reader = open_video(clip)
    assert decoded() == 1  # for the size
    result = run(model, reader, tmp_path / "out")
    assert len(result["frames"]) == COUNT
    assert decoded() <= 2 * COUNT + 1
    before = decoded()
    model.segment(clip, "the dog")
    assert decoded() - before <= 2 * COUNT + 1


@pytest.mark.parametrize(
    ("settings", "most"), [({"max_frames": 6}, 6), ({"every": 2, "max_frames": 3}, 5), ({"start": 4, "end": 9}, 10)]
)
def test_no_more_is_read_than_is_needed(model, clip, decoded, settings, most):
    reader = StridedReader(open_video(clip), **settings)
    survey = take_survey(model.cfg, reader, Options())
    with model.segment_stream(reader, "the dog", survey=survey) as stream:
        assert len(list(stream)) == survey.num_frames
    # frames are decoded in another order than they are shown: the first pass looks a little further
    assert decoded() - 1 <= 2 * most + video_file.REORDERED


def test_a_range(model, clip):
    whole = np.stack(list(open_video(clip)))
    part = StridedReader(open_video(clip), 2, start=4, end=11)
    assert list(part.numbers) == [4, 6, 8, 10]
    np.testing.assert_array_equal(np.stack(list(part)), whole[4:12:2])
    assert part.times_of([0, 1]) == pytest.approx([0.8, 1.2])
    np.testing.assert_array_equal(
        model.segment(StridedReader(open_video(clip), start=4, end=11), "the dog").masks,
        model.segment(whole[4:12], "the dog").masks,
    )
    for start, end in ((-1, None), (3, 2)):
        with pytest.raises(UserError, match="are no range"):
            StridedReader(open_video(clip), start=start, end=end)
    with pytest.raises(UserError, match="there is no frame 30; the video has frames 0 to 29"):
        _ = StridedReader(open_video(clip), start=30).num_frames


@pytest.mark.parametrize("stated", [1, COUNT - 7, COUNT + 9])
def test_a_wrong_number_in_the_file_changes_nothing(model, clip, monkeypatch, stated):
    right = take_survey(model.cfg, open_video(clip), Options())
    monkeypatch.setattr(FileReader, "expected_frames", lambda self: stated)
    found = take_survey(model.cfg, open_video(clip), Options())
    assert found.plan == right.plan == plan_frames(model.cfg, COUNT, Options())
    assert [(x.number, x.use) for x in found.pixels] == [(x.number, x.use) for x in right.pixels]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(found.pixels, right.pixels))


def test_the_releases_generators_are_drawn_from_once(model, clip):
    import random

    def generators():
        return np.random.RandomState(3), random.Random(3)

    given, other = generators(), generators()
    survey = take_survey(model.cfg, open_video(clip), Options(release_random=given))
    assert survey.plan == plan_frames(model.cfg, COUNT, Options(release_random=other))
    assert given[0].randint(1 << 30) == other[0].randint(1 << 30)
    assert given[1].random() == other[1].random()


def test_packets_are_counted_where_the_container_says_nothing(tmp_path):
    import av

    path = tmp_path / "clip.ts"
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width = stream.height = 32
        for _ in range(COUNT):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert open_video(path).expected_frames() == COUNT


def test_an_animation_is_read_twice(model, tmp_path, monkeypatch):
    from virst_jax.io import images

    path = tmp_path / "clip.webp"
    shown = [Image.fromarray(np.full((20, 32, 3), 20 * i, np.uint8)) for i in range(12)]
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=[100, 300] * 6, lossless=True)
    passes, frames = [], images.frames

    def counting(*arguments):
        for number, item in enumerate(frames(*arguments)):
            passes.append(number)
            yield item

    monkeypatch.setattr(images, "frames", counting)
    result = run(model, open_video(path), tmp_path / "out")
    assert len(passes) <= 2 * 12 + 1
    assert result["times"][:3] == [0.0, 0.1, 0.4]
    assert open_video(path).fps == pytest.approx(5)


def test_a_resumed_run_takes_two_passes_and_paints_the_same(model, clip, tmp_path, decoded, monkeypatch):
    whole = run(model, open_video(clip), tmp_path / "whole")
    take = SharedPass.take

    def stops(self, index):
        if index > 20:
            raise KeyboardInterrupt
        return take(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(SharedPass, "take", stops)
        with pytest.raises(KeyboardInterrupt):
            run(model, open_video(clip), tmp_path / "out")
    assert not (tmp_path / "out" / "overlay.mp4").exists()
    before = decoded()
    result = run(model, open_video(clip), tmp_path / "out")
    assert decoded() - before <= 2 * COUNT + 2
    assert result["objects"] == whole["objects"]
    for name in ("overlay.mp4", "preview.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_one_pass_for_two(clip):
    whole = np.stack(list(open_video(clip)))
    shared = SharedPass(open_video(clip))
    picks = shared.pick([3, 4, 11])
    picked = [next(picks), next(picks)]
    taken = [shared.take(i) for i in range(8)]  # further than was picked
    picked.append(next(picks))
    assert len(shared._passed) == 4  # frames 8 to 11 wait
    taken += [shared.take(i) for i in range(8, COUNT)]
    np.testing.assert_array_equal(np.stack(taken), whole)
    np.testing.assert_array_equal(np.stack(picked), whole[[3, 4, 11]])
    assert not shared._passed
    with pytest.raises(UserError, match="the video ended after 30 frames"):
        shared.take(COUNT)
    shared.close()


def test_damage_is_told_by_the_survey(model, clip, tmp_path):
    content = clip.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cut short"):
        take_survey(model.cfg, open_video(tmp_path / "cut.mp4"), Options())


def test_the_options_of_a_range_are_options(clip):
    from virst_jax.commands import segment

    parser = argparse.ArgumentParser()
    segment.add_arguments(parser)
    args = parser.parse_args([str(clip), "x", "--out", "y", "--start", "3", "--end", "5"])
    assert segment.open_reader(args, str(clip)).num_frames == 3
