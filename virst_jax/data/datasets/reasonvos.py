"""ReasonVOS (VideoLISA's benchmark, 458 expressions, evaluation only).

ReasonVOS/
  JPEGImages/VIDEO/FRAME.jpg
  meta_expressions.json                       {"videos": {VIDEO: {"source": text, "frames": [FRAME], "expressions":
                                              [{"exp_id", "obj_id", "exp_text", "is_sent"}]}}}
  Annotations/{source}_{VIDEO}_{obj_id}/FRAME.png   not 0: the object
"""

from functools import partial
from pathlib import Path

from virst_jax.data.datasets.files import find_folder, first_file
from virst_jax.data.datasets.layout import Entry, Layout, VideoRecord, index_videos, read_videos
from virst_jax.data.datasets.readers import BinaryMasks, find_frames
from virst_jax.data.datasets.source import IndexedSource, Problem
from virst_jax.data.samples import Video
from virst_jax.errors import UserError
from virst_jax.io.names import check_name

SPLITS = ("test",)
_VIDEO_KEYS = frozenset({"source", "frames", "expressions", "is_sent", "height", "width"})
_EXPRESSION_KEYS = frozenset({"exp_id", "obj_id", "exp_text", "is_sent"})


def open_reasonvos(root: Path, split: str) -> IndexedSource:
    """ReasonVOS; an expression's category is "sentence" or "phrase". Raises UserError: not in this layout."""
    folder = find_folder(root, ("ReasonVOS", "reasonvos"), ("meta_expressions.json",))
    meta = first_file(folder, ("meta_expressions.json",))
    layout = Layout(
        _mask_folder, _VIDEO_KEYS, _EXPRESSION_KEYS, text="exp_text", listed="exp_id", category=_sentence_or_phrase
    )
    problems: list[Problem] = []
    records = index_videos(read_videos(meta), layout, problems)
    return IndexedSource("reasonvos", split, str(folder), records, partial(_video, folder), tuple(problems))


def _mask_folder(entry: Entry) -> str:
    """The folder of an expression's masks below Annotations."""
    if "source" not in entry.video_fields:
        raise UserError(f'{entry.video_fields.where}: has no "source"; not in ReasonVOS layout')
    source = entry.video_fields["source"].text()
    name = f"{source}_{entry.video}_{entry.fields['obj_id'].identifier()}"
    return check_name(name, f"{entry.fields.where}: the folder of its masks,", nested=True)


def _sentence_or_phrase(entry: Entry) -> str:
    stated = entry.fields["is_sent"] if "is_sent" in entry.fields else entry.video_fields["is_sent"]
    return "sentence" if stated.value is not None and stated.boolean() else "phrase"


def _video(folder: Path, record: VideoRecord) -> Video:
    frames = find_frames(folder / "JPEGImages", record.name, record.frames)
    size = frames.size()
    masks = BinaryMasks(tuple(str(folder / "Annotations" / f) for f in record.targets), frames.names, size)
    return Video(record.name, len(record.frames), size, record.expressions, frames, masks, frames.names)
