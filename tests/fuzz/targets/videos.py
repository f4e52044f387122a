"""Short videos of several containers, and animations, with changed bytes."""

import functools
import io
import itertools
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from fuzz.mutate import byte_edits, edit_bytes
from fuzz.target import Target
from virst_jax.io.video import open_video

FRAMES = np.random.default_rng(0).integers(0, 256, (6, 24, 32, 3), np.uint8)
KINDS = [
    ("mp4", "libx264"),
    ("mkv", "libx264"),
    ("avi", "mpeg4"),
    ("webm", "libvpx-vp9"),
    ("ts", "mpeg2video"),
    ("gif", "gif"),
]


@functools.cache
def files() -> list[tuple[str, bytes]]:
    """Suffix and content of good videos."""
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, codec in KINDS:
            path = Path(folder) / f"a.{kind}"
            with av.open(str(path), "w") as container:
                stream: Any = container.add_stream(codec, rate=10)
                stream.height, stream.width = FRAMES.shape[1:3]
                stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
                for frame in FRAMES:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
            made.append((kind, path.read_bytes()))
    images = [Image.fromarray(frame) for frame in FRAMES[:3]]
    for kind in ("webp", "png", "tiff"):
        content = io.BytesIO()
        images[0].save(content, kind.upper(), save_all=True, append_images=images[1:], duration=100)
        made.append((kind, content.getvalue()))
    return made


def read(case: tuple[int, Any, bool]) -> int:
    """Reads a video twice, as segmenting does: some frames, then all of them, with their times."""
    number, edits, allow_damaged = case
    suffix, content = files()[number % len(files())]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{suffix}"
        path.write_bytes(edit_bytes(content, edits) if edits else content)
        video = open_video(path, allow_damaged=allow_damaged)
        count = video.num_frames
        assert count == len(video.frame_names)
        first = video.read([0, count - 1])
        assert first.dtype == np.uint8
        assert first.shape[1:] == (*video.size, 3)
        frames = list(video)
        assert len(frames) == count, (len(frames), count)
        assert all(frame.shape == (*video.size, 3) for frame in frames)
        times = video.times_of(range(count))
        assert times is None or all(a < b for a, b in itertools.pairwise(times))
        assert all(0 <= i < count for i in video.damaged)
        if not allow_damaged:
            assert not video.damaged
            assert not video.is_cut
    return count


CASES = st.tuples(st.integers(0, len(KINDS) + 2), st.one_of(st.none(), byte_edits), st.booleans())
TARGETS = [Target("videos", CASES, read, cost=3)]
