"""The command line: `dcgan COMMAND PRESET-or-RUN section.key=value ...`, one command per stage."""

import argparse
import logging
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dcgan import commands, config
from dcgan.config import PRESETS

USER_ERROR, INTERRUPTED = 2, 130  # exit codes: argparse's own for a wrong command line, the shell's for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. What users can fix is one line on stderr; a bug keeps its traceback."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dcgan").setLevel(logging.INFO)
    parser = _parser()
    chosen, rest = parser.parse_known_args(arguments)
    if rest and (chosen.command is not commands.reproduce or any(word.startswith("-") for word in rest)):
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


class Parser(argparse.ArgumentParser):
    """argparse with errors in the form of all others: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(_refuse(message))


def _parser() -> Parser:
    parser = Parser("dcgan", description="Train a DCGAN and measure what its discriminator's features are worth.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{_presets()}\n\n`dcgan run --help` lists the keys."
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (function, text) in commands.STAGES.items():
        command = parsers.add_parser(name, help=text, description=text, formatter_class=parser.formatter_class)
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
    _add_sample(parsers)
    _add_data(parsers)
    _add_reproduce(parsers)
    command = parsers.add_parser("sync", help="deliver to MLflow what it lacks")
    command.add_argument("run", metavar="RUN", help="a run directory, or a run's name")
    command.set_defaults(command=commands.sync)
    return parser


def _add_sample(parsers: "argparse._SubParsersAction[Parser]") -> None:
    command = parsers.add_parser("sample", help="draw a grid of images from a checkpoint; needs no data, no server")
    command.add_argument("source", metavar="RUN|CHECKPOINT", help="a run, or a directory checkpoints/<step>")
    command.add_argument(
        "--count",
        type=_at_least(1),
        default=64,
        help="how many images; per class, if conditional (default %(default)s)",
    )
    command.add_argument("--seed", type=_at_least(0), default=0, help="random seed of z (default %(default)s)")
    command.add_argument("--out", type=Path, default=Path("grid.png"), help="the PNG (default %(default)s)")
    command.set_defaults(command=commands.sample)


def _add_data(parsers: "argparse._SubParsersAction[Parser]") -> None:
    command = parsers.add_parser("data", help="list, verify or show the image stores of this home")
    actions = command.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")
    actions.add_parser("list", help="fingerprint, data set, size, images, bytes and origin of each store")
    verify = actions.add_parser("verify", help="read every byte again and compare it with its hash")
    verify.add_argument("stores", metavar="STORE", nargs="*", help="fingerprints, or beginnings of them; all if none")
    show = actions.add_parser("show", help="describe a store and draw a contact sheet of it")
    show.add_argument("stores", metavar="STORE", nargs=1, help="a fingerprint, or the beginning of one")
    show.add_argument("--count", type=_at_least(1), default=64, help="images of each split (default %(default)s)")
    show.add_argument("--out", type=Path, default=Path("sheet.png"), help="the PNG (default %(default)s)")
    command.set_defaults(command=commands.data)


def _add_reproduce(parsers: "argparse._SubParsersAction[Parser]") -> None:
    command = parsers.add_parser("reproduce", help="measure a table of the literature beside what was published")
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
    command.set_defaults(command=commands.reproduce)


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
