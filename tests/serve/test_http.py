"""The HTTP interface of `virst serve`, on the small network: what goes right."""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from helpers.network import CFG, params
from helpers.segmenting import CAT, DOG, small_model
from helpers.serving import FRAMES, HEIGHT, WIDTH, animation, click, finished, masks, pixels, serving, state, upload
from virst_jax.api import Model
from virst_jax.io.masks import decode_mask
from virst_jax.serve.limits import Limits
from virst_jax.serve.results import FORMATS
from virst_jax.tracking import TrackerModel


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("serve"), Limits(sessions=30)) as (client, _):
        yield client


@pytest.fixture(scope="module")
def done(client: TestClient) -> dict[str, Any]:
    """The job of a video and two sentences."""
    files = {"video": ("my clip.png", animation(pixels()))}
    answer = client.post("/segment", files=files, data={"sentence": [DOG, CAT]})
    assert answer.status_code == 202
    job = finished(client, answer.json())
    assert job["state"] == "done", job
    return job


def decoded(codes: dict[str, Any], object_id: int) -> np.ndarray:
    """Masks of an object, bool[T, H, W]."""
    size = (HEIGHT, WIDTH)
    return np.stack(
        [decode_mask({"size": size, "counts": codes[str(t)][str(object_id)]}, size, "test") for t in range(FRAMES)]
    )


def archive(answer: Any) -> zipfile.ZipFile:
    assert answer.status_code == 200, answer.text
    return zipfile.ZipFile(io.BytesIO(answer.content))


def test_masks_are_those_of_segment(client: TestClient, done: dict[str, Any]) -> None:
    expected = small_model().segment(pixels(), [DOG, CAT])
    assert done["objects"] == [1, 2]
    found = masks(client, done["session_id"])
    shown = state(client, done["session_id"])
    assert [x["label"] for x in shown["objects"]] == list(expected.expressions)
    for i in range(2):
        # sums in another order: a pixel at the edge may fall on either side
        assert (decoded(found, i + 1) != expected.masks[i]).mean() < 1e-3
        np.testing.assert_allclose(shown["objects"][i]["scores"], expected.scores[i], rtol=1e-3, atol=1e-3)
    assert (shown["num_frames"], shown["height"], shown["width"], shown["fps"]) == (FRAMES, HEIGHT, WIDTH, 8.0)


def test_downloads(client: TestClient, done: dict[str, Any]) -> None:
    """Every format, and one of them looked into: its masks are those that the page shows."""
    answer = client.get(f"/jobs/{done['job_id']}/result?format=all")
    assert "my%20clip-all.zip" in answer.headers["content-disposition"]
    names = archive(answer).namelist()
    assert {name.partition("/")[0] for name in names} == set(FORMATS)
    assert "overlay/my clip.mp4" in names
    file = archive(client.get(f"/jobs/{done['job_id']}/result?format=coco")).read("annotations.json")
    codes = {(x["image_id"] - 1, x["track_id"]): x["segmentation"]["counts"] for x in json.loads(file)["annotations"]}
    for frame, found in masks(client, done["session_id"]).items():
        for object_id, code in found.items():
            mask = decode_mask({"size": (HEIGHT, WIDTH), "counts": code}, (HEIGHT, WIDTH), "test")
            assert codes.get((int(frame), int(object_id)), "") == (code if mask.any() else "")
    assert client.get(f"/jobs/{done['job_id']}/result?format=bmp").status_code == 404


