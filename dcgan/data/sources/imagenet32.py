"""ImageNet at 32x32 (Chrabaszcz, Loshchilov and Hutter 2017): all 1,281,167 + 50,000 images of ILSVRC-2012, resized.

ImageNet's terms of access forbid fetching it on someone's behalf, so `data.source` is required. The files are pickles,
which can run code when they are read, and no published checksums of them are known. So `pickles.py` reads them, which
builds only containers, numbers and arrays, and the images are counted.

A batch has 393 MB of pixels. It is read when its images are needed and kept as long as they are.
"""

import hashlib
import pickle
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from dcgan import storage
from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import Item
from dcgan.data.sources import archives, pickles, published
from dcgan.data.sources.base import Opened
from dcgan.data.store import Description, SourceFile

PAGE = "https://image-net.org/download-images.php"
ARCHIVES = {"train": "Imagenet32_train.zip", "test": "Imagenet32_val.zip"}
BATCHES = {"train": tuple(f"train_data_batch_{number}" for number in range(1, 11)), "test": ("val_data",)}
ADVICE = (
    f"ImageNet's terms forbid downloading it automatically: put {' and '.join(ARCHIVES.values())} from {PAGE} "
    "(Download downsampled image data, 32x32), or the files in them, into one directory and set data.source to it"
)
NAMES = "map_clsloc.txt"  # of the authors: lines of WordNet id, number, word
COUNTS = {"train": 1_281_167, "test": 50_000}
FOLDER = "imagenet32"  # under downloads
CLASSES = 1_000
SIDE = 32
# What the unpickler and numpy raise on damaged pickles, and zipfile on members that are damaged or encrypted.
DAMAGED = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, RuntimeError),
)


class Batch(NamedTuple):
    """One of the published files: on its own or as a member of a zip file."""

    name: str
    path: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else str(self.path)


