"""Mirrors on loopback: one that answers as a test says, and one of files, with a proxy before it that breaks things."""

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from s3 import Proxy

from dcgan.data.sources import attempts

Answer = Callable[[str, int], tuple[int, bytes, int]]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other without a pause worth mentioning, and loopback is reached without a proxy."""
    monkeypatch.setattr(attempts, "DELAY", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.fixture
def serve(quick: None) -> Iterator[Callable[[Answer], tuple[str, list[str]]]]:
    """serve(answer) -> (address of a directory, names asked for so far).

    answer(name, number of the request) gives the status, the bytes to send and the length to announce.
    """
    running: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> tuple[str, list[str]]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/mirror/")
                status, body, length = answer(name, len(asked))
                asked.append(name)
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        running.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}/mirror/", asked

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


class Mirror(Proxy):
    """A directory of `files` at `address`, behind a proxy with faults.

    ranges: whether it gives parts of files; conditions: whether it minds If-Range; lengths: whether it announces them.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = self.conditions = self.lengths = True
        self._files = ThreadingHTTPServer(("127.0.0.1", 0), _directory(self))
        super().__init__(self._files.server_port)

    def __enter__(self) -> "Mirror":
        threading.Thread(target=self._files.serve_forever, args=(0.05,), daemon=True).start()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(None, None, None)
        self._files.shutdown()
        self._files.server_close()


def _directory(mirror: Mirror) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = mirror.files.get(self.path.removeprefix("/"))
            if content is None:
                self.send_error(404)
                return
            etag = f'"{hashlib.md5(content).hexdigest()}"'
            start = self.start(etag) if mirror.ranges else 0
            if start and start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("ETag", etag)
            if mirror.lengths:
                self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            self.wfile.write(content[start:])

        def start(self, etag: str) -> int:
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            changed = mirror.conditions and self.headers.get("If-Range", etag) != etag
            return int(asked[1]) if asked and not changed else 0

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def make_mirror(quick: None) -> Iterator[Callable[..., Mirror]]:
    """make_mirror(name=content, ...): a running one with these files."""
    running: list[Mirror] = []

    def start(**files: bytes) -> Mirror:
        running.append(Mirror().__enter__())
        running[-1].files |= files
        return running[-1]

    yield start
    for mirror in running:
        mirror.__exit__()
