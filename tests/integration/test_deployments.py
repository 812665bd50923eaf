"""`make up` for real: servers, worker and deployments on free ports; runs that complete, are refused, are cancelled."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray_nodes

from dcgan import checkpoint, config
from dcgan.reproduce import TABLES
from dcgan.run import Run
from dcgan.tracking_ledger import Ledger

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMALL = [
    *("train.steps=4", "train.batch_size=16", "train.log_every=1", "train.checkpoint_every=4", "train.sample_every=4"),
    *("model.width=4", "compute.device=cpu", "evaluate.protocols=[knn]", "evaluate.labels=100"),
]


@dataclass
class Stack:
    """What `infra/local.py` runs in one home, and the environment that a user of it has."""

    home: Path
    environment: dict[str, str]

    def local(self, command: str) -> "subprocess.CompletedProcess[str]":
        return self.call(sys.executable, str(ROOT / "infra" / "local.py"), command)

    def call(self, *command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=500)

    def prefect(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """The CLI as after `. var/env`."""
        script = '. "$DCGAN_HOME/env" && exec prefect --no-prompt "$@"'
        return self.call("sh", "-c", script, "sh", *words)

    def post(self, path: str, content: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.environment['PREFECT_PORT']}/api/{path}",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def flow_runs(self) -> list[dict[str, Any]]:
        """Newest first."""
        return self.post("flow_runs/filter", {"sort": "START_TIME_DESC"})

    def processes(self) -> list[str]:
        """The command lines of all processes started with this stack's home."""
        marker = f"DCGAN_HOME={self.home}".encode()
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if marker in (directory / "environ").read_bytes().split(b"\0"):
                    found.append((directory / "cmdline").read_text().replace("\0", " "))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return [command for command in found if command]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def until(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.3)


def give_way(run: Run) -> None:
    """Have other processes go before the one that trains a run, which never ends and would take a core from them."""
    for thread in Path("/proc", (run.path / ".lock").read_text().strip(), "task").iterdir():
        os.setpriority(os.PRIO_PROCESS, int(thread.name), 5)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "RAY_"))}
    stack = Stack(home, {**kept, "DCGAN_HOME": str(home), "PREFECT_PORT": free_port(), "MLFLOW_PORT": free_port()})
    try:
        done = stack.local("up")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "prefect deployment run train-eval/digits --watch" in done.stdout
        yield stack
    finally:
        stack.local("down")


def test_deployments_are_in_place_with_a_choice_of_presets_and_tables(stack: Stack) -> None:
    flows = {found["id"]: found["name"] for found in stack.post("flows/filter", {})}
    deployed = {f"{flows[found['flow_id']]}/{found['name']}": found for found in stack.post("deployments/filter", {})}

    presets, tables = [f"train-eval/{name}" for name in config.PRESETS], [f"reproduce/{name}" for name in TABLES]
    assert set(deployed) == {*presets, *tables}
    for name, deployment in deployed.items():
        properties = deployment["parameter_openapi_schema"]["properties"]
        choice = properties["preset"] if name in presets else properties["table"]
        assert choice["enum"] == list(config.PRESETS if name in presets else TABLES)
        assert deployment["global_concurrency_limit"] is None
    (automation,) = stack.post("automations/filter", {})
    assert automation["enabled"]
    (worker,) = (command for command in stack.processes() if " worker start " in command)
    assert "--limit 1" in worker, "flow runs of all deployments wait for one another there"


def test_deployment_runs_to_the_end_and_is_in_mlflow(stack: Stack) -> None:
    done = stack.prefect("deployment", "run", "train-eval/digits", "-p", f"overrides={json.dumps(SMALL)}", "--watch")

    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = map(Run.open, (stack.home / "runs").iterdir())
    assert set(run.scores()) == {"knn"}
    ledger = Ledger.load(run.path / "mlflow.json")
    assert ledger.status == "FINISHED"
    address = f"http://127.0.0.1:{stack.environment['MLFLOW_PORT']}/api/2.0/mlflow/runs/get?run_id={ledger.run_id}"
    with urllib.request.urlopen(address, timeout=30) as response:
        recorded = json.load(response)["run"]
    assert recorded["info"]["status"] == "FINISHED"
    assert {tag["key"]: tag["value"] for tag in recorded["data"]["tags"]}["prefect_flow_run"] == stack.flow_runs()[0][
        "id"
    ]
    (artifact,) = stack.post("artifacts/filter", {"artifacts": {"key": {"like_": "train-eval-%"}}})
    assert f"/runs/{ledger.run_id}" in artifact["data"]


