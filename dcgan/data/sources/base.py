"""What every source has in common: what it gives, how a picture becomes square, which images are held out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dcgan.config import Data
from dcgan.data.store import Description, SourceFile

Labelled = tuple[np.ndarray, int]  # uint8 (C, size, size) in 0..255, and a label; -1 where there is none
TRANSFORM = "centre crop of the shorter side, resized with antialiasing (Pillow's bilinear)"


@dataclass(frozen=True)
class Opened:
    """A data set whose input has been checked, ready to be read once.

    splits: name and images, in the order to store. skipped: names of input left out, filled while `splits` is read.
    """

    description: Description
    splits: tuple[tuple[str, Iterable[Labelled]], ...]
    sources: tuple[SourceFile, ...]
    skipped: list[str] = field(default_factory=list)


class Source(Protocol):
    """A module of this package: one data set."""

    def signature(self, data: Data) -> Any:
        """What the input is, as a JSON value found without reading images: equal only if the images are equal.

        Raises FileNotFoundError if `data.source` names a directory that does not have the data set.
        """

    def read(self, data: Data, downloads: Path) -> Opened:
        """Find, download (under `downloads` only) and check the input.

        Raises FileNotFoundError, ValueError, storage.CorruptError or published.DownloadError, naming file or address.
        """


def square(image: Image.Image, size: int) -> np.ndarray:
    """uint8 (C, size, size): the centre of the picture, as torchvision's CenterCrop and then Resize give it.

    Pillow widens the filter when it shrinks, which is what antialiasing means.
    """
    side = min(image.size)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    cropped = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(cropped.resize((size, size), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels.reshape(size, size, -1).transpose(2, 0, 1))


def squares(images: np.ndarray, labels: Sequence[int] | np.ndarray, size: int) -> Iterator[Labelled]:
    """`square` of each of uint8 (N, H, W) or (N, H, W, 3), with its label."""
    for image, label in zip(images, labels, strict=True):
        yield square(Image.fromarray(image), size), int(label)


def held_out(sha256: bytes, fraction: float) -> bool:
    """Whether the image with this hash of its content is a test image: a pure function, so a copy goes with it.

    The first 8 bytes of SHA-256 are uniform on 0 .. 2^64 - 1; those below `fraction` of that range are held out.
    """
    return int.from_bytes(sha256[:8], "big") < fraction * 2**64


def require_both(dataset: str, train: int, test: int, fraction: float) -> None:
    """Raise ValueError if the split by content hash leaves a side without images."""
    for split, count in (("train", train), ("test", test)):
        if not count:
            raise ValueError(
                f"{dataset}: {train + test} images with data.test_fraction={fraction} leave split {split!r} empty: "
                "add images or change data.test_fraction"
            )
