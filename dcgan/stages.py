"""The pipeline's stages as functions: ingest, train, extract, evaluate, report; and sample.

The command line, the Prefect tasks and a notebook call these. Each reads and writes only the run directory and the
image store, does nothing where its result is already there, and can be run again after any interruption.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dcgan import storage
from dcgan.config import Data, Experiment, Protocol
from dcgan.data.store import Store
from dcgan.run import Report, Run, read_lines, watched

log = logging.getLogger(__name__)


def ingest(experiment: Experiment) -> Run:
    """Put the images into a store, unless they are there already, and open the run of this experiment on them.

    Raises ValueError, before any image is read where possible, if the images or the settings don't fit each other.
    """
    # Those to score on come first: they are the fewer, and as likely to be missing.
    other = images(experiment, _scored_on(experiment)) if experiment.evaluate.images else None
    store = images(experiment, experiment.data)
    scored = other or store
    if (count := store.count(*store.training)) < experiment.train.batch_size:
        raise ValueError(f"train.batch_size={experiment.train.batch_size} exceeds the {count} training images")
    alone = [name for name in experiment.evaluate.protocols if name != "clustering"]
    if scored.classes and "test" not in scored.splits and alone:
        raise ValueError(
            f"evaluate.protocols={', '.join(alone)} need test images, and {scored.dataset} has none: "
            "set evaluate.protocols=[clustering]"
        )
    if len(scored.classes) > 1:
        from dcgan.evaluate.inputs import check_labels

        check_labels({split: scored.labels(split) for split in scored.scored}, experiment.evaluate)
    if scored.channels != store.channels:
        raise ValueError(
            f"evaluate.images={scored.dataset} has {scored.channels} channels and {store.dataset} {store.channels}"
        )
    if experiment.model.conditional and (store.labels(*store.training) < 0).any():
        raise ValueError("model.conditional=true needs images with labels; these have none")
    return Run.create(experiment, store, scored)


def images(experiment: Experiment, data: Data) -> Store:
    """The store of `data` in the experiment's home, made unless it is there."""
    from dcgan.data import ingest

    make = ingest.by_threads if experiment.compute.workers == 0 else _by_ray(experiment.home)
    fingerprint = ingest.ingest(data, experiment.home, verify=True, maker=make)
    if data.remote:
        from dcgan import mirror_stores

        mirror_stores.use(experiment.home / "stores" / fingerprint)
    return Store.open(experiment.home, fingerprint)


def _scored_on(experiment: Experiment) -> Data:
    """The data section of `evaluate.images`: its preset's, at the size that is trained on."""
    from dcgan import config

    words = [f"data.source={experiment.evaluate.images_source}"] if experiment.evaluate.images_source else []
    wanted = config.build(str(experiment.evaluate.images), [*words, f"data.size={experiment.data.size}"]).data
    same = {"home", "remote", "cache_gb", "offline"}
    return wanted.model_copy(update=experiment.data.model_dump(include=same))


