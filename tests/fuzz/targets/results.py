"""What an evaluation has written and reads again, and archives for a server."""

import atexit
import contextlib
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fuzz.mutate import byte_edits, edit_bytes, edit_json, json_edits
from fuzz.target import Target
from helpers.dataset_layouts import write_layout
from helpers.evaluation_cases import SETTINGS, predict_truth
from virst_jax.data.datasets.registry import open_dataset
from virst_jax.errors import UserError
from virst_jax.evaluation.predictions import StoredReader
from virst_jax.evaluation.runner import evaluate, read_scores
from virst_jax.evaluation.submission import check_submission, write_submission

_FOLDERS = contextlib.ExitStack()
atexit.register(_FOLDERS.close)


@functools.cache
def evaluated() -> tuple[Any, Path, dict[Path, bytes]]:
    """A data set, the folder of its evaluation, and the files in it."""
    root = Path(_FOLDERS.enter_context(tempfile.TemporaryDirectory(prefix="virst_fuzz_")))
    write_layout("mevis", root / "data", num_videos=1, seed=1)
    source = open_dataset("mevis", root / "data")
    evaluate(source, predict_truth, root / "out", SETTINGS, progress=False)
    write_submission(source, StoredReader(str(root / "out/masks")), root / "good.zip", progress=False)
    return source, root, {path: path.read_bytes() for path in sorted((root / "out").rglob("*.json"))}


def read_results(case: tuple[int, Any, Any]) -> None:
    """One file of an evaluation is changed; the evaluation goes on, and scores what there is."""
    number, edits, bytes_ = case
    source, root, files = evaluated()
    path = list(files)[number % len(files)]
    content = json.dumps(edit_json(json.loads(files[path]), edits)).encode() if edits else files[path]
    path.write_bytes(edit_bytes(content, bytes_) if bytes_ else content)
    try:
        read_scores(root / "out", source.names[0])
        reader, video = StoredReader(str(root / "out/masks")), source[0]
        for position in range(len(video.expressions)):
            with contextlib.suppress(UserError):
                assert reader(video, position, [0, 1]).dtype == np.uint64
        outcome = evaluate(source, predict_truth, root / "out", SETTINGS, progress=False)
        assert outcome.finished == 1
    finally:
        for name, good in files.items():
            name.write_bytes(good)


def read_archive(edits: Any) -> int:
    source, root, _ = evaluated()
    path = root / "changed.zip"
    path.write_bytes(edit_bytes((root / "good.zip").read_bytes(), edits))
    return check_submission(source, path, progress=False)


CASES = st.one_of(
    st.tuples(st.integers(0, 9), json_edits, st.none()), st.tuples(st.integers(0, 9), st.none(), byte_edits)
)
TARGETS = [
    Target("results", CASES, read_results, cost=3),
    Target("results_archive", byte_edits, read_archive),
]
