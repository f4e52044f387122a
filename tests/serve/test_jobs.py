"""The queue, cancelling, and when files are deleted."""

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.serving import click, finished, masks, serving, state, upload
from virst_jax import cli
from virst_jax.errors import UserError
from virst_jax.serve import registry
from virst_jax.serve.jobs import Job, Worker
from virst_jax.serve.limits import Limits, Refusal


class Gate:
    """Work that lasts until it is let through."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> dict[str, Any]:
        self.entered.set()
        while not self.open.wait(0.01):
            job.progress("wait", 1, 2)
        return {"answer": "through"}


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_queue() -> None:
    faults: list[BaseException] = []

    def explain(error: BaseException) -> str:
        faults.append(error)
        return "a fault"

    def fail(job: Job) -> dict[str, Any]:
        raise ZeroDivisionError

    def refuse(job: Job) -> dict[str, Any]:
        raise UserError("bad input")

    worker, gate = Worker("test", explain, waiting=4, waiting_each=3), Gate()
    jobs = [Job("a", str(i)) for i in range(5)]
    worker.submit(jobs[0], gate)
    assert gate.entered.wait(20)
    for job, work in zip(jobs[1:4], (fail, refuse, Gate())):
        worker.submit(job, work)
    assert [worker.position(job) for job in jobs] == [None, 1, 2, 3, None]
    with pytest.raises(Refusal, match="3 requests of this session wait"):
        worker.submit(jobs[4], gate)
    other = Job("b", "b")
    worker.submit(other, lambda job: {})
    with pytest.raises(Refusal, match="too many requests") as full:
        worker.submit(Job("c", "c"), gate)
    assert full.value.status == 503
    worker.cancel(jobs[3])  # which waits
    assert (jobs[3].state, worker.position(other)) == ("cancelled", 3)
    assert worker.is_busy("a")
    gate.open.set()
    until(lambda: other.finished)
    assert [(x.state, x.error, x.status) for x in (*jobs[:3], other)] == [
        ("done", "", 200),
        ("failed", "a fault", 500),
        ("failed", "bad input", 400),
        ("done", "", 200),
    ]
    assert isinstance(faults[0], ZeroDivisionError)
    last = Gate()
    worker.submit(jobs[4], last)
    assert last.entered.wait(20)
    assert worker.stop(20)
    assert jobs[4].state == "cancelled"
    with pytest.raises(Refusal, match="stopping"):
        worker.submit(Job("a", "a"), gate)


def test_positions_and_cancelling(tmp_path: Path) -> None:
    """One device for all: another user's job waits, says where, and can be cancelled; nothing is lost."""
    with serving(tmp_path) as (client, service):
        first, second = (upload(client)["session_id"] for _ in range(2))
        click(client, second, [[5, 5]])
        before = state(client, second)
        gate = Gate()
        running = service.submit(service.registry.get(first), "test", gate)
        assert gate.entered.wait(20)
        waiting = client.post(f"/sessions/{second}/propagate", json={})
        assert (waiting.status_code, waiting.json()["state"], waiting.json()["position"]) == (202, "queued", 1)
        # what needs no device is answered all the same
        assert client.get(f"/sessions/{second}/frames/0").status_code == 200
        assert masks(client, second)
        cancelled = client.delete(f"/jobs/{waiting.json()['job_id']}?wait=30").json()
        assert cancelled["state"] == "cancelled"
        refused = client.get(f"/jobs/{cancelled['job_id']}/result")
        assert (refused.status_code, "is cancelled" in refused.json()["error"]) == (409, True)
        stopped = client.delete(f"/jobs/{running.id}?wait=30").json()
        assert (stopped["state"], stopped["stage"], stopped["done"], stopped["total"]) == ("cancelled", "wait", 1, 2)
        assert client.delete(f"/jobs/{running.id}").status_code == 409
        assert state(client, second) == before


def test_tracked_frames_are_kept_when_cancelled(tmp_path: Path) -> None:
    with serving(tmp_path) as (client, service):
        session = upload(client)["session_id"]
        click(client, session, [[5, 5]], 1)
        served = service.registry.get(session)
        job = Job(session, "propagate")
        note, seen = job.note, []

        def stop_at_two(stage: str, done: int, total: int) -> None:
            note(stage, done, total)
            seen.append(done)
            job.cancelling = done == 2

        job.note = stop_at_two  # type: ignore[method-assign]
        service._submit(service.device, job, lambda j: served.propagate(service.model, None, "forward", j))
        shown = finished(client, client.get(f"/jobs/{job.id}").json())
        assert (shown["state"], shown["error"]) == ("cancelled", "cancelled; 2 tracked frames are kept")
        assert set(masks(client, session)) == {"1", "2"}
        assert client.post(f"/sessions/{session}/undo?wait=30").status_code == 200
        assert set(masks(client, session)) == {"1"}


