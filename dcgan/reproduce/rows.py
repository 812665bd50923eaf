"""What a table of the literature is made of: columns, rows with published figures, and how a row is measured here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dcgan import checkpoint, config, stages, storage
from dcgan.config import DataSet, Evaluate, Experiment, Protocol
from dcgan.data.store import Store
from dcgan.evaluate.inputs import Labelled
from dcgan.reproduce import overrides
from dcgan.run import Run


class Figure(NamedTuple):
    """A cell's value and its spread: `spread` is None for a single measurement; `of` says what the spread is over."""

    value: float
    spread: float | None = None
    of: str = ""


@dataclass(frozen=True)
class Column:
    """One metric. title: with its unit. percent: values are shares, shown times 100."""

    key: str
    title: str
    percent: bool = False


@dataclass(frozen=True)
class Measured:
    """What one row gave with one seed.

    figures: column to value. controls: control to the same mapping. choices: what was chosen, and by which rule, in
    words or numbers. scale: how large the run was, in words. runs: names of the training runs that it used.
    """

    figures: dict[str, Figure]
    scale: str
    controls: dict[str, dict[str, Figure]] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What a row is measured with: its presets, the user's overrides, a seed, and a directory for its own work.

    runs: the runs trained for it, by name.
    """

    presets: tuple[DataSet, ...]
    overrides: tuple[str, ...]
    seed: int
    directory: Path
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return overrides.home(self.overrides)

    def experiment(self, preset: DataSet, *words: str, protocols: Sequence[Protocol] = ()) -> Experiment:
        """The preset's experiment with the row's words, the seed, the user's overrides and what the row scores.

        An override may be for one preset only: `cifar10/data.source=DIRECTORY`. protocols: checked at ingestion.
        """
        if preset not in self.presets:
            raise LookupError(f"a row is measured on images of {preset}, which its presets leave out")
        seeds = (f"train.seed={self.seed}", f"evaluate.seed={self.seed}")
        scored = [f"evaluate.protocols=[{', '.join(protocols)}]"] if protocols else []
        return config.build(preset, [*words, *seeds, *overrides.of(self.overrides, preset), *scored])

    def images(self, preset: DataSet, *words: str) -> tuple[Store, Evaluate]:
        """The preset's images, ingested if necessary, and its evaluation settings."""
        experiment = self.experiment(preset, *words)
        return stages.images(experiment, experiment.data), experiment.evaluate

    def trained(self, preset: DataSet, *words: str, protocols: Sequence[Protocol] = ()) -> Run:
        """A run of the preset, trained to its end."""
        run = stages.ingest(self.experiment(preset, *words, protocols=protocols))
        stages.train(run)
        self.runs[run.name] = run
        return run

    def extracted(self, preset: DataSet, protocols: Sequence[Protocol], *words: str) -> Run:
        """A trained run with feature banks, which these protocols score."""
        run = self.trained(preset, *words, protocols=protocols)
        stages.extract(run)
        return run


@dataclass(frozen=True)
class Row:
    """A method of a table.

    published: column to figure. source: of these. measure: how it is measured here, or why it is not. presets: whose
    images it is measured on.
    """

    key: str
    method: str
    published: dict[str, Figure]
    source: str
    measure: Callable[[Setting], Measured] | str
    presets: tuple[DataSet, ...] = ()


@dataclass(frozen=True)
class Table:
    """title: what the table is. columns and rows: in the order shown. note: what holds for every row."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""


QUOTED = "not measured: another model, whose figure is quoted"
LATEST = "the newest checkpoint"
BEST = "the checkpoint of lowest sliced Wasserstein distance between generated and {} images"


def features(run: Run, protocol: Protocol, names: dict[str, str]) -> Measured:
    """A protocol's scores of a trained run and of its controls; names: column to metric."""
    scores = stages.evaluate(run, protocol)
    settings = run.experiment.evaluate
    draws = f"{settings.draws} draws" if protocol == "svm_few_labels" else ""
    cells = {
        source: {column: Figure(values[metric], values.get(f"{metric}_std"), draws) for column, metric in names.items()}
        for source, values in scores.items()
    }
    chosen = {
        f"{source} {name}": value
        for source, values in scores.items()
        for name, value in values.items()
        if name not in names.values() and name.rpartition("/")[2] in ("c", "neighbours")
    }
    if protocol == "svm_few_labels":
        chosen["labels per class"] = settings.labels_per_class
    some = f"; {settings.labels:,} labels" if settings.labels and protocol in ("svm", "knn") else ""
    return Measured(
        cells.pop("discriminator"),
        scale(run) + some,
        {source.replace("_", " "): figures for source, figures in cells.items()},
        {**chosen, "checkpoint": checkpoint_rule(run)},
        (run.name,),
    )


def merged(*parts: Measured) -> Measured:
    """One row from several protocols of the same run."""
    controls: dict[str, dict[str, Figure]] = {}
    for part in parts:
        for control, figures in part.controls.items():
            controls[control] = {**controls.get(control, {}), **figures}
    return Measured(
        {column: figure for part in parts for column, figure in part.figures.items()},
        parts[0].scale,
        controls,
        {key: value for part in parts for key, value in part.choices.items()},
        tuple(dict.fromkeys(name for part in parts for name in part.runs)),
    )


def checkpoint_rule(run: Run) -> str:
    """Which checkpoint was scored and why.

    The choice uses no test image, and no label except that a conditional net draws the classes of the real images.
    """
    directory = checkpoint.chosen(run)
    compared = storage.read_manifest(directory, hashes=False).get("compared")
    best = BEST.format("validation" if compared == ["validation"] else "training")
    return f"step {int(directory.name):,}, {best if run.experiment.evaluate.checkpoint == 'best' else LATEST}"


def scale(run: Run) -> str:
    """How much was trained on what, and how long that took."""
    train, store = run.experiment.train, run.store()
    images = store.count(*store.training)
    epochs = train.steps * train.batch_size / images
    minutes = sum(line["seconds"] for line in run.metrics()) / 60
    return (
        f"trained {train.steps:,} steps of {train.batch_size} ({epochs:.1f} epochs of {images:,} images) "
        f"in {minutes:.1f} min"
    )


def arrays(store: Store) -> tuple[Labelled, Labelled | None, Labelled]:
    """Train, validation (None where the data set has none) and test: images uint8 (N, C, H, W), labels int64 (N,)."""
    held = _split(store, "validation") if "validation" in store.splits else None
    return _split(store, "train"), held, _split(store, "test")


def _split(store: Store, split: str) -> Labelled:
    return store.images(split), store.labels(split)
