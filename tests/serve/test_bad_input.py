"""What is refused, by the requests' JSON and by limits: one line, a status of 4xx, and nothing lost."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from helpers.segmenting import DOG
from helpers.serving import FRAMES, HEIGHT, WIDTH, animation, click, finished, masks, pixels, serving, state, upload
from virst_jax.io.small_model import CLIP
from virst_jax.serve.limits import Limits


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("serve"), Limits(sessions=30)) as (client, _):
        yield client


@pytest.fixture(scope="module")
def session(client: TestClient) -> str:
    """With an object on frame 1."""
    session: str = upload(client)["session_id"]
    assert click(client, session, [[20, 10]], 1).status_code == 200
    return session


def refused(answer: Any, status: int, *words: str) -> str:
    assert answer.status_code == status, answer.text
    (line,) = answer.json().values()
    assert list(answer.json()) == ["error"]
    assert "\n" not in line
    for word in words:
        assert word in line
    return str(line)


POINTS = {
    "outside": ({"points": [[WIDTH, 3]]}, 400, "outside of the frame"),
    "negative": ({"points": [[-1, 3]]}, 400, "outside of the frame"),
    "no number": ({"points": [["a", 3]]}, 422, "number"),
    "half a point": ({"points": [[3]]}, 422, ""),
    "infinite": ({"points": [[1e999, 3]]}, 422, ""),
    "nothing": ({}, 400, "no point was given"),
    "labels": ({"points": [[3, 3]], "labels": [1, 0]}, 400, "2 labels"),
    "another label": ({"points": [[3, 3]], "labels": [2]}, 422, "labels"),
    "a box of negative size": ({"box": [20, 20, 10, 30]}, 400, "has no area"),
    "a box outside": ({"box": [20, 20, 10, HEIGHT + 1]}, 400, "has no area"),
    "a box that leaves": ({"box": [5, 5, WIDTH + 1, 9]}, 400, "leaves the frame"),
    "no such frame": ({"frame": FRAMES, "points": [[3, 3]]}, 404, f"frames 0 to {FRAMES - 1}"),
    "a frame before the first": ({"frame": -1, "points": [[3, 3]]}, 404, "no frame -1"),
    "no such object": ({"object_id": 9, "points": [[3, 3]]}, 404, "there are 1"),
    "too many": ({"points": [[3, 3]] * 65}, 400, "64"),
    "an unknown field": ({"points": [[3, 3]], "pionts": []}, 422, "pionts"),
}


@pytest.mark.parametrize(("body", "status", "words"), POINTS.values(), ids=POINTS)
def test_points(client: TestClient, session: str, body: dict[str, Any], status: int, words: str) -> None:
    before = state(client, session), masks(client, session)
    content = json.dumps({"frame": 0, **body})  # the client itself refuses infinite numbers
    headers = {"content-type": "application/json"}
    answer = client.post(f"/sessions/{session}/points?wait=30", content=content, headers=headers)
    refused(answer, status, words)
    assert (state(client, session), masks(client, session)) == before


def test_other_requests(client: TestClient, session: str) -> None:
    before = state(client, session)
    address = f"/sessions/{session}"
    refused(client.delete(f"{address}/objects/9"), 404, "no object 9")
    refused(client.delete(f"{address}/objects/1/prompts/0?wait=30"), 400, "no prompt on frame 0")
    refused(client.delete(f"{address}/objects/1/prompts/99"), 404, "no frame 99")
    refused(client.post(f"{address}/propagate", json={"start": 99}), 404, "no frame 99")
    refused(client.post(f"{address}/propagate", json={"direction": "up"}), 422, "direction")
    refused(client.post(f"{address}/sentences", json={"sentences": []}), 422, "sentences")
    refused(client.post(f"{address}/sentences", json={"sentences": ["  "]}), 400, "empty")
    refused(client.post(f"{address}/sentences", json={"sentences": [DOG] * 9}), 400, "9 sentences")
    refused(client.post(f"{address}/sentences", json={"sentences": ["a" * 501]}), 400, "500 characters")
    refused(client.post(f"{address}/sentences", json={"sentences": ["a <|im_end|>"]}), 400)
    refused(client.post(f"{address}/chat", json={"question": ""}), 422, "question")
    refused(client.post(f"{address}/chat", json={"question": "a" * 2001}), 400, "2000")
    refused(client.get(f"{address}/frames/99"), 404, "no frame 99")
    refused(client.get(f"{address}/frames/x"), 422, "frame")
    refused(client.get(f"{address}/masks?first=99"), 404, "no frame 99")
    refused(client.get(f"{address}/masks?count=9999"), 422, "count")
    refused(client.get(f"{address}/export?format=doc"), 404, "unknown format 'doc'")
    refused(client.get("/sessions/none"), 404, "no such session")
    refused(client.get("/jobs/none"), 404, "no such job")
    refused(client.get("/nothing/here"), 404, "/nothing/here")
    refused(client.put("/segment"), 405)
    refused(client.post(f"{address}/points", content=b"{", headers={"content-type": "application/json"}), 422)
    # what a form of another site could send without asking
    refused(client.post(f"{address}/points", content=b'{"frame": 0}', headers={"content-type": "text/plain"}), 422)
    assert state(client, session) == before


def test_an_empty_session(client: TestClient) -> None:
    session = upload(client)["session_id"]
    refused(client.post(f"/sessions/{session}/propagate?wait=30", json={}), 400, "no object to track")
    refused(client.post(f"/sessions/{session}/undo?wait=30"), 400, "nothing to undo")
    refused(client.get(f"/sessions/{session}/export?format=coco"), 409, "nothing to save")


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width), np.uint8)).save(file, "PNG")
    return file.getvalue()


MASKS = {
    "another size": ({"frame": 0}, png(WIDTH, HEIGHT), 400, f"{HEIGHT}x{WIDTH} pixels, the video {WIDTH}x{HEIGHT}"),
    "a large one": ({"frame": 0}, png(4000, 4000), 400, f"the mask is 4000x4000 pixels, the video {WIDTH}x{HEIGHT}"),
    "no image": ({"frame": 0}, b"none", 400, "the mask: cannot be read as an image"),
    "a cut image": ({"frame": 0}, png(HEIGHT, WIDTH)[:-30], 400, "the mask: "),
    "no frame": ({}, png(HEIGHT, WIDTH), 400, "'frame' is missing"),
    "a frame that is none": ({"frame": "-1"}, png(HEIGHT, WIDTH), 400, "'frame' must be a number"),
    "no such frame": ({"frame": FRAMES}, png(HEIGHT, WIDTH), 404, f"frames 0 to {FRAMES - 1}"),
    "no such object": ({"frame": 0, "object_id": 9}, png(HEIGHT, WIDTH), 404, "there are 1"),
    "an unknown field": ({"frame": 0, "object": 9}, png(HEIGHT, WIDTH), 400, "unknown field 'object'"),
}


@pytest.mark.parametrize(("fields", "content", "status", "words"), MASKS.values(), ids=MASKS)
def test_masks(
    client: TestClient, session: str, fields: dict[str, Any], content: bytes, status: int, words: str
) -> None:
    before = state(client, session), masks(client, session)
    answer = client.post(f"/sessions/{session}/masks?wait=30", files={"mask": ("m.png", content)}, data=fields)
    refused(answer, status, words)
    assert (state(client, session), masks(client, session)) == before


def test_forms_without_a_mask(client: TestClient, session: str) -> None:
    address = f"/sessions/{session}/masks?wait=30"
    refused(client.post(address, json={}), 415, "multipart/form-data")
    refused(client.post(address, files={"frame": (None, "0")}), 400, "'mask' is missing")
    refused(client.post(address, files={"mask": (None, "x"), "frame": (None, "0")}), 400, "'mask' is text")
    large = {"mask": ("m.png", b"x" * (9 << 20))}
    refused(client.post(address, files=large, data={"frame": 0}), 413, "limit of this server")
    refused(client.post("/sessions/none/masks", files={"mask": ("m.png", b"x")}), 404, "no such session")


NO_VIDEOS = {
    "text": ("notes.txt", b"This is no video.", "notes.txt: cannot be read as a video"),
    "text named as one": ("a.mp4", b"This is no video.", "a.mp4: cannot be read as a video"),
    "an image that is none": ("a.png", b"This is no image.", "a.png: cannot be read as an image"),
    "nothing": ("a.mp4", b"", "a.mp4: the file is empty"),
    "a cut video": ("a.mp4", CLIP.read_bytes()[:20_000], "a.mp4: cut short"),
    "a path": ("../../../etc/passwd.mp4", b"x", "passwd.mp4: cannot be read"),
}


@pytest.mark.parametrize(("name", "content", "words"), NO_VIDEOS.values(), ids=NO_VIDEOS)
def test_uploads_that_are_no_videos(client: TestClient, name: str, content: bytes, words: str) -> None:
    job = upload(client, content, name)
    assert (job["state"], job["error"].startswith(words)) == ("failed", True), job["error"]
    assert "/tmp" not in job["error"]
    refused(client.get(f"/sessions/{job['session_id']}/masks"), 409, "not read yet")
    answer = client.post(f"/sessions/{job['session_id']}/sentences?wait=30", json={"sentences": [DOG]})
    refused(answer, 409, "not read yet")


def test_forms(client: TestClient) -> None:
    video = {"video": ("a.png", animation(pixels()))}
    refused(client.post("/sessions", json={}), 415, "multipart/form-data")
    refused(client.post("/sessions", files={"other": (None, "x")}), 400, "unknown field 'other'")
    refused(client.post("/sessions", files={"video": (None, "x")}), 400, "is text")
    refused(client.post("/sessions", files={"sample": (None, "false")}), 400, "no video was given")
    refused(client.post("/sessions", files={"sample": (None, "maybe")}), 400, "true or false")
    refused(client.post("/sessions", files=video, data={"every": "0"}), 400, "1 to 60")
    refused(client.post("/sessions", files=video, data={"every": "9" * 99}), 400, "1 to 60")
    refused(client.post("/segment", files=video), 400, "no expression was given")
    refused(client.post("/segment", files=video, data={"sentence": [" "]}), 400, "empty")
    refused(client.post("/segment", files={"sentence": (None, DOG)}), 400, "no video was given")
    refused(client.post("/sessions", files=[("video", ("a.png", b"x")), ("video", ("b.png", b"x"))]), 400)
    refused(client.post("/sessions", files=[("sample", (None, "true"))] * 65), 400)
    refused(client.post("/sessions", content=b"x", headers={"content-type": "multipart/form-data"}), 400)


def test_limits(tmp_path: Path) -> None:
    """On bytes, frames, pixels, objects and sessions. What was refused leaves no file behind."""
    small = Limits(
        upload_bytes=50_000, body_bytes=1000, frames=FRAMES - 1, pixels=HEIGHT * WIDTH, objects=1, sessions=3, clicks=2
    )
    with serving(tmp_path, small) as (client, service):
        refused(client.post("/sessions", files={"video": ("a.mp4", b"x" * 60_000)}), 413, "limit of this server")
        chunks = (b"x" * 1000 for _ in range(90))
        headers = {"content-type": "multipart/form-data; boundary=x"}
        refused(client.post("/sessions", content=chunks, headers=headers), 413, "limit of this server")
        assert [entry for entry in service.registry.folder.iterdir() if entry.is_dir()] == []
        many = upload(client, animation(pixels(FRAMES)))
        assert (many["state"], "more than 5 frames" in many["error"]) == ("failed", True)
        large = upload(client, png(HEIGHT, WIDTH + 1))
        assert (large["state"], "too large" in large["error"]) == ("failed", True)
        session = upload(client, animation(pixels(2)))["session_id"]
        for _ in range(2):  # in place of those that could not be read
            assert upload(client, animation(pixels(2)))["state"] == "done"
        refused(client.post("/sessions", files={"sample": (None, "true")}), 503, "3 videos are open")
        assert click(client, session, [[3, 3]]).status_code == 200
        refused(click(client, session, [[3, 3]]), 409, "1 objects at most")
        assert click(client, session, [[4, 4]], object_id=1).status_code == 200
        refused(click(client, session, [[5, 5]], object_id=1), 409, "2 clicks on a frame")
        body = b'{"frame": 0, "points": [' + b" " * 1000 + b"]}"
        headers = {"content-type": "application/json"}
        refused(client.post(f"/sessions/{session}/points", content=body, headers=headers), 413)
        refused(client.post(f"/sessions/{session}/points", content=iter([body, body]), headers=headers), 413)
        (shown,) = state(client, session)["objects"]
        assert shown["prompts"][0]["points"] == [[3, 3], [4, 4]]


def test_a_bomb_is_not_decoded(tmp_path: Path) -> None:
    """A small file of a large image is refused by its header."""
    with serving(tmp_path, Limits(pixels=1000 * 1000)) as (client, _):
        content = png(9000, 9000)
        assert len(content) < 100_000
        job = upload(client, content)
        assert (job["state"], job["error"]) == (
            "failed",
            "frames of 9000x9000 pixels are too large for this server, which takes 1,000,000; scale the video down",
        )


def test_memory_of_a_session(tmp_path: Path) -> None:
    """An object too many is refused, those that are there stay."""
    with serving(tmp_path, Limits(outcome_bytes=1)) as (client, _):
        session = upload(client)["session_id"]
        refused(click(client, session, [[3, 3]]), 409, "more memory")
        job = client.post(f"/sessions/{session}/sentences", json={"sentences": [DOG]}).json()
        assert "more memory" in finished(client, job)["error"]


def test_undo_is_bounded_by_memory(tmp_path: Path) -> None:
    with serving(tmp_path, Limits(undo_bytes=0)) as (client, _):
        session = upload(client)["session_id"]
        click(client, session, [[3, 3]])
        assert state(client, session)["num_undo"] == 1  # nothing was there before: it takes no memory
        click(client, session, [[9, 9]], object_id=1)
        assert state(client, session)["num_undo"] == 0
        refused(client.post(f"/sessions/{session}/undo?wait=30"), 400, "nothing to undo")
