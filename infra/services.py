"""Prefect's server, MLflow's and a Prefect worker as processes that are found again: started, waited for, stopped."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
HOME = Path(os.environ.get("DCGAN_HOME") or ROOT / "var").absolute()
SERVICES = HOME / "services"
POOL = "local"  # as in prefect.yaml
START_SECONDS = 240  # MLflow creates its database in 10 s on a quiet machine, in a minute on a loaded one
PORT_SECONDS = 5  # a process that was killed counts as gone while some of its threads still hold its port
STOP_SECONDS = 60  # for a checkpoint, and for Ray to end


def _born(pid: int) -> str | None:
    """When a process was started, in clock ticks since boot; None if it is gone or a zombie. See proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def _recorded(name: str) -> tuple[int, str] | None:
    """A service's pid and port (empty if it has none), if it runs, and its pid was not reused by another process."""
    file = SERVICES / f"{name}.pid"
    pid, born, port = [*(file.read_text().split() if file.is_file() else []), "", "", ""][:3]
    return (int(pid), port) if pid and _born(int(pid)) == born else None


def _address(name: str, port: str) -> str:
    """Where a server runs, or else should be started."""
    recorded = _recorded(name)
    running = recorded[1] if recorded else ""
    file = SERVICES / f"{name}.pid"  # of one that died: worker and flow runs still ask at its port
    died = "".join(file.read_text().split()[2:3]) if file.is_file() else ""
    chosen = running or os.environ.get(f"{name.upper()}_PORT") or died or port
    if not (chosen.isdecimal() and 0 < int(chosen) < 2**16):
        fail(f"{name.upper()}_PORT={chosen!r} is not a port, a whole number from 1 to 65535")
    return f"http://127.0.0.1:{chosen}"


def fail(message: str) -> NoReturn:
    sys.exit(f"error: {message}")


PREFECT, MLFLOW = _address("prefect", "4200"), _address("mlflow", "5000")
ENVIRONMENT = {
    "DCGAN_HOME": str(HOME),
    "PREFECT_HOME": str(HOME / "prefect"),
    "PREFECT_API_URL": f"{PREFECT}/api",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; zombies.json counts on it
    "DO_NOT_TRACK": "1",
    "MLFLOW_TRACKING_URI": MLFLOW,
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # for evaluations of language models
}

say = functools.partial(print, flush=True)


@dataclass
class Service:
    """A process in its own session, with a file for its pid and one for its output."""

    name: str
    command: tuple[str, ...]
    address: str = ""  # where it answers 200 when it is ready
    words: str = ""  # or what its log says then
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)  # if it was started here

    @property
    def log(self) -> Path:
        return SERVICES / f"{self.name}.log"

    @property
    def pid_file(self) -> Path:
        return SERVICES / f"{self.name}.pid"

    def pid(self) -> int | None:
        """The process, if it runs."""
        recorded = _recorded(self.name)
        return recorded[0] if recorded else None

    def start(self) -> None:
        """Start it unless it runs. Exits if another program has its port, or it runs on another port than wanted."""
        port = urlsplit(self.address).port
        if self.pid() is not None:
            wanted = os.environ.get(f"{self.name.upper()}_PORT") or str(port)
            if port is not None and wanted != str(port):
                fail(f"{self.name} runs at port {port}, not {wanted}: make down stops it")
            return
        if port is not None:
            self._claim(port)
        for directory in (SERVICES, HOME / "prefect"):  # Prefect makes its own only where the parent exists
            directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(BIN / self.command[0]), *self.command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,
            )
        try:
            aside = self.pid_file.with_suffix(".new")
            aside.write_text(f"{self.process.pid} {_born(self.process.pid)} {port or ''}".rstrip())
            aside.replace(self.pid_file)
        except OSError:  # a process without a record could not be stopped
            os.killpg(self.process.pid, signal.SIGTERM)
            raise

    def _claim(self, port: int) -> None:
        deadline = time.monotonic() + PORT_SECONDS
        while _listens(port):
            if time.monotonic() > deadline:
                fail(f"port {port} is in use by another program: set {self.name.upper()}_PORT to a free one")
            time.sleep(0.1)

    def ready(self) -> bool:
        return _answers(self.address) if self.address else self.words in self.log.read_text(errors="replace")

    def wait(self) -> None:
        """Return when it is ready. Exits, with the end of its log, if it stops or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while self.pid() is None or not self.ready():  # the log of one that has ended says that it was
            if self.pid() is None and self.process is None:  # found as it was ending
                self.start()
            if self.pid() is None or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                fail(f"{self.name} did not start: {self._failure()}; the end of {self.log}:\n{tail}")
            time.sleep(0.2)

    def _failure(self) -> str:
        if self.process is None or self.pid() is not None:
            return f"not ready after {START_SECONDS} s"
        code = self.process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def stop(self) -> bool:
        """Stop it and all its children; False if it was not running."""
        pid = self.pid()
        if pid is None:
            self.pid_file.unlink(missing_ok=True)
            return False
        with contextlib.suppress(ProcessLookupError):  # another command may be stopping it, too
            os.killpg(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while self.pid() is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # any of the group that ignored the request
        self.pid_file.unlink(missing_ok=True)
        return True


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


SERVERS = (
    Service(
        "prefect",
        ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(urlsplit(PREFECT).port)),
        address=f"{PREFECT}/api/health",
    ),
    Service(
        "mlflow",
        (
            *("mlflow", "server", "--host", "127.0.0.1", "--port", str(urlsplit(MLFLOW).port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{HOME / 'mlflow.db'}"),
            # Clients write files themselves, not through the server: the record is then the same with the server
            # (`make up`) and without it (`make run`), whichever of them created the experiment.
            *("--no-serve-artifacts", "--default-artifact-root", (HOME / "mlartifacts").as_uri()),
        ),
        address=f"{MLFLOW}/health",
    ),
)
WORKER = Service(
    "worker",
    # One flow run at a time, of whichever deployment: two of the same settings would write the same directory, and the
    # machine has one GPU or none.
    ("prefect", "worker", "start", "--type", "process", "--pool", POOL, "--name", POOL, "--limit", "1"),
    words="started!",
)
