"""Ray Train: run a function in several worker processes, here or on an existing cluster, and restart what dies.

With cluster_search.py the only module that imports ray, and it knows nothing of what it runs. RAY_ADDRESS names an
existing cluster; without it a local Ray is started, guarded by a token of its own, and stopped again whatever happens.
Each worker gets an equal share of the cores, a process group that is already initialised (gloo, or NCCL on GPUs) and
the variables that torchrun sets. Ray's own checkpoints are not used: a restarted function finds its own.
"""

import importlib
import logging
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dcgan.config import Compute

log = logging.getLogger(__name__)

Job = TypeVar("Job")
Result = TypeVar("Result")

COLLECTIVE_TIMEOUT = 600  # seconds until a hung peer counts as dead: as long as Ray's own health check waits
OBJECT_STORE = 2**27  # bytes; no image and no tensor passes through Ray, whose default is 30 % of the memory
LOOPBACK = "127.0.0.2"  # Ray replaces 127.0.0.1 by the address of a network interface, which a laptop may lose
START_ATTEMPTS = 3  # Ray gives its own processes 15 s to start; the next attempt finds the libraries in memory
SOCKET = len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")  # bytes below its directory
REPEATS = (ValueError, TypeError, LookupError, ArithmeticError, AssertionError)  # a restart would fail in the same way

_local = threading.Event()  # set while the Ray that this process uses is one that `session` has started

# Read by Ray when it is imported or started; what the user has set wins.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # or a thread of Ray Data that outlives its session starts a Ray of its own
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay in the working directory, so that relative paths hold
    # What Ray does beside the workers slows them where they use every core. The controller asks them this often, which
    # also bounds how long a finished run waits; preemption is noticed by the worker's death.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # by default workers give way to whatever else runs, Ray's own processes too
    "RAY_enable_metrics_collection": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # of the agent, to a dashboard that is not there
    "RAY_memory_monitor_refresh_ms": "1000",  # 250 by default
    # Tune (cluster_search.py): no tables, no copies of results, Ctrl-C is ours; told of a callback it imports MLflow.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class WorkerError(RuntimeError):
    """A worker failed for good; the message is its own exception in one line."""


def launch(function: Callable[..., None], arguments: tuple, compute: Compute, home: Path, name: str) -> None:
    """Run `function(*arguments)` in `compute.workers` >= 1 processes at once; return when all have returned.

    If one dies or fails, all are stopped and started again, at most `compute.max_failures` times, and not at all for
    an exception that a restart would only repeat. `name` is the run's in Ray's views; Ray's files go to `home`/ray.
    Raises WorkerError, or ValueError before anything starts if Ray lacks the CPUs or GPUs that were asked for.
    """
    log.info("starting %d Ray worker%s", compute.workers, "" if compute.workers == 1 else "s")
    _prepare()
    # Four seconds of imports, while Ray's servers start.
    threading.Thread(target=importlib.import_module, args=("ray.train.torch",), name="imports", daemon=True).start()
    for attempts_left in range(compute.max_failures, -1, -1):
        with session(home, compute.workers):
            from ray.exceptions import RayActorError
            from ray.train import ControllerError, WorkerGroupError

            others = _placement_groups()
            try:
                _trainer(function, arguments, compute, home, name).fit()
                return
            except WorkerGroupError as error:
                raise _readable(error.worker_failures) from error
            except ControllerError as error:
                cause = error.controller_failure
                if isinstance(cause, WorkerError):
                    raise cause from error
                # Ray gives up on a worker that dies before the group has started, whatever FailureConfig says, and
                # then keeps the CPUs of the others: a session that is not ours would never have them back.
                _remove_placement_groups(_placement_groups() - others)
                if not (isinstance(cause, RayActorError) and attempts_left):
                    raise WorkerError(f"Ray's controller failed: {type(cause).__name__}: {cause}") from error
                log.warning("a worker died while the workers were starting; starting them again")


def _placement_groups() -> set[str]:
    """The ids of what holds CPUs for groups of workers."""
    from ray.util import placement_group_table

    return {name for name, group in placement_group_table().items() if group["state"] != "REMOVED"}


