"""The description of the HTTP interface, and that nothing is loaded from elsewhere."""

import re
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from helpers.serving import serving
from virst_jax.serve.app import STATIC


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("serve")) as (client, _):
        yield client


def test_every_request_is_described(client: TestClient) -> None:
    api = client.get("/openapi.json").json()
    described = {(method, path) for path, methods in api["paths"].items() for method in methods}
    assert {("post", "/segment"), ("get", "/jobs/{job_id}"), ("delete", "/jobs/{job_id}")} <= described
    form = api["paths"]["/segment"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert (form["required"], form["properties"]["video"]["format"]) == (["video", "sentence"], "binary")
    for path, methods in api["paths"].items():
        for method, told in methods.items():
            assert told["description"], (method, path)
            assert "4XX" in told["responses"], (method, path)
    text = str(api)
    for name in re.findall(r"#/components/schemas/(\w+)", text):
        assert name in api["components"]["schemas"]


def test_the_pages_load_nothing_from_elsewhere(client: TestClient) -> None:
    """Whatever they name is there, and here."""
    namespace = "http://www.w3.org/2000/svg"
    files = [f for f in STATIC.rglob("*") if f.is_file()]
    assert {"index.html", "docs.html", "docs.js", "style.css"} <= {f.name for f in files}
    for file in files:
        text = file.read_text().replace(namespace, "")
        assert not re.search(r"(https?:)?//[\w.-]+\.\w", text), file
        assert len(text.splitlines()) < 400
        if file.suffix == ".html":  # the policy forbids what stands in the page itself
            assert not re.search(r"<script(?![^>]*src)|<style|style=|\son\w+=", text), file
        named = re.findall(r"(?:src|href)=\"(/[^\"]*)\"", text)
        folder = file.parent.relative_to(STATIC)
        named += [f"/static/{folder / name}" for name in re.findall(r"from \"\./([\w./-]+)\"", text)]
        for name in named:
            assert client.get(name).status_code == 200, (file, name)
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert client.get("/static/js/docs.js").headers["content-type"].startswith("text/javascript")