def test_a_sentence_cancelled_while_it_is_read(tmp_path: Path) -> None:
    with serving(tmp_path) as (client, service):
        session = upload(client)["session_id"]
        served = service.registry.get(session)
        job = Job(session, "sentences")
        job.note = lambda *args: setattr(job, "cancelling", True)  # type: ignore[method-assign]
        service._submit(service.device, job, lambda j: served.add_text(service.model, ["the dog"], j))
        assert finished(client, client.get(f"/jobs/{job.id}").json())["state"] == "cancelled"
        shown = state(client, session)
        assert (shown["objects"], shown["num_undo"]) == ([], 0)


def test_files_are_deleted(tmp_path: Path) -> None:
    """After idle time, unless a job is at work; for another upload, if there is no room; and at the end."""
    limits = Limits(sessions=2, idle_seconds=3600, spare_seconds=60)
    with serving(tmp_path, limits) as (client, service):
        first, second = (upload(client)["session_id"] for _ in range(2))
        folder = service.registry.folder
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o77 == 0  # for nobody else
        full = client.post("/sessions", files={"sample": (None, "true")})
        assert full.status_code == 503
        service.registry.get(first).used -= 100
        third = upload(client)
        assert third["state"] == "done"
        assert client.get(f"/sessions/{first}").status_code == 404
        gate = Gate()
        served = service.registry.get(second)
        job = service.submit(served, "test", gate)
        assert gate.entered.wait(20)
        for session in (second, third["session_id"]):
            service.registry.get(session).used -= 4000
        service.registry.sweep()
        assert client.get(f"/sessions/{third['session_id']}").status_code == 404
        assert served.upload.folder.is_dir()
        service.registry.delete(second)  # its job is told to end, and its files go behind it
        until(lambda: job.finished and not service.registry.is_busy(second))
        service.registry.sweep()
        assert not served.upload.folder.exists()
        upload(client)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_servers_that_were_killed(tmp_path: Path) -> None:
    """They are deleted by the next one; those of servers at work, and what is not ours, stay."""
    killed, foreign = tmp_path / f"{registry.PREFIX}a", tmp_path / f"{registry.PREFIX}b"
    killed.mkdir()
    (killed / registry.LOCK).write_text("")
    (killed / "video.mp4").write_bytes(b"x")
    foreign.mkdir()
    (tmp_path / "precious").write_text("kept")
    (foreign / registry.LOCK).symlink_to(tmp_path / "precious")
    limits = Limits()
    running = registry.Registry(limits, (), tmp_path)
    assert not killed.exists()
    other = registry.Registry(limits, (), tmp_path)
    assert running.folder.is_dir()
    running.close()
    other.close()
    assert (tmp_path / "precious").read_text() == "kept"


def test_memory_of_the_device_is_shared(tmp_path: Path) -> None:
    with serving(tmp_path, Limits(feature_bytes=1)) as (client, service):
        sessions = [upload(client)["session_id"] for _ in range(2)]
        for session in sessions:
            click(client, session, [[5, 5]])
        kept = []
        for session in sessions:
            network = service.registry.get(session).network
            assert network is not None
            kept.append(len(network.features.kept))
        assert kept == [0, 1]
        assert click(client, sessions[0], [[6, 6]], object_id=1).status_code == 200


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 2
    line = capsys.readouterr().err
    assert line == (
        f"error: 127.0.0.1:{port}: another program has this port; choose one with --port, or any that is free with "
        "--port 0\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "0 to 65535"),
        (["--host", "192.0.2.1", "--port", "0"], "192.0.2.1:0: cannot be served"),
        (["--token", "short"], "16 characters"),
        (["--max-frames", "0"], "--max-frames is 0"),
        (["--idle-minutes", "-1"], "--idle-minutes is -1"),
        (["--port", "0", "--model", "nowhere"], "no model there"),
    ],
)
def test_options(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert cli.main(["serve", *arguments]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
