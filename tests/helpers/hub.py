"""A stand-in for the Hugging Face hub on this machine: what huggingface_hub asks to write and read a small model."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Repositories by name: files of their only branch."""

    def __init__(self, token: str):
        self.token = token
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.address = ""

    def commit_of(self, name: str) -> str:
        content = repr(sorted((path, hashlib.sha1(x).hexdigest()) for path, x in self.files[name].items()))
        return hashlib.sha1(content.encode()).hexdigest()


@contextlib.contextmanager
def running(token: str = "hf_secret") -> Iterator[Hub]:
    """A hub that only this token may write to."""
    hub = Hub(token)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            status = 409 if name in self.hub.files else 200
            self.hub.files.setdefault(name, {})
            self.hub.private.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
            return self._answer(status, {"url": f"{self.hub.address}/{name}"})
        _, _, _, owner, name, what, *_ = self.path.split("/")
        repository = f"{owner}/{name}"
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._answer(200, {"files": modes})
        if what == "commit":
            self._commit(repository, [json.loads(line) for line in body.splitlines()])
            commit = self.hub.commit_of(repository)
            url = f"{self.hub.address}/{repository}/commit/{commit}"
            return self._answer(200, {"commitUrl": url, "commitOid": commit})
        return self._answer(404, {"error": self.path})

    def _commit(self, repository: str, changes: list[dict[str, Any]]) -> None:
        files = self.hub.files[repository]
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "deletedFile":
                del files[value["path"]]

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository = "/".join(parts[2:4])
            if repository not in self.hub.files:
                return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            files = self.hub.files[repository]
            if parts[4:5] == ["tree"]:
                tree = [
                    {"type": "file", "path": p, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                    for p, x in files.items()
                ]
                return self._answer(200, tree)
            siblings = [{"rfilename": path} for path in files]
            about = {"id": repository, "sha": self.hub.commit_of(repository), "siblings": siblings}
            return self._answer(200, about)
        repository, path = "/".join(parts[:2]), "/".join(parts[4:])
        content = self.hub.files.get(repository, {}).get(path)
        if parts[2] != "resolve" or content is None:
            return self._answer(404, {"error": path}, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.hub.commit_of(repository)}
        return self._answer(200, content, headers)

    do_HEAD = do_GET

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
