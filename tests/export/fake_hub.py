"""A small model hub on this machine, spoken to by the real huggingface_hub: create, ask, and commit with large files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_fake_token_that_may_write"


class FakeHub:
    """A context manager.

    Attributes:
        url: its address.
        repos: whether it is private, by ORG/NAME.
        files: contents by repository and name.
        cards: metadata of models that are there.
        asked: method and path of every request.
        tokens: what each was sent with.
        refuse: status that creating a repository is answered with; 0: it is made.
    """

    def __init__(self) -> None:
        self.repos: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.tokens: dict[str, str | None] = {}
        self.refuse = 0
        hub = self

        class Handler(_Handler):
            def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
                return hub.answer(method, path, body)

        Handler.hub = self
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        self.asked.append(f"{method} {path}")
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.large[match[1]] = body
            return 200, {}
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return 200, self._batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [{**f, "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in json.loads(body)["files"]]
            return 200, {"files": files}
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return 200, self._commit(match[1], body)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path):
            return self._info(match[1])
        return 404, {"error": f"no such address here: {method} {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{asked['organization']}/{asked['name']}"
        if self.refuse:
            return self.refuse, {"error": "not for you"}
        if repo in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}
        private = asked.get("private", asked.get("visibility") == "private")
        self.repos[repo], self.files[repo] = bool(private), {}
        return 200, {"url": f"{self.url}/{repo}"}

    def _info(self, repo: str) -> tuple[int, Any]:
        if repo in self.cards:
            return 200, {"id": repo, "private": False, "siblings": [], "cardData": self.cards[repo]}
        if repo in self.repos:
            return 200, {"id": repo, "private": self.repos[repo], "siblings": [], "sha": "0" * 40}
        return 404, {"error": "Repository not found"}

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}", "header": {}}}}
            for one in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repo: str, body: bytes) -> dict[str, Any]:
        for line in body.splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "file":
                assert value["encoding"] == "base64"
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.large[value["oid"]]
        oid = "a" * 40
        return {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".gguf")) else "regular"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        raise NotImplementedError

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        self.hub.tokens[f"{method} {path}"] = self.headers.get("authorization")
        status, answer = self.answer(method, path, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *args: object) -> None:
        pass
