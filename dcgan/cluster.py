"""Connects to Ray, started here or on an existing cluster, and runs a function on many jobs with Ray Data.

RAY_ADDRESS names an existing cluster; without it a local Ray is started, guarded by its own token, and stopped again
whatever happens. Only the modules that begin with `cluster` import ray, and none of them knows what it runs.
"""

import logging
import os
import secrets
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dcgan import storage
from dcgan.config import Compute

log = logging.getLogger(__name__)

Job = TypeVar("Job")
Result = TypeVar("Result")

RETRIES = 3  # of what a process did when it died, as often as `compute.max_failures` restarts training by default
OBJECT_STORE = 2**27  # bytes; no image and no tensor passes through Ray, whose default is 30 % of the memory
# Ray replaces 127.0.0.1 by the address of a network interface, which a laptop may lose. Its servers listen on all
# interfaces whatever address they are given: the token keeps others out.
LOOPBACK = "127.0.0.2"
LOAD_SECONDS = 120  # for a node to start a process and import a module: seconds, minutes over a slow file system
START_ATTEMPTS = 3  # Ray gives its own processes 15 s to start; the next attempt finds the libraries in memory
SOCKET = len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")  # bytes below its directory
# Errors that a restart would only repeat.
REPEATS = (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, storage.CorruptError)

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


def scatter(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    home: Path,
    concurrency: int | None = None,
    device: str = "cpu",
) -> Iterator[Result]:
    """Yield `function(job)` for each job, in order of completion: Ray Data, one CPU and one process per running job.

    Jobs and results are pickled; both are small, large data goes through files. A process that dies is started again,
    up to RETRIES times, and its jobs are repeated.
    concurrency: most processes; None: one per CPU of the machine or cluster. device: as `compute.device`, decides
    whether each has a GPU. Raises what `function` raised, and stops the other jobs; or what `check_nodes` does.
    """
    if not jobs:
        return
    with session(home, 1):
        import ray
        from ray.data import ActorPoolStrategy, DataContext
        from ray.util.annotations import RayDeprecationWarning

        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.enable_operator_progress_bars = False
        for name in ("ray.data", "ray.data.util", "ray.data._internal"):
            logging.getLogger(name).setLevel(logging.ERROR)  # it warns of pickled jobs and missing progress bars

        class Worker:
            """A process that does one job after another, with the next ones queued: a process per job costs 0.2 s."""

            def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
                try:
                    return {"result": function(row["job"]), "error": None}
                except (OSError, RuntimeError, *REPEATS) as error:  # Ray Data would wrap it beyond recognition
                    return {"result": None, "error": error}

        most = min(concurrency or int(ray.cluster_resources().get("CPU", 0)), len(jobs))
        gpus = int(use_gpu(Compute(workers=most, device=device), int(ray.cluster_resources().get("GPU", 0))))
        check_nodes(function, most, 1, bool(gpus))
        pool = ActorPoolStrategy(size=most, max_tasks_in_flight_per_actor=3)
        data = ray.data.from_items([{"job": job} for job in jobs], override_num_blocks=len(jobs))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RayDeprecationWarning)  # of max_restarts, which has no other name yet
            # By default there is no limit. Jobs have none: those of a lost node are tried until Ray knows of the loss.
            done = data.map(Worker, num_cpus=1, num_gpus=gpus, compute=pool, max_restarts=RETRIES)
        try:
            for row in done.iter_rows():
                if row["error"] is not None:
                    raise row["error"]
                yield row["result"]
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise WorkerError(f"processes died again and again, perhaps for want of memory: {reason}") from error


def check_nodes(function: Callable[..., Any], workers: int, cpus: int, on_gpu: bool) -> None:
    """Raise ValueError if no node can run a worker, of so many CPUs and, if `on_gpu`, a GPU.

    Of an existing cluster, also say if there is not enough room now, and raise WorkerError if a node that may run
    `function` lacks its modules. Ray itself would wait, or start a worker there again and again, and say nothing.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = able(ray.nodes(), cpus, on_gpu)
    if not nodes:
        raise ValueError(f"no Ray node has {cpus} CPU{'s' * (cpus > 1)}{' and a GPU' * on_gpu}")
    if started_here.is_set():
        return
    free = ray.available_resources()
    for kind, wanted in (("CPU", cpus * workers), ("GPU", on_gpu * workers)):
        if (now := free.get(kind, 0)) < wanted:
            log.warning("Ray has %g %ss free of the %d wanted, and is waited for", now, kind, wanted)
    load, loads = ray.remote(num_cpus=0, max_retries=0)(lambda function: None), []
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        loads.append((node["NodeManagerAddress"], load.options(scheduling_strategy=there).remote(function)))
    for address, loaded in loads:
        try:
            ray.get(loaded, timeout=LOAD_SECONDS)
        except (ray.exceptions.RaySystemError, ray.exceptions.RayTaskError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise WorkerError(f"the Ray node at {address} can't run this: {reason}") from error
        except ray.exceptions.RayError as error:  # lost meanwhile, or busy
            log.warning("the Ray node at %s does not answer: %s", address, type(error).__name__)


def able(nodes: Sequence[dict[str, Any]], cpus: int, on_gpu: bool) -> list[dict[str, Any]]:
    """Of Ray's nodes those that live and have so many CPUs and, if `on_gpu`, a GPU."""
    return [
        node
        for node in nodes
        if node["Alive"] and node["Resources"].get("CPU", 0) >= cpus and node["Resources"].get("GPU", 0) >= on_gpu
    ]


def use_gpu(compute: Compute, gpus: int) -> bool:
    """Whether each worker gets one of the cluster's GPUs; raises ValueError if it should and there are too few."""
    if compute.device == "cpu" or (compute.device == "auto" and gpus == 0):
        return False
    if gpus < compute.workers:
        raise ValueError(
            f"compute.workers={compute.workers} on compute.device={compute.device} needs a GPU each, "
            f"and Ray has {gpus}: use fewer workers, or compute.device=cpu"
        )
    return True


def prepare() -> None:
    """Set the environment variables that Ray reads when it is imported."""
    local = (os.environ.get("RAY_ADDRESS") or "local") == "local"
    for key, value in {**ENVIRONMENT, **(LOCAL if local else {})}.items():
        os.environ.setdefault(key, value)
    if local and os.environ.get("RAY_AUTH_MODE") != "token":
        # This process's own token: by default Ray writes one to ~/.ray; without a token anyone who reaches this
        # machine can run code, also where the user has switched it off for some cluster.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


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


def _handle_sigterm(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():  # other threads can't
        signal.signal(signal.SIGTERM, handler)


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
                f"(`ray start --address={address}` makes it one): {reason}"
            ) from error
        return
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with _lean():
                ray.init(
                    "local",
                    num_cpus=max(len(os.sched_getaffinity(0)), workers),
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
