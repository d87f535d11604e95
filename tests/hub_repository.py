"""A Hugging Face hub on loopback that takes commits: repositories, branches, small files in the commit, large ones by LFS."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from tests.loopback_server import Loopback


class HubRepository:
    """What one repository, `org/name`, holds after the commits that came; `sent` are all bodies, to be searched for secrets."""

    TOKEN = "hf_write"

    def __init__(self, server: Loopback) -> None:
        self.server = server
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.branches: list[str] = []
        self.commits: list[str] = []
        self._stored: dict[str, bytes] = {}
        server.routes = self._route

    def _route(self, handler: Any, path: str, query: dict[str, list[str]]) -> bool:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        if path.startswith("/lfs/"):
            self._stored[path.rpartition("/")[2]] = body
            return handler.body(b"", 200, {})
        if path == "/api/validate-yaml":
            return handler.json({"errors": [], "warnings": []})
        if handler.headers.get("Authorization") != f"Bearer {self.TOKEN}":
            return handler.json({"error": "no write access"}, 403)
        if path == "/api/whoami-v2":
            return handler.json({"type": "user", "name": "somebody"})
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return handler.json({"url": f"{self.server.url}/org/name"})
        action = path.removeprefix("/api/models/org/name/").split("/")[0]
        answer = {"preupload": self._preupload, "branch": self._branch, "commit": self._commit, "info": self._batch}
        if path == "/org/name.git/info/lfs/objects/batch":
            action = "info"
        return handler.json(answer[action](path, body)) if action in answer else handler.json({"error": path}, 404)

    def _preupload(self, path: str, body: bytes) -> dict[str, Any]:
        files = json.loads(body)["files"]
        modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
        return {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]}

    def _branch(self, path: str, body: bytes) -> dict[str, Any]:
        self.branches.append(path.rpartition("/")[2])
        return {}

    def _batch(self, path: str, body: bytes) -> dict[str, Any]:
        upload = [
            {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": upload}

    def _commit(self, path: str, body: bytes) -> dict[str, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self._stored[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                self.files[value["path"]] = data
        return {"commitUrl": f"{self.server.url}/org/name/commit/abc", "commitOid": "abc", "pullRequestUrl": None}
