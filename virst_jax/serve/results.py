"""The masks of a session as files to download."""

import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from virst_jax.errors import UserError
from virst_jax.io import exports, visualize
from virst_jax.io.masks import decode_mask
from virst_jax.io.video import VideoWriter
from virst_jax.serve.limits import Refusal
from virst_jax.serve.served_session import ServedSession, View

OVERLAY = "overlay"  # the video with the masks in colours
ALL = "all"  # every format, a folder each
FORMATS = (*exports.FORMATS, OVERLAY)
_STORED = (".png", ".webm", ".mp4")  # compressed already


def color_of(object_id: int) -> tuple[int, int, int]:
    """The colour of an object, on the page and in the overlay."""
    return visualize.color(object_id - 1)


def write_zip(session: ServedSession, view: View, kind: str) -> Path:
    """The masks of a view in one of FORMATS, or in all of them, as a new file in the session's folder.

    Raises:
      UserError: an unknown format, nothing to write, or what `exports.export` raises.
    """
    if kind not in (*FORMATS, ALL):
        raise Refusal(f"unknown format {kind!r}: choose {', '.join((*FORMATS, ALL))}", 404)
    if not view.objects:
        raise Refusal("there is nothing to save yet; add a sentence, a click or a box", 409)
    masks, kinds = mask_set(session, view), FORMATS if kind == ALL else (kind,)
    folder = Path(tempfile.mkdtemp(prefix="export-", dir=session.upload.folder))
    try:
        for name in kinds:
            # a reader of our own: the worker reads the session's at the same time
            video = session.upload.open(session.limits)
            if name == OVERLAY:
                _write_overlay(masks, folder / name, video)
            else:
                exports.export(name, masks, folder / name, video)
        file = folder / "masks.zip"
        root = folder if kind == ALL else folder / kind
        with zipfile.ZipFile(file, "w", compresslevel=1) as archive:
            for path in sorted(root.rglob("*")):
                if path.is_file() and path != file:
                    how = zipfile.ZIP_STORED if path.suffix in _STORED else zipfile.ZIP_DEFLATED
                    archive.write(path, path.relative_to(root), how)
        return file
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def mask_set(session: ServedSession, view: View) -> exports.MaskSet:
    """As `virst_jax.io.exports` writes it; frames to which an object was not tracked show nothing of it."""
    reader = session.ready
    height, width = reader.size

    def masks(frame: int) -> np.ndarray:
        found = view.frames.get(frame, {})
        out = np.zeros((len(view.objects), height, width), bool)
        for row, object_id in enumerate(view.object_ids):
            if object_id in found:
                code = {"size": [height, width], "counts": found[object_id].counts}
                out[row] = decode_mask(code, (height, width), f"object {object_id}")
        return out

    return exports.MaskSet(
        session.upload.stem,
        [x.label for x in view.objects],
        list(view.object_ids),
        list(reader.frame_names),
        (height, width),
        reader.fps,
        session.times,
        [view.scores(object_id, reader.num_frames) for object_id in view.object_ids],
        masks,
    )


def _write_overlay(masks: exports.MaskSet, out: Path, video: exports.Reader) -> None:
    """OUT/NAME.mp4: the video with the objects in their colours, and a legend."""
    out.mkdir()
    colors = [color_of(object_id) for object_id in masks.object_ids]
    strip = _legend(masks)
    size = (masks.size[0] + len(strip), masks.size[1])
    with VideoWriter(out / f"{masks.name}.mp4", size, masks.fps, video.format) as writer:
        for frame, pixels in enumerate(video):
            if frame >= len(masks.frame_names):
                raise UserError(f"{video.name}: has more frames than before; upload it again")
            painted = visualize.overlay(pixels, masks.masks(frame), colors=colors)
            writer.write(np.concatenate([painted, strip]), None if masks.times is None else masks.times[frame])


def _legend(masks: exports.MaskSet) -> np.ndarray:
    """A strip for each object: their numbers, and so their colours, may have gaps."""
    rows = [visualize.legend([label], masks.size[1], first=i - 1) for label, i in zip(masks.labels, masks.object_ids)]
    return np.concatenate(rows)
