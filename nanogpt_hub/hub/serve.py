"""The page in which a browser runs the model, served from this machine: no Hub, no network needed.

    with PageServer("out/mine/best") as server:
        print(server.url)

A server of static files, as any other: the page's own, and the model's folder as model/.
"""

import json
import mimetypes
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from nanogpt_hub.checkpoint import read_config
from nanogpt_hub.hub.publish import training_files
from nanogpt_hub.hub.resolve import MODEL_FILES
from nanogpt_hub.hub.static import page_files

# The same on every machine: Windows may take .js for text/plain, which browsers refuse to run.
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html; charset=utf-8", ".json": "application/json"}
BLOCK = 2**20  # bytes sent at once


def model_files(folder: str | Path) -> dict[str, Path]:
    """The files of a model folder that the page may ask for, its run's under training/. ValueError where it is none."""
    folder = Path(folder)
    read_config(folder)
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in found.items() if MODEL_FILES.fullmatch(name)}
    return {**training_files(folder), **files}


class PageServer:
    """Serves the page until it is closed. `model` is a folder here, user/name on the Hub, or None.

    Raises ValueError for a folder that is no model, OSError where the port is taken.
    """

    def __init__(self, model: str | Path | None = None, host: str = "127.0.0.1", port: int = 0):
        self.files: dict[str, bytes | Path] = dict(page_files(str(model) if model else ""))
        if model is not None and Path(model).is_dir():
            files = model_files(model)
            listing = [[name, path.stat().st_size] for name, path in files.items()]
            self.files = dict(page_files("./model/")) | {f"model/{name}": path for name, path in files.items()}
            self.files["model/files.json"] = json.dumps(listing).encode()
        handler = type("Handler", (_Handler,), {"files": self.files})
        self.http = ThreadingHTTPServer((host, port), handler)
        self.http.daemon_threads = True
        self.url = f"http://{host}:{self.http.server_address[1]}/"

    def run(self) -> None:
        """Serves in this thread, until interrupted."""
        try:
            self.http.serve_forever(poll_interval=0.1)
        finally:
            self.http.server_close()

    def __enter__(self) -> "PageServer":
        threading.Thread(target=self.run, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.http.shutdown()


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD with the listed files and nothing else."""

    files: dict[str, bytes | Path]
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/") or "index.html"
        file = self.files.get(name)
        try:
            size = len(file) if isinstance(file, bytes) else file.stat().st_size if file is not None else 0
            self.send_response(200 if file is not None else 404)
            kind = TYPES.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
            for header, value in (("Content-Type", kind), ("Content-Length", str(size)), ("Cache-Control", "no-cache"),
                                  ("X-Content-Type-Options", "nosniff")):  # fmt: skip
                self.send_header(header, value)
            self.end_headers()
            if file is not None and self.command == "GET":
                self._send(file)
        except OSError:  # the visitor went away, or the file
            self.close_connection = True

    do_HEAD = do_GET

    def _send(self, file: bytes | Path) -> None:
        if isinstance(file, bytes):
            self.wfile.write(file)
            return
        with open(file, "rb") as opened:
            while block := opened.read(BLOCK):
                self.wfile.write(block)
