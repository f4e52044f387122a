"""Small video files of many kinds, written with PyAV: what a case about reading videos holds.

A file is a row of KINDS: how it is coded, in which colours, and when its frames are shown.
"""

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..weights_rule import make_video

COUNT = 10  # frames of a file
BT601, BT709, BT2020 = 6, 1, 9  # FFmpeg's numbers of colour matrices
LIMITED, FULL = 1, 2  # and of ranges
WITH_B_FRAMES = {"bf": "2", "g": "6", "crf": "18"}


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
      size: height and width.
      colours: matrix and range that the file states; None: it states none.
      times: of the frames, in hundredths of a second; None: ten frames a second.
      first: number of ticks before the first frame.
    """

    suffix: str = ".mp4"
    codec: str = "libx264"
    pixels: str = "yuv420p"
    size: tuple[int, int] = (24, 34)
    options: dict[str, str] = field(default_factory=lambda: dict(WITH_B_FRAMES))
    colours: tuple[int, int] | None = None
    times: tuple[int, ...] | None = None
    first: int = 0


KINDS: dict[str, Kind] = {
    "plain": Kind(),
    "bt601": Kind(colours=(BT601, LIMITED)),
    "bt709": Kind(colours=(BT709, LIMITED)),
    "bt709_full": Kind(colours=(BT709, FULL)),
    "variable_rate": Kind(times=(0, 3, 6, 15, 45, 47, 49, 64, 124, 128)),
    "late_start": Kind(first=25),
    "open_gop": Kind(options={**WITH_B_FRAMES, "x264-params": "open-gop=1:keyint=5:scenecut=0"}),
    "mpeg4": Kind(codec="mpeg4", options={"qscale": "3"}),
    "odd_444": Kind(size=(23, 33), pixels="yuv444p"),
    "ten_bit": Kind(pixels="yuv420p10le", colours=(BT2020, LIMITED)),
    "odd_420": Kind(".webm", "libvpx-vp9", size=(23, 33), options={"crf": "20"}),
}


def frames_of(kind: Kind, salt: int) -> np.ndarray:
    """What a file of this kind is made of, uint8[COUNT, H, W, 3]."""
    video = make_video(COUNT, *kind.size, salt=salt).astype(int)
    noise = np.random.RandomState(salt).randint(-8, 9, video.shape)
    return (video + noise).clip(0, 255).astype(np.uint8)


def write_clip(path: Path, kind: Kind, salt: int) -> None:
    """Writes one file."""
    import av

    frames = frames_of(kind, salt)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(kind.codec, rate=10, options=dict(kind.options))
        stream.height, stream.width, stream.pix_fmt = *kind.size, kind.pixels
        if kind.times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 100)
        if kind.colours:
            stream.codec_context.colorspace, stream.codec_context.color_range = kind.colours
        for number, pixels in enumerate(frames):
            frame: Any = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if kind.colours:
                matrix, extent = kind.colours
                frame = frame.reformat(format=kind.pixels, dst_colorspace=matrix, dst_color_range=extent)
            frame.pts = kind.times[number] if kind.times else number + kind.first
            if kind.times:
                frame.time_base = Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
