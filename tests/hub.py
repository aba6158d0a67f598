"""A stand-in of the hub's upload endpoints on this machine, which remembers what it was sent."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """What was uploaded, and how.

    Attributes:
        files: Contents by path in the repository.
        tokens: Authorization headers of all requests.
        commits: Summaries of the commits.
        refuse: Status with which commits are answered, if not 200.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.commits: list[str] = []
        self.large: dict[str, bytes] = {}
        self.refuse = 0

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                assert value["encoding"] == "base64"
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run the stand-in, and point the hub's library to it."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, content: Any = None, status: int = 200, **headers: str) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def body(self) -> bytes:
            hub.tokens.add(self.headers.get("Authorization", ""))
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_POST(self) -> None:
            data = self.body()
            if self.path == "/api/repos/create":
                name = json.loads(data)
                full = f"{name.get('organization') or 'me'}/{name['name']}"
                self.answer({"url": f"{url}/{full}", "name": full, "id": full})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                asked = json.loads(data)["files"]
                self.answer(
                    {
                        "files": [
                            {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False}
                            for f in asked
                        ]
                    }
                )
            elif "/commit/" in self.path:
                if hub.refuse:
                    self.answer({"error": "refused"}, hub.refuse)
                    return
                hub.commit([json.loads(line) for line in data.splitlines()])
                self.answer(
                    {"commitUrl": f"{url}/me/x/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""}
                )
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(data)["objects"]
                self.answer(
                    {
                        "transfer": "basic",
                        "objects": [
                            {**o, "actions": {"upload": {"href": f"{url}/large/{o['oid']}"}}} for o in objects
                        ],
                    }
                )
            else:
                self.answer({"error": self.path}, 404)

        def do_PUT(self) -> None:
            data = self.body()
            oid = self.path.rpartition("/")[2]
            assert hashlib.sha256(data).hexdigest() == oid
            hub.large[oid] = data
            self.answer()

        def do_GET(self) -> None:
            self.body()
            before, resolves, path = self.path.partition("/resolve/main/")
            if self.path == "/api/whoami-v2":
                self.answer(
                    {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []}
                )
            elif resolves and path in hub.files:
                self.answer(hub.files[path], ETag=f'"{hashlib.sha1(hub.files[path]).hexdigest()}"')
            elif resolves:
                self.answer({}, 404, X_Error_Code="EntryNotFound")
            elif self.path.startswith("/api/models/"):
                name = before.removeprefix("/api/models/").partition("/revision")[0]
                self.answer({"id": name, "sha": COMMIT, "siblings": [], "private": False, "tags": []})
            else:
                self.answer({"error": self.path}, 404)

        do_HEAD = do_GET

    def mode(path: str) -> str:
        return "lfs" if path.endswith((".safetensors", ".bin")) else "regular"

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
