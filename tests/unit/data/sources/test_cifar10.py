"""CIFAR-10 is torchvision's pixel for pixel, and nothing is unpickled before its checksum is known."""

import hashlib
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from fabricated import Bomb

from dcgan import storage
from dcgan.config import Data
from dcgan.data.ingest import ingest
from dcgan.data.sources import cifar, cifar10
from dcgan.data.store import Store


def given(source: object) -> Data:
    return Data(name="cifar10", size=32, source=str(source))


@pytest.fixture
def archive(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published files in a tar of our own, declared to be the published one; packing it would take 12 s."""
    path = tmp_path / "mirror" / cifar10.ARCHIVE
    path.parent.mkdir()
    with tarfile.open(path, "w") as packed:
        packed.add(real_data / cifar10.FOLDER, cifar10.FOLDER)
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_address_and_checksums_are_torchvisions() -> None:
    theirs = torchvision.datasets.CIFAR10
    meta = [theirs.meta["filename"], theirs.meta["md5"]]
    assert dict([*theirs.train_list, *theirs.test_list, meta]) == cifar10.FILES
    assert f"{cifar.ADDRESSES[0]}/{cifar10.ARCHIVE}" == theirs.url
    assert (
        theirs.filename,
        theirs.tgz_md5,
        theirs.base_folder,
    ) == (cifar10.ARCHIVE, cifar10.ARCHIVE_MD5, cifar10.FOLDER)


def test_images_are_the_published_ones_pixel_for_pixel(real_data: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path, ingest(given(real_data), tmp_path), verify=True)
    for split in ("train", "test"):
        theirs = torchvision.datasets.CIFAR10(str(real_data), train=split == "train")
        np.testing.assert_array_equal(store.images(split).transpose(0, 2, 3, 1), theirs.data)
        np.testing.assert_array_equal(store.labels(split), theirs.targets)
        assert store.classes == tuple(theirs.classes)
    # Not through torchvision: a batch holds its pixels as one run of bytes, channels first.
    first = (real_data / cifar10.FOLDER / "data_batch_1").read_bytes()
    assert store.images("train")[:10_000].tobytes() in first
    assert (store.count("train"), store.count("test"), store.channels) == (50_000, 10_000, 3)


def test_the_directory_of_the_batches_may_have_any_name(real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to(real_data / cifar10.FOLDER)
    opened = cifar10.read(given(tmp_path / "mine"), tmp_path / "downloads")
    assert [source.name for source in opened.sources] == list(cifar10.FILES)
    assert not (tmp_path / "downloads").exists()


def test_an_archive_and_a_mirror_of_it_give_the_same(
    real_data: Path, archive: Path, tmp_path: Path, serve: Callable
) -> None:
    address, asked = serve(lambda name, _: (200, raw := (archive.parent / name).read_bytes(), len(raw)))
    expected = cifar10.read(given(real_data), tmp_path).sources
    for number, source in enumerate((archive.parent, address)):
        opened = cifar10.read(given(source), tmp_path / f"downloads{number}")
        assert opened.sources == expected
        assert (tmp_path / f"downloads{number}/cifar10" / cifar10.FOLDER / "test_batch").exists()
    assert asked == [cifar10.ARCHIVE]
    assert os.listdir(archive.parent) == [cifar10.ARCHIVE], "nothing is unpacked beside the archive"


def test_a_pickle_that_is_not_the_published_one_is_never_read(tmp_path: Path) -> None:
    for name in cifar10.FILES:
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    with pytest.raises(storage.CorruptError, match=r"data_batch_1 \(\d+ bytes\) is not the published file"):
        ingest(given(tmp_path), tmp_path / "home")
    assert not (tmp_path / "marker").exists()


def test_an_archive_that_is_not_the_published_one_is_never_unpacked(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / cifar10.ARCHIVE, "w:gz") as packed:
        packed.add(__file__, "../outside")
    with pytest.raises(storage.CorruptError, match=r"cifar-10-python\.tar\.gz .* is not the published file"):
        cifar10.read(given(tmp_path), tmp_path / "downloads")
    assert os.listdir(tmp_path) == [cifar10.ARCHIVE]


def test_a_directory_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"data\.source={tmp_path} has none of data_batch_1, "):
        cifar10.signature(given(tmp_path))
