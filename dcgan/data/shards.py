"""Makes one shard, once: part of a split's images, decoded into one .npy, with a record of its contents.

`make` is what the processes of an ingestion run, in any order and number. The shard is renamed into place before its
record, so a shard without a record, or with one that differs, was interrupted and is made again. Shards are fsynced
only before the store is published; one that is lost in a power cut differs from its record, too.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dcgan import storage
from dcgan.data import publish
from dcgan.data.decode import UnreadableError, decode, square
from dcgan.data.records import Item, Records

BYTES = 2**26  # maximum of a shard: what a process holds in memory, and one upload; 4,096 images at 64 px RGB
ADVICE = "set data.unreadable=skip, which continues from here, or remove it, which starts over"
BLOCK = 16  # images whose statistics are computed at once: what the processor's cache holds


def images_per_shard(channels: int, size: int) -> int:
    """The largest power of two of images that fits in BYTES."""
    return 1 << (BYTES // (channels * size * size)).bit_length() - 1


@dataclass(frozen=True)
class Job:
    """A shard to make: `<split>-<number>.npy` of the store in the working `directory`, its record beside that store.

    records: its images, and no others. labels: how many classes there are.
    skip: leave out images that can't be decoded.
    """

    directory: Path
    split: str
    number: int
    records: Records
    size: int
    channels: int
    labels: int
    skip: bool

    @property
    def path(self) -> Path:
        return self.directory / publish.UNPUBLISHED / f"{self.split}-{self.number:05d}.npy"

    @property
    def record(self) -> Path:
        return self.directory / f"{self.split}-{self.number:05d}.json"


def read(job: Job) -> dict[str, Any]:
    """The record of a shard that has been made."""
    record: dict[str, Any] = json.loads(job.record.read_bytes())
    return record


def made(job: Job) -> bool:
    """Whether the shard is there and has the hash that was recorded."""
    try:
        return storage.sha256(job.path) == read(job)["sha256"]
    except (OSError, ValueError, KeyError):
        return False


def make(job: Job) -> dict[str, Any]:
    """Make the shard and return its record, which is also written to disk.

    bytes, sha256: of the file. labels: of its images, in order. sums, squares: of each channel's pixels, exact.
    skipped: [name, reason] of images left out. Raises ValueError, naming the image, if one can't be used.
    """
    images = np.empty((len(job.records), job.channels, job.size, job.size), np.uint8)
    labels: list[int] = []
    skipped: list[tuple[str, str]] = []
    for item in job.records:
        try:
            image = pixels(item, job.size, job.records.exif)
        except UnreadableError as error:
            if not job.skip:
                raise ValueError(f"{item.where} can't be decoded ({error}): {ADVICE}") from error
            skipped.append((item.name, str(error)))
            continue
        if image.shape != images.shape[1:]:
            raise ValueError(f"{item.where} has {len(image)} channels; the store has {job.channels}")
        images[len(labels)] = image
        labels.append(_label(job, item))
    if -1 in labels and any(label >= 0 for label in labels):
        raise ValueError(f"split {job.split!r} has images with a label and images without")
    images = images[: len(labels)]
    record = {
        **publish.write_array(job.path, images),
        "labels": labels,
        "skipped": skipped,
        **statistics(images),
    }
    storage.write_json(job.record, record)
    return record


def pixels(item: Item, size: int, exif: bool) -> np.ndarray:
    """The stored form of an image, uint8 (C, size, size). Raises UnreadableError, or ValueError for other dtypes."""
    if isinstance(item.image, bytes):
        return decode(item.image, size, exif)
    if item.image.dtype != np.uint8:
        raise ValueError(f"{item.where} is {item.image.dtype}; expected uint8")
    return square(Image.fromarray(item.image), size)


def _label(job: Job, item: Item) -> int:
    if not -1 <= item.label < job.labels:
        raise ValueError(f"{item.where} has label {item.label}; allowed are 0 to {job.labels - 1}, or -1 for none")
    return item.label


def statistics(images: np.ndarray) -> dict[str, list[int]]:
    """Sum and sum of squares of the pixels of each channel of uint8 (N, C, H, W), exact.

    float32 is fast and exact here, in any order of summation: up to 128 squares in a row sum to less than 2^24.
    """
    _, channels, height, width = images.shape
    ones, sums, squares = np.ones(width, np.float32), np.zeros(channels), np.zeros(channels)
    for start in range(0, len(images), BLOCK):
        rows = images[start : start + BLOCK].astype(np.float32).reshape(-1, width)
        sums += (rows @ ones).reshape(-1, channels, height).sum((0, 2), dtype=np.float64)
        squares += (np.square(rows, out=rows) @ ones).reshape(-1, channels, height).sum((0, 2), dtype=np.float64)
    return {"sums": [int(value) for value in sums], "squares": [int(value) for value in squares]}
