"""The image store: uint8 shards, labels and a manifest, named by the manifest's own hash."""

import re
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dcgan import storage


@dataclass(frozen=True)
class SourceFile:
    """One file that a data set came from; for a tree of images, the whole tree as one entry."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Description:
    """What a store holds, before its images are known.

    classes: names by label, empty where images have no label. size: pixels per side. channels: 1 or 3.
    transform: in words, how a source image became a stored one. training: the splits that a GAN is trained on.
    superclasses, superclass_of: names, and the one that each class belongs to; empty where there are none.
    """

    dataset: str
    classes: tuple[str, ...]
    size: int
    channels: int
    transform: str
    training: tuple[str, ...] = ("train",)
    superclasses: tuple[str, ...] = ()
    superclass_of: tuple[int, ...] = ()


def mapped(shards: Sequence[Path]) -> list[np.memmap]:
    """Memory maps of arrays.

    Each keeps a file open, and LSUN's 741 may be mapped twice, while most systems start with a limit of 1,024: so the
    limit is raised as far as the system allows a process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return [np.load(shard, mmap_mode="r") for shard in shards]


@dataclass(frozen=True)
class Store:
    """A published image store, read through memory maps.

    Raises CorruptError when opened with `verify` and a byte differs from the manifest; lengths are always checked.
    """

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, home: Path, fingerprint: str, verify: bool = False, share: tuple[int, int] = (0, 1)) -> "Store":
        """The store of this name in a home. share: (i, n) compares every n-th file, from i on, with its hash.

        Raises FileNotFoundError if it is not there.
        """
        path = home / "stores" / fingerprint
        if not path.is_dir():
            raise FileNotFoundError(f"no image store {fingerprint} under {home / 'stores'}: run `dcgan ingest` first")
        manifest = path / storage.MANIFEST
        if manifest.is_file() and storage.fingerprint(path) != fingerprint:
            raise storage.CorruptError(f"{manifest} is corrupt: its hash is not the store's name")
        return cls(path, storage.read_manifest(path, hashes=verify, share=share))

    @property
    def fingerprint(self) -> str:
        return self.path.name

    @property
    def dataset(self) -> str:
        return self.manifest["dataset"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty if the images have no labels."""
        return tuple(self.manifest["classes"])

    @property
    def size(self) -> int:
        """Pixels per side."""
        return self.manifest["size"]

    @property
    def channels(self) -> int:
        return self.manifest["channels"]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest["counts"])

    @property
    def training(self) -> tuple[str, ...]:
        """The splits that a GAN is trained on, in order: `train`, unless the data set says otherwise."""
        return tuple(self.manifest["training"])

    @property
    def compared(self) -> tuple[str, ...]:
        """The splits that generated images are compared with, to choose `best`: those held out for it, if there are."""
        held_out = "validation" in self.splits and "validation" not in self.training
        return ("validation",) if held_out else self.training

    @property
    def scored(self) -> tuple[str, ...]:
        """The splits that features are scored on: those of train, validation and test that exist and have labels."""
        return tuple(split for split in ("train", "validation", "test") if self.classes and split in self.splits)

    @property
    def clustered(self) -> tuple[str, ...]:
        """The splits that are clustered: those that are scored, of Tiny ImageNet train alone, as was published."""
        return ("train",) if self.dataset == "tiny_imagenet" else self.scored

    @property
    def superclass_of(self) -> np.ndarray:
        """int64 (classes,): the superclass of each class; empty where there are none."""
        return np.array(self.manifest["superclass_of"], np.int64)

    def count(self, *splits: str) -> int:
        """The number of images in the splits together."""
        return sum(self.manifest["counts"][split] for split in splits)

    def shards(self, *splits: str) -> list[np.memmap]:
        """Memory maps of the splits' shards in order, each uint8 (n, C, H, W)."""
        return mapped([self.path / name for split in splits for name in self._names(split)])

    def _names(self, split: str) -> list[str]:
        shard = re.compile(re.escape(split) + r"-\d{5}\.npy")
        return sorted(name for name in self.manifest["files"] if shard.fullmatch(name))

    def images(self, split: str) -> np.ndarray:
        """The split's images, uint8 (N, C, H, W): a memory map of the one shard, or all shards read into memory."""
        shards = self.shards(split)
        return shards[0] if len(shards) == 1 else np.concatenate(shards)

    def labels(self, *splits: str) -> np.ndarray:
        """int64 (N,); -1 everywhere if the images have no labels."""
        return np.concatenate([np.load(self.path / f"{split}-labels.npy") for split in splits])

    def groups(self, split: str) -> np.ndarray:
        """int64 (N,): what a split is clustered into: superclasses where there are any (CIFAR-100), else classes."""
        labels = self.labels(split)
        return self.superclass_of[labels] if len(self.superclass_of) else labels

    def balance(self, split: str) -> dict[str, int]:
        """The number of images of each class in a split; empty if they have no labels."""
        labels = self.labels(split)
        if labels[0] < 0:
            return {}
        counts = np.bincount(labels, minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def pixel_statistics(self, split: str) -> list[tuple[float, float]]:
        """Mean and standard deviation of each channel's pixels, in 0..255, over a split."""
        totals, pixels = self.manifest["pixels"][split], self.count(split) * self.size**2
        means = [total / pixels for total in totals["sums"]]
        return [
            (mean, max(0.0, squares / pixels - mean**2) ** 0.5)
            for mean, squares in zip(means, totals["squares"], strict=True)
        ]
