"""Real servers on the loopback for tests: a web server with range requests and injected faults, and S3."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class WebServer:
    """Serves a folder. faults: errors for the next GETs of a shard: "500", "stall", "truncate" or "zeros".

    plain: as `python -m http.server`, without ranges.  lengths: whether it gives the length of a file.
    """

    def __init__(self, folder: Path):
        self.folder, self.port = folder, 0
        self.faults: list[str] = []
        self.plain, self.lengths = False, True
        self.refused = 0  # number of requests, for any file, that get 503 instead
        self.gets: list[tuple[str, int]] = []
        self.start()

    def start(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET(body=False)

            def do_GET(self, body: bool = True) -> None:
                if server.refused:
                    server.refused -= 1
                    self.send_error(503)
                    return
                path = server.folder / unquote(self.path).lstrip("/")
                if not path.is_file():
                    self.send_error(404)
                    return
                data, byte_range = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                byte_range = None if server.plain else byte_range
                if byte_range:
                    data = data[int(byte_range[1]) : int(byte_range[2]) + 1]
                fault = ""
                if body and path.suffix == ".tar":
                    server.gets.append((path.name, len(data)))
                    fault = server.faults.pop(0) if server.faults else ""
                if fault == "500":
                    self.send_error(500)
                    return
                if fault == "zeros":
                    data = bytes(len(data))
                self.send_response(206 if byte_range else 200)
                if server.lengths:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if fault == "stall":
                    time.sleep(1.0)
                elif body:
                    self.wfile.write(data[: len(data) // 2] if fault == "truncate" else data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:  # clients that disconnect are part of the tests
                pass

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def bucket(folder: Path, monkeypatch: Any) -> Iterator[str]:
    """The folder's files in an S3 bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    values = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**values, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, value)
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        for path in folder.iterdir():
            client.upload_file(str(path), "images", f"train/{path.name}")
        yield "s3://images/train"
    finally:
        server.stop()
