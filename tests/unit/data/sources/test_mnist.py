"""MNIST, from every place it may come from, is torchvision's pixel for pixel."""

import gzip
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from fabricated import decoded
from sklearn.utils import shuffle
from torchvision.transforms import v2

from dcgan import storage
from dcgan.config import Data
from dcgan.data.ingest import ingest
from dcgan.data.sources import mnist
from dcgan.data.store import Store


def given(source: object, size: int = 28) -> Data:
    return Data(name="mnist", size=size, source=str(source))  # type: ignore[arg-type]


def test_addresses_and_checksums_are_torchvisions() -> None:
    theirs = torchvision.datasets.MNIST
    assert {f"{name}.gz": packed for name, (packed, _) in mnist.FILES.items()} == dict(theirs.resources)
    assert [f"{address}/" for address in mnist.ADDRESSES] == theirs.mirrors


def test_checksums_of_the_unpacked_files_follow_from_the_published_ones(real_data: Path) -> None:
    for name, (packed, unpacked) in mnist.FILES.items():
        raw = (real_data / "MNIST/raw" / f"{name}.gz").read_bytes()
        assert hashlib.md5(raw).hexdigest() == packed
        assert hashlib.md5(gzip.decompress(raw)).hexdigest() == unpacked


def test_images_are_torchvisions_pixel_for_pixel(real_data: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path, ingest(given(real_data), tmp_path), verify=True)
    train, test = (torchvision.datasets.MNIST(str(real_data), train=train) for train in (True, False))
    # mnist/load.py: sklearn's shuffle by a fresh RandomState(42), and all but the first 50,000.
    held_out = np.sort(shuffle(np.arange(60_000), random_state=np.random.RandomState(42))[50_000:])
    kept = np.delete(np.arange(60_000), held_out)
    expected = {"train": (train, kept), "validation": (train, held_out), "test": (test, slice(None))}
    assert set(store.splits) == set(expected)
    for split, (theirs, rows) in expected.items():
        np.testing.assert_array_equal(store.images(split)[:, 0], theirs.data.numpy()[rows])
        np.testing.assert_array_equal(store.labels(split), theirs.targets.numpy()[rows])
    assert (store.count("train"), store.count("validation"), store.channels) == (50_000, 10_000, 1)
    assert store.training == ("train",)


def test_resized_images_are_torchvisions(real_data: Path, tmp_path: Path) -> None:
    theirs = torchvision.datasets.MNIST(str(real_data), train=False)
    images = decoded(mnist.read(given(real_data, 32), tmp_path))["test"]
    for (ours, label), (image, target), _ in zip(images, theirs, range(100), strict=False):
        np.testing.assert_array_equal(ours, v2.PILToTensor()(v2.Resize(32)(image)).numpy())
        assert label == target


@pytest.mark.parametrize("layout", ["raw", "MNIST/raw", "."])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_every_layout_gives_the_same(real_data: Path, tmp_path: Path, layout: str, end: str) -> None:
    (tmp_path / "here" / layout).mkdir(parents=True, exist_ok=True)
    for name in mnist.FILES:
        shutil.copy(real_data / "MNIST/raw" / f"{name}{end}", tmp_path / "here" / layout)
    data = given(tmp_path / "here")
    assert mnist.signature(data) == {"files": mnist.FILES, "held out from": 50_000}
    assert mnist.read(data, tmp_path / "downloads").sources == mnist.read(given(real_data), tmp_path).sources
    assert not (tmp_path / "downloads").exists()


def test_a_mirror_is_checked_and_kept(real_data: Path, tmp_path: Path, serve: Callable) -> None:
    def answer(name: str, number: int) -> tuple[int, bytes, int]:
        raw = (real_data / "MNIST/raw" / name).read_bytes()
        return 200, raw[:999] if number == 0 else raw, len(raw)  # the first answer is truncated

    address, asked = serve(answer)
    first = mnist.read(given(address), tmp_path / "downloads")
    assert asked == [f"{name}.gz" for name in (next(iter(mnist.FILES)), *mnist.FILES)]
    assert mnist.read(given(address), tmp_path / "downloads").sources == first.sources
    assert len(asked) == 5, "what was downloaded is not asked for again"
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["downloads", "mnist", *asked[1:]])


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_file_that_is_not_the_published_one_is_refused(tmp_path: Path, end: str) -> None:
    for name in mnist.FILES:
        (tmp_path / f"{name}{end}").write_bytes(b"\0\0\x08\x01\0\0\0\x01\x07")
    with pytest.raises(
        storage.CorruptError, match=rf"train-images-idx3-ubyte{end} \(9 bytes\) is not the published file"
    ):
        mnist.read(given(tmp_path), tmp_path)


def test_a_directory_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"data\.source={tmp_path} has none of train-images-idx3-ubyte\.gz, "):
        ingest(given(tmp_path), tmp_path / "home")
    assert not (tmp_path / "home").exists()