def _remove_placement_groups(names: set[str]) -> None:
    from ray.util import remove_placement_group
    from ray.util.placement_group import PlacementGroup, PlacementGroupID

    for name in names:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def scatter(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    home: Path,
    concurrency: int | None = None,
    device: str = "cpu",
) -> Iterator[Result]:
    """`function` of each job, in whatever order they end: Ray Data, a processor and a process a job.

    Jobs and results are pickled; both are small, what is large goes through files. A job whose process dies is done
    again. concurrency: processes at most; None: every processor of the machine or the cluster. device: as
    `compute.device`, whether each has a GPU. Raises what `function` raised; other jobs are stopped then.
    """
    with session(home, 1):
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.enable_operator_progress_bars = False
        for name in ("ray.data", "ray.data.util", "ray.data._internal"):
            logging.getLogger(name).setLevel(logging.ERROR)  # that jobs are pickled and nothing is drawn is as wanted

        class Worker:
            """A process that does one job after another, with the next ones at hand: starting each anew takes 0.2 s."""

            def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
                try:
                    return {"result": function(row["job"]), "error": None}
                except (OSError, RuntimeError, *REPEATS) as error:  # Ray Data would wrap it beyond recognition
                    return {"result": None, "error": error}

        most = min(concurrency or int(ray.cluster_resources()["CPU"]), len(jobs))
        gpus = int(_use_gpu(Compute(workers=most, device=device), int(ray.cluster_resources().get("GPU", 0))))
        pool = ActorPoolStrategy(size=most, max_tasks_in_flight_per_actor=3)
        data = ray.data.from_items([{"job": job} for job in jobs], override_num_blocks=len(jobs))
        for row in data.map(Worker, num_cpus=1, num_gpus=gpus, compute=pool).iter_rows():
            if row["error"] is not None:
                raise row["error"]
            yield row["result"]


def _prepare() -> None:
    """Set what Ray reads when it is imported."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if "RAY_ADDRESS" not in os.environ:
        # Ray's agents would outlive a killed driver by a minute, waiting for a server that died with it. But every
        # process gives up, and exits without a word, if the server takes longer to start: eight seconds were seen.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
        if "RAY_AUTH_MODE" not in os.environ:
            # A token of this process's own: by default Ray writes one to ~/.ray; without one any user can run code.
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


@contextmanager
def session(home: Path, workers: int) -> Iterator[None]:
    """Ray, initialised: what this process already has, else the cluster at RAY_ADDRESS, else a local one of its own."""
    _prepare()
    address = os.environ.get("RAY_ADDRESS", "local")
    import ray

    if ray.is_initialized():
        yield
        return
    with _short(home / "ray") as directory:
        before = signal.getsignal(signal.SIGTERM)
        _connect(address, directory, workers)
        if before != signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            # Prefect can't cancel a flow whose handler Ray has replaced. Where there was none, Ray's stays: it exits,
            # and the session is closed on the way.
            signal.signal(signal.SIGTERM, before)
        try:
            yield
        finally:
            _local.clear()
            ray.shutdown()


def _connect(address: str, directory: Path, workers: int) -> None:
    import ray

    logs: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if address != "local":
        ray.init(address, **logs)
        return
    _leave_out()
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                "local",
                num_cpus=max(len(os.sched_getaffinity(0)), workers),
                object_store_memory=OBJECT_STORE,
                include_dashboard=False,
                _node_ip_address=LOOPBACK,
                _temp_dir=str(directory),
                **logs,
            )
            _local.set()
            return
        except Exception as error:
            if attempt == START_ATTEMPTS or "timed out during startup" not in str(error):
                raise


def _leave_out() -> None:
    """Keep a local Ray from starting three processes, each a second or more to start, that would do nothing for us.

    The monitor asks a cloud for machines; the API server, for which ray.init waits, is one without a dashboard; the log
    monitor reads all logs ten times a second for drivers that want them sent.
    """
    from ray._private.node import Node

    for name in ("start_monitor", "start_api_server", "start_log_monitor"):
        if not hasattr(Node, name):
            raise AttributeError(f"ray._private.node.Node has no {name}: this Ray is not the one of constraints.txt")
        setattr(Node, name, lambda node, **settings: None)


def _trainer(function: Callable[..., None], arguments: tuple, compute: Compute, home: Path, name: str) -> Any:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    class StopOnRepeat(UserCallback):  # type: ignore[misc]  # mypy follows no import of ray
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if any(isinstance(_own(error), REPEATS) for error in worker_exceptions.values()):
                raise _readable(worker_exceptions)

    class NoAutoscaler(FixedScalingPolicy):  # type: ignore[misc]
        """Tells nobody how many CPUs are wanted."""

        def _send_resource_request(self) -> None: ...
        def _maybe_send_resource_request(self) -> None: ...
        def _cancel_resource_request(self) -> None: ...

    class Trainer(TorchTrainer):  # type: ignore[misc]
        """Without three processes that are not needed, each with seconds to start and 1 % of a CPU from then on.

        One hands out Ray's data sets, and there are none; one frees the CPUs of a controller that died, and one asks
        for more machines, but a local Ray ends with its driver and has no more.
        """

        def _create_default_callbacks(self) -> list[Any]:
            unneeded = (DatasetsCallback, PlacementGroupCleanerCallback) if _local.is_set() else (DatasetsCallback,)
            return [one for one in super()._create_default_callbacks() if not isinstance(one, unneeded)]

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            if not _local.is_set():
                return super()._initialize_and_run_controller(**settings)
            settings["scaling_policy"] = NoAutoscaler(self.scaling_config)
            # As Ray does, less a runtime environment: for that one it starts other processes than those it has started.
            controller = ray.remote(num_cpus=0)(TrainController).remote(**settings)
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())

        def _register_sigint_handler(self, controller: Any) -> None:
            """None: Ray's swallows Ctrl-C; so KeyboardInterrupt is raised and the session is closed on the way."""

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = _share([int(node.get("CPU", 0)) for node in nodes], compute.workers)
    return Trainer(
        _work,
        train_loop_config={"function": function, "arguments": arguments, "threads": cpus},
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT),
        scaling_config=ScalingConfig(
            num_workers=compute.workers,
            use_gpu=_use_gpu(compute, sum(int(node.get("GPU", 0)) for node in nodes)),
            resources_per_worker={"CPU": cpus},
        ),
        run_config=RunConfig(
            # A name of its own for each launch: Ray must never find a snapshot of its own to resume from.
            name=f"{name}-{secrets.token_hex(4)}",
            storage_path=str(home / "ray" / "train"),
            failure_config=FailureConfig(max_failures=compute.max_failures),
            callbacks=[StopOnRepeat()],
        ),
    )


