"""A server of the small network within the test's process, and videos to send to it."""

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from helpers.segmenting import small_model, video
from virst_jax.serve.app import make_app
from virst_jax.serve.limits import Limits
from virst_jax.serve.server import address_of, listen
from virst_jax.serve.service import AnyModel, Service

FRAMES, HEIGHT, WIDTH = 6, 40, 56
BASE = "http://localhost"


@contextlib.contextmanager
def serving(
    home: Path, limits: Limits | None = None, model: AnyModel | None = None, **settings: Any
) -> Iterator[tuple[TestClient, Service]]:
    """A client and the service that it talks to."""
    service = Service(model or small_model(), limits, home=home)
    with TestClient(make_app(service, **settings), base_url=BASE) as client:
        yield client, service


@contextlib.contextmanager
def listening(home: Path, model: AnyModel) -> Iterator[str]:
    """As `serving`, for a browser: the address."""
    sock = listen("127.0.0.1", 0)
    app = make_app(Service(model, home=home))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield address_of(sock, "127.0.0.1", None).rstrip("/")
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


def animation(frames: np.ndarray) -> bytes:
    """An animated PNG, which loses nothing."""
    images = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    images[0].save(file, "PNG", save_all=True, append_images=images[1:], duration=125)
    return file.getvalue()


def pixels(count: int = FRAMES) -> np.ndarray:
    return video(count, HEIGHT, WIDTH)


def upload(client: TestClient, content: bytes | None = None, name: str = "clip.png", **fields: Any) -> dict[str, Any]:
    """Opens a session and waits for its video."""
    files = {"video": (name, animation(pixels()) if content is None else content)}
    answer = client.post("/sessions", files=files, data=fields)
    assert answer.status_code == 202, answer.text
    return finished(client, answer.json())


def finished(client: TestClient, job: dict[str, Any]) -> dict[str, Any]:
    """A job once it has ended."""
    while job["state"] in ("queued", "running"):
        job = client.get(f"/jobs/{job['job_id']}?wait=30").json()
    return job


def click(client: TestClient, session: str, points: Sequence[Sequence[float]], frame: int = 0, **more: Any) -> Any:
    """The answer to clicks, once they are done."""
    body = {"frame": frame, "points": points, **more}
    return client.post(f"/sessions/{session}/points?wait=30", json=body)


def state(client: TestClient, session: str) -> dict[str, Any]:
    """Of a session, without what changes when nothing was changed."""
    shown = client.get(f"/sessions/{session}").json()
    return {key: value for key, value in shown.items() if key != "version"}


def masks(client: TestClient, session: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/sessions/{session}/masks").json()["frames"]
    return found
