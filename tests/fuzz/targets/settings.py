"""What a run keeps and reads again, configs of networks, and settings of recipes."""

import contextlib
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fuzz.mutate import ODD, byte_edits, edit_bytes, edit_json, json_edits
from fuzz.target import Target
from virst_jax.commands import config_file, segment_results
from virst_jax.config import from_json, get_preset, to_json
from virst_jax.errors import UserError
from virst_jax.io import atomic, digests, exports, result_folder
from virst_jax.io.json_files import Json
from virst_jax.io.npz import read_npz

STATE = {
    "next": np.array(3),
    "0.count": np.array(2),
    "0.bank.0": np.zeros((2, 3, 4), np.float32),
    "scores": np.ones((2, 3)),
}
RECORD: dict[str, Any] = {
    "areas": [3, 0],
    "boxes": [[0, 0, 1, 3], None],
    "rle": [{"size": [4, 4], "counts": "03="}] * 2,
}
RECORD |= {"scores": [1.5, -2.0], "folder": "01-x", "expression": "x"}
RESULT = {"expressions": ["x"], "frames": [0, 1], "frame_names": ["0", "1"], "objects": [RECORD], "notes": []}
RESULT |= {"size": {"height": 4, "width": 4}, "fps": 5.0, "times": [0.0, 0.2], "video": {"path": "a.mp4"}}
DIGESTS = {"tensors": {"a/b": "00"}, "files": {"config.json": "00"}}


@contextlib.contextmanager
def _file(content: bytes) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / digests.FILE
        path.write_bytes(content)
        yield path


def _edited(value: Any, case: tuple[Any, Any]) -> bytes:
    edits, bytes_ = case
    content = json.dumps(edit_json(value, edits) if edits else value).encode()
    return edit_bytes(content, bytes_) if bytes_ else content


def read_state(edits: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tracker.npz"
        atomic.write_npz(path, STATE)
        path.write_bytes(edit_bytes(path.read_bytes(), edits))
        return sum(array.nbytes for array in read_npz(path, "begin again").values())


def read_result(case: tuple[Any, Any]) -> bool:
    with _file(_edited(RESULT, case)) as path:
        result = result_folder.read_whole(path)
        if result is None:
            raise UserError("no result")
        segment_results.is_there(path.parent, result)
        segment_results.findings(result)
        out = path.parent / "a" / "b"
        out.parent.mkdir()
        exports.export("png-ids", result_folder.mask_set(Json(result, "result.json")), out)
        assert all(x in (path, out.parent, out) or x.parent == out for x in path.parent.rglob("*")), "left its folder"
    return True


def read_digests(case: tuple[Any, Any]) -> None:
    with _file(_edited(DIGESTS, case)) as path:
        stated = digests.read(path.parent)
        assert stated is not None
        digests.check_files(path.parent, stated)


def read_config(case: tuple[Any, Any]) -> str:
    return to_json(from_json(_edited(json.loads(to_json(get_preset("tiny"))), case).decode("utf-8", "replace"), "x"))


@functools.cache
def recipe() -> Any:
    return config_file.load("synthetic")


def change_recipe(case: tuple[list[int], str]) -> None:
    way, text = case
    at, keys = recipe(), []
    for step in way:
        if not hasattr(at, "keys") or not at:
            break
        keys.append(list(at)[step % len(at)])
        at = at[keys[-1]]
    config_file.change(recipe().copy_and_resolve_references(), [f"--config.{'.'.join(keys)}={text}"])


JSON_CASES = st.one_of(st.tuples(json_edits, st.none()), st.tuples(st.none(), byte_edits))
TEXTS = st.one_of(
    st.text(max_size=20), ODD.map(str).map(lambda text: text[:300]), st.sampled_from(["(1,", "[", "None"])
)
TARGETS = [
    Target("settings_state", byte_edits, read_state),
    Target("settings_result", JSON_CASES, read_result),
    Target("settings_digests", JSON_CASES, read_digests),
    Target("settings_config", JSON_CASES, read_config),
    Target(
        "settings_recipe", st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=4), TEXTS), change_recipe, cost=2
    ),
]
