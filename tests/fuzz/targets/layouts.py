"""JSON files of every data set's layout, with changed values and changed bytes."""

import atexit
import contextlib
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz.mutate import byte_edits, edit_bytes, edit_json, json_edits
from fuzz.target import Target
from helpers.dataset_layouts import write_layout
from virst_jax.data.datasets.registry import DATASETS, open_dataset
from virst_jax.data.datasets.validate import check
from virst_jax.errors import UserError

_FOLDERS = contextlib.ExitStack()
atexit.register(_FOLDERS.close)


@functools.cache
def layout(name: str) -> tuple[Path, dict[Path, bytes]]:
    """The folder of a small data set, and its JSON files."""
    root = Path(_FOLDERS.enter_context(tempfile.TemporaryDirectory(prefix="virst_fuzz_")))
    write_layout(name, root, num_videos=1, seed=1)
    files = {path: path.read_bytes() for path in sorted(root.rglob("*.json"))}
    return root, files


def read(name: str, case: tuple[int, Any, Any]) -> int:
    """Opens all splits of a data set of which one file is changed, and reads everything."""
    number, edits, bytes_ = case
    root, files = layout(name)
    path = list(files)[number % len(files)]
    content = files[path]
    if edits:
        content = json.dumps(edit_json(json.loads(content), edits)).encode()
    if bytes_:
        content = edit_bytes(content, bytes_)
    path.write_bytes(content)
    kept, opened, errors = 0, 0, []
    try:
        for split in DATASETS[name].splits:
            try:
                source = open_dataset(name, root, split)
                report = check(source, workers=1)
            except UserError as error:
                errors.append(error)
                continue
            for problem in report.problems:
                str(problem).encode()
            kept += report.kept_expressions
            opened += 1
    finally:
        path.write_bytes(files[path])
    if not opened:
        raise errors[0]
    return kept


def reader(name: str) -> Callable[[Any], int]:
    return functools.partial(read, name)


CASES = st.one_of(
    st.tuples(st.integers(0, 9), json_edits, st.none()),
    st.tuples(st.integers(0, 9), st.none(), byte_edits),
)
WITH_JSON = [name for name in DATASETS if name not in ("ade20k", "cocostuff")]
TARGETS = [Target(f"layout_{name}", CASES, reader(name), cost=2) for name in WITH_JSON]
