import errno
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from virst_jax.errors import UserError
from virst_jax.io import atomic, lock


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    atomic.write_json(path, {"a": 1})
    writing = atomic.new_file(path)
    writing.__enter__().write(b"half")
    assert names(tmp_path) == [".a.json.part", "a.json"]
    assert not writing.__exit__(RuntimeError, RuntimeError("stop"), None)
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert names(tmp_path) == ["a.json"]
    atomic.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    atomic.write_npz(tmp_path / "b.npz", {"x": np.arange(3)})
    atomic.write_npy(tmp_path / "c.npy", np.arange(3))
    assert np.load(tmp_path / "b.npz")["x"].tolist() == np.load(tmp_path / "c.npy").tolist() == [0, 1, 2]
    with atomic.new_path(tmp_path / "d") as beside:
        beside.write_bytes(b"by name")
    assert (tmp_path / "d").read_bytes() == b"by name"
    assert names(tmp_path) == ["a.json", "b.npz", "c.npy", "d"]


def test_the_disk_holds_a_file_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(atomic.os, "fsync", lambda fd: (done.append("fsync"), sync(fd))[1])
    monkeypatch.setattr(atomic.os, "replace", lambda a, b: (done.append("rename"), replace(a, b))[1])
    atomic.write_bytes(tmp_path / "a", b"1")
    assert done == ["fsync", "rename", "fsync"]  # the file, its name, the folder
    done.clear()
    atomic.write_bytes(tmp_path / "a", b"1", durable=False)
    assert done == ["rename"]


def test_a_lone_surrogate_is_written_as_json_can_read_it(tmp_path):
    import json

    atomic.write_text(tmp_path / "a.json", json.dumps("x\udc80é", ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text()) == "x\udc80é"


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "above" / "model"
    writing = atomic.new_folder(path)
    (writing.__enter__() / "x").write_text("1")
    assert not writing.__exit__(RuntimeError, RuntimeError("stop"), None)
    assert names(path.parent) == []
    with atomic.new_folder(path) as part:
        (part / "x").write_text("2")
        assert names(path.parent) == [".model.part"]
    assert (path / "x").read_text() == "2"
    assert names(path.parent) == ["model"]
    with pytest.raises(UserError, match="exists already"), atomic.new_folder(path):
        pass


def test_what_a_killed_process_left_goes_away(tmp_path):
    code = """
import sys, time
from pathlib import Path
from virst_jax.io import atomic
with atomic.new_folder(sys.argv[1] + "/folder") as part, atomic.new_file(sys.argv[1] + "/file") as file:
    (part / "x").write_text("old")
    file.write(b"old"); file.flush()
    print("ready", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    assert names(tmp_path) == [".file.part", ".folder.part"]
    assert atomic.remove_leftovers(tmp_path) == []  # it is still at work
    atomic.write_bytes(tmp_path / "file", b"beside it")
    assert names(tmp_path) == [".file.part", ".folder.part", "file"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    with atomic.new_folder(tmp_path / "folder") as part:
        assert names(part) == []  # taken over, empty
    assert names(tmp_path) == [".file.part", "file", "folder"]
    (tmp_path / ".keep.partial").write_text("of somebody else")
    assert [p.name for p in atomic.remove_leftovers(tmp_path)] == [".file.part"]
    assert names(tmp_path) == [".keep.partial", "file", "folder"]


def test_many_writers_of_one_file_do_not_meet(tmp_path):
    path, contents = tmp_path / "a", [bytes([i]) * 10_000 for i in range(8)]
    failures = []

    def work(content):
        try:
            for _ in range(10):
                atomic.write_bytes(path, content, durable=False)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_bytes() in contents
    assert not failures
    assert names(tmp_path) == ["a"]


def test_errors_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (atomic.write_bytes, lambda p, b: atomic.new_folder(p).__enter__()):
        with pytest.raises(UserError, match="cannot be written") as info:
            write(tmp_path / "file" / "below" / "x", b"")
        assert "\n" not in str(info.value)
    with pytest.raises(UserError, match="cannot be written"):
        atomic.write_bytes(tmp_path / "no such folder" / "x", b"")
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"):
        atomic.write_bytes(tmp_path, b"")
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match=r"a: cannot be written \(No .*free disk"), atomic.new_file(tmp_path / "a"):
        raise full
    with pytest.raises(FileNotFoundError), atomic.new_file(tmp_path / "a"):
        (tmp_path / "other").read_bytes()  # not an error of writing
    assert names(tmp_path) == ["file"]


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    atomic.write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    atomic.write_bytes("/dev/null", b"gone")
    assert not os.path.isfile("/dev/null")
    long = "n" * 250
    atomic.write_bytes(tmp_path / long, b"x")
    assert names(tmp_path) == ["link", long, "real"]


def test_what_cannot_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("")
    atomic.check_writable(tmp_path / "a" / "b")
    with pytest.raises(UserError, match="is no folder"):
        atomic.check_writable(tmp_path / "file" / "a" / "b")
    if os.geteuid():  # root writes everywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(UserError, match="read-only"):
            atomic.check_writable(tmp_path / "closed" / "a")
    assert names(tmp_path) == [n for n in ("closed", "file") if (tmp_path / n).exists()]


def test_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=r"pipe: cannot be written \(No such device or address\)"):
        atomic.write_bytes(pipe, b"a")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    atomic.write_bytes(pipe, b"a" * 100)
    assert os.read(reader, 200) == b"a" * 100
    os.close(reader)


def test_what_must_be_new_is_looked_at_before(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path, match in {"file": "exists already", "dangling": "exists already", "file/x": "file is no folder"}.items():
        with pytest.raises(UserError, match=match):
            atomic.check_new(tmp_path / path)
    atomic.check_new(tmp_path / "a" / "b")
    with pytest.raises(UserError, match="a is no folder; make it first"):
        atomic.check_new(tmp_path / "a" / "b", parents=False)
    assert names(tmp_path) == ["dangling", "file"]


def test_one_run_at_a_time(tmp_path):
    folder = tmp_path / "run"
    with lock.exclusive(folder):
        said = rf"run: another run is at work here \(process {os.getpid()} on "
        with pytest.raises(UserError, match=said) as info, lock.exclusive(folder):
            pass
        assert "\n" not in str(info.value)
        assert names(folder) == [".lock"]
    assert names(folder) == []
    with pytest.raises(ZeroDivisionError), lock.exclusive(folder):
        raise ZeroDivisionError
    with lock.exclusive(folder):
        pass
    with (
        lock.exclusive(folder),
        pytest.raises(UserError, match=r"^masks: another run"),
        lock.exclusive(folder, shown="masks"),
    ):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), lock.exclusive(tmp_path / "file" / "x"):
        pass


def test_a_lock_ends_with_its_process_and_not_with_its_workers(tmp_path):
    code = """
import os, sys, time
from virst_jax.io import lock
with lock.exclusive(sys.argv[1]):
    worker = os.fork()
    if worker == 0:
        time.sleep(600)
    print(worker, flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    worker = int(process.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"process {process.pid} "), lock.exclusive(tmp_path):
            pass
        process.kill()
        process.wait()
        time.sleep(0.1)
        with lock.exclusive(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
