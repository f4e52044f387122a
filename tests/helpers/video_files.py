"""Video files as people have them, written for a test."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def texture(count: int, height: int = 96, width: int = 128) -> np.ndarray:
    """A pattern that moves, so that every frame is coded from the ones before."""
    cells = np.random.default_rng(5).integers(0, 255, (height // 8, width // 8, 3)).astype(np.uint8)
    base = cells.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(base, 2 * t, axis=1) for t in range(count)])


def write(path: Path, frames: np.ndarray, codec: str = "libx264", *, times=None, sound: str = "", **options) -> Path:
    aspect, colours = options.pop("aspect", None), options.pop("colours", None)
    pix_fmt = options.pop("pix_fmt", "yuv420p")
    layout = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    with av.open(str(path), "w", options=layout) as container:
        stream: Any = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if colours:
            stream.codec_context.colorspace, stream.codec_context.color_primaries = colours[:2]
            stream.codec_context.color_trc, stream.codec_context.color_range = colours[2:]
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        audio: Any = container.add_stream(sound, rate=16000) if sound else None
        for t, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[t], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            wave = (np.sin(np.arange(16000 * len(frames) // 10) / 7) * 9000).astype(np.int16)[None]
            heard = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            heard.sample_rate, heard.pts, heard.time_base = 16000, 0, Fraction(1, 16000)
            container.mux(audio.encode(heard))
            container.mux(audio.encode())
    return path


def damage(path: Path, count: int, seed: int = 0) -> Path:
    data, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
    places = packets(path)
    for at in rng.integers(places[0][0] + 100, sum(places[-1]), count):
        data[at] ^= 1 + rng.integers(255)
    path.write_bytes(data)
    return path


def packets(path: Path) -> list[tuple[int, int]]:
    """Places of the video's packets in the file, in the order of decoding."""
    with av.open(str(path)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.size and p.pos is not None]