def test_a_deployments_environment_moves_it_to_a_cluster(stack: Stack, tmp_path: Path) -> None:
    started = set(stack.home.glob("ray/session_*"))
    with ray_nodes.cluster(tmp_path):
        variables = {name: os.environ[name] for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        words = json.dumps([*SMALL, "train.seed=3", "compute.workers=1"])
        done = stack.prefect(
            *("deployment", "run", "train-eval/digits", "-p", f"overrides={words}", "--watch"),
            *("--job-variable", f"env={json.dumps(variables)}"),
        )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (run for run in map(Run.open, stack.home.glob("runs/*")) if run.experiment.train.seed == 3)
    assert checkpoint.steps(run) == [4]
    assert set(run.scores()) == {"knn"}
    assert set(stack.home.glob("ray/session_*")) == started, "a Ray of its own was started"


def test_parameter_that_is_no_preset_is_refused_at_submission(stack: Stack) -> None:
    before = len(stack.flow_runs())

    done = stack.prefect("deployment", "run", "train-eval/digits", "-p", 'preset="imagenet21k"')

    assert done.returncode != 0
    assert "preset" in done.stdout + done.stderr
    assert len(stack.flow_runs()) == before


def test_folder_without_a_directory_fails_at_once_and_says_so(stack: Stack) -> None:
    done = stack.prefect("deployment", "run", "train-eval/folder", "--watch")

    assert done.returncode != 0
    assert "data.source=DIRECTORY" in stack.flow_runs()[0]["state"]["message"]


def test_a_table_whose_data_is_absent_says_so_and_completes(stack: Stack, tmp_path: Path) -> None:
    words = [f"mnist/data.source={tmp_path}"]
    done = stack.prefect(
        *("deployment", "run", "reproduce/mnist", "-p", 'rows=["real"]', "-p", f"overrides={json.dumps(words)}"),
        "--watch",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (stack.home / "results.md").read_text()
    assert "- **real data, 50,000**: not measured: " in page
    assert str(tmp_path) in page


def test_cancelled_flow_keeps_a_checkpoint_and_stops_its_ray_workers_and_its_mlflow_run(stack: Stack) -> None:
    before = set(stack.home.glob("runs/*"))
    words = [*SMALL, "train.steps=1000000", "train.checkpoint_every=1000000", "compute.workers=1"]
    stack.prefect("deployment", "run", "train-eval/digits", "-p", f"overrides={json.dumps(words)}")
    until(lambda: [run for run in set(stack.home.glob("runs/*")) - before if (run / "metrics.jsonl").exists()], 300)
    (run,) = map(Run.open, set(stack.home.glob("runs/*")) - before)
    give_way(run)

    stack.prefect("flow-run", "cancel", stack.flow_runs()[0]["id"])

    until(lambda: stack.flow_runs()[0]["state"]["type"] == "CANCELLED", 90)
    until(lambda: Ledger.load(run.path / "mlflow.json").status == "KILLED", 60)
    until(lambda: not any("ray::" in command or "raylet" in command for command in stack.processes()), 60)
    assert checkpoint.steps(run) == [run.metrics()[-1]["step"]], "SIGTERM to all processes spares Ray's"


def test_a_server_that_dies_ends_nothing_up_again_starts_nothing_twice_and_down_leaves_nothing(stack: Stack) -> None:
    """And SIGTERM to a flow has its Ray worker keep a checkpoint."""
    before = set(stack.home.glob("runs/*"))
    words = [*SMALL, "train.steps=1000001", "train.checkpoint_every=1000000", "compute.workers=1"]
    stack.prefect("deployment", "run", "train-eval/digits", "-p", f"overrides={json.dumps(words)}")
    until(lambda: [run for run in set(stack.home.glob("runs/*")) - before if (run / "metrics.jsonl").exists()], 300)
    (run,) = map(Run.open, set(stack.home.glob("runs/*")) - before)
    give_way(run)
    pids = {path.stem: path.read_text() for path in (stack.home / "services").glob("*.pid")}
    os.killpg(int(pids["prefect"].split()[0]), signal.SIGKILL)
    # Whoever forgets the ports means those at which the worker still asks, and later the servers that run, not those of
    # others at the usual ports.
    ports = {"PREFECT_PORT", "MLFLOW_PORT"}
    forgotten = Stack(stack.home, {name: value for name, value in stack.environment.items() if name not in ports})
    again = forgotten.local("up")
    assert again.returncode == 0, again.stdout + again.stderr
    now = {path.stem: path.read_text() for path in (stack.home / "services").glob("*.pid")}
    assert {name for name in now if now[name] == pids[name]} == {"mlflow", "worker"}
    done = len(run.metrics())
    until(lambda: len(run.metrics()) > done + 10, 60)

    elsewhere = Stack(stack.home, {**stack.environment, "PREFECT_PORT": free_port()})
    refused = elsewhere.local("up")
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: prefect runs at port {stack.environment['PREFECT_PORT']}, not ")
    assert forgotten.local("up").returncode == 0
    assert {path.stem: path.read_text() for path in (stack.home / "services").glob("*.pid")} == now

    # A restarted server seldom manages to cancel a flow run of before: here it never does.
    script = "import sys; sys.path.insert(0, 'infra'); import local; local._cancel_flow_runs = print; local.down()"
    ended = forgotten.call(sys.executable, "-c", script)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "stopping the flow run of process" in ended.stdout
    assert stack.processes() == []
    assert list((stack.home / "services").glob("*.pid")) == []
    (step,) = checkpoint.steps(run)
    assert run.metrics()[-1]["step"] == step


def test_port_that_is_taken_is_named(stack: Stack, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        taken = Stack(tmp_path, {**stack.environment, "DCGAN_HOME": str(tmp_path), "PREFECT_PORT": port})
        done = taken.local("up")
    assert done.returncode == 1
    assert done.stderr == f"error: port {port} is in use by another program: set PREFECT_PORT to a free one\n"


def test_another_mlflow_server_is_refused(tmp_path: Path) -> None:
    names = {"DCGAN_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": "https://mlflow.example"}
    command = [sys.executable, "infra/local.py", "up"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **names}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "error: this runs an MLflow server of its own, and MLFLOW_TRACKING_URI names another, at mlflow.example: "
        "unset it\n"
    )
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("port", ["abc", "0", "65536", "-1"])
def test_what_is_no_port_is_refused(tmp_path: Path, port: str) -> None:
    names = {"DCGAN_HOME": str(tmp_path / "home"), "PREFECT_PORT": port}
    command = [sys.executable, "infra/local.py", "up"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **names}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: PREFECT_PORT={port!r} is not a port, a whole number from 1 to 65535\n"


def test_a_port_that_is_given_up_a_little_later_is_taken(tmp_path: Path) -> None:
    script = """
import sys; sys.path.insert(0, "infra")
import socket, threading, time
import services
other = socket.create_server(("127.0.0.1", 0))
port = other.getsockname()[1]
threading.Timer(1, other.close).start()
service = services.Service("some", ("python", "-m", "http.server", "--bind", "127.0.0.1", str(port)))
service.address = f"http://127.0.0.1:{port}"
service.start()
service.wait()
assert service.stop()
"""
    environment = {**os.environ, "DCGAN_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_service_that_is_found_as_it_ends_is_started_again(tmp_path: Path) -> None:
    script = """
import sys; sys.path.insert(0, "infra")
import services
def service():
    code = "import time; print('ready', flush=True); time.sleep(60)"
    return services.Service("some", ("python", "-c", code), words="ready")
ending, again = service(), service()
ending.start()
ending.wait()
again.start()
assert again.process is None
ending.process.kill()
ending.process.wait()
again.wait()
assert again.pid() == again.process.pid
assert again.stop()
"""
    environment = {**os.environ, "DCGAN_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_servers_alone_end_with_the_command_that_started_them_and_no_others(tmp_path: Path) -> None:
    script = """
import sys; sys.path.insert(0, "infra")
import os, signal, threading, time
import local, services
def service(name):
    return services.Service(name, ("python", "-c", "import time; print('on', flush=True); time.sleep(60)"), words="on")
earlier = service("earlier")
earlier.start()
local.SERVERS = service("earlier"), service("own")
def end():
    while not (local.SERVERS[1].log.exists() and local.SERVERS[1].ready()):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end).start()
try:
    local.ui()
except SystemExit as error:
    assert error.code == 0, error.code
assert (earlier.pid() is None, local.SERVERS[1].pid() is None) == (False, True)
local.SERVERS = local.SERVERS[:1]
local.ui()  # with nothing of its own it returns
assert earlier.stop()
"""
    environment = {**os.environ, "DCGAN_HOME": str(tmp_path)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("end", "expected"),
    [("sys.exit(3)", "exit code 3"), ("os.kill(os.getpid(), 9)", "killed by SIGKILL"), ("time.sleep(60)", "not ready")],
)
def test_a_service_that_does_not_start_says_how_it_ended(tmp_path: Path, end: str, expected: str) -> None:
    script = f"""
import sys; sys.path.insert(0, "infra")
import services
services.START_SECONDS = 5
code = "import os, sys, time; print('why', flush=True); {end}"
service = services.Service("some", ("python", "-c", code), words="ready")
service.start()
try:
    service.wait()
finally:
    service.stop()
"""
    environment = {**os.environ, "DCGAN_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    log = tmp_path / "services" / "some.log"
    assert done.stderr.startswith(f"error: some did not start: {expected}")
    assert done.stderr.endswith(f"; the end of {log}:\nwhy\n")


def test_a_process_that_has_got_the_number_of_a_dead_service_is_left_alone(tmp_path: Path) -> None:
    """As after a reboot. Nor is a flow run of another server ended."""
    services, home = tmp_path / "home" / "services", tmp_path / "home"
    services.mkdir(parents=True)
    sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", "prefect.engine"]
    elsewhere = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:1/api"}
    with subprocess.Popen(sleep, env=elsewhere, stdout=subprocess.PIPE, start_new_session=True) as other:
        assert other.stdout
        other.stdout.readline()
        (services / "prefect.pid").write_text(f"{other.pid} 1 4200")
        command, environment = [sys.executable, "infra/local.py", "down"], {**os.environ, "DCGAN_HOME": str(home)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert other.poll() is None
        other.kill()


def test_a_torn_pid_file_is_of_nothing_that_runs(tmp_path: Path) -> None:
    """Of a disk that was full, or a machine that lost its power."""
    services = tmp_path / "home" / "services"
    services.mkdir(parents=True)
    for name in ("prefect", "mlflow", "worker"):
        (services / f"{name}.pid").write_text("")
    command = [sys.executable, "infra/local.py", "down"]
    environment = {**os.environ, "DCGAN_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
