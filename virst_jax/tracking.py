"""SAM 2.1 alone, without language model: `load_tracker` loads one, and a session tracks what a person points at."""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax

from virst_jax.api import DTYPES, ImageLike, VideoLike
from virst_jax.config import Compute, Sam2Config, TrackerConfig
from virst_jax.errors import UserError
from virst_jax.inference.automatic import AutomaticOptions, ImageMask, Progress, find_masks
from virst_jax.inference.placement import Context, find_placement, keep_compiled
from virst_jax.inference.plan import call_sizes
from virst_jax.inference.resizing import HOST, check_place
from virst_jax.inference.session import BUDGET, HOST_BUDGET, Session
from virst_jax.inference.tracker_steps import TrackerNetwork, TrackerSteps
from virst_jax.io import arrays, tracker_folder
from virst_jax.io.video import open_video
from virst_jax.types import PyTree

__all__ = ["AutomaticOptions", "ImageMask", "Session", "TrackerModel", "load_tracker"]


def load_tracker(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    device: str | jax.Device | None = None,
    compilation_cache: bool | str | os.PathLike[str] = True,
    check: bool = True,
    resize: str = HOST,
) -> "TrackerModel":
    """Loads a tracker.

    Args:
      path: a folder that `virst convert --sam2 FILE.pt --out DIR` wrote.
      dtype: of parameters and activations, "float32" or "bfloat16"; None: parameters as stored, activations bfloat16 on
        accelerators if the parameters are, and float32 on CPUs.
      mesh, device, compilation_cache, check, resize: as of `virst_jax.load`.

    Raises:
      UserError: no such folder or device, an unknown place to resize, or a broken folder.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"a tracker is loaded from a folder, not from {type(path).__name__} {path!r}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: choose {' or '.join(DTYPES)}")
    check_place(resize)
    folder = Path(path)
    shardings, context = find_placement(TrackerConfig(sam2=tracker_folder.read_config(folder)), mesh, device)
    if shardings is not None:
        shardings = shardings["sam2"]
    keep_compiled(compilation_cache)
    cfg, params = tracker_folder.load_tracker(folder, dtype, shardings, check=check)
    return TrackerModel(cfg, params, name=str(path), dtype=dtype, context=context, resize=resize)


class TrackerModel:
    """SAM 2.1 for videos and images. `load_tracker` makes one.

    Args:
      cfg, params: of `Sam2`.
      name: for reports.
      dtype: of the activations; None: on accelerators that of the parameters, on CPUs float32.
      context: entered around every step of the network.
      batch: frames that are encoded at a time; None: 1 on CPUs, else 4.
      group_size: objects that are tracked in one call, a power of two; None: 1 on CPUs, else 8.
      resize: as of `virst_jax.load`.
    """

    def __init__(
        self,
        cfg: Sam2Config,
        params: PyTree,
        *,
        name: str = "tracker",
        dtype: str | None = None,
        context: Context | None = None,
        batch: int | None = None,
        group_size: int | None = None,
        resize: str = HOST,
    ):
        # the prompt encoder keeps float32, so another part tells
        kernel: Any = params["no_memory_embed"]
        on_cpu = all(device.platform == "cpu" for device in kernel.devices())
        if dtype is None:
            dtype = "float32" if on_cpu else str(kernel.dtype)
        self.cfg, self.name, self.dtype = cfg, name, dtype
        self.batch, self.group_size = call_sizes(on_cpu, batch, group_size)
        steps = TrackerSteps(cfg, Compute(dtype=dtype, param_dtype=str(kernel.dtype)))
        self.network = TrackerNetwork(steps, params, context or contextlib.nullcontext, resize)

    def __repr__(self) -> str:
        count = sum(x.size for x in jax.tree.leaves(self.network.tracker_params))
        return f"TrackerModel({self.name!r}, {count / 1e6:,.1f} M parameters, {self.dtype})"

    def session(
        self,
        video: VideoLike,
        *,
        fps: float | None = None,
        exclusive: bool = False,
        budget: int = BUDGET,
        host_budget: int = HOST_BUDGET,
    ) -> Session:
        """Begins a session on a video: objects by clicks, boxes and masks, corrected on any frame.

            session = tracker.session("dog.mp4")
            session.add_points(1, 0, [(120, 340)])
            for frame in session.propagate():
                frame.index, frame.object_ids, frame.masks

        Args:
          video, fps: as of `Model.segment`.
          exclusive: masks of different objects do not overlap.
          budget, host_budget: as of `Model.session`.

        Raises:
          UserError: a video that cannot be read.
        """
        reader = open_video(video, fps=fps)
        return Session(
            self.network,
            reader,
            exclusive=exclusive,
            budget=budget,
            host_budget=host_budget,
            batch=self.batch,
            group_size=self.group_size,
        )

    def image_session(self, image: ImageLike, *, exclusive: bool = False) -> Session:
        """As `session`, of one image: a file, an array [H, W, 3] or a PIL image. Its frame has number 0.

        Raises:
          UserError: an image that cannot be read.
        """
        video = image if isinstance(image, (str, os.PathLike)) else arrays.to_image(image)[None]
        session = self.session(video, exclusive=exclusive)
        if session.num_frames != 1:
            raise UserError(
                f"{session.reader.name}: {session.num_frames} frames where one image is wanted; use session"
            )
        return session

    def find_masks(
        self, image: ImageLike, options: AutomaticOptions | None = None, progress: Progress | None = None
    ) -> list[ImageMask]:
        """Masks of everything in an image, the surest first; nothing need be pointed at.

        Args:
          image: a file, an array [H, W, 3] (also [3, H, W], grey or RGBA) or a PIL image.
          options: of the grid of clicks and of the filters.
          progress: called with "masks", how many clicks are done, and of how many.

        Raises:
          UserError: an image that cannot be read, or an option out of range.
        """
        (options := options or AutomaticOptions()).check()
        reader = self.image_session(image).reader
        (pixels,) = reader.pick([0])
        return find_masks(self.network, pixels, options, progress)
