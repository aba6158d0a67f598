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
from huggingface_hub import constants, hf_api

COMMIT = "c0ffee" + "0" * 34
"""What every answer to a commit says."""


class Hub:
    """What was uploaded, and how.

    Attributes:
        files: Contents by path in the repository.
        tokens: Authorization headers of all requests.
        commits: Summaries of the commits.
        parents: What each commit said it changes.
        made: Whether the repository was made.
        refuse: Status with which commits are answered, if not 200.
        hide: Status with which files are answered, if not 200.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.commits: list[str] = []
        self.large: dict[str, bytes] = {}
        self.parents: list[str | None] = []
        self.made = False
        self.refuse = self.hide = 0

    @property
    def sha(self) -> str:
        """The repository's latest commit: another one for other contents."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
                self.parents.append(value.get("parentCommit"))
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
            for name, value in {
                "Content-Length": str(len(data)),
                "X-Repo-Commit": hub.sha,
                **headers,
            }.items():
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
                name, hub.made = json.loads(data), True
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
            before, resolves, rest = self.path.partition("/resolve/")
            revision, _, path = rest.partition("/")
            if self.path == "/api/whoami-v2":
                self.answer(
                    {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []}
                )
            elif resolves and hub.hide:
                self.answer({}, hub.hide)
            elif resolves and path in hub.files and revision in ("main", hub.sha):
                self.answer(hub.files[path], ETag=f'"{hashlib.sha1(hub.files[path]).hexdigest()}"')
            elif resolves:
                self.answer({}, 404, X_Error_Code="EntryNotFound")
            elif self.path.startswith("/api/models/") and not hub.made:
                self.answer({}, 404, X_Error_Code="RepoNotFound")
            elif self.path.startswith("/api/models/"):
                name = before.removeprefix("/api/models/").partition("/revision")[0]
                self.answer(
                    {
                        "id": name,
                        "sha": hub.sha,
                        "private": False,
                        "tags": [],
                        "siblings": [{"rfilename": path} for path in hub.files],
                    }
                )
            else:
                self.answer({"error": self.path}, 404)

        do_HEAD = do_GET

    def mode(path: str) -> str:
        return "lfs" if path.endswith((".safetensors", ".bin")) else "regular"

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    # What functions of the library use was fixed when it was imported.
    monkeypatch.setattr(hf_api.api, "endpoint", url)
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
