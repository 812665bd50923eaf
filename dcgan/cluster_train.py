"""Runs a function in several Ray Train workers, here or on an existing cluster, and restarts them if one dies.

Each worker gets an equal share of the cores, or `compute.cpus`. Two or more get a process group that is already
initialised (gloo, or NCCL on GPUs) and the variables that torchrun sets; one needs none, and gloo's thread would wake
up 100 times per second. Ray's own checkpoints are not used: a restarted function finds its own.
"""

import importlib
import logging
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dcgan.cluster import check_nodes, use_gpu
from dcgan.cluster_session import WorkerError, prepare, session, started_here
from dcgan.config import Compute

log = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = 600  # seconds until a hung peer counts as dead: as long as Ray's own health check waits


def launch(function: Callable[..., None], arguments: tuple, compute: Compute, home: Path, name: str) -> None:
    """Run `function(*arguments)` in `compute.workers` >= 1 processes at once; return when all have returned.

    If one dies or fails, all are stopped and restarted, up to `compute.max_failures` times, but not after an exception
    that a restart would only repeat; a death before all have started is counted separately. `name` is the run's name
    in Ray's views; Ray's files go to `home`/ray.
    Raises WorkerError, also if a node of the cluster can't load the function, or ValueError before any worker starts if
    Ray lacks the requested CPUs or GPUs.
    """
    log.info("starting %d Ray worker%s", compute.workers, "" if compute.workers == 1 else "s")
    prepare()
    # Four seconds of imports, done while Ray's servers start.
    threading.Thread(
        target=importlib.import_module, args=("dcgan.cluster_trainer",), name="imports", daemon=True
    ).start()
    attempts_left = compute.max_failures
    while True:
        with session(home, compute.workers):
            from ray.exceptions import RayActorError
            from ray.train import ControllerError, WorkerGroupError
            from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

            from dcgan.cluster_trainer import readable

            others = _placement_groups()
            try:
                _trainer(function, arguments, compute, attempts_left, home, name).fit()
                return
            except WorkerGroupError as error:
                raise readable(error.worker_failures) from error
            except ControllerError as error:
                cause = error.controller_failure
                if isinstance(cause, WorkerError):
                    raise cause from error
                # Ray gives up on a worker that dies before the group has started, whatever FailureConfig says, and
                # then keeps the CPUs of the others. On a cluster, where groups may be other people's, it frees them.
                if started_here.is_set():
                    _remove_placement_groups(_placement_groups() - others)
                if isinstance(cause, WorkerGroupStartupTimeoutError) and not started_here.is_set():
                    # Others may use the CPUs. A node may also be lost for good: then the share of each is another.
                    log.warning("the cluster has no room for compute.workers=%d; trying again", compute.workers)
                    continue
                if not (isinstance(cause, RayActorError) and attempts_left):
                    raise WorkerError(f"Ray's controller failed: {type(cause).__name__}: {cause}") from error
                log.warning("a worker died while the workers were starting; starting them again")
            except RayActorError as error:  # of the controller, where that is a process of its own
                if not attempts_left:
                    raise WorkerError(f"Ray's controller died: {error}") from error
                log.warning("Ray's controller died; starting the workers again")
            attempts_left -= 1


def _placement_groups() -> set[str]:
    """The ids of the placement groups, which hold CPUs for groups of workers."""
    from ray.util import placement_group_table

    return {name for name, group in placement_group_table().items() if group["state"] != "REMOVED"}


def _remove_placement_groups(names: set[str]) -> None:
    from ray.util import remove_placement_group
    from ray.util.placement_group import PlacementGroup, PlacementGroupID

    for name in names:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def _trainer(
    function: Callable[..., None], arguments: tuple, compute: Compute, attempts: int, home: Path, name: str
) -> Any:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import BackendConfig
    from ray.train.torch import TorchConfig

    from dcgan.cluster_trainer import StopOnRepeat, Trainer

    nodes = [
        (int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]
    on_gpus = use_gpu(compute, sum(gpus for _, gpus in nodes))
    cpus = _share(nodes, compute, on_gpus)
    check_nodes(function, compute.workers, cpus, on_gpus)
    return Trainer(
        _work,
        train_loop_config={"function": function, "arguments": arguments, "threads": cpus},
        backend_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT) if compute.workers > 1 else BackendConfig(),
        scaling_config=ScalingConfig(
            num_workers=compute.workers,
            use_gpu=on_gpus,
            resources_per_worker={"CPU": cpus},
        ),
        run_config=RunConfig(
            # A new name for each launch: Ray must never find one of its own snapshots to resume from.
            name=f"{name}-{secrets.token_hex(4)}",
            storage_path=str(home / "ray" / "train"),
            failure_config=FailureConfig(
                max_failures=attempts,
                controller_failure_limit=attempts if started_here.is_set() else 0,  # see `launch`
            ),
            callbacks=[StopOnRepeat()],
        ),
    )


def _work(config: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(config["threads"])  # Ray leaves it at 1
    if not torch.distributed.is_initialized():
        os.environ["WORLD_SIZE"] = "1"  # a pod's own variables may say otherwise, and it would wait for the others
        os.environ.pop("LOCAL_RANK", None)
    config["function"](*config["arguments"])


def _share(nodes: list[tuple[int, int]], compute: Compute, on_gpus: bool) -> int:
    """The CPUs of each worker: `compute.cpus`, or the most that all can have, given each node's CPUs and GPUs.

    A worker stays within one node. on_gpus: each has a GPU of its node, too.
    """
    total, workers = sum(cpus for cpus, _ in nodes), compute.workers
    for share in [compute.cpus] if compute.cpus else range(total // workers, 0, -1):
        if sum(min(cpus // share, gpus) if on_gpus else cpus // share for cpus, gpus in nodes) >= workers:
            return share
    wanted = f"compute.cpus={compute.cpus} CPUs of one node each" if compute.cpus else "as many CPUs"
    where = ", each on a node with a GPU for it" if on_gpus else ""
    raise ValueError(f"compute.workers={workers} needs {wanted}{where}, and Ray has {total}")
