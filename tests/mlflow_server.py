"""A real MLflow server on loopback, and a gate before it that opens and closes at once: a start takes half a minute."""

import contextlib
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path


class Server:
    """`mlflow server` over a SQLite file and artifacts in `directory`; not started yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.directory / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.directory / "artifacts")]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.directory / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=self.directory, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self._wait()

    def _wait(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError(f"the server does not answer:\n{(self.directory / 'log').read_text()[-2000:]}")

    def stop(self) -> None:
        """End the server and the workers it started."""
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None

    def signal(self, number: int) -> None:
        """To the server and its workers: SIGSTOP makes it hang, SIGCONT go on."""
        assert self.process is not None
        os.killpg(self.process.pid, number)


class Gate:
    """A port that passes everything to a server while it is open, and refuses connections while it is closed."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.listener: socketserver.ThreadingTCPServer | None = None
        self.live: list[socket.socket] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        gate = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", gate.target)) as onward:
                    gate.live += [self.request, onward]
                    back = threading.Thread(target=_pump, args=(onward, self.request), daemon=True)
                    back.start()
                    _pump(self.request, onward)
                    back.join()

        socketserver.ThreadingTCPServer.allow_reuse_address = True
        self.listener = socketserver.ThreadingTCPServer(("127.0.0.1", self.port), Handler)
        self.listener.daemon_threads = True
        threading.Thread(target=self.listener.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Refuse new connections and cut the ones that are open."""
        if self.listener is not None:
            self.listener.shutdown()
            self.listener.socket.close()
            self.listener = None
        while self.live:
            connection = self.live.pop()
            with contextlib.suppress(OSError):  # ended by itself
                connection.shutdown(socket.SHUT_RDWR)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass bytes on until one side ends."""
    with contextlib.suppress(OSError):
        while content := source.recv(65_536):
            sink.sendall(content)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
