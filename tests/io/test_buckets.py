"""Writing to buckets: whole files, copies of folders, and the lock of a run, in stores on this machine."""

import contextlib
import threading
import time

import numpy as np
import pytest

from virst_jax.errors import UserError
from virst_jax.io import atomic, buckets, lock


def test_files_are_written_whole(bucket):
    file = buckets.place(f"{bucket.address}/runs/a.json")
    atomic.write_json(file, {"a": 1}, indent=None)
    assert file.read_text() == '{"a": 1}\n'
    atomic.write_bytes(str(file), b"{}", parents=True)
    assert bucket.files() == {"runs/a.json": b"{}"}
    with contextlib.suppress(RuntimeError), atomic.new_file(file) as part:
        part.write(b"half")
        raise RuntimeError
    assert bucket.files() == {"runs/a.json": b"{}"}
    atomic.write_npz(f"{bucket.address}/b.npz", {"x": np.arange(3)})
    with (buckets.place(bucket.address) / "b.npz").open("rb") as stored:
        assert np.load(stored)["x"].tolist() == [0, 1, 2]


def test_a_bucket_that_is_not_there(bucket):
    with pytest.raises(atomic.WriteError, match=f"{bucket.address}-gone/file: cannot be written"):
        atomic.write_bytes(f"{bucket.address}-gone/file", b"1")


def test_a_folder_is_removed(bucket):
    for name in ("runs/model/params/d/0", "runs/model/config.json", "runs/models"):
        bucket.system.pipe_file(f"{bucket.name}/{name}", b"0")
    for _ in range(2):
        buckets.remove(f"{bucket.address}/runs/model")
        assert set(bucket.files()) == {"runs/models"}
    assert [str(file) for file in buckets.files_below(buckets.place(f"{bucket.address}/runs"))] == [
        f"{bucket.address}/runs/models"
    ]


def test_the_size_of_a_folder(bucket):
    for name, content in (("runs/a", b"123"), ("runs/b/c", b"45"), ("runs2", b"6")):
        bucket.system.pipe_file(f"{bucket.name}/{name}", content)
    assert buckets.size_below(f"{bucket.address}/runs") == 5
    assert buckets.size_below(f"{bucket.address}/none") == 0


def test_two_mirrors_of_a_folder(bucket):
    """What one adds, changes and removes, the other sees; parts of files that are being written stay here."""
    one, two = (buckets.Mirror(f"{bucket.address}/runs/eval") for _ in range(2))
    (one.folder / "masks").mkdir()
    (one.folder / "masks" / "a.json").write_text("1")
    (one.folder / ".b.json.part").write_text("half")
    one.push()
    assert set(bucket.files()) == {"runs/eval/masks/a.json"}
    two.pull()
    assert (two.folder / "masks" / "a.json").read_text() == "1"
    (two.folder / "masks" / "a.json").write_text("22")
    (two.folder / "c.json").write_text("3")
    two.push()
    one.pull()
    assert (one.folder / "masks" / "a.json").read_text() == "22"
    (one.folder / "c.json").unlink()
    one.push()
    two.pull()
    assert not (two.folder / "c.json").exists()
    assert set(bucket.files()) == {"runs/eval/masks/a.json"}
    one.close()
    assert not one.folder.exists()


def test_parts_of_a_folder_are_mirrored(bucket):
    bucket.system.pipe_file(f"{bucket.name}/stage/checkpoints/2/large", b"0")
    bucket.system.pipe_file(f"{bucket.name}/stage/metrics.csv", b"step")
    mirror = buckets.Mirror(f"{bucket.address}/stage", ("metrics.csv",))
    mirror.pull()
    (mirror.folder / "other").write_text("")
    mirror.push()
    assert [file.name for file in mirror.folder.rglob("*")] != ["large"]
    assert not (mirror.folder / "checkpoints").exists()
    assert set(bucket.files()) == {"stage/checkpoints/2/large", "stage/metrics.csv"}


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in (("BEAT", 0.2), ("SILENCE", 2.0), ("SETTLE", 0.2)):
        monkeypatch.setattr(buckets, name, seconds)


def test_one_run_at_a_time(bucket, quick):
    folder = buckets.place(f"{bucket.address}/runs/a")
    with lock.exclusive(folder):
        with pytest.raises(UserError, match=r"runs/a: another run is at work here \(process \d+ on"):
            lock.exclusive(folder).__enter__()
        assert set(bucket.files()) == {"runs/a/.lock"}
    assert not bucket.files()
    with lock.exclusive(folder):
        pass


def test_the_lock_of_a_killed_run_is_taken_over(bucket, quick):
    bucket.system.pipe_file(f"{bucket.name}/a/.lock", b"process 1 on host\n0 1\n")
    since = time.monotonic()
    with lock.exclusive(f"{bucket.address}/a"):
        assert time.monotonic() - since > buckets.SILENCE


def test_two_runs_that_begin_at_once(bucket, quick):
    entered, refused = [], []

    def run():
        try:
            with lock.exclusive(f"{bucket.address}/a"):
                entered.append(1)
                time.sleep(1)
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(entered), len(refused)) == (1, 1)
