"""Builds an `Experiment` from a preset and dotted overrides.

It is built once, at the entry point, from the same words (`train.steps=2000`) on the command line, in `prefect.yaml`
and in the Prefect form.
"""

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dcgan import storage
from dcgan.experiment import ADDRESSES, Experiment, default_home, has_secret, text
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


def sections(preset: str) -> dict[str, Any]:
    """What a preset says, as `override` takes it."""
    import yaml  # only here: training a stored data set needs torch, numpy and pydantic alone

    return yaml.safe_load(_read_preset(preset))


def build(preset: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a preset with `section.key=value` overrides, later ones winning.

    A value is read as YAML, so `0.5`, `true`, `null` and `[svm, knn]` mean what they look like; a path is taken as is.
    Raises ValueError in one line for an unknown preset or key (with the nearest known ones) or a value out of bounds.
    """
    if preset not in PRESETS:
        known = f"; presets are {', '.join(PRESETS)}"
        raise ValueError(f"unknown preset {preset!r}{meant(preset, PRESETS) or known}")
    experiment = override(sections(preset), overrides)
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
        example = "[svm, knn]" if key == "evaluate.protocols" else "[1, 2]"
        reason = f"input should be a list, as in {example}"
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