def test_clicks_undo_and_removal(client: TestClient) -> None:
    """Two clicks at once both count; what undo takes back is as it was."""
    session = upload(client)["session_id"]
    address = f"/sessions/{session}/points"
    first = client.post(address, json={"frame": 2, "points": [[20, 10]]}).json()
    (number,) = first["objects"]
    second = client.post(address, json={"frame": 2, "object_id": number, "points": [[3, 3]], "labels": [0]}).json()
    assert [finished(client, job)["state"] for job in (first, second)] == ["done", "done"]
    (shown,) = state(client, session)["objects"]
    assert shown["prompts"] == [
        {"frame": 2, "kind": "points", "points": [[20, 10], [3, 3]], "labels": [1, 0], "box": None}
    ]
    assert set(masks(client, session)) == {"2"}
    tracked = client.post(f"/sessions/{session}/propagate?wait=30", json={"direction": "both"}).json()
    assert (tracked["state"], tracked["stage"], tracked["done"]) == ("done", "track", FRAMES)
    assert len(masks(client, session)) == FRAMES
    before = state(client, session), masks(client, session)
    box = click(client, session, [], 4, object_id=number, box=[5, 5, 30, 30])
    assert (box.status_code, box.json()["state"]) == (200, "done")
    assert masks(client, session)["4"] != before[1]["4"]
    assert client.delete(f"/sessions/{session}/objects/{number}/prompts/4?wait=30").status_code == 200
    assert client.delete(f"/sessions/{session}/objects/{number}?wait=30").status_code == 200
    assert state(client, session)["objects"] == []
    for _ in range(3):
        assert client.post(f"/sessions/{session}/undo?wait=30").status_code == 200
    assert (state(client, session), masks(client, session)) == before


def test_a_box_keeps_the_clicks(client: TestClient) -> None:
    session = upload(client)["session_id"]
    (number,) = click(client, session, [[20, 10]]).json()["objects"]
    click(client, session, [], object_id=number, box=[5, 5, 30, 30])
    (prompt,) = state(client, session)["objects"][0]["prompts"]
    assert (prompt["points"], prompt["box"]) == ([[20, 10]], [5, 5, 30, 30])
    click(client, session, [[9, 9]], object_id=number, replace=True)
    (prompt,) = state(client, session)["objects"][0]["prompts"]
    assert (prompt["points"], prompt["box"]) == ([[9, 9]], None)


def png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    return file.getvalue()


def test_masks_as_prompts(client: TestClient) -> None:
    """An uploaded mask is the object's on its frame; tracked, all is as in a session in Python."""
    session = upload(client)["session_id"]
    given = np.zeros((HEIGHT, WIDTH), bool)
    given[8:30, 10:40] = True
    address = f"/sessions/{session}/masks?wait=30"
    (number,) = client.post(address, files={"mask": ("m.png", png(given))}, data={"frame": 3}).json()["objects"]
    (prompt,) = state(client, session)["objects"][0]["prompts"]
    assert (prompt["frame"], prompt["kind"]) == (3, "mask")
    empty = {"frame": 5, "object_id": number}  # it is not there
    assert client.post(address, files={"mask": ("m.png", png(given & False))}, data=empty).status_code == 200
    assert client.post(f"/sessions/{session}/propagate?wait=30", json={}).status_code == 200
    plain = small_model().session(pixels())
    plain.add_mask(1, 3, given)
    plain.add_mask(1, 5, given & False)
    expected = {shown.index: shown.of(1) for shown in plain.propagate()}
    found = decoded(masks(client, session), number)
    # sums in another order: a pixel at the edge may fall on either side
    assert (found != np.stack([expected[t] for t in range(FRAMES)])).mean() < 1e-3
    assert not found[5].any()
    assert found[3].any()
    assert client.post(f"/sessions/{session}/undo?wait=30").status_code == 200
    assert set(masks(client, session)) == {"3", "5"}


def test_exclusive_objects_do_not_overlap(client: TestClient) -> None:
    given = np.zeros((HEIGHT, WIDTH), bool)
    given[8:30, 10:40] = True
    shared = {}
    for exclusive in ("false", "true"):
        session = upload(client, exclusive=exclusive)["session_id"]
        assert state(client, session)["exclusive"] == (exclusive == "true")
        for _ in range(2):  # both objects have the same mask
            files = {"mask": ("m.png", png(given))}
            assert client.post(f"/sessions/{session}/masks?wait=30", files=files, data={"frame": 0}).status_code == 200
        assert client.post(f"/sessions/{session}/propagate?wait=30", json={}).status_code == 200
        codes = masks(client, session)
        shared[exclusive] = (decoded(codes, 1) & decoded(codes, 2)).sum()
    assert shared["false"] > 0
    assert shared["true"] == 0


