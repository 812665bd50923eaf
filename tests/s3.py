"""A real S3 server on loopback, with a proxy before it that breaks what a test wants broken.

    with s3.server(tmp_path) as store:             # the AWS_* variables are set in here, and put back after
        store.put("bucket/a.bin", b"...")          # straight to the server: no fault, nothing in the log
        store.url("bucket/prefix")                 # s3://bucket/prefix
        store.environment                          # the same variables, for a process with an environment of its own
        store.faults(503, times=3, contains="a.bin")
        store.faults("truncate", at=1000)
        [(seen.method, seen.path, seen.range, seen.sent) for seen in store.log]

The bucket `bucket` is there from the start; any other is made with `store.put("other", b"")`. Everything that is not
`put` goes through the proxy, whose faults are, each for the next `times` requests that have `method` and whose path
with query contains `contains`:

    a number     answer with this status, and with Retry-After if `retry_after` is given
    "reset"      reset the connection after `at` bytes of the body
    "truncate"   close it after `at` bytes of the body, as if that were all
    "slow"       wait `seconds` before the answer and before each PIECE bytes of its body

`with s3.Proxy(port) as proxy` stands before any HTTP server on loopback in the same way; the proxy has `faults`,
`clear`, `log` and `address`.
"""

import contextlib
import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from unittest import mock
from urllib.parse import quote

PIECE = 65_536  # bytes passed on at once
STARTUP = 60  # seconds; a second or two on an idle machine
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}  # a proxy answers for these itself
# What the developer's own account, or a test before, may have set; none of it may reach the server under test.
UNSET = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")

# The server, ended by the end of its input: tests that are killed leave none behind.
SERVE = """
import os, sys, threading
from moto.server import main
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
main(sys.argv[1:])
"""


@dataclass
class Request:
    """What the proxy was asked, and what it gave: `sent` counts the bytes of the body."""

    method: str
    path: str
    headers: Mapping[str, str]
    status: int = 0
    sent: int = 0

    @property
    def range(self) -> str | None:
        """The header Range."""
        return self.headers.get("Range")


@dataclass
class Fault:
    """One way to fail, `times` times."""

    kind: int | str
    times: float
    method: str
    contains: str
    at: int
    seconds: float
    retry_after: str | None


class Proxy:
    """Passes HTTP on to `port` of loopback, except for the faults that are due; counts every byte."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.log: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def faults(
        self,
        kind: int | str,
        times: float = 1,
        *,
        method: str = "GET",
        contains: str = "",
        at: int = 0,
        seconds: float = 0.1,
        retry_after: str | None = None,
    ) -> None:
        """Break the next `times` requests that match; see above. `times` may be `math.inf`, until `clear`."""
        assert isinstance(kind, int) or kind in ("reset", "truncate", "slow"), kind
        with self._lock:
            self._faults.append(Fault(kind, times, method, contains, at, seconds, retry_after))

    def clear(self) -> None:
        """Forget the faults that are left and the log."""
        with self._lock:
            self._faults, self.log = [], []

    def due(self, request: Request) -> Fault | None:
        """The fault for this request, if there is one; it is then counted as used."""
        with self._lock:
            self.log.append(request)
            for fault in self._faults:
                if fault.times > 0 and fault.method == request.method and fault.contains in request.path:
                    fault.times -= 1
                    return fault
        return None


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            self.close_connection = True  # so that the end of the body can be the end of the connection
            seen = Request(self.command, self.path, dict(self.headers))
            fault = proxy.due(seen)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with contextlib.suppress(ConnectionError):  # the client is gone: a test may have killed it
                if fault and isinstance(fault.kind, int):
                    self.refuse(seen, fault)
                else:
                    self.relay(seen, fault, body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on  # noqa: N815

        def refuse(self, seen: Request, fault: Fault) -> None:
            assert isinstance(fault.kind, int)
            seen.status = fault.kind
            self.send_response(fault.kind)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            if fault.retry_after is not None:
                self.send_header("Retry-After", fault.retry_after)
            self.end_headers()

        def relay(self, seen: Request, fault: Fault | None, body: bytes) -> None:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", proxy.target, timeout=60)) as onward:
                onward.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in HOP_BY_HOP | {"expect"}:
                        onward.putheader(name, value)
                onward.endheaders(body)
                answer = onward.getresponse()
                if fault and fault.kind == "slow":
                    time.sleep(fault.seconds)
                self.answer(seen, answer)
                self.content(seen, fault, answer)

        def answer(self, seen: Request, answer: http.client.HTTPResponse) -> None:
            seen.status = answer.status
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()

        def content(self, seen: Request, fault: Fault | None, answer: http.client.HTTPResponse) -> None:
            cut = fault is not None and fault.kind in ("reset", "truncate")
            while piece := answer.read(min(PIECE, fault.at - seen.sent) if fault and cut else PIECE):
                self.wfile.write(piece)
                seen.sent += len(piece)
                if fault and fault.kind == "slow":
                    time.sleep(fault.seconds)
            if fault and fault.kind == "reset":
                # Closing with a linger of zero seconds, and without a shutdown before it, sends RST in place of FIN.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())

        def log_message(self, *_: object) -> None:
            pass

    return Handler


class Store:
    """A running server and the proxy before it."""

    def __init__(self, port: int, proxy: Proxy) -> None:
        self._direct = f"http://127.0.0.1:{port}"
        self.proxy = proxy
        self.faults, self.clear = proxy.faults, proxy.clear
        self.environment = {
            "AWS_ENDPOINT_URL": proxy.address,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "no_proxy": "127.0.0.1",
        }

    @property
    def log(self) -> list[Request]:
        """The requests so far, those of `put` excepted."""
        return self.proxy.log

    def url(self, path: str) -> str:
        """s3://bucket/..."""
        return f"s3://{path}"

    def put(self, path: str, content: bytes) -> None:
        """Make the bucket `path`, or the object at `path`, whose key may be as hostile as a test wants."""
        bucket, _, key = path.partition("/")
        address = f"{self._direct}/{bucket}" + f"/{quote(key, safe='')}" * bool(key)
        kind = {"Content-Type": "application/octet-stream"}
        self._ask(urllib.request.Request(address, content, kind, method="PUT"))

    def delete(self, path: str) -> None:
        """Delete the object at `path`."""
        self._ask(urllib.request.Request(f"{self._direct}/{path}", method="DELETE"))

    def _ask(self, request: urllib.request.Request) -> None:
        # The server takes any signature; without one it takes the request for a stranger's, who may not overwrite.
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=testing/20250101/us-east-1/s3/aws4_request")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30):
            pass


@contextmanager
def server(directory: Path) -> Iterator[Store]:
    """A server in a process of its own, empty but for the bucket `bucket`; its log is in `directory`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "-H", "127.0.0.1", "-p", str(port)]
    log = directory / "s3.log"
    with log.open("a") as output:
        process = subprocess.Popen(
            command, cwd=directory, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait(process, port, log)
        with Proxy(port) as proxy, mock.patch.dict(os.environ):
            store = Store(port, proxy)
            for name in UNSET:
                os.environ.pop(name, None)
            os.environ.update(store.environment)
            store.put("bucket", b"")
            yield store
    finally:
        process.kill()
        process.communicate()


def _wait(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + STARTUP
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError(f"the S3 server does not answer:\n{log.read_text()[-2000:]}")
