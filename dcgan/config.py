"""Builds `Experiment`, the one typed, frozen description of a run, from a preset and dotted overrides.

It is built once, at the entry point, from the same words (`train.steps=2000`) on the command line, in `prefect.yaml`
and in the Prefect form. A function takes only the section it uses; `settings.py` says what each key means.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

from pydantic import ValidationError, model_validator
from pydantic.fields import FieldInfo

from dcgan import storage
from dcgan.settings import PROTOCOLS, Compute, Data, DataSet, Evaluate, Model, Protocol, Section, Train

__all__ = [
    "PRESETS",
    "PROTOCOLS",
    "Compute",
    "Data",
    "DataSet",
    "Evaluate",
    "Experiment",
    "Knob",
    "Model",
    "Preset",
    "Protocol",
    "Train",
    "build",
    "default_home",
    "digest",
    "is_for_users",
    "keys",
    "meant",
    "override",
    "summary",
    "text",
    "validate",
]

Preset = DataSet  # one per data set, of the same name
PRESETS: tuple[Preset, ...] = get_args(Preset)

ADDRESSES = (
    ("data", "source"),
    ("evaluate", "images_source"),
)  # section and key: an http(s):// address may contain a user

PLACES = {"home", "source", "offline", "remote", "cache_gb"}  # of `data`: where images are, not which

# Settings that only some data sets have: elsewhere they would change a run's name and nothing else.
ENCODED: tuple[DataSet, ...] = (
    "celeba",
    "lfw",
    "lsun",
    "imagenet",
    "imagenet10",
    "imagenet_dog15",
    "tiny_imagenet",
    "folder",
)
WITHOUT_LABELS: tuple[DataSet, ...] = ("celeba", "lfw", "lsun", "stl10")  # or those trained on have none
GREY: tuple[DataSet, ...] = ("digits", "mnist")
ONLY_FOR: dict[str, tuple[DataSet, ...]] = {
    "test_fraction": ("digits", "lfw", "folder"),
    "unreadable": ENCODED,
    "category": ("lsun",),
    "extra": ("svhn",),
}


class Experiment(Section):
    """Everything that decides what a run does."""

    data: Data
    model: Model
    train: Train
    compute: Compute = Compute()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _check(self) -> "Experiment":
        workers = max(1, self.compute.workers)
        if self.train.batch_size % workers:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} is not divisible by compute.workers={workers}: "
                "each worker takes an equal share"
            )
        if self.train.batch_size < 2 * workers:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} leaves each of compute.workers={workers} one image: "
                "BatchNorm needs two"
            )
        if self.model.kernel == 3 and self.data.size == 28:
            raise ValueError("model.kernel=3 makes 32, 64 or 128 pixels, not data.size=28")
        if self.data.name == "folder" and not self.data.source:
            raise ValueError("data.name=folder needs data.source=DIRECTORY, a tree of images")
        for key, names in ONLY_FOR.items():
            if self.data.name not in names and getattr(self.data, key) != Data.model_fields[key].default:
                raise ValueError(f"data.{key} is for {', '.join(names)}, not for {self.data.name}")
        if self.model.conditional and self.data.name in WITHOUT_LABELS:
            raise ValueError(f"model.conditional=true needs images with labels; those of {self.data.name} have none")
        images = self.evaluate.images
        if images is not None and (images in GREY) != (self.data.name in GREY):
            raise ValueError(f"evaluate.images={images}: {' and '.join(GREY)} are grey, and the others in colour")
        return self

    @property
    def home(self) -> Path:
        """The directory under which everything is written."""
        return self.data.home or default_home()

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: data, model and training, not where they are computed or scored."""
        return {
            "data": self.data.model_dump(mode="json", exclude=PLACES),
            "model": self.model.model_dump(mode="json"),
            "train": self.train.model_dump(mode="json"),
        }

    def flat(self) -> dict[str, str]:
        """Dotted key to value in JSON, as overrides take them and MLflow shows them.

        Without the parts of an address that `build` rejects: a run recorded before that check may have them.
        """
        sections = self.model_dump(mode="json")
        for section, key in ADDRESSES:
            if has_secret(sections[section][key]):
                sections[section][key] = _without_secret(sections[section][key])
        return {f"{s}.{k}": text(v) for s, section in sections.items() for k, v in section.items()}


def default_home() -> Path:
    """DCGAN_HOME, or ./var: where runs are looked up by name."""
    return Path(os.environ.get("DCGAN_HOME") or "var").absolute()


def text(value: Any) -> str:
    """A setting as an override takes it: JSON, but text as it is."""
    return value if isinstance(value, str) else json.dumps(value)


class Knob(NamedTuple):
    """What the help says about a key. `default` is Ellipsis where the preset must give a value."""

    description: str
    default: Any
    allowed: str


def keys() -> dict[str, Knob]:
    """Every dotted key an override may set."""
    found = {}
    for section, field in Experiment.model_fields.items():
        for name, knob in _section(field).model_fields.items():
            default = ... if knob.is_required() else knob.default
            found[f"{section}.{name}"] = Knob(knob.description or "", default, _allowed(knob))
    return found


def _section(field: FieldInfo) -> type[Section]:
    assert isinstance(field.annotation, type)
    assert issubclass(field.annotation, Section)
    return field.annotation


