"""A model hub on loopback: as much of its HTTP API as `huggingface_hub.snapshot_download` speaks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
OTHER_SHA = "89abcdef0123456789abcdef0123456789abcdef"

REPO = "tiny/llama"
GATED = "tiny/gated"
BROKEN = "tiny/broken"


class Hub(ThreadingHTTPServer):
    """Serves one repository with these files on `main`; asked for what it lacks, it answers as the real one."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.revisions = {"main": SHA, SHA: SHA, "v1": OTHER_SHA, OTHER_SHA: OTHER_SHA}
        self.downloaded: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(files) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:], body)
        elif parts[2:3] == ["resolve"]:
            self._file(parts[3], "/".join(parts[4:]), body)
        else:
            self._send(404, b"{}", body)

    def _api(self, repo: str, rest: list[str], body: bool) -> None:
        if repo == GATED:
            return self._send(401, b"{}", body, **{"X-Error-Code": "GatedRepo"})
        if repo == BROKEN:
            return self._send(400, b"{}", body)
        if repo != REPO:
            return self._send(401, b"{}", body, **{"X-Error-Code": "RepoNotFound"})
        kind, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        sha = self.server.revisions.get(revision)
        if sha is None:
            return self._send(404, b"{}", body, **{"X-Error-Code": "RevisionNotFound"})
        if kind == "revision":
            return self._send(200, json.dumps({"id": repo, "sha": sha, "siblings": []}).encode(), body)
        tree = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.server.files.items()
        ]
        return self._send(200, json.dumps(tree).encode(), body)

    def _file(self, revision: str, name: str, body: bool) -> None:
        data = self.server.files.get(name)
        if data is None:
            return self._send(404, b"", body, **{"X-Error-Code": "EntryNotFound"})
        if body:
            self.server.downloaded.append(name)
        sha = self.server.revisions[revision]
        return self._send(200, data, body, **{"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha})

    def _send(self, status: int, data: bytes, body: bool, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)
