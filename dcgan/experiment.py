"""`Experiment`, the one typed, frozen description of a run, which `config.py` builds.

A function takes only the section it uses; `settings.py` says what each key means. Here is what depends on two sections,
or on which data set it is.
"""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import model_validator

from dcgan.settings import Compute, Data, DataSet, Evaluate, Model, Section, Train

# Section and key: an http(s):// address may contain a user.
ADDRESSES = (("data", "source"), ("evaluate", "images_source"))
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
            raise ValueError("model.kernel=3 makes 32, 64, 96 or 128 pixels, not data.size=28")
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


def has_secret(address: str | None) -> bool:
    """Whether an http(s) address has a user, a password or a query, in which secrets are passed."""
    parts = urlsplit(address or "")
    return parts.scheme in ("http", "https") and bool("@" in parts.netloc or parts.query)


def _without_secret(address: str) -> str:
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
