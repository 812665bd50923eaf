"""Experiment: the one typed, frozen description of a run; every knob, its meaning and its bounds.

It is built once, at the edge, from a preset and dotted overrides (`train.steps=2000`), with the same words on the
command line, in `prefect.yaml` and in the Prefect form. A function takes the section that it uses.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dcgan import storage

Preset = Literal["digits", "mnist", "cifar10", "folder"]
DataSet = Literal["digits", "mnist", "cifar10", "folder"]
Protocol = Literal["svm", "svm_few_labels", "clustering", "knn"]
PRESETS: tuple[str, ...] = get_args(Preset)
PROTOCOLS: tuple[str, ...] = get_args(Protocol)


class Section(BaseModel):
    """A frozen group of settings that refuses a key it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(Section):
    """Which images, from where, at which size."""

    name: DataSet = Field(description="the data set")
    size: Literal[28, 32, 64, 128] = Field(
        description="pixels a side: the shorter side is centre-cropped, then resized with antialiasing"
    )
    source: str | None = Field(
        None,
        description="a directory with the published files, or an http(s) address that mirrors them, in place of the "
        "data set's own home; for `folder`, the tree of images, a class a subdirectory",
    )
    test_fraction: float = Field(
        0.1, gt=0, lt=1, description="`folder` and `digits`: the share of images held out for scoring, by content hash"
    )
    unreadable: Literal["refuse", "skip"] = Field(
        "refuse", description="`folder`: an image that can't be decoded stops ingestion, or is skipped and listed"
    )
    home: Path | None = Field(
        None, description="where everything is written; DCGAN_HOME if unset, else ./var", validate_default=False
    )


class Model(Section):
    """Both networks. The defaults are the paper's 64-pixel pair (section 3)."""

    kernel: Literal[3, 4, 5] = Field(
        5,
        description="5: the paper's stride-2 5x5; 4: the 4x4 of pytorch/examples; "
        "3: the deep 3x3 ImageNet pair, strides 1 and 2 in turn",
    )
    width: int = Field(128, ge=1, le=2048, description="channels of the discriminator's first layer; doubles downwards")
    z_dim: int = Field(100, ge=1, le=4096, description="length of z")
    z: Literal["uniform", "normal"] = Field("uniform", description="z ~ U(-1, 1) as in the paper, or N(0, 1)")
    conditional: bool = Field(False, description="join the one-hot label to every layer's input, as the MNIST code does")
    hidden: int = Field(0, ge=0, le=8192, description="width of a fully connected layer in both nets; 0: none; MNIST 1024")
    affine: bool = Field(True, description="BatchNorm has gamma and beta; the MNIST code has none")
    spectral_norm: bool = Field(False, description="spectral normalisation in the discriminator (Miyato et al., 2018)")


class Train(Section):
    """The game. The defaults are the paper's (section 4)."""

    steps: int = Field(ge=1, description="batches of real images to train on")
    batch_size: int = Field(128, ge=2, description="images in a step over all workers; a worker takes an equal share")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Adam's, both nets")
    beta1: float = Field(0.5, ge=0, lt=1, description="Adam's first momentum")
    weight_decay: float = Field(0.0, ge=0, le=1, description="L2 term added to the gradient; the original code: 1e-5")
    update: Literal["both", "alternate"] = Field(
        "both", description="each batch updates both nets, or the nets take turns as in the original code"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="one-sided: real images have the target 1 - this")
    ema: float = Field(0.0, ge=0, lt=1, description="decay a step of the generator's moving average; 0: none")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast; weights stay float32")
    channels_last: bool = Field(False, description="channels-last memory layout")
    fused: bool = Field(False, description="PyTorch's fused Adam")
    seed: int = Field(0, ge=0, lt=2**32, description="of the weights, the order of images, and z")
    log_every: int = Field(50, ge=1, description="steps between lines of metrics.jsonl")
    sample_every: int = Field(500, ge=1, description="steps between sample grids")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints, each scored for `best`")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, beside the best")


class Compute(Section):
    """Where training runs. None of it is part of a run's identity."""

    workers: int = Field(1, ge=0, description="Ray Train workers; 0: in this process, without Ray")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if Ray, or this process, has it")
    max_failures: int = Field(3, ge=0, description="times Ray restarts the workers from the newest checkpoint")