def test_a_sentence_is_one_step(client: TestClient, done: dict[str, Any]) -> None:
    """What a sentence has begun, and its tracking, are taken back together; its object can be corrected."""
    session = upload(client)["session_id"]
    job = client.post(f"/sessions/{session}/sentences", json={"sentences": [DOG, CAT]}).json()
    assert finished(client, job)["objects"] == [1, 2]
    before = masks(client, session)
    assert len(before) == FRAMES
    assert click(client, session, [[20, 10]], 1, object_id=1).status_code == 200
    assert masks(client, session)["1"] != before["1"]
    kinds = {prompt["kind"] for prompt in state(client, session)["objects"][0]["prompts"]}
    assert kinds == {"sentence", "points"}
    client.post(f"/sessions/{session}/undo?wait=30")
    assert masks(client, session) == before
    client.post(f"/sessions/{session}/undo?wait=30")
    assert (state(client, session)["objects"], masks(client, session)) == ([], {})
    assert client.post(f"/sessions/{session}/undo?wait=30").json() == {"error": "there is nothing to undo"}


def test_frames_and_steps_between_them(client: TestClient) -> None:
    session = upload(client, every=2)["session_id"]
    assert state(client, session)["num_frames"] == FRAMES // 2
    image = client.get(f"/sessions/{session}/frames/1")
    assert image.headers["content-type"] == "image/jpeg"
    assert client.get(f"/sessions/{session}/frames/3").status_code == 404
    click(client, session, [[5, 5]])
    names = archive(client.get(f"/sessions/{session}/export?format=png-ids")).namelist()
    assert names == ["00000.png", "00002.png", "00004.png"]  # their numbers in the whole video


def test_chat(tmp_path: Path) -> None:
    """Questions are remembered. What a network of random weights answers does not matter."""
    model = small_model()
    talking = Model(CFG, params(), model.tokenizer, answers=True)
    with serving(tmp_path, model=talking) as (client, service):
        assert client.get("/server").json()["answers"]
        session = upload(client)["session_id"]
        given = []
        service.model.chat = lambda video, question, history: given.append(list(history)) or question.upper()  # type: ignore
        for question in ("what?", "why?"):
            job = client.post(f"/sessions/{session}/chat?wait=30", json={"question": question}).json()
            assert job["answer"] == question.upper()
        assert given == [[], [("what?", "WHAT?")]]
        assert state(client, session)["history"] == [["what?", "WHAT?"], ["why?", "WHY?"]]


def test_a_tracker_alone(tmp_path: Path) -> None:
    """It tracks, and says of sentences and questions that it takes none."""
    with serving(tmp_path, model=TrackerModel(CFG.sam2, params()["sam2"])) as (client, _):
        shown = client.get("/server").json()
        assert not shown["reads_text"]
        assert not shown["answers"]
        session = upload(client)["session_id"]
        assert click(client, session, [[20, 10]]).status_code == 200
        text = client.post(f"/sessions/{session}/sentences?wait=30", json={"sentences": [DOG]})
        chat = client.post(f"/sessions/{session}/chat?wait=30", json={"question": "what?"})
        assert [(x.status_code, "this model" in x.json()["error"]) for x in (text, chat)] == [(409, True)] * 2
        assert len(state(client, session)["objects"]) == 1


def test_the_sample(client: TestClient) -> None:
    answer = client.post("/sessions", files={"sample": (None, "true")})
    job = finished(client, answer.json())
    assert (job["state"], state(client, job["session_id"])["num_frames"]) == ("done", 32)
    assert client.delete(f"/sessions/{job['session_id']}").status_code == 204
    assert client.get(f"/sessions/{job['session_id']}").status_code == 404
    assert client.get(f"/jobs/{job['job_id']}").status_code == 404