def _work(config: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(config["threads"])  # Ray leaves it at 1
    config["function"](*config["arguments"])


def _share(nodes: list[int], workers: int) -> int:
    """The most CPUs each of `workers` can have, given the CPUs of each node; a worker lies within one node."""
    for cpus in range(sum(nodes) // workers, 0, -1):
        if sum(node // cpus for node in nodes) >= workers:
            return cpus
    raise ValueError(f"compute.workers={workers} needs as many CPUs, and Ray has {sum(nodes)}")


def _use_gpu(compute: Compute, gpus: int) -> bool:
    if compute.device == "cpu" or (compute.device == "auto" and gpus == 0):
        return False
    if gpus < compute.workers:
        raise ValueError(
            f"compute.workers={compute.workers} on compute.device={compute.device} needs a GPU each, "
            f"and Ray has {gpus}: use fewer workers, or compute.device=cpu"
        )
    return True


def _readable(failures: dict[int, Exception]) -> WorkerError:
    """The failure that says most: an exception of the function before the death of a process that took others along."""
    rank, error = min(failures.items(), key=lambda item: (not isinstance(_own(item[1]), REPEATS), item[0]))
    own = _own(error)
    return WorkerError(f"worker {rank}: {type(own).__name__}: {' '.join(str(own).split())}")


def _own(error: Exception) -> BaseException:
    return getattr(error, "_base_exc", error)  # Ray wraps what the function raised


@contextmanager
def _short(directory: Path) -> Iterator[Path]:
    """The directory, by another name if its own is too long for the Unix sockets that Ray keeps below it."""
    directory.mkdir(parents=True, exist_ok=True)
    if len(os.fsencode(directory)) + SOCKET <= 107:  # Linux: sun_path in unix(7)
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="dcgan-") as parent:
        link = Path(parent) / "ray"
        link.symlink_to(directory)
        yield link
