"""Who is let in, and from which page."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from helpers.serving import BASE, serving
from virst_jax.errors import UserError
from virst_jax.serve.security import check_token, is_local, same

TOKEN = "a-token-of-24-characters"


def test_names_of_this_machine(tmp_path: Path) -> None:
    """A name that an attacker's page has pointed here is refused, whatever is asked."""
    with serving(tmp_path) as (client, _):
        for host in ("localhost:8321", "127.0.0.1", "[::1]:8321", "LOCALHOST"):
            assert client.get("/server", headers={"host": host}).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8321", "", "[::1", "@localhost"):
            answer = client.get("/server", headers={"host": host})
            assert answer.status_code == (200 if host == "@localhost" else 421), host
    with serving(tmp_path, token=TOKEN, names=["Virst.example"]) as (client, _):
        right = {"authorization": f"Bearer {TOKEN}", "origin": "https://virst.example"}
        assert client.post("/sessions", headers={**right, "host": "virst.example"}).status_code == 415
        assert client.get("/server", headers={**right, "host": "evil.example"}).status_code == 421


def test_pages_of_other_sites(tmp_path: Path) -> None:
    with serving(tmp_path) as (client, _):

        def post(**headers: str) -> int:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            return client.post("/sessions", files={"sample": (None, "true")}, headers=given).status_code

        assert post() == 202  # no browser
        assert post(origin=BASE) == 202
        assert post(origin=BASE, sec_fetch_site="same-origin") == 202
        assert post(origin="http://evil.example") == 403
        assert post(origin="http://localhost:9999") == 403
        assert post(origin="null") == 403
        assert post(sec_fetch_site="cross-site") == 403
        assert post(sec_fetch_site="same-site") == 403
        across = {"sec-fetch-site": "cross-site"}
        assert client.get("/server", headers=across).status_code == 403
        assert client.get("/", headers={**across, "sec-fetch-mode": "navigate"}).status_code == 200  # a link to here


def test_a_token(tmp_path: Path) -> None:
    """As header, as query of a first visit, and as the cookie that this visit sets."""
    with serving(tmp_path, token=TOKEN, local=False) as (client, _):
        assert client.get("/server").status_code == 401
        assert client.get("/").status_code == 401
        assert client.get("/static/style.css").status_code == 401
        assert "token is needed" in client.get("/server").json()["error"]
        for wrong in ("Bearer x", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \xe4", ""):
            assert client.get("/server", headers={"authorization": wrong.encode("latin-1")}).status_code == 401
        assert client.get("/server", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert client.get("/?token=wrong").status_code == 401
        assert client.post(f"/sessions?token={TOKEN}").status_code == 401  # only a visit brings it so
        visit = client.get(f"/?token={TOKEN}&a=b", follow_redirects=False)
        assert (visit.status_code, visit.headers["location"]) == (303, "/?a=b")
        cookie = visit.headers["set-cookie"]
        assert TOKEN not in cookie
        assert all(word in cookie for word in ("HttpOnly", "SameSite=Strict"))
        assert client.get("/server").status_code == 200  # the client keeps cookies
        away = client.get(f"//evil.example/?token={TOKEN}", follow_redirects=False)
        assert not away.headers.get("location", "").startswith("//")


def test_headers(tmp_path: Path) -> None:
    with serving(tmp_path) as (client, _):
        for path in ("/", "/server", "/nothing"):
            headers = client.get(path).headers
            assert "default-src 'none'" in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/app.py", "/static//etc/passwd"]
)
def test_no_way_out_of_the_static_files(tmp_path: Path, path: str) -> None:
    with serving(tmp_path) as (client, _):
        assert client.get(path).status_code == 404


def test_tokens_and_hosts() -> None:
    assert check_token(TOKEN) == TOKEN
    for bad in ("", "short", "ä" * 20, "with a space in it ..."):
        with pytest.raises(UserError, match="16 characters"):
            check_token(bad)
    assert same("abc", "abc")
    assert not same("\udcff", "abc")
    assert [is_local(x) for x in ("localhost", "127.0.0.2", "::1")] == [True] * 3
    assert [is_local(x) for x in ("0.0.0.0", "::", "192.168.0.1", "example.org")] == [False] * 4


def test_web_sockets_are_closed(tmp_path: Path) -> None:
    with serving(tmp_path) as (client, _):
        assert isinstance(client, TestClient)
        assert client.get("/server", headers={"upgrade": "websocket"}).status_code == 200
