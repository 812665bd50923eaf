"""CIFAR-100 is torchvision's pixel for pixel, with the superclasses, and nothing is unpickled that could run code."""

import hashlib
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from fabricated import Bomb

from dcgan import storage
from dcgan.config import Data
from dcgan.data.ingest import ingest
from dcgan.data.sources import SOURCES, cifar, cifar100
from dcgan.data.store import Store

IMAGES = 200
FINE = np.arange(IMAGES) % 100


def given(source: object) -> Data:
    return Data(name="cifar100", size=32, source=str(source))


# Protocol 2 as Python 2 wrote it in 2009, which Python 3 can't: byte strings, and numpy under its old names.


def text(value: str) -> bytes:
    return b"U" + bytes([len(value)]) + value.encode()


def listed(items: Sequence[bytes]) -> bytes:
    return b"](" + b"".join(items) + b"e"


def numbers(values: Sequence[int]) -> bytes:
    return listed([b"K" + bytes([value]) for value in values])


def array(rows: np.ndarray) -> bytes:
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    shape = b"".join(b"M" + struct.pack("<H", length) for length in rows.shape) + b"\x86"
    return empty + b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", rows.size) + rows.tobytes() + b"tb"


def pickled(content: dict[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in content.items()) + b"u."


def batch(rows: np.ndarray, coarse: Sequence[int]) -> bytes:
    fine = numbers(FINE.tolist())
    return pickled({"data": array(rows), "fine_labels": fine, "coarse_labels": numbers(coarse)})


Write = Callable[..., Path]


@pytest.fixture
def write(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """write(train=..., test=..., where=...): files of real images with these superclasses, declared the published."""
    raw = (real_data / "cifar-10-batches-py" / "test_batch").read_bytes()
    start = raw.index(b"T" + struct.pack("<i", 10_000 * 3072)) + 5  # the array's bytes, as `array` above writes them
    train, test = np.frombuffer(raw, np.uint8, 2 * IMAGES * 3072, start).reshape(2, IMAGES, 3072)
    right = (FINE * 7 % 20).tolist()

    def build(train_coarse: Sequence[int] = right, test_coarse: Sequence[int] = right) -> Path:
        names = {
            "fine_label_names": listed([text(f"class {i}") for i in range(100)]),
            "coarse_label_names": listed([text(f"superclass {i}") for i in range(20)]),
        }
        files = {"train": batch(train, train_coarse), "test": batch(test, test_coarse), "meta": pickled(names)}
        return declare(tmp_path / "files" / cifar100.FOLDER, files, monkeypatch)

    monkeypatch.setitem(SOURCES, "cifar100", cifar100)
    return build


def declare(folder: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(cifar100, "FILES", md5)
    theirs = torchvision.datasets.CIFAR100
    for name, names in (("train_list", ["train"]), ("test_list", ["test"])):
        monkeypatch.setattr(theirs, name, [[part, md5[part]] for part in names])
    monkeypatch.setattr(theirs, "meta", {**theirs.meta, "md5": md5["meta"]})
    return folder


def pack(folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as packed:
        packed.add(folder, cifar100.FOLDER)
    monkeypatch.setattr(cifar100, "ARCHIVE_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_address_and_checksums_are_torchvisions() -> None:
    theirs = torchvision.datasets.CIFAR100
    meta = [theirs.meta["filename"], theirs.meta["md5"]]
    assert dict([*theirs.train_list, *theirs.test_list, meta]) == cifar100.FILES
    assert f"{cifar.ADDRESSES[0]}/{cifar100.ARCHIVE}" == theirs.url
    assert (theirs.tgz_md5, theirs.base_folder) == (cifar100.ARCHIVE_MD5, cifar100.FOLDER)


def test_images_and_labels_are_torchvisions(write: Write, tmp_path: Path) -> None:
    root = write().parent
    store = Store.open(tmp_path, ingest(given(root), tmp_path), verify=True)
    for split in ("train", "test"):
        theirs = torchvision.datasets.CIFAR100(str(root), train=split == "train")
        np.testing.assert_array_equal(store.images(split).transpose(0, 2, 3, 1), theirs.data)
        np.testing.assert_array_equal(store.labels(split), theirs.targets)
        assert store.classes == tuple(theirs.classes)
    assert not np.array_equal(store.images("train"), store.images("test"))


def test_every_image_has_its_published_superclass(write: Write, tmp_path: Path) -> None:
    about = cifar100.read(given(write()), tmp_path).description
    assert about.superclasses == tuple(f"superclass {i}" for i in range(20))
    np.testing.assert_array_equal(np.array(about.superclass_of)[FINE], FINE * 7 % 20)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_in_two_superclasses_is_refused_by_name(write: Write, tmp_path: Path, split: str) -> None:
    wrong = (FINE * 7 % 20).tolist()
    wrong[142] = 3  # class 42 is in superclass 14
    folder = write(**{f"{split}_coarse": wrong})
    with pytest.raises(ValueError, match=r"class 'class 42' is in superclasses \[3, 14\]; expected one of 0 to 19"):
        cifar100.read(given(folder), tmp_path)


def test_an_unknown_superclass_is_refused(write: Write, tmp_path: Path) -> None:
    wrong = [20 if fine == 7 else fine * 7 % 20 for fine in FINE.tolist()]
    with pytest.raises(ValueError, match=r"class 'class 7' is in superclasses \[20\]"):
        cifar100.read(given(write(wrong, wrong)), tmp_path)


def test_an_archive_and_a_mirror_of_it_give_the_same(
    write: Write, tmp_path: Path, serve: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write()
    archive = pack(folder, tmp_path / "mirror" / cifar100.ARCHIVE, monkeypatch)
    address, asked = serve(lambda name, _: (200, raw := (archive.parent / name).read_bytes(), len(raw)))
    expected = cifar100.read(given(folder), tmp_path).sources
    for number, source in enumerate((folder.parent, archive.parent, address)):
        opened = cifar100.read(given(source), tmp_path / f"downloads{number}")
        assert opened.sources == expected
        assert cifar100.signature(given(source)) == json.loads(json.dumps(cifar100.FILES))
    assert asked == [cifar100.ARCHIVE]
    assert os.listdir(archive.parent) == [cifar100.ARCHIVE], "nothing is unpacked beside the archive"


def test_a_pickle_that_is_not_the_published_one_is_never_read(tmp_path: Path) -> None:
    for name in cifar100.FILES:
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    with pytest.raises(storage.CorruptError, match=r"train \(\d+ bytes\) is not the published file"):
        cifar100.read(given(tmp_path), tmp_path / "downloads")
    assert not (tmp_path / "marker").exists()


def test_a_pickle_can_name_nothing_but_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "marker"))
    folder = declare(tmp_path / "files", dict.fromkeys(cifar100.FILES, bomb), monkeypatch)
    with pytest.raises(ValueError, match=r"a pickle refers to posix\.mkdir; only arrays"):
        cifar100.read(given(folder), tmp_path / "downloads")
    assert not (tmp_path / "marker").exists()


def test_a_truncated_archive_is_refused_and_not_unpacked(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(write(), tmp_path / "mine" / cifar100.ARCHIVE, monkeypatch)
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(storage.CorruptError, match=r"cifar-100-python\.tar\.gz .* is not the published file"):
        cifar100.read(given(archive.parent), tmp_path / "downloads")
    assert not (tmp_path / "downloads").exists()


def test_a_directory_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"data\.source={tmp_path} has none of cifar-100-python/train, "):
        cifar100.signature(given(tmp_path))
