"""A server on loopback that answers what huggingface_hub asks the Hub when it uploads a folder, and keeps the files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_token_of_a_test"


class Hub:
    """address: of the server. refuse: path -> status with which a request of it is answered. files: name -> content.

    repositories: what was asked to be created. requests: method and path of each, in order.
    """

    def __init__(self) -> None:
        self.address = ""
        self.refuse: dict[str, int] = {}
        self.files: dict[str, bytes] = {}
        self.repositories: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self._large: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes, authorised: bool) -> tuple[int, Any]:
        path = path.partition("?")[0]
        self.requests.append(f"{method} {path}")
        status = next((status for start, status in self.refuse.items() if path.startswith(start)), None)
        if status is not None:
            return status, {"error": "not you"}
        if path.startswith("/large/"):
            self._large[path.removeprefix("/large/")] = body
            return 200, {}
        if not authorised:
            return 401, {"error": "no token"}
        values = json.loads(body) if body and not path.endswith("/commit/main") else {}
        if path == "/api/repos/create":
            self.repositories.append(values)
            return 200, {"url": f"{self.address}/{values.get('organization')}/{values['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            modes = [
                (of["path"], "lfs" if of["path"].endswith(".safetensors") else "regular") for of in values["files"]
            ]
            return 200, {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]}
        if path.endswith("/info/lfs/objects/batch"):
            actions = [
                {**of, "actions": {"upload": {"href": f"{self.address}/large/{of['oid']}", "header": {}}}}
                for of in values["objects"]
            ]
            return 200, {"transfer": "basic", "objects": actions}
        if path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines()])
            return 200, {
                "commitUrl": f"{self.address}/org/name/commit/{'0' * 40}",
                "commitOid": "0" * 40,
                "success": True,
            }
        if method == "GET" and self.repositories:
            return 200, {"id": path, "sha": "0" * 40, "siblings": []}
        return 404, {"error": f"{method} {path}"}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self._large[value["oid"]]


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub at its `address` until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, values = hub.answer(self.command, self.path, body, authorised)
            content = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _do

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
