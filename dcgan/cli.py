"""The command line: `dcgan COMMAND PRESET-or-RUN section.key=value ...`, one command per stage.

Heavy libraries are imported by the stage that needs them, so help and error messages appear at once.
"""

import argparse
import dataclasses
import logging
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dcgan import config
from dcgan.config import PRESETS
from dcgan.run import Run

RUN_SECTIONS = ("compute", "evaluate")  # sections that a run may change and stay the same run
USER_ERROR, INTERRUPTED = 2, 130  # exit codes: argparse's own for a wrong command line, the shell's for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. What users can fix is one line on stderr; a bug keeps its traceback."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dcgan").setLevel(logging.INFO)
    parser = _parser()
    chosen, rest = parser.parse_known_args(arguments)
    if rest and (chosen.command is not reproduce or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        chosen.words += rest  # argparse fills a positional at the first chance, and takes no words after an option
    try:
        chosen.command(chosen)
    except (ValueError, OSError, RuntimeError) as error:
        if not config.is_for_users(error):
            raise
        return _refuse(error)
    except KeyboardInterrupt:
        print("dcgan: stopped; the same command continues from here", file=sys.stderr)
        return INTERRUPTED
    return 0


def _refuse(error: object) -> int:
    print("dcgan: error:", " ".join(str(error).split()), file=sys.stderr)
    return USER_ERROR


def ingest(chosen: argparse.Namespace) -> None:
    run = find(chosen.target, chosen.overrides)
    store = run.store()
    counts = ", ".join(f"{store.count(split):,} {split}" for split in store.splits)
    print(f"images  {store.path}  ({counts}, {store.size} px)")
    print(f"run     {run.path}")


def train(chosen: argparse.Namespace) -> None:
    from dcgan import tracking

    run = find(chosen.target, chosen.overrides)
    _train(run)
    if tracking.Ledger.load(run.path / "mlflow.json").status == "RUNNING":  # not where nothing was left to train
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
    from dcgan import stages

    run = find(chosen.target, chosen.overrides)
    _train(run)
    print("extracting features")
    stages.extract(run)
    _evaluate(run)
    print(f"report in {stages.report(run)}")


def sample(chosen: argparse.Namespace) -> None:
    from dcgan import stages

    source = Path(chosen.source)
    stages.sample(source if source.is_dir() else run_path(chosen.source), chosen.count, chosen.seed, chosen.out)
    print(f"{chosen.count} images in {chosen.out}")


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


def _train(run: Run) -> None:
    from dcgan import stages, summary, tables

    print(f"training {run.path}", flush=True)
    stages.train(run, tables.Progress(run.experiment.train.steps, lambda line: print(line, flush=True)))
    for event in summary.events(run):
        print(f"warning, step {event['step']:,}: {event['message']}")
    print(f"trained to step {run.experiment.train.steps:,}; grids in {run.samples}")


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
    if word in PRESETS:
        raise ValueError(f"{word} is a preset; this command takes a run; `dcgan ingest {word}` prints its path")
    names = sorted(path.parent.name for path in runs.glob("*/experiment.json"))
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


class Parser(argparse.ArgumentParser):
    """argparse with errors in the form of all others: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(_refuse(message))


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
    "run": (run_all, "all stages in order: ingest, train, extract, evaluate, report"),
    "ingest": (ingest, "put the images into a store and open the run"),
    "train": (train, "train, or go on training, to the last step"),
    "extract": (extract, "write the discriminator's features of every image"),
    "evaluate": (evaluate, "score the features beside random init and raw pixels"),
    "report": (report, "write report.html and deliver the run to MLflow"),
}


def _parser() -> Parser:
    parser = Parser("dcgan", description="Train a DCGAN and measure what its discriminator's features are worth.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{_presets()}\n\n`dcgan run --help` lists the keys."
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (function, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, formatter_class=parser.formatter_class)
        command.epilog = f"{_presets()}\n\n{_keys()}"
        command.add_argument("target", metavar="PRESET|RUN", help="a preset, a run directory, or a run's name")
        command.add_argument(
            "overrides",
            metavar="key=value",
            nargs="*",
            default=[],
            help="settings; of an existing run only compute.* and evaluate.*",
        )
        command.set_defaults(command=function)
    _add_sample(commands)
    _add_data(commands)
    _add_reproduce(commands)
    command = commands.add_parser("sync", help="deliver to MLflow what it lacks")
    command.add_argument("run", metavar="RUN", help="a run directory, or a run's name")
    command.set_defaults(command=sync)
    return parser


def _add_sample(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser("sample", help="draw a grid of images from a checkpoint; needs no data, no server")
    command.add_argument("source", metavar="RUN|CHECKPOINT", help="a run, or a directory checkpoints/<step>")
    command.add_argument(
        "--count",
        type=_at_least(1),
        default=64,
        help="how many images; per class, if conditional (default %(default)s)",
    )
    command.add_argument("--seed", type=_at_least(0), default=0, help="random seed of z (default %(default)s)")
    command.add_argument("--out", type=Path, default=Path("grid.png"), help="the PNG (default %(default)s)")
    command.set_defaults(command=sample)


def _add_data(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser("data", help="list, verify or show the image stores of this home")
    actions = command.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")
    actions.add_parser("list", help="fingerprint, data set, size, images, bytes and origin of each store")
    verify = actions.add_parser("verify", help="read every byte again and compare it with its hash")
    verify.add_argument("stores", metavar="STORE", nargs="*", help="fingerprints, or beginnings of them; all if none")
    show = actions.add_parser("show", help="describe a store and draw a contact sheet of it")
    show.add_argument("stores", metavar="STORE", nargs=1, help="a fingerprint, or the beginning of one")
    show.add_argument("--count", type=_at_least(1), default=64, help="images of each split (default %(default)s)")
    show.add_argument("--out", type=Path, default=Path("sheet.png"), help="the PNG (default %(default)s)")
    command.set_defaults(command=data)


def _add_reproduce(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser("reproduce", help="measure a table of the literature beside what was published")
    command.add_argument("table", metavar="TABLE", help="cifar10, svhn, clustering, mnist or image_quality")
    command.add_argument(
        "words",
        metavar="ROW|key=value",
        nargs="*",
        default=[],
        help="rows, all if none; settings for all rows, or for one data set: cifar10/data.source=DIRECTORY",
    )
    command.add_argument("--seeds", type=_at_least(1), default=1, help="for mean and spread (default %(default)s)")
    command.add_argument("--results", type=Path, help="directory of results.md and results/ (default: the home)")
    command.set_defaults(command=reproduce)


def _at_least(least: int) -> Callable[[str], int]:
    def read(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of at least {least}")
        return int(word)

    return read


def _presets() -> str:
    return "\n".join(["presets:", *(f"  {preset:16}{config.summary(preset)}" for preset in PRESETS)])


def _keys() -> str:
    lines = ["keys (allowed values) [default; a preset may set another]:"]
    for key, knob in config.keys().items():
        allowed = f" ({knob.allowed})" if knob.allowed else ""
        default = "" if knob.default is ... else f" [{config.text(knob.default)}]"
        lines.append(f"  {key}{allowed}{default}")
        lines.append(textwrap.indent(textwrap.fill(knob.description, 90), " " * 6))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
