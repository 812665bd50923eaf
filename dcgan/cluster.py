"""Runs a function on many jobs with Ray Data, and checks that Ray's nodes can run what they are asked to."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dcgan import storage
from dcgan.cluster_session import WorkerError, session, started_here
from dcgan.config import Compute

log = logging.getLogger(__name__)

Job = TypeVar("Job")
Result = TypeVar("Result")

RETRIES = 3  # of what a process did when it died, as often as `compute.max_failures` restarts training by default
LOAD_SECONDS = 120  # for a node to start a process and import a module: seconds, minutes over a slow file system
# Errors that a restart would only repeat.
REPEATS = (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, storage.CorruptError)


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
