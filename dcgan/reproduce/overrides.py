"""Overrides of `dcgan reproduce`: those of any run, or for one preset alone, `cifar10/data.source=DIRECTORY`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dcgan import config, experiment
from dcgan.config import DataSet

PLACES = {f"data.{key}" for key in experiment.PLACES - {"source"}}  # another source may have other images


class Override(NamedTuple):
    """preset: the one it is for; "" for every one."""

    preset: str
    key: str
    value: str

    @classmethod
    def read(cls, word: str) -> "Override":
        key, equals, value = word.partition("=")
        preset, slash, rest = key.partition("/")
        if not equals:
            raise ValueError(f"override {word!r} is not of the form section.key=value")
        if slash and preset not in config.PRESETS:
            known = f"; presets are {', '.join(config.PRESETS)}"
            raise ValueError(
                f"override {word!r}: {preset!r} is no preset{config.meant(preset, config.PRESETS) or known}"
            )
        return cls(preset, rest, value) if slash else cls("", key, value)


def of(words: Sequence[str], preset: str) -> list[str]:
    """Those that apply to a preset, as `config.build` takes them."""
    return [f"{one.key}={one.value}" for one in map(Override.read, words) if one.preset in ("", preset)]


def home(overrides: Sequence[str]) -> Path:
    """Where everything is written: the last `data.home` of the overrides, or the default."""
    path = given(overrides, "data.home")
    return Path(path).expanduser().absolute() if path not in (None, "", "null") else config.default_home()


def given(overrides: Sequence[str], key: str) -> str | None:
    """The last value of a key among the overrides that apply to every preset; None if there is none."""
    found = [
        override.value for override in map(Override.read, overrides) if (override.preset, override.key) == ("", key)
    ]
    return found[-1] if found else None


def check(overrides: Sequence[str], seeds: int = 1) -> None:
    """Raise ValueError for an override that no experiment would take, or no seed, before any work."""
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: a row is measured with at least one")
    known = config.keys()
    for word in overrides:
        preset, key, value = Override.read(word)
        if key not in known:
            raise ValueError(f"unknown key {key!r}{config.meant(key, known) or '; `dcgan run --help` lists the keys'}")
        if preset and key in ("data.home", "compute.device"):
            raise ValueError(f"{word}: a row has one home and one device for everything: give {key}={value}")
        config.refuse_secret(key, value)  # each of them: the record has them all, also those that a later one replaces
        if key in ("train.seed", "evaluate.seed"):
            raise ValueError(f"{word}: a row is measured with the seeds 0 to N - 1 of --seeds N")
    _check_values(overrides)


def _check_values(overrides: Sequence[str]) -> None:
    """Raise ValueError for values that a preset they name rejects or, if they name none, that every preset rejects."""
    named = {override.preset for override in map(Override.read, overrides) if override.preset}
    refusals = {}
    for preset in config.PRESETS:
        place = ["data.source=directory"] if preset == "folder" else []
        try:
            config.build(preset, [*place, *of(overrides, preset)])
        except ValueError as error:
            refusals[preset] = error
    for preset in config.PRESETS:
        if preset in refusals and (preset in named or len(refusals) == len(config.PRESETS)):
            raise refusals[preset]


def digest(words: Sequence[str], presets: Sequence[DataSet], seed: int, code: str) -> str:
    """Of everything that can change what is measured on the presets; the words may be given in any order."""
    decisive = {}
    for preset in presets:
        given = dict(word.split("=", 1) for word in of(words, preset))  # of two values of a key the later
        decisive[preset] = {k: v for k, v in given.items() if not k.startswith("compute.") and k not in PLACES}
    return config.digest([decisive, seed, code])
