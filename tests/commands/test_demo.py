"""The sample clip of `virst demo`."""

from virst_jax.commands import demo
from virst_jax.io.video import open_video


def test_the_sample_clip():
    clip = open_video(demo.CLIP)
    assert (clip.num_frames, clip.size, clip.fps) == (32, (256, 256), 8.0)
    assert demo.CLIP.stat().st_size < 100_000
    assert len(set(demo.EXPRESSIONS)) >= 4
