"""A hub on this machine: as much of its HTTP interface as one download and one upload need."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_the_tests"


class Hub:
    """What the hub holds.

    Attributes:
        files: By repository, then by path.
        private: Repositories that only the token sees.
        requests: Paths that were asked for, with their methods.
        made: Names and bodies of the repositories that were made.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.made: dict[str, dict] = {}
        self.uploads: dict[str, bytes] = {}


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Serves it; yields the address, for HF_ENDPOINT."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self._note()
        if path == "/api/whoami-v2":
            known = self.headers["Authorization"] == f"Bearer {TOKEN}"
            self._answer(200 if known else 401, {"name": "me", "type": "user", "orgs": []})
        elif path.startswith("/api/models/"):
            repo, _, rest = path.removeprefix("/api/models/").partition("/revision/")
            if not rest:
                repo, _, rest = repo.partition("/tree/")
                if (files := self._find(repo, rest)) is not None:
                    entries = [
                        {"type": "file", "path": name, "size": len(data), "oid": _hash(data)}
                        for name, data in files.items()
                    ]
                    self._answer(200, entries)
            elif (files := self._find(repo, rest)) is not None:
                siblings = [{"rfilename": name} for name in files]
                self._answer(200, {"id": repo, "sha": COMMIT, "siblings": siblings})
        else:
            repo, _, rest = path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            if (files := self._find(repo, revision)) is not None:
                if name not in files:
                    self._answer(404, {}, **{"X-Error-Code": "EntryNotFound"})
                    return
                headers = {"ETag": f'"{_hash(files[name])}"', "X-Repo-Commit": COMMIT}
                self._answer(200, files[name], **headers)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        path = self._note()
        self.hub.uploads[path.rpartition("/")[2]] = self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        path, body = self._note(), self._body()
        address = f"http://{self.headers['Host']}"
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.made[repo] = asked
            self._answer(200, {"url": f"{address}/{repo}", "name": repo, "id": repo})
        elif "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files, "commitOid": COMMIT})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **one,
                    "actions": {"upload": {"href": f"{address}/lfs/{one['oid']}", "header": {}}},
                }
                for one in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        else:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            self._commit(repo, [json.loads(line) for line in body.splitlines()])
            answer = {"commitUrl": f"{address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}
            self._answer(200, {**answer, "success": True})

    def _commit(self, repo: str, lines: list[dict]) -> None:
        files = self.hub.files.setdefault(repo, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]

    def _find(self, repo: str, revision: str) -> dict[str, bytes] | None:
        seen = repo not in self.hub.private or self.headers["Authorization"] == f"Bearer {TOKEN}"
        if repo not in self.hub.files or not seen:
            self._answer(404, {}, **{"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", COMMIT):
            self._answer(404, {}, **{"X-Error-Code": "RevisionNotFound"})
        else:
            return self.hub.files[repo]
        return None

    def _note(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: object, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def _hash(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
