"""Runs the trials of a random search with Ray Tune: one function, many settings, each result kept."""

import json
import logging
import secrets
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dcgan import storage
from dcgan.cluster import REPEATS, RETRIES, check_nodes
from dcgan.cluster_session import WorkerError, session
from dcgan.config import digest

log = logging.getLogger(__name__)

Json = dict[str, Any]  # what JSON can hold


def search(
    function: Callable[[Json], Json], trials: Sequence[Json], home: Path, directory: Path, gpus: float = 0
) -> list[Json | None]:
    """`function(trial)` for each trial, in their order, by Ray Tune with one CPU and `gpus` of a GPU per trial.

    Settings and results are JSON, and a trial's settings determine its result: it is kept in `directory` under their
    digest, and a killed search resumes from what is there. A trial whose process dies is repeated, up to RETRIES times.
    One that fails has the result None, a warning says why, and the next search tries it again.
    Raises WorkerError if all fail or a node of the cluster lacks the function's modules, or ValueError before any trial
    starts if Ray has no such GPU.
    """
    files = [directory / f"{digest(trial)}.json" for trial in trials]
    missing = [trial for trial, file in zip(trials, files, strict=True) if not file.exists()]
    log.info("%d trials, of which %d are done", len(trials), len(trials) - len(missing))
    if missing:
        with session(home, 1):
            failures = _tune(function, missing, home, directory, gpus)
        for failure in failures:
            log.warning("a trial failed: %s", failure)
        if len(failures) == len(trials):
            raise WorkerError(f"all of {len(trials)} trials failed, the first: {failures[0]}")
    return [json.loads(file.read_bytes()) if file.exists() else None for file in files]


def _tune(
    function: Callable[[Json], Json], trials: Sequence[Json], home: Path, directory: Path, gpus: float
) -> list[str]:
    """Write each trial's result into `directory`; returns why trials failed, one line each."""
    import ray
    from ray import tune

    if gpus > ray.cluster_resources().get("GPU", 0):
        raise ValueError(f"a trial needs {gpus} of a GPU, and Ray has none: search on the CPU")
    check_nodes(function, 1, 1, gpus > 0)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the caller logs each failure in one line

    def attempt(config: Json) -> Json:
        trial = config["trial"]
        try:
            storage.write_json(directory / f"{digest(trial)}.json", function(trial))
        except (OSError, RuntimeError, *REPEATS) as error:  # Tune would try it again
            return {"failure": _line(error)}
        return {"failure": ""}

    class Count(tune.Callback):  # type: ignore[misc]  # mypy follows no import of ray
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ended = 1 + sum(other.is_finished() for other in trials)  # this one is about to be
            log.info("%d of %d trials have ended", ended, len(trials))

    tuner = tune.Tuner(
        tune.with_resources(attempt, {"cpu": 1, "gpu": gpus}),
        param_space={"trial": tune.grid_search(list(trials))},
        tune_config=tune.TuneConfig(reuse_actors=True),  # importing torch takes longer than many a trial
        run_config=tune.RunConfig(
            name=f"{directory.name}-{secrets.token_hex(4)}",
            storage_path=str(home / "ray" / "tune"),
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[Count()],
            verbose=0,
        ),
    )
    ends = [_line(end.error) if end.error else end.metrics["failure"] for end in tuner.fit()]
    return [end for end in ends if end]


def _line(error: BaseException) -> str:
    """An error's type and message, without Ray's pages about a process that died."""
    own = getattr(error, "cause", error)  # Ray wraps what the function raised
    return f"{type(own).__name__}: {textwrap.shorten(str(own), 200)}"