_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _allowed(knob: FieldInfo) -> str:
    """The choices or the bounds of a key in a few characters; empty if its type says it all."""
    if choices := _choices(knob.annotation):
        return "|".join(map(str, choices))
    bounds = [f"{sign} {getattr(m, name)}" for m in knob.metadata for name, sign in _SIGNS.items() if hasattr(m, name)]
    return ", ".join(bounds)


def _choices(annotation: Any) -> tuple[Any, ...]:
    if annotation is bool:
        return ("true", "false")
    if getattr(annotation, "__origin__", None) is Literal:
        return get_args(annotation)
    return ()


def summary(preset: Preset) -> str:
    """The first line of a preset's header: what it trains."""
    return _read_preset(preset).partition("\n")[0].removeprefix("# ")


def _read_preset(preset: str) -> str:
    return (Path(__file__).parent / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")


def build(preset: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a preset with `section.key=value` overrides, later ones winning.

    A value is read as YAML, so `0.5`, `true`, `null` and `[svm, knn]` mean what they look like; a path is taken as is.
    Raises ValueError in one line for an unknown preset or key (with the nearest known ones) or a value out of bounds.
    """
    import yaml  # only here: training a stored data set needs torch, numpy and pydantic alone

    if preset not in PRESETS:
        known = f"; presets are {', '.join(PRESETS)}"
        raise ValueError(f"unknown preset {preset!r}{meant(preset, PRESETS) or known}")
    experiment = override(yaml.safe_load(_read_preset(preset)), overrides)
    _refuse_what_is_recorded(experiment)
    return experiment


def _refuse_what_is_recorded(experiment: Experiment) -> None:
    """Raise ValueError for a secret in an address, without quoting it, and for data.offline with data.remote.

    Not part of the model's validation, so that a run recorded before either was rejected can still be opened.
    """
    for section, key in ADDRESSES:
        refuse_secret(f"{section}.{key}", getattr(getattr(experiment, section), key))
    if experiment.data.offline and experiment.data.remote:
        raise ValueError("data.offline=true opens no connection, and data.remote needs one: unset one of them")


def refuse_secret(key: str, value: str | None) -> None:
    """Raise ValueError, without quoting it, if the value of a key in ADDRESSES has a secret: it would be recorded."""
    section, _, name = key.partition(".")
    if (section, name) in ADDRESSES and has_secret(value):
        raise ValueError(
            f"{key}: an address at {urlsplit(value or '').hostname} with a user, a password or a query would be "
            "recorded with the run; put the password into ~/.netrc"
        )


def has_secret(address: str | None) -> bool:
    """Whether an http(s) address has a user, a password or a query, in which secrets are passed."""
    parts = urlsplit(address or "")
    return parts.scheme in ("http", "https") and bool("@" in parts.netloc or parts.query)


def _without_secret(address: str) -> str:
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def override(sections: dict[str, Any], overrides: Sequence[str]) -> Experiment:
    """The experiment of `sections` (as `model_dump` gives them) after applying overrides; raises as `build` does."""
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"override {word!r} is not of the form section.key=value")
        if key not in keys():
            raise ValueError(_unknown(key))
        section, name = key.split(".")
        sections = {**sections, section: {**sections.get(section, {}), name: _value(key, text)}}
    return validate(sections)


def _value(key: str, text: str) -> Any:
    import yaml

    section, name = key.split(".")
    knob = _section(Experiment.model_fields[section]).model_fields[name]
    if {str, Path} & set(get_args(knob.annotation)):
        return None if text in ("", "null") else text  # a directory may be called 2015, or `a #1`
    try:
        return _number(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2015-99-99
        raise ValueError(f"{key}={text!r} is not a value that YAML can read") from error


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text; here it is a number, also inside a list."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def validate(sections: Any) -> Experiment:
    """`Experiment.model_validate` with its errors in one readable line."""
    try:
        return Experiment.model_validate(sections)
    except ValidationError as error:
        raise ValueError("; ".join(_describe(dict(e)) for e in error.errors())) from error


def _describe(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    reason = str(error["msg"]).removeprefix("Value error, ")
    if not key:
        return reason
    if error["type"] == "extra_forbidden":
        return _unknown(key)
    if error["type"] == "missing":
        return f"{key} is required"
    if error["type"] == "tuple_type":
        reason = "input should be a list, as in [1, 2]"
    return f"{key}={error['input']!r}: {reason[0].lower()}{reason[1:]}"


def _unknown(key: str) -> str:
    return f"unknown key {key!r}{meant(key, keys()) or '; `dcgan run --help` lists the keys'}"


def is_for_users(error: Exception) -> bool:
    """Whether an error tells users what to fix: ours and the system's do; a library's RuntimeError is a bug."""
    if isinstance(error, RuntimeError):
        return type(error).__module__.startswith("dcgan.")
    return isinstance(error, ValueError | OSError)


def meant(word: str, known: Iterable[str]) -> str:
    """`, did you mean ...?` with the nearest known word; empty if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def digest(value: Any) -> str:
    """Eight hex digits that name a JSON value."""
    return hashlib.sha256(storage.dump_json(value).encode()).hexdigest()[:8]
