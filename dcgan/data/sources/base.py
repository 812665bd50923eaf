"""What all sources share: their interface, and the rules that decide which images are held out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dcgan.config import Data
from dcgan.data.records import Pixels, Records
from dcgan.data.store import Description, SourceFile


@dataclass(frozen=True)
class Opened:
    """A data set whose input has been found and checked.

    splits: name and records, in the order to store.
    """

    description: Description
    splits: Mapping[str, Records]
    sources: tuple[SourceFile, ...]


class Source(Protocol):
    """A module of this package: one data set."""

    def signature(self, data: Data) -> Any:
        """A JSON value that identifies the input, found without reading images: equal only if the images are equal.

        Raises FileNotFoundError if `data.source` names a directory that does not have the data set.
        """

    def read(self, data: Data, downloads: Path) -> Opened:
        """Find, download (under `downloads` only) and check the input.

        Splits are train, test and others; every choice is made on validation where that is one of them.
        Raises FileNotFoundError, ValueError, CorruptError or DownloadError, naming the file or address.
        """


def held_out(sha256: bytes, fraction: float) -> bool:
    """Whether the image with this hash of its content is a test image: a pure function, so copies share a split.

    The first 8 bytes of SHA-256 are uniform on 0 .. 2^64 - 1; those below `fraction` of that range are held out.
    """
    return int.from_bytes(sha256[:8], "big") < fraction * 2**64


PAPERS_SEED = 42  # Newmu/dcgan_code, lib/rng.py


def as_the_paper_held_out(whole: Pixels, held_out: slice) -> tuple[Pixels, Pixels]:
    """The images to train on and the `held_out` part of the paper's random order, both in the file's order.

    The code of Radford et al. shuffles training images by NumPy's RandomState(42), from which nothing was drawn before,
    and takes one end of them for validation (Newmu/dcgan_code, svhn/load.py and mnist/load.py).
    """
    assert whole.labels is not None
    held = np.zeros(len(whole), bool)
    held[np.random.RandomState(PAPERS_SEED).permutation(len(whole))[held_out]] = True
    return Pixels(whole.images[~held], whole.labels[~held]), Pixels(whole.images[held], whole.labels[held])


def require_both(dataset: str, train: int, test: int, fraction: float) -> None:
    """Raise ValueError if the split by content hash leaves either side empty."""
    for split, count in (("train", train), ("test", test)):
        if not count:
            raise ValueError(
                f"{dataset}: {train + test} images with data.test_fraction={fraction} leave split {split!r} empty: "
                "add images or change data.test_fraction"
            )
