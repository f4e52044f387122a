"""A model folder that several processes write together, and one in a bucket that Orbax does not write to."""

import jax
import numpy as np
import pytest

from helpers.places import PROGRAMS
from helpers.process_cases import Group
from virst_jax.api import EMBEDDED
from virst_jax.errors import UserError
from virst_jax.io import atomic, buckets, digests, model_folder, remote
from virst_jax.io.model_folder import PARAMS, is_whole, load_model, named, save_folder


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.heavy)])
def test_a_folder_written_by_two_processes_is_whole(tmp_path, killed):
    folder = tmp_path / "models" / "model"
    with Group(tmp_path / "killed", 2, [PROGRAMS / "export.py", folder, killed]) as group:
        assert 0 not in group.wait(90)
    assert not folder.exists()
    with Group(tmp_path / "again", 2, [PROGRAMS / "export.py", folder]) as group:
        group.until("exported", 0)
        group.until("exported", 1)
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]
    cfg, ours = load_model(folder)
    _, theirs = load_model(EMBEDDED["tiny"])
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_folder_is_sent_with_its_digests_last(make_bucket, monkeypatch):
    """What cannot be sent is one line, and what was sent before is removed the next time."""
    folder = buckets.place(f"{make_bucket('s3').address}/model")
    params = {"a": {"kernel": jax.numpy.arange(6.0).reshape(2, 3)}, "b": np.arange(3, dtype=np.int8)}

    def describe(part, written):
        assert written is params
        atomic.write_text(part / model_folder.CONFIG, "{}")
        digests.write(part, named(params), (model_folder.CONFIG, PARAMS))

    put = buckets.put

    def refuse(source, target):
        if source.name == digests.FILE:
            raise PermissionError("Access Denied")
        put(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(buckets, "put", refuse)
        with pytest.raises(UserError, match=rf"{folder}: cannot be written \(Access Denied\); check the address, the"):
            save_folder(folder, params, describe)
    assert (folder / model_folder.CONFIG).is_file()
    assert not is_whole(folder)
    (folder / PARAMS / "old").write_text("of another network")
    save_folder(folder, params, describe)
    assert is_whole(folder)
    copy = remote.fetch(folder)
    assert not (copy / PARAMS / "old").exists()
    stated = digests.read(copy)
    assert digests.check_files(copy, stated) >= 1 + 2 * len(params)
    with model_folder.open_reader() as reader:
        stored = reader.restore(copy / PARAMS)
    jax.tree.map(np.testing.assert_array_equal, stored, params)
    assert digests.check_tensors(copy, stated, named(stored)) == len(params)
