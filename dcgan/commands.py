"""What each command of the command line does with the words that `cli.py` has read.

Heavy libraries are imported by the command that needs them, so help and error messages appear at once.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from dcgan import config
from dcgan.config import PRESETS
from dcgan.run import Run

RUN_SECTIONS = ("compute", "evaluate")  # sections that a run may change and stay the same run


def ingest(chosen: argparse.Namespace) -> None:
    run = find(chosen.target, chosen.overrides)
    store = run.store()
    counts = ", ".join(f"{store.count(split):,} {split}" for split in store.splits)
    print(f"images  {store.path}  ({counts}, {store.size} px)")
    print(f"run     {run.path}")


def train(chosen: argparse.Namespace) -> None:
    from dcgan import tracking

    run = find(chosen.target, chosen.overrides)
    if _train(run) or tracking.is_running(run.path):  # killed after its last step, before it was ended
        tracking.finish(run, "FINISHED")


def extract(chosen: argparse.Namespace) -> None:
    from dcgan import stages

    run = find(chosen.target, chosen.overrides)
    stages.extract(run)
    print(f"features in {run.features}")


def evaluate(chosen: argparse.Namespace) -> None:
    _evaluate(find(chosen.target, chosen.overrides))


def report(chosen: argparse.Namespace) -> None:
    from dcgan import stages

    print(f"report in {stages.report(find(chosen.target, chosen.overrides))}")


def run_all(chosen: argparse.Namespace) -> None:
    from dcgan import stages, tracking

    run = find(chosen.target, chosen.overrides)
    _train(run)
    with tracking.ending(lambda: [run]):
        print("extracting features")
        stages.extract(run)
        _evaluate(run)
        print(f"report in {stages.report(run)}")


def sample(chosen: argparse.Namespace) -> None:
    from dcgan import stages

    source = Path(chosen.source)
    source = source if source.is_dir() else run_path(chosen.source)
    print(f"{stages.sample(source, chosen.count, chosen.seed, chosen.out)} images in {chosen.out}")


def sync(chosen: argparse.Namespace) -> None:
    from dcgan import tracking

    run = Run.open(run_path(chosen.run))
    sent = tracking.sync(run)
    print(f"delivered {sent.metrics} metric values, {sent.images} grids, {sent.files} files, {sent.models} models")
    print(f"to run {sent.run_id} of {sent.url or tracking.without_password(tracking.uri(run.home))}")


def data(chosen: argparse.Namespace) -> None:
    from dcgan.data import catalogue

    home = config.default_home()
    if chosen.action == "list":
        print(catalogue.table(home))
    elif chosen.action == "verify":
        for path in catalogue.chosen(home, chosen.stores):
            print(catalogue.verify(path), flush=True)
    else:
        (path,) = catalogue.chosen(home, chosen.stores)
        print(catalogue.describe(path))
        catalogue.show(path, chosen.count, chosen.out)
        print(f"\n{chosen.count} images of each split in {chosen.out}")


def reproduce(chosen: argparse.Namespace) -> None:
    from dcgan.reproduce import measure

    rows = [word for word in chosen.words if "=" not in word]
    overrides = [word for word in chosen.words if "=" in word]
    page = measure.reproduce(
        chosen.table, rows, overrides, chosen.seeds, chosen.results, lambda line: print(line, flush=True)
    )
    print(f"tables in {page}")


def _train(run: Run) -> bool:
    from dcgan import stages, summary, tables

    print(f"training {run.path}", flush=True)
    trained = stages.train(run, tables.Progress(run.experiment.train.steps, lambda line: print(line, flush=True)))
    for event in summary.events(run):
        print(f"warning, step {event['step']:,}: {event['message']}")
    print(f"trained to step {run.experiment.train.steps:,}; grids in {run.samples}")
    return trained


def _evaluate(run: Run) -> None:
    from dcgan import stages, tables

    if not stages.protocols(run):
        print("not scored: scoring needs images of at least two classes")
        return
    for protocol in stages.protocols(run):
        print(f"scoring {protocol}", flush=True)
        stages.evaluate(run, protocol)
    print(tables.text_table(run))


def find(target: str, overrides: Sequence[str]) -> Run:
    """The run that a word names: a preset's, after ingesting its images, or one that already exists.

    Raises ValueError for a word that is neither, and for an override that would make it a different run.
    """
    if target in PRESETS:
        from dcgan import stages

        return stages.ingest(config.build(target, overrides))
    return _changed(Run.open(run_path(target)), overrides)


def run_path(word: str) -> Path:
    """The directory of the run given by its path or by its name in the home."""
    runs = config.default_home() / "runs"
    for path in (Path(word), runs / word):
        if (path / "experiment.json").is_file():
            return path
    names = sorted(path.parent.name for path in runs.glob("*/experiment.json"))
    if word in PRESETS:
        own = [name for name in names if name.rpartition("-")[0] == word]
        there = f"those of {word} in {runs} are {', '.join(own)}" if own else f"there is none of {word} in {runs}"
        raise ValueError(f"{word} is a preset; this command takes a run; {there}")
    known = f"; presets are {', '.join(PRESETS)}, runs are looked for in {runs}"
    raise ValueError(f"{word!r} is neither a preset nor a run{config.meant(word, [*PRESETS, *names]) or known}")


def _changed(run: Run, overrides: Sequence[str]) -> Run:
    """The run with changed `compute` and `evaluate` settings, recorded in it, where worker processes read them."""
    if not overrides:
        return run
    experiment = config.override(run.experiment.model_dump(mode="json"), overrides)
    for word in overrides:
        if word.partition(".")[0] not in RUN_SECTIONS:
            raise ValueError(f"{word} would make {run.name} another run; give the preset instead of the run to set it")
        if word.startswith("evaluate.images"):
            raise ValueError(f"{word} asks for images to be ingested; give {run.name}'s preset, not the run, to set it")
    changed = dataclasses.replace(run, experiment=experiment)
    changed.record()
    return changed


# Of a preset or a run: function, and what the help says.
STAGES: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
    "run": (run_all, "all stages in order: ingest, train, extract, evaluate, report"),
    "ingest": (ingest, "put the images into a store and open the run"),
    "train": (train, "train, or go on training, to the last step"),
    "extract": (extract, "write the discriminator's features of every image"),
    "evaluate": (evaluate, "score the features beside random init and raw pixels"),
    "report": (report, "write report.html and deliver the run to MLflow"),
}