def _by_ray(home: Path) -> Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]:
    def make(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
        from dcgan import cluster

        return cluster.scatter(function, jobs, home)

    return make


def train(run: Run, progress: Report | None = None) -> bool:
    """Train the run to its last step, from the newest checkpoint; `progress` gets each metrics line as it appears.

    Returns whether there was a step left to train.

    `compute.workers` Ray Train workers do it, or this process if that is 0. MLflow is kept up to date meanwhile.
    SIGTERM ends it with a checkpoint and KeyboardInterrupt, or what SIGTERM did before (`dcgan.preemption`).
    Raises DivergedError; StoppedError if another process asked it to stop; WorkerError or, without Ray, what the loop
    raised; or, before anything starts, BusyError, IncompatibleError or CorruptError.
    """
    from dcgan import checkpoint

    with run.claim():
        newest = checkpoint.latest(run)
        if newest is not None:
            checkpoint.check_fits(newest, run)
            if int(newest.name) >= run.experiment.train.steps:
                _push(run)
                return False
        _train(run, progress)
    return True


def _train(run: Run, progress: Report | None) -> None:
    from dcgan import mirror_runs, preemption, tracking

    with (
        mirror_runs.follow(run.path, run.experiment.data.remote),
        tracking.follow(run),
        watched(run, progress),
    ):
        with preemption.awaited(run):
            if run.experiment.compute.workers == 0:
                train_here(str(run.path))
            else:
                from dcgan import cluster_train

                cluster_train.launch(train_here, (str(run.path),), run.experiment.compute, run.home, run.name)
        _raise_if_it_ended_early(run)


def train_here(path: str) -> None:
    """Train the run at `path` in this process; each Ray worker calls this.

    Divergence and a stop are left for `train` to raise from the run's record: no worker should be restarted for them.
    """
    from dcgan import train as loop

    try:
        loop.train(Run.open(Path(path)))
    except (loop.DivergedError, loop.StoppedError):
        return


def _raise_if_it_ended_early(run: Run) -> None:
    from dcgan import checkpoint
    from dcgan.train import DivergedError, StoppedError

    for event in read_lines(run.path / "events.jsonl"):
        if event["event"] == "non_finite":
            raise DivergedError(f"run {run.name}: {event['message']}")
    if (step := max(checkpoint.steps(run), default=0)) < run.experiment.train.steps:
        raise StoppedError(f"run {run.name} was stopped at step {step}, which is kept; the same command continues")


def extract(run: Run) -> None:
    """Write the feature banks of the chosen checkpoint and of the random initialisation: see `dcgan.feature_banks`.

    Two or more `compute.workers`: that many Ray processes do it, each with a GPU if Ray has them; else this process.
    """
    from dcgan import feature_banks

    compute = run.experiment.compute
    if compute.workers < 2:
        feature_banks.extract(run)
        return
    from dcgan import cluster

    maker = partial(cluster.scatter, home=run.home, concurrency=compute.workers, device=compute.device)
    feature_banks.extract(run, maker)


def protocols(run: Run) -> tuple[Protocol, ...]:
    """The protocols to run: those of `evaluate.protocols`, or none if the images have fewer than two classes."""
    return run.experiment.evaluate.protocols if len(run.scored_store().classes) > 1 else ()


def evaluate(run: Run, protocol: Protocol) -> dict[str, dict[str, float]]:
    """Score the features by one protocol, beside two controls, and write scores/<protocol>.json: `scoring.score`."""
    from dcgan import scoring

    return scoring.score(run, protocol)


def report(run: Run) -> Path:
    """Write report.html and deliver the run to MLflow, as finished if it is; returns the page's path.

    If MLflow can't be reached, a warning says so and nothing is lost: `dcgan sync`, or the next run, delivers it.
    """
    from dcgan import checkpoint, tracking
    from dcgan import report as page

    finished = max(checkpoint.steps(run), default=0) >= run.experiment.train.steps
    if finished:
        tracking.ensure(run)
    file = page.write(run)
    try:
        tracking.sync(run)
    except tracking.TrackingError as error:
        log.warning("%s; `dcgan sync %s` delivers the run when it is back", error, run.name)
    if finished:
        tracking.finish(run, "FINISHED")
    _push(run)
    return file


def _push(run: Run) -> None:
    """Copy the run to `data.remote`, if there is one, unless the process that trains it does so."""
    from dcgan import mirror_runs

    if run.experiment.data.remote is None:
        return
    try:
        with run.lock():
            mirror_runs.push_run(run.path, run.experiment.data.remote)
    except storage.BusyError as error:
        log.info("%s, which copies it to %s", error, run.experiment.data.remote)


def sample(source: Path, count: int, seed: int, out: Path) -> int:
    """Draw `count` images (that many per class, if conditional) from a run or a checkpoint directory into a PNG grid.

    Needs the checkpoint only: no data, no server. Returns how many were drawn. Raises FileNotFoundError or CorruptError
    if there is none.
    """
    from dcgan import checkpoint, pictures
    from dcgan.config import validate
    from dcgan.sampling import draw, fixed_noise

    directory = checkpoint.chosen(Run.open(source)) if (source / "experiment.json").is_file() else source
    generator, _, state = checkpoint.load_nets(directory)
    z, labels = fixed_noise(validate(state["experiment"]).model, len(state["images"]["classes"]), count, seed)
    images = pictures.to_uint8(draw(generator, z, labels).numpy())
    columns = count if labels is not None else int(np.ceil(np.sqrt(count)))
    pictures.write_png(out, pictures.grid(images, columns))
    return len(images)