class Stretch(NamedTuple):
    """Some of the images of a batch, from `start` up to `stop`."""

    batch: Batch
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Content:
    """images: uint8 (N, 3072), channel by channel. labels: int64 (N,) from 0."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Stretches:
    """Images of several batches, concatenated."""

    parts: Sequence[Stretch]
    encoded: bool = False
    exif: bool = False

    def __len__(self) -> int:
        return sum(stop - start for _, start, stop in self.parts)

    def part(self, start: int, stop: int) -> "Stretches":
        found, first = [], 0
        for batch, begin, end in self.parts:
            here = Stretch(batch, begin + max(start - first, 0), min(begin + stop - first, end))
            if here.start < here.stop:
                found.append(here)
            first += end - begin
        return Stretches(found)

    def __iter__(self) -> Iterator[Item]:
        for stretch in self.parts:
            yield from _items(stretch)


def signature(data: Data) -> Any:
    """Length and modification time of every file; see `base.Source`."""
    _require_local(data)
    root = archives.tree(data, FOLDER)
    paths = sorted({batch.path for batches in _batches(root).values() for batch in batches})
    names = [root / NAMES] if (root / NAMES).is_file() else []
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in [*paths, *names]}


def read(data: Data, downloads: Path) -> Opened:
    """The published splits, three channels; see `base.Source`. This reads every batch once.

    data.source: a directory of the zip files, or of the batches in them. The classes are the authors' numbers, "1" to
    "1000", which are not in the order of ImageNet's ids; or the ids, if map_clsloc.txt is beside them. Raises
    ValueError, naming the file, unless there are 1,281,167 + 50,000 images with labels from 1 to 1000.
    """
    _require_local(data)
    root = published.tree(data, downloads / FOLDER)
    splits, sources = {}, []
    for split, batches in _batches(root).items():
        parts = []
        for batch in batches:
            count, source = _described(batch)
            parts.append(Stretch(batch, 0, count))
            sources.append(source)
        splits[split] = Stretches(parts)
        if (found := len(splits[split])) != COUNTS[split]:
            raise ValueError(f"{root} has {found} images in split {split}; published are {COUNTS[split]}")
    return Opened(Description(data.name, _classes(root), data.size, 3, TRANSFORM), splits, tuple(sources))


def _require_local(data: Data) -> None:
    """Raise FileNotFoundError, saying which files to put where, unless `data.source` is a directory or at S3."""
    if data.source is None:
        raise FileNotFoundError(f"data.source is not set; {ADVICE}")
    if data.source.startswith(("http://", "https://")):
        raise FileNotFoundError(f"data.source={data.source}: a download could not be checked; {ADVICE}")


def _batches(root: Path) -> dict[str, list[Batch]]:
    return {split: _found(root, split) for split in BATCHES}


def _found(root: Path, split: str) -> list[Batch]:
    """The batches of a split, as files or in the zip file; raises FileNotFoundError, naming one that is absent."""
    archive = root / ARCHIVES[split]
    folder = next((folder for folder in (root, root / archive.stem) if (folder / BATCHES[split][0]).is_file()), None)
    if folder is None and archive.is_file():
        return _in_archive(archive, BATCHES[split])
    batches = [Batch(name, (folder or root) / name) for name in BATCHES[split]]
    if absent := next((batch for batch in batches if not batch.path.is_file()), None):
        raise FileNotFoundError(f"{absent.path} is not there, nor is {archive}; {ADVICE}")
    return batches


def _in_archive(path: Path, names: Sequence[str]) -> list[Batch]:
    with _naming(str(path)), zipfile.ZipFile(path) as archive:
        members = {member.rpartition("/")[2]: member for member in archive.namelist()}
    if absent := next((name for name in names if name not in members), None):
        raise ValueError(f"{path} has no {absent}")
    return [Batch(name, path, members[name]) for name in names]


def _described(batch: Batch) -> tuple[int, SourceFile]:
    """How many images there are, and a hash of their content: the same whether the batch was in a zip file or not."""
    content = read_batch(batch)
    labels = content.labels.astype("<i8").tobytes()
    whole = hashlib.sha256(content.images.data)
    whole.update(labels)
    size = content.images.nbytes + len(labels)
    return len(content.images), SourceFile(f"{batch.name}, pixels and labels", size, whole.hexdigest())


def _classes(root: Path) -> tuple[str, ...]:
    if not (root / NAMES).is_file():
        return tuple(str(number) for number in range(1, CLASSES + 1))
    lines = [line.split() for line in (root / NAMES).read_text(encoding="utf-8").splitlines() if line.strip()]
    names = {line[1]: line[0] for line in lines if len(line) > 1}
    try:
        return tuple(names[str(number)] for number in range(1, CLASSES + 1))
    except KeyError as error:
        raise ValueError(f"{root / NAMES} has no class number {error}") from error


def _items(stretch: Stretch) -> Iterator[Item]:
    """The images of a stretch, copied, so that the batch is freed before the next one is read."""
    batch, start, stop = stretch
    content = read_batch(batch)
    if stop > len(content.images):
        raise ValueError(f"{batch} changed while it was being read")
    for i in range(start, stop):
        image = content.images[i].reshape(3, SIDE, SIDE).transpose(1, 2, 0).copy()
        yield Item(f"{batch.name}: image {i}", image, int(content.labels[i]), f"{batch}: image {i}")


_kept: WeakValueDictionary[Batch, Content] = WeakValueDictionary()
_reading = threading.Lock()


def read_batch(batch: Batch) -> Content:
    """The images and labels of a batch, read once for all threads that use it.

    Raises CorruptError if it is damaged or names anything but arrays, ValueError if it is no batch of 32x32 images;
    both name it.
    """
    with _reading:
        if (content := _kept.get(batch)) is None:
            content = _kept[batch] = _content(batch)
        return content


def _content(batch: Batch) -> Content:
    with _naming(str(batch)), _stream(batch) as stream:
        raw = pickles.load(stream)
    images, labels = (raw.get("data"), raw.get("labels")) if isinstance(raw, Mapping) else (None, None)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (3 * SIDE**2,):
        raise ValueError(f"{batch}: its data are not uint8 (N, {3 * SIDE**2})")
    with _naming(str(batch)):
        numbers = np.asarray(labels, np.int64)
    if numbers.shape != (len(images),) or (len(numbers) and not 1 <= numbers.min() <= numbers.max() <= CLASSES):
        raise ValueError(f"{batch}: its labels are not one of 1 to {CLASSES} for each of {len(images)} images")
    return Content(np.ascontiguousarray(images), numbers - 1)


@contextmanager
def _stream(batch: Batch) -> Iterator[IO[bytes]]:
    if not batch.member:
        with batch.path.open("rb") as file:
            yield file
    else:
        with zipfile.ZipFile(batch.path) as archive, archive.open(batch.member) as member:
            yield member


@contextmanager
def _naming(where: str) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise storage.CorruptError(f"{where} can't be read: {error}") from error
