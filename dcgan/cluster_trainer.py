"""Ray Train's trainer without what these workers do not need; only cluster_train.py uses it.

Deep in Ray: `ray.train.v2._internal` may change with any release, so constraints.txt pins Ray, and
tests/integration/test_cluster.py counts the processes. Importing this takes seconds.
"""

import asyncio
import math
from contextlib import closing
from typing import Any

import ray
from ray.train import UserCallback
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import RayTrainWorker, WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from dcgan.cluster import REPEATS
from dcgan.cluster_session import WorkerError, started_here

PATIENCE = 4.0  # seconds; Ray gives a worker 5 s to answer when it ends the others of one that failed


class StopOnRepeat(UserCallback):  # type: ignore[misc]  # mypy follows no import of ray
    """Ends a run whose failure a restart would only repeat."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if any(isinstance(_own(error), REPEATS) for error in worker_exceptions.values()):
            raise readable(worker_exceptions)


class _NoAutoscaler(FixedScalingPolicy):  # type: ignore[misc]
    """Does not tell an autoscaler how many CPUs are wanted."""

    def _send_resource_request(self) -> None: ...
    def _maybe_send_resource_request(self) -> None: ...
    def _cancel_resource_request(self) -> None: ...


class _Worker(RayTrainWorker):  # type: ignore[misc]
    """Answers a poll when its function has ended, or after PATIENCE seconds.

    While its main thread waits for polls, Ray wakes it 100 times per second to look for signals, and each poll takes
    5 ms, from a function that uses every core. So it waits here.
    """

    def poll_status(self) -> Any:
        thread = get_train_context().execution_context.training_thread_runner._thread
        if thread is not None:
            thread.join(PATIENCE)
        return super().poll_status()


class _Workers(WorkerGroup):  # type: ignore[misc]
    """Without the actor that makes workers wait for one another when they report to Ray: these never report."""

    _worker_cls = _Worker

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
    """Asks again at once, because a worker of these answers late."""

    worker_group_cls = _Workers

    async def _poll_workers(self) -> Any:
        self._latest_poll_time = -math.inf
        return await super()._poll_workers()


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Without unneeded processes, each of which takes seconds to start and 1 % of a CPU from then on.

    One hands out Ray data sets, of which there are none. A local Ray has no further machines to request, and ends
    with its driver: so the controller runs in this process, and no other one frees its CPUs when it dies.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unneeded = [DatasetsCallback, *([PlacementGroupCleanerCallback] if started_here.is_set() else [])]
        return [one for one in super()._create_default_callbacks() if not isinstance(one, tuple(unneeded))]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        if started_here.is_set():
            settings["scaling_policy"] = _NoAutoscaler(self.scaling_config)
        if not started_here.is_set() or _in_event_loop():
            return super()._initialize_and_run_controller(**settings)
        controller = Controller(**settings)
        with closing(asyncio.new_event_loop()) as loop:  # unlike asyncio.run, which would wait to be interrupted
            loop.run_until_complete(controller.run())
        return controller.get_result()

    def _register_sigint_handler(self, controller: Any) -> None:
        """None: Ray's swallows Ctrl-C; without it KeyboardInterrupt is raised, which closes the session."""


def _in_event_loop() -> bool:
    """Whether this thread already runs an event loop, as a notebook's does: it can't run a second one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def readable(failures: dict[int, Exception]) -> WorkerError:
    """The most telling failure: one of REPEATS, which may have caused the others, else that of the lowest rank."""
    rank, error = min(failures.items(), key=lambda item: (not isinstance(_own(item[1]), REPEATS), item[0]))
    own = _own(error)
    return WorkerError(f"worker {rank}: {type(own).__name__}: {' '.join(str(own).split())}")


def _own(error: Exception) -> BaseException:
    return getattr(error, "_base_exc", error)  # Ray wraps what the function raised
