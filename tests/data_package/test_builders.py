"""What is built from a folder and read back is what the reader gives."""

import json
import pickle
import subprocess
import sys

import grain
import numpy as np
import pytest

from helpers.dataset_layouts import write_layout
from virst_jax.data.builders.builder import build, built_folder, open_built, open_source
from virst_jax.data.datasets.registry import DATASETS, open_dataset
from virst_jax.data.samples import Question
from virst_jax.errors import UserError
from virst_jax.io import lock


def same(a, b):
    """Whether two samples are equal, pixels and masks included."""
    assert (a.name, a.num_frames, a.is_image) == (b.name, b.num_frames, b.is_image)
    every = range(a.num_frames)
    np.testing.assert_array_equal(a.read_frames(every), b.read_frames(every))
    if isinstance(a, Question):
        assert a.turns == b.turns
        return
    assert (a.size, a.expressions, a.frame_names) == (b.size, b.expressions, b.frame_names)
    assert (a.read_masks is None) == (b.read_masks is None)
    for position in range(len(a.expressions) if a.read_masks is not None else 0):
        np.testing.assert_array_equal(a.read_masks(position, every), b.read_masks(position, every))


@pytest.mark.parametrize("name", DATASETS)
def test_built_equals_read(tmp_path, name):
    write_layout(name, tmp_path / "official", num_videos=2, seed=4)
    for split in DATASETS[name].splits if name != "custom" else ("",):
        folder, report = build(name, tmp_path / "official", tmp_path / "built", split)
        assert report.dropped == ()
        assert any(folder.glob("*.array_record*"))
        official = open_dataset(name, tmp_path / "official", split)
        built = pickle.loads(pickle.dumps(open_built(name, tmp_path / "built", split)))
        assert len(built) == len(official) == 2
        for a, b in zip(official, built, strict=True):
            same(a, b)
        if name == "reasonseg":
            np.testing.assert_array_equal(built[0].read_masks.ignored(), official[0].read_masks.ignored())


def test_a_folder_is_read_as_it_is_or_as_built(tmp_path):
    write_layout("reasonvos", tmp_path / "official", num_videos=1, seed=0)
    build("reasonvos", tmp_path / "official", tmp_path / "built")
    sources = [open_source("reasonvos", tmp_path / folder, "test") for folder in ("official", "built")]
    assert [type(source).__name__ for source in sources] == ["IndexedSource", "BuiltSource"]
    same(sources[0][0], sources[1][0])


def test_built_and_official_folders_in_a_bucket(bucket, tmp_path):
    write_layout("reasonvos", tmp_path / "official", num_videos=1, seed=0)
    build("reasonvos", tmp_path / "official", tmp_path / "built")
    addresses = [bucket.put(tmp_path / name, name) for name in ("official", "built")]
    sources = [open_source("reasonvos", address, "test") for address in addresses]
    assert [type(source).__name__ for source in sources] == ["IndexedSource", "BuiltSource"]
    same(sources[0][0], sources[1][0])
    with pytest.raises(UserError, match="--out: gs://b/built is an address"):
        build("reasonvos", tmp_path / "official", "gs://b/built")


def test_the_order_is_kept_and_access_is_random(tmp_path):
    write_layout("lvvis", tmp_path, num_videos=12, seed=0)
    build("lvvis_train", tmp_path, tmp_path / "built")
    built = open_built("lvvis", tmp_path / "built")
    names = open_dataset("lvvis", tmp_path).names
    assert [built[i].name for i in (11, 0, 5)] == [names[11], names[0], names[5]]
    with pytest.raises(IndexError):
        built[12]
    with pytest.raises(UserError, match="frame 9 was asked for"):
        built[0].read_frames([9])
    shuffled = grain.MapDataset.source(built).shuffle(seed=1).map(lambda video: video.name)
    assert sorted(shuffled[i] for i in range(12)) == names


