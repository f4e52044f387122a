"""ReasonVOS (VideoLISA's benchmark, 458 expressions, evaluation only).

ReasonVOS/
  JPEGImages/VIDEO/FRAME.jpg
  meta_expressions.json                       {"videos": {VIDEO: {"source": text, "frames": [FRAME], "expressions":
                                              [{"exp_id", "obj_id", "exp_text", "is_sent"}]}}}
  Annotations/{source}_{VIDEO}_{obj_id}/FRAME.png   not 0: the object
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from virst_jax.data.datasets.files import find_folder, first_file, read_videos
from virst_jax.data.datasets.mevis import parse_frames, parse_text
from virst_jax.data.datasets.readers import BinaryMasks, FrameFiles
from virst_jax.data.datasets.source import IndexedSource, Problem, unknown_keys
from virst_jax.data.samples import Expression, Video
from virst_jax.errors import UserError

SPLITS = ("test",)
_VIDEO_KEYS = frozenset({"source", "frames", "expressions", "is_sent", "height", "width"})
_EXPRESSION_KEYS = frozenset({"exp_id", "obj_id", "exp_text", "is_sent"})


@dataclass(frozen=True)
class _Record:
    name: str
    frames: tuple[str, ...]
    expressions: tuple[Expression, ...]
    folders: tuple[str, ...]  # of masks, per expression


def open_reasonvos(root: Path, split: str) -> IndexedSource:
    """ReasonVOS; an expression's category is "sentence" or "phrase". Raises UserError: not in this layout."""
    folder = find_folder(root, ("ReasonVOS", "reasonvos"), ("meta_expressions.json",))
    meta = first_file(folder, ("meta_expressions.json",))
    problems: list[Problem] = []
    records = []
    for video, entry in read_videos(meta).items():
        frames = parse_frames(meta, video, entry, problems)
        if frames is None:
            continue
        problems += unknown_keys(entry, _VIDEO_KEYS, f"{meta}: {video}")
        if not isinstance(entry.get("expressions"), list) or "source" not in entry:
            raise UserError(f'{meta}: video {video} lacks "source" or a list of "expressions"; not ReasonVOS layout')
        expressions: list[Expression] = []
        folders: list[str] = []
        for fields in entry["expressions"]:
            exp_id = str(fields.get("exp_id", len(expressions)))
            where = f"{meta}: {video}, expression {exp_id}"
            problems += unknown_keys(fields, _EXPRESSION_KEYS, where)
            text = parse_text(where, fields.get("exp_text"), f"expression {exp_id} of {video}", problems)
            if text is not None:
                is_sentence = fields.get("is_sent", entry.get("is_sent"))
                expressions.append(Expression(text, exp_id, "sentence" if is_sentence else "phrase"))
                folders.append(f"{entry['source']}_{video}_{fields.get('obj_id')}")
        if expressions:
            records.append(_Record(video, frames, tuple(expressions), tuple(folders)))
        else:
            problems.append(Problem(f"{meta}: {video}", "no expression is left", f"video {video}"))
    return IndexedSource("reasonvos", split, str(folder), tuple(records), partial(_video, folder), tuple(problems))


def _video(folder: Path, record: _Record) -> Video:
    frames = FrameFiles(str(folder / "JPEGImages" / record.name), record.frames)
    size = frames.size()
    masks = BinaryMasks(tuple(str(folder / "Annotations" / f) for f in record.folders), record.frames, size)
    return Video(record.name, len(record.frames), size, record.expressions, frames, masks, record.frames)
