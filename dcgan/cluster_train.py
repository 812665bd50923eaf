"""Runs a function in several Ray Train workers, here or on an existing cluster, and restarts them if one dies.

Each worker gets an equal share of the cores, a process group that is already initialised (gloo, or NCCL on GPUs) and
the variables that torchrun sets. Ray's own checkpoints are not used: a restarted function finds its own.
"""

import asyncio
import importlib
import logging
import secrets
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from dcgan.cluster import REPEATS, WorkerError, prepare, session, started_here, use_gpu
from dcgan.config import Compute

log = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = 600  # seconds until a hung peer counts as dead: as long as Ray's own health check waits


def launch(function: Callable[..., None], arguments: tuple, compute: Compute, home: Path, name: str) -> None:
    """Run `function(*arguments)` in `compute.workers` >= 1 processes at once; return when all have returned.

    If one dies or fails, all are stopped and restarted, up to `compute.max_failures` times, but not after an exception
    that a restart would only repeat; a death before all have started is counted separately. `name` is the run's name
    in Ray's views; Ray's files go to `home`/ray.
    Raises WorkerError, or ValueError before any worker starts if Ray lacks the requested CPUs or GPUs.
    """
    log.info("starting %d Ray worker%s", compute.workers, "" if compute.workers == 1 else "s")
    prepare()
    # Four seconds of imports, done while Ray's servers start.
    threading.Thread(target=importlib.import_module, args=("ray.train.torch",), name="imports", daemon=True).start()
    for attempts_left in range(compute.max_failures, -1, -1):
        with session(home, compute.workers):
            from ray.exceptions import RayActorError
            from ray.train import ControllerError, WorkerGroupError

            others = _placement_groups()
            try:
                _trainer(function, arguments, compute, attempts_left, home, name).fit()
                return
            except WorkerGroupError as error:
                raise _readable(error.worker_failures) from error
            except ControllerError as error:
                cause = error.controller_failure
                if isinstance(cause, WorkerError):
                    raise cause from error
                # Ray gives up on a worker that dies before the group has started, whatever FailureConfig says, and
                # then keeps the CPUs of the others: a session that is not ours would never get them back.
                _remove_placement_groups(_placement_groups() - others)
                if not (isinstance(cause, RayActorError) and attempts_left):
                    raise WorkerError(f"Ray's controller failed: {type(cause).__name__}: {cause}") from error
                log.warning("a worker died while the workers were starting; starting them again")


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
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
    from ray.train.v2._internal.execution.worker_group import WorkerGroup

    class StopOnRepeat(UserCallback):  # type: ignore[misc]  # mypy follows no import of ray
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if any(isinstance(_own(error), REPEATS) for error in worker_exceptions.values()):
                raise _readable(worker_exceptions)

    class NoAutoscaler(FixedScalingPolicy):  # type: ignore[misc]
        """Does not tell an autoscaler how many CPUs are wanted."""

        def _send_resource_request(self) -> None: ...
        def _maybe_send_resource_request(self) -> None: ...
        def _cancel_resource_request(self) -> None: ...

    class Workers(WorkerGroup):  # type: ignore[misc]
        """Without the actor that makes workers wait for one another when they report to Ray: these never report."""

        def _init_train_context_on_workers(self, workers: list[Any], actor: Any, arguments: dict[str, list]) -> None:
            ray.kill(actor)
            prepared = [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,  # also only for reports
                    **{name: values[rank] for name, values in arguments.items()},
                )
                for rank, worker in enumerate(workers)
            ]
            ray.get(prepared)

    class Controller(TrainController):  # type: ignore[misc]
        worker_group_cls = Workers

    class Trainer(TorchTrainer):  # type: ignore[misc]
        """Without unneeded processes, each of which takes seconds to start and 1 % of a CPU from then on.

        One hands out Ray data sets, of which there are none. A local Ray has no further machines to request, and ends
        with its driver: so the controller runs in this process, and no other one frees its CPUs when it dies.
        """

        def _create_default_callbacks(self) -> list[Any]:
            unneeded = [DatasetsCallback, *([PlacementGroupCleanerCallback] if started_here.is_set() else [])]
            return [one for one in super()._create_default_callbacks() if not isinstance(one, tuple(unneeded))]

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            if started_here.is_set():
                settings["scaling_policy"] = NoAutoscaler(self.scaling_config)
            if not started_here.is_set() or _in_event_loop():
                return super()._initialize_and_run_controller(**settings)
            controller = Controller(**settings)
            with closing(asyncio.new_event_loop()) as loop:  # unlike asyncio.run, which would wait to be interrupted
                loop.run_until_complete(controller.run())
            return controller.get_result()

        def _register_sigint_handler(self, controller: Any) -> None:
            """None: Ray's swallows Ctrl-C; without it KeyboardInterrupt is raised, which closes the session."""

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = _share([int(node.get("CPU", 0)) for node in nodes], compute.workers)
    if (free := ray.available_resources().get("CPU", 0)) < cpus * compute.workers and not started_here.is_set():
        log.warning("Ray has %d CPUs free of the %d wanted; training waits for them", free, cpus * compute.workers)
    return Trainer(
        _work,
        train_loop_config={"function": function, "arguments": arguments, "threads": cpus},
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT),
        scaling_config=ScalingConfig(
            num_workers=compute.workers,
            use_gpu=use_gpu(compute, sum(int(node.get("GPU", 0)) for node in nodes)),
            resources_per_worker={"CPU": cpus},
        ),
        run_config=RunConfig(
            # A new name for each launch: Ray must never find one of its own snapshots to resume from.
            name=f"{name}-{secrets.token_hex(4)}",
            storage_path=str(home / "ray" / "train"),
            failure_config=FailureConfig(max_failures=attempts),
            callbacks=[StopOnRepeat()],
        ),
    )


def _in_event_loop() -> bool:
    """Whether this thread already runs an event loop, as a notebook's does: it can't run a second one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _work(config: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(config["threads"])  # Ray leaves it at 1
    config["function"](*config["arguments"])


def _share(nodes: list[int], workers: int) -> int:
    """The most CPUs that each of `workers` can have, given each node's CPUs; a worker stays within one node."""
    for cpus in range(sum(nodes) // workers, 0, -1):
        if sum(node // cpus for node in nodes) >= workers:
            return cpus
    raise ValueError(f"compute.workers={workers} needs as many CPUs, and Ray has {sum(nodes)}")


def _readable(failures: dict[int, Exception]) -> WorkerError:
    """The most telling failure: one of REPEATS, which may have caused the others, else that of the lowest rank."""
    rank, error = min(failures.items(), key=lambda item: (not isinstance(_own(item[1]), REPEATS), item[0]))
    own = _own(error)
    return WorkerError(f"worker {rank}: {type(own).__name__}: {' '.join(str(own).split())}")


def _own(error: Exception) -> BaseException:
    return getattr(error, "_base_exc", error)  # Ray wraps what the function raised
