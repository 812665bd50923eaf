"""Connects to Ray: to an existing cluster, or to a Ray that is started here and stopped again whatever happens.

RAY_ADDRESS names an existing cluster; a Ray that is started here is guarded by its own token. Only the modules that
begin with `cluster` import ray, and none of them knows what it runs.
"""

import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dcgan import environment

OBJECT_STORE = 2**27  # bytes; no image and no tensor passes through Ray, whose default is 30 % of the memory
# Ray replaces 127.0.0.1 by the address of a network interface, which a laptop may lose. Its servers listen on all
# interfaces whatever address they are given: the token keeps others out.
LOOPBACK = "127.0.0.2"
START_ATTEMPTS = 3  # Ray gives its own processes 15 s to start; the next attempt finds the libraries in memory
SOCKET = len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")  # bytes below its directory

started_here = threading.Event()  # set while this process uses a Ray that `session` has started

# Read by Ray when it is imported or started; what the user has set wins.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # or a thread of Ray Data that outlives its session starts its own Ray
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay in the working directory, so that relative paths hold
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # preemption is noticed by the worker's death
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # it would configure this process's loggers
    # Tune (cluster_search.py): no tables, no copies of results, Ctrl-C is ours; given a callback, it imports MLflow.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
# Of a Ray that is started here, whose background work slows workers that use every core; read when it is started.
LOCAL = {
    "RAY_worker_niceness": "0",  # by default workers yield to everything else that runs, Ray's own processes too
    "RAY_enable_metrics_collection": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # the agent's reports, to a dashboard that is not there
    "RAY_task_events_report_interval_ms": "0",  # nor are there any readers of each task's states
    "RAY_memory_monitor_refresh_ms": "1000",  # 250 by default
    "RAY_kill_idle_workers_interval_ms": "10000",  # 200 by default
    "RAY_object_manager_timer_freq_ms": "2000",  # 100 by default; looks for objects that other nodes were asked for
    "RAY_io_context_monitor_probe_interval_ms": "60000",  # how long Ray's servers take to answer themselves
    # By default Ray's agents outlive a killed driver by a minute, waiting for a server that died with it. But a
    # process also exits silently if the server takes longer than this to start: eight seconds were seen.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}


class WorkerError(RuntimeError):
    """A worker failed for good; the message is its own exception in one line."""


@contextmanager
def session(home: Path, workers: int) -> Iterator[None]:
    """Initialised Ray: the one this process already has, else the cluster at RAY_ADDRESS, else a new local one."""
    prepare()
    address = os.environ.get("RAY_ADDRESS") or "local"
    import ray

    if ray.is_initialized():
        yield
        return
    with _short(home / "ray") as directory:
        before = signal.getsignal(signal.SIGTERM)
        try:
            try:
                _connect(address, directory, workers)
            except SystemExit as error:  # by Ray's own handler of SIGTERM, which it installs first
                _handle_sigterm(before)
                if callable(before):
                    before(signal.SIGTERM, None)
                raise KeyboardInterrupt from error
            # Ray's handler prints the native stack and dies on the spot, and Prefect can't cancel a flow whose handler
            # was replaced. Where there was none, SIGTERM now acts as Ctrl-C, so that the session is closed.
            _handle_sigterm(signal.default_int_handler if before == signal.SIG_DFL else before)
            yield
        finally:
            started_here.clear()
            ray.shutdown()
            _handle_sigterm(before)


def prepare() -> None:
    """Set the environment variables that Ray reads when it is imported."""
    local = (os.environ.get("RAY_ADDRESS") or "local") == "local"
    for key, value in {**ENVIRONMENT, **(LOCAL if local else {})}.items():
        os.environ.setdefault(key, value)
    if local and os.environ.get("RAY_AUTH_MODE") != "token":
        # This process's own token: by default Ray writes one to ~/.ray; without a token anyone who reaches this
        # machine can run code, also where the user has switched it off for some cluster.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def _connect(address: str, directory: Path, workers: int) -> None:
    import ray

    logs: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if address != "local":
        try:
            ray.init(address, **logs)
        except (OSError, RuntimeError, ray.exceptions.RayError) as error:  # also of another version of Python or Ray
            reason = f"{error} {error.__cause__ or ''}".strip()
            raise WorkerError(
                f"RAY_ADDRESS={address} can't be joined from here; this machine has to be a node of that cluster "
                f"(`.venv/bin/ray start --address={address}` makes it one): {reason}"
            ) from error
        return
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with _lean():
                ray.init(
                    "local",
                    num_cpus=max(environment.cpus(), workers),
                    object_store_memory=OBJECT_STORE,
                    include_dashboard=False,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(directory),
                    **logs,
                )
            started_here.set()
            return
        except Exception as error:
            if attempt == START_ATTEMPTS or "timed out during startup" not in str(error):
                raise


def _handle_sigterm(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():  # other threads can't
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _lean() -> Iterator[None]:
    """Keep ray.init from starting three processes that are of no use here and take a second or more each.

    The monitor requests machines from a cloud; the API server, which ray.init waits for, has no dashboard to serve; the
    log monitor reads all logs ten times per second, for drivers that want them sent.

    The others have process groups of their own: Prefect cancels a flow run by SIGTERM to its whole group, and a worker
    that is to keep a checkpoint must not die of it. They still end with this process.
    """
    from ray._private import services
    from ray._private.node import Node

    changed = [
        (Node, f"start_{name}", lambda node, **settings: None) for name in ("monitor", "api_server", "log_monitor")
    ]
    changed.append((services, "ConsolePopen", partial(services.ConsolePopen, process_group=0)))
    before = [getattr(owner, name) for owner, name, _ in changed]
    for owner, name, value in changed:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(changed, before, strict=True):
            setattr(owner, name, value)


@contextmanager
def _short(directory: Path) -> Iterator[Path]:
    """The directory, or a link to it if its own path is too long for the Unix sockets that Ray keeps below it."""
    directory.mkdir(parents=True, exist_ok=True)
    if len(os.fsencode(directory)) + SOCKET <= 107:  # Linux: sun_path in unix(7)
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="dcgan-") as parent:
        link = Path(parent) / "ray"
        link.symlink_to(directory)
        yield link