class Evaluate(Section):
    """What is scored, and how. Every choice is made on a split of the training set."""

    checkpoint: Literal["best", "latest"] = Field("best", description="best by the sliced Wasserstein distance, or newest")
    protocols: tuple[Protocol, ...] = Field(PROTOCOLS, description="the protocols to run, see dcgan/evaluate/")
    labels: int = Field(0, ge=0, description="training labels for `svm` and `knn`; 0: all")
    labels_per_class: int = Field(100, ge=1, description="`svm_few_labels`: labels a class in each draw")
    draws: int = Field(10, ge=2, description="`svm_few_labels`: random draws, for mean and standard deviation")
    c_grid: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-5, 1e-4, 1e-3, 1e-2), min_length=1, description="SVM penalties tried on a held-out fifth of the labels"
    )
    restarts: int = Field(10, ge=1, description="`clustering`: k-means restarts, the lowest inertia is scored")
    neighbours: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 5, 15), min_length=1, description="`knn`: neighbours tried on a held-out fifth of the labels"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of splits, draws and centroids")


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
        if self.model.kernel == 3 and self.data.size == 28:
            raise ValueError("model.kernel=3 makes 32, 64 or 128 pixels, not data.size=28")
        if self.data.name == "folder" and not self.data.source:
            raise ValueError("data.name=folder needs data.source=DIRECTORY, a tree of images")
        return self

    @property
    def home(self) -> Path:
        """The directory under which everything is written."""
        return (self.data.home or Path(os.environ.get("DCGAN_HOME", "var"))).absolute()

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: data, model and training, not where they are computed or scored."""
        return {
            "data": self.data.model_dump(mode="json", exclude={"home", "source"}),
            "model": self.model.model_dump(mode="json"),
            "train": self.train.model_dump(mode="json"),
        }

    def flat(self) -> dict[str, str]:
        """Dotted key to value in JSON, as overrides take them and MLflow shows them."""
        sections = self.model_dump(mode="json")
        return {f"{s}.{k}": _text(v) for s, section in sections.items() for k, v in section.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def keys() -> dict[str, tuple[str, Any]]:
    """Every dotted key an override may set, with its description and default (Ellipsis where there is none)."""
    found = {}
    for section, field in Experiment.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        for name, knob in field.annotation.model_fields.items():
            default = ... if knob.is_required() else knob.default
            found[f"{section}.{name}"] = (knob.description or "", default)
    return found


def build(preset: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a preset with `section.key=value` overrides, later ones winning.

    A value is read as YAML, so `0.5`, `true`, `null` and `[svm, knn]` mean what they look like.
    Raises ValueError in one line for an unknown preset or key (with the nearest known ones) or a value out of bounds.
    """
    import yaml  # only here: training a stored data set needs torch, numpy and pydantic alone

    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}{_meant(preset, PRESETS)}; presets are {', '.join(PRESETS)}")
    text = (Path(__file__).parent / "presets" / f"{preset}.yaml").read_text()
    return override(yaml.safe_load(text), overrides)


def override(sections: dict[str, Any], overrides: Sequence[str]) -> Experiment:
    """The experiment of `sections` (as `model_dump` gives them) after applying overrides; raises as `build` does."""
    import yaml

    known = keys()
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"override {word!r} is not of the form section.key=value")
        if key not in known:
            raise ValueError(f"unknown key {key!r}{_meant(key, known)}")
        section, name = key.split(".")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{key}={value!r} is not a value that YAML can read") from error
        sections = {**sections, section: {**sections.get(section, {}), name: _number(parsed)}}
    return validate(sections)


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
    if not key:
        return str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_meant(key, keys())}"
    if error["type"] == "missing":
        return f"{key} is required"
    return f"{key}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _meant(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), n=2, cutoff=0.5)
    return f", did you mean {' or '.join(near)}?" if near else ""


def digest(value: Any) -> str:
    """Eight hex digits that name a JSON value."""
    return hashlib.sha256(storage.dump_json(value).encode()).hexdigest()[:8]
