"""Runs Prefect, MLflow and a Prefect worker as plain processes on loopback, with all their files in one home.

    python infra/local.py ui     both servers, until Ctrl-C
    python infra/local.py up     both servers and a worker, in the background, with everything in prefect.yaml deployed
    python infra/local.py down   stop what is running

DCGAN_HOME (./var), PREFECT_PORT (4200) and MLFLOW_PORT (5000) may be set; a running server is found where it was
started. README.md next to this file says more.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from services import BIN, ENVIRONMENT, HOME, MLFLOW, PREFECT, ROOT, SERVERS, SERVICES, STOP_SECONDS, WORKER, fail, say

CANCEL_SECONDS = 60  # Prefect gives a flow run 30 to end, and checks every 10 for what is to be cancelled


def up() -> None:
    """Start what does not run yet, deploy everything, and say what to do next."""
    _start_servers()
    WORKER.start()
    WORKER.wait()  # it creates the work pool, which deploying needs
    _crash_zombies()
    _deploy()
    lines = [f"export {name}={shlex.quote(value)}" for name, value in ENVIRONMENT.items()]
    (HOME / "env").write_text("\n".join([*lines, f'export PATH={shlex.quote(str(BIN))}:"$PATH"', ""]))
    say("", *_addresses(), f"Logs     {SERVICES}", "", "Run a deployment, for instance:", sep="\n")
    file = (HOME / "env").relative_to(ROOT) if HOME.is_relative_to(ROOT) else HOME / "env"
    say(f"  . {shlex.quote(str(file))} && prefect deployment run train-eval/digits --watch")
    say("Stop everything: make down")


def down() -> None:
    """Cancel what the worker runs, which would count as running for ever; then stop the worker and the servers."""
    if all(service.pid() for service in (WORKER, *SERVERS)):
        try:
            _cancel_flow_runs()
        except (OSError, ValueError) as error:  # no answer, or another program's
            say(f"flow runs could not be cancelled: {error}")
    _end_flow_runs()
    for service in (WORKER, *reversed(SERVERS)):
        if service.stop():
            say(f"stopped {service.name}")


def ui() -> None:
    """Run both servers until Ctrl-C; those that `up` started keep running."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        _start_servers()
        say(*_addresses(), sep="\n")
        own = [server for server in SERVERS if server.process]
        if not own:
            return
        say("Ctrl-C stops them.")
        while all(server.pid() for server in own):
            time.sleep(0.5)
        fail(f"a server stopped; see {SERVICES}")
    except KeyboardInterrupt:
        say()
    finally:
        for server in SERVERS:
            if server.process:
                server.stop()


def _start_servers() -> None:
    named = os.environ.get("MLFLOW_TRACKING_URI") or MLFLOW
    if (other := urlsplit(named).hostname or urlsplit(named).scheme) not in (
        "127.0.0.1",
        "localhost",
    ):  # its own, also an older one's
        fail(f"this runs an MLflow server of its own, and MLFLOW_TRACKING_URI names another, at {other}: unset it")
    for server in SERVERS:
        server.start()
    say(f"starting {' and '.join(server.name for server in SERVERS)} ...")
    for server in SERVERS:
        server.wait()


def _addresses() -> tuple[str, str]:
    return f"Prefect  {PREFECT}", f"MLflow   {MLFLOW}"


def _deploy() -> None:
    command = [BIN / "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    if done.returncode:
        fail(f"prefect.yaml could not be deployed:\n{done.stdout}{done.stderr}")


def _crash_zombies() -> None:
    """Have the server mark a flow run as crashed when its process and its worker have both died."""
    automation = json.loads((ROOT / "infra" / "zombies.json").read_text())
    known = _post("automations/filter", {"automations": {"name": {"any_": [automation["name"]]}}})
    if not known:
        _post("automations/", automation)


def _cancel_flow_runs() -> None:
    """Cancel every flow run of a deployment that is running, and wait until their processes have ended."""
    deployed = {"deployment_id": {"is_null_": False}}  # a flow run of `make run` has none, and is not the worker's
    running = {"flow_runs": {**deployed, "state": {"type": {"any_": ["PENDING", "RUNNING"]}}}}
    for run in _post("flow_runs/filter", running):
        _post(f"flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLING"}})
        say(f"cancelling {run['name']}")
    deadline = time.monotonic() + CANCEL_SECONDS
    cancelling = {"flow_runs": {**deployed, "state": {"type": {"any_": ["CANCELLING"]}}}}
    while _post("flow_runs/filter", cancelling) and time.monotonic() < deadline:
        time.sleep(0.5)


def _end_flow_runs() -> None:
    """End those that still run: once the server was restarted, they seldom hear that they are cancelled.

    Their sessions are their own, so they outlive the worker. SIGTERM goes to the flow's process alone, which has Ray's
    workers keep a checkpoint first.
    """
    left = _flow_runs()
    for pid in left:
        say(f"stopping the flow run of process {pid}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while set(left) & set(_flow_runs()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _flow_runs() -> list[int]:
    """The processes of flow runs that this home's worker has started for this server."""
    found, ours = [], {f"PREFECT_API_URL={PREFECT}/api".encode(), b"DCGAN_HOME=" + os.fsencode(HOME)}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if b"prefect.engine" in (process / "cmdline").read_bytes().split(b"\0"):
                found += [int(process.name)] * (ours <= {*(process / "environ").read_bytes().split(b"\0")})
    return found


def _post(path: str, content: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{PREFECT}/api/{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


if __name__ == "__main__":
    commands = {"up": up, "down": down, "ui": ui}
    if sys.argv[1:] not in [[name] for name in commands]:
        fail(f"usage: python infra/local.py {' | '.join(commands)}")
    commands[sys.argv[1]]()