def test_faults_are_dropped_and_reported(tmp_path):
    write_layout("mevis", tmp_path, num_videos=3, seed=0)
    train = tmp_path / "mevis" / "train"
    frame = train / "JPEGImages" / "train_01" / "00010.jpg"
    frame.write_bytes(frame.read_bytes()[:-60])
    meta = json.loads((train / "meta_expressions.json").read_text())
    meta["videos"]["train_00"]["expressions"]["1"]["exp"] = ""
    (train / "meta_expressions.json").write_text(json.dumps(meta))
    masks = json.loads((train / "mask_dict.json").read_text())
    masks["8"][0]["size"] = [1, 1]
    (train / "mask_dict.json").write_text(json.dumps(masks))
    folder, report = build("mevis", tmp_path, tmp_path / "built", "train")
    built = open_built("mevis", tmp_path / "built", "train")
    assert [(v.name, [e.id for e in v.expressions]) for v in (built[0], built[1])] == [
        ("train_00", ["0", "2", "3"]),
        ("train_02", ["0", "1"]),
    ]
    written = json.loads((folder / "report.json").read_text())
    assert (written["kept_samples"], written["kept_expressions"]) == (2, 5)
    assert [p["dropped"] for p in written["problems"] if p["dropped"]] == [
        "expression 1 of train_00",
        "video train_01",
        "expression 2 of train_02",
        "expression 3 of train_02",
    ]
    assert str(frame) in {p["where"] for p in written["problems"]}
    assert report.kept_samples == 2


def test_building_twice_leaves_the_files_alone(tmp_path):
    write_layout("lvvis", tmp_path, num_videos=1, seed=0)
    folder, first = build("lvvis", tmp_path, tmp_path / "built")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again, second = build("lvvis", tmp_path, tmp_path / "built")
    assert (again, first.kept_samples, second) == (folder, 1, None)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_errors_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        build("mevis", tmp_path / "nothing", tmp_path / "built", "train")
    with pytest.raises(UserError, match="not built; run virst data build"):
        open_built("mevis", tmp_path / "built", "train")
    write_layout("mevis", tmp_path, num_videos=1, seed=0)
    folder, _ = build("mevis", tmp_path, tmp_path / "built", "train")
    with pytest.raises(UserError, match="--dataset mevis --split valid --out"):
        open_built("mevis", tmp_path / "built", "valid")
    (path,) = folder.glob("*.array_record*")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"build it again"):
        open_built("mevis", tmp_path / "built", "train")[0]
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        open_built("mevis", tmp_path / "built", "train")


def test_an_interrupted_build_leaves_nothing_that_counts(tmp_path, monkeypatch):
    write_layout("lvvis", tmp_path, num_videos=3, seed=0)

    def stop(sample):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("virst_jax.data.builders.builder.encode_sample", stop)
        with pytest.raises(KeyboardInterrupt):
            build("lvvis", tmp_path, tmp_path / "built")
    with pytest.raises(UserError, match="not built"):
        open_built("lvvis", tmp_path / "built")
    build("lvvis", tmp_path, tmp_path / "built")
    assert len(open_built("lvvis", tmp_path / "built")) == 3


def test_a_full_disk_takes_one_line_and_leaves_nothing_that_counts(tmp_path):
    """Files cannot grow beyond 16 KiB; array_record is told of it as of a full disk."""
    write_layout("lvvis", tmp_path, num_videos=3, seed=0)
    left = built_folder("lvvis", "train", tmp_path / "built").parent / "incomplete.of_a_killed_build"
    left.mkdir(parents=True)
    (left / "part").write_text("")
    code = "import sys; from virst_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["data", "build", str(tmp_path), "--dataset", "lvvis", "--out", str(tmp_path / "built")]
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384)); {code}"
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot be written (File too large); free disk space or choose another folder" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")  # no bar before it on the line, or behind it
    assert "Traceback" not in done.stderr
    assert not list(left.parent.iterdir())
    with pytest.raises(UserError, match="not built"):
        open_built("lvvis", tmp_path / "built")
    build("lvvis", tmp_path, tmp_path / "built")
    assert len(open_built("lvvis", tmp_path / "built")) == 3


def test_two_builds_into_one_folder(tmp_path):
    write_layout("lvvis", tmp_path, num_videos=1, seed=0)
    folder = built_folder("lvvis", "train", tmp_path / "built")
    with lock.exclusive(folder.parent), pytest.raises(UserError, match="another run is at work here"):
        build("lvvis", tmp_path, tmp_path / "built")
    build("lvvis", tmp_path, tmp_path / "built")


def test_tensorflow_is_not_needed():
    assert "tensorflow" not in sys.modules
