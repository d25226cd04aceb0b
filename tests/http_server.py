"""A real HTTP server that misbehaves in every way that was thought of, and what it serves; for test_download.py and test_archives.py."""

import hashlib
import io
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data_sets.transfer import RemoteFile

BODY = bytes(range(256)) * 4096  # 1 MB


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server: Server = self.server.owner
        name, seen = self.path.rsplit("/", 1)[-1], self.headers.get("Range")
        if body:
            server.ranges.append(seen)
        self.close_connection = True
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", f"{server.url}/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if server.status:
            self.send_error(server.status.pop(0))
            return
        if name not in server.files:
            self.send_error(404)
            return
        data, start = server.files[name], 0
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        if seen and server.ranges_served and self.headers.get("If-Range") in (None, tag):
            start = int(seen[6:].rstrip("-"))
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(data) - start + server.lie))
        self.end_headers()
        if not body:
            return
        data = bytes([data[start] ^ 1]) + data[start + 1 :] if server.corrupt and server.corrupt.pop(0) else data[start:]
        if server.cut:
            data = data[: server.cut.pop(0)]
        for at in range(0, len(data), 65536):
            try:
                self.wfile.write(data[at : at + 65536])
            except (BrokenPipeError, ConnectionResetError):
                return
            server.sent += len(data[at : at + 65536])
            time.sleep(server.pause)


class Server:
    """Serves `files`; the other attributes say how it misbehaves, a list element per answer."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: list[int] = []
        self.status: list[int] = []
        self.corrupt: list[bool] = []
        self.ranges_served, self.lie, self.pause, self.sent = True, 0, 0.0, 0
        self.ranges: list[str | None] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.owner = self
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, name: str, data: bytes, **more: object) -> RemoteFile:
        self.files[name] = data
        return RemoteFile(f"{self.url}/{name}", "md5", hashlib.md5(data).hexdigest(), len(data), **more)


def archive(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, data in entries.items():
            bundle.writestr(name, data)
    return buffer.getvalue()
