"""What a table of the literature is made of: columns, rows with published figures, and how a row is measured here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dcgan import config, stages
from dcgan.config import DataSet, Evaluate, Experiment
from dcgan.data.store import Store
from dcgan.evaluate.inputs import Labelled
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
    """What a row is measured with: the user's overrides, a seed, and a directory for its own work.

    runs: the runs trained for it, by name.
    """

    overrides: tuple[str, ...]
    seed: int
    directory: Path
    runs: dict[str, Run] = field(default_factory=dict)

    def experiment(self, preset: DataSet, *words: str) -> Experiment:
        """The preset's experiment with the row's words, the seed and, last, the user's overrides.

        An override may be for one preset only: `cifar10/data.source=DIRECTORY`.
        """
        seeds = (f"train.seed={self.seed}", f"evaluate.seed={self.seed}")
        return config.build(preset, [*words, *seeds, *_Override.of(self.overrides, preset)])

    def images(self, preset: DataSet, *words: str) -> tuple[Store, Evaluate]:
        """The preset's images, ingested if necessary, and its evaluation settings."""
        experiment = self.experiment(preset, *words)
        return stages.images(experiment, experiment.data), experiment.evaluate

    def trained(self, preset: DataSet, *words: str) -> Run:
        """A run of the preset, trained to its end."""
        run = stages.ingest(self.experiment(preset, *words))
        stages.train(run)
        self.runs[run.name] = run
        return run

    def extracted(self, preset: DataSet, *words: str) -> Run:
        """A trained run with feature banks."""
        run = self.trained(preset, *words)
        stages.extract(run)
        return run


class _Override(NamedTuple):
    preset: str
    key: str
    value: str

    @classmethod
    def read(cls, word: str) -> "_Override":
        key, equals, value = word.partition("=")
        preset, slash, rest = key.partition("/")
        if not equals:
            raise ValueError(f"override {word!r} is not of the form section.key=value")
        if slash and preset not in config.PRESETS:
            raise ValueError(f"override {word!r}: {preset!r} is no preset{config.meant(preset, config.PRESETS)}")
        return cls(preset, rest, value) if slash else cls("", key, value)

    @classmethod
    def of(cls, words: Sequence[str], preset: str) -> list[str]:
        """Those that apply to a preset, as `config.build` takes them."""
        return [f"{one.key}={one.value}" for one in map(cls.read, words) if one.preset in ("", preset)]


@dataclass(frozen=True)
class Row:
    """A method of a table.

    published: column to figure. source: of these. measure: how it is measured here, or why it is not.
    """

    key: str
    method: str
    published: dict[str, Figure]
    source: str
    measure: Callable[[Setting], Measured] | str


@dataclass(frozen=True)
class Table:
    """title: what the table is. columns and rows: in the order shown. note: what holds for every row."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""


def home(overrides: Sequence[str]) -> Path:
    """Where everything is written: the last `data.home` of the overrides, or the default."""
    path = given(overrides, "data.home")
    return Path(path).expanduser().absolute() if path else config.default_home()


def given(overrides: Sequence[str], key: str) -> str | None:
    """The last value of a key among the overrides that apply to every preset; None if there is none."""
    found = [
        override.value for override in map(_Override.read, overrides) if (override.preset, override.key) == ("", key)
    ]
    return found[-1] if found else None


QUOTED = "not measured: another model, whose figure is quoted"
LATEST = "the newest checkpoint"
BEST = "the checkpoint of lowest sliced Wasserstein distance between generated and training images"


def check(overrides: Sequence[str], seeds: int = 1) -> None:
    """Raise ValueError for an override that no experiment would take, or no seed, before any work."""
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: a row is measured with at least one")
    known = config.keys()
    for word in overrides:
        preset, key, value = _Override.read(word)
        if key not in known:
            raise ValueError(f"unknown key {key!r}{config.meant(key, known)}")
        if preset and key in ("data.home", "compute.device"):
            raise ValueError(f"{word}: a row has one home and one device for everything: give {key}={value}")
        config.refuse_secret(key, value)  # each of them: the record has them all, also those that a later one replaces
        if key in ("train.seed", "evaluate.seed"):
            raise ValueError(f"{word}: a row is measured with the seeds 0 to N - 1 of --seeds N")
    _check_values(overrides)


def _check_values(overrides: Sequence[str]) -> None:
    """Raise ValueError for values that a preset they name rejects or, if they name none, that every preset rejects."""
    named = {override.preset for override in map(_Override.read, overrides) if override.preset}
    refusals = {}
    for preset in config.PRESETS:
        place = ["data.source=directory"] if preset == "folder" else []
        try:
            config.build(preset, [*place, *_Override.of(overrides, preset)])
        except ValueError as error:
            refusals[preset] = error
    for preset in config.PRESETS:
        if preset in refusals and (preset in named or len(refusals) == len(config.PRESETS)):
            raise refusals[preset]


def features(run: Run, protocol: config.Protocol, names: dict[str, str]) -> Measured:
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
    """Which checkpoint was scored and why: the choice uses no label and no test image."""
    from dcgan import checkpoint

    step = int(checkpoint.chosen(run).name)
    rule = BEST if run.experiment.evaluate.checkpoint == "best" else LATEST
    return f"step {step:,}, {rule}"


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
