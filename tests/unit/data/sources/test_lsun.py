"""LSUN: images are torchvision's out of the same LMDB; a zip file is unpacked once; what is damaged is refused."""

import hashlib
import logging
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from torchvision.transforms import v2

from dcgan import storage
from dcgan.config import Data
from dcgan.data import sources
from dcgan.data.ingest import ingest
from dcgan.data.sources import lsun
from dcgan.data.store import Store

TRAIN, VAL = "bedroom_train_lmdb", "bedroom_val_lmdb"


def given(source: object, **settings: object) -> Data:
    return Data(name="lsun", size=64, source=str(source), **settings)  # type: ignore[arg-type]


def pack(directory: Path, files: list[Path]) -> None:
    """An LMDB as LSUN's are: keys are hashes of the images."""
    with lmdb.open(str(directory), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        for file in files:
            transaction.put(hashlib.sha1(raw := file.read_bytes()).hexdigest().encode(), raw)


@pytest.fixture(scope="module")
def packed(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both LMDBs of real bedrooms, 40 + 10, one of the former as WebP; read-only."""
    root = tmp_path_factory.mktemp("lsun")
    rooms = sorted((real_data / "rooms" / "bedroom").iterdir())[:50]
    with Image.open(rooms[0]) as image:
        image.save(webp := root / "0.webp", lossless=True)
    pack(root / TRAIN, [webp, *rooms[1:40]])
    pack(root / VAL, rooms[40:])
    return root


@pytest.fixture
def tree(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "lsun")
    return tmp_path / "lsun"


@pytest.fixture
def zips(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The LMDBs in zip files of our own, declared to be the published ones, with a member that leads out of them."""
    (root := tmp_path / "zips").mkdir()
    digests = []
    for name in (TRAIN, VAL):
        with zipfile.ZipFile(root / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(packed / name / "data.mdb", f"{name}/data.mdb")
            archive.write(packed / name / "lock.mdb", f"{name}/lock.mdb")
            archive.writestr("../outside", "")
        digests.append(storage.sha256(root / f"{name}.zip"))
    monkeypatch.setitem(lsun.CATEGORIES, "bedroom", tuple(digests))
    return root


def test_images_are_torchvisions_pixel_for_pixel(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where torchvision writes its cache
    monkeypatch.setitem(sources.SOURCES, "lsun", lsun)
    opened = lsun.read(given(packed), tmp_path / "downloads")
    store = Store.open(tmp_path, ingest(given(packed), tmp_path), verify=True)
    for split, part in (("train", "bedroom_train"), ("test", "bedroom_val")):
        raw = [item.image for item in opened.splits[split]]
        stored = store.images(split)
        theirs = torchvision.datasets.LSUN(str(packed), [part])
        assert len(raw) == len(stored) == len(theirs) == {"train": 40, "test": 10}[split]
        resize = v2.Compose([v2.Resize(64), v2.PILToTensor()])
        for i, (image, _) in enumerate(theirs):
            np.testing.assert_array_equal(stored[i], resize(image).numpy())
        for database in theirs.dbs:
            database.env.close()
    assert store.classes == ()
    assert set(store.labels("train", "test")) == {-1}
    assert not (tmp_path / "downloads").exists()


def test_records_are_cut_and_sent(packed: Path, tmp_path: Path) -> None:
    records = lsun.read(given(packed), tmp_path).splits["train"]
    whole = list(records)
    parts = [pickle.loads(pickle.dumps(records.part(i, i + 16))) for i in range(0, 40, 16)]  # noqa: S301
    assert [item for part in parts for item in part] == whole
    assert [item.name for item in whole] == sorted(hashlib.sha1(item.image).hexdigest() for item in whole)


def test_no_lock_file_and_no_right_to_write_one_are_needed(tree: Path, tmp_path: Path) -> None:
    expected = list(lsun.read(given(tree), tmp_path).splits["test"])
    for name in (TRAIN, VAL):
        (tree / name / "lock.mdb").unlink()
        (tree / name / "data.mdb").chmod(0o400)
        (tree / name).chmod(0o500)
    assert list(lsun.read(given(tree), tmp_path).splits["test"]) == expected
    assert [os.listdir(tree / name) for name in (TRAIN, VAL)] == [["data.mdb"]] * 2


@pytest.mark.parametrize("keep", [0, 100, 4096, 4200, 8192, 0.5, -4096, -1])
def test_a_file_that_was_cut_short_is_refused(tree: Path, tmp_path: Path, keep: float) -> None:
    file = tree / TRAIN / "data.mdb"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(storage.CorruptError, match=r"bedroom_train_lmdb/data\.mdb .*cut short"):
        lsun.read(given(tree), tmp_path)


def test_a_file_that_is_cut_short_meanwhile_is_refused(tree: Path, tmp_path: Path) -> None:
    records = lsun.read(given(tree), tmp_path).splits["test"]
    os.truncate(tree / VAL / "data.mdb", 20_000)
    with pytest.raises(ValueError, match=r"bedroom_val_lmdb/data\.mdb: [0-9a-f]{40} is cut short"):
        list(records)


def test_zip_files_are_unpacked_once_and_give_the_same(
    packed: Path, zips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    downloads = tmp_path / "downloads"
    direct = lsun.read(given(packed), downloads)
    with caplog.at_level(logging.INFO):
        opened = lsun.read(given(zips), downloads)
    assert caplog.text.count("unpacking") == 2
    assert opened.sources == direct.sources
    for split in ("train", "test"):
        assert [item.image for item in opened.splits[split]] == [item.image for item in direct.splits[split]]
    written = sorted(path.relative_to(tmp_path).as_posix() for path in downloads.rglob("[!.]*") if path.is_file())
    assert written == [f"downloads/lsun/{name}/data.mdb" for name in (TRAIN, VAL)]
    caplog.clear()
    lsun.read(given(zips), downloads)
    assert "unpacking" not in caplog.text


def test_a_mirror_is_downloaded_and_the_unpacked_file_is_enough(zips: Path, tmp_path: Path, serve: Callable) -> None:
    address, asked = serve(lambda name, _: (200, raw := (zips / name).read_bytes(), len(raw)))
    opened = lsun.read(given(address), tmp_path / "downloads")
    assert [len(records) for records in opened.splits.values()] == [40, 10]
    for name in (TRAIN, VAL):
        (tmp_path / "downloads" / "lsun" / f"{name}.zip").unlink()
    lsun.read(given(address), tmp_path / "downloads")
    assert len(asked) == 2


def test_a_zip_file_that_is_not_the_published_one_is_refused(zips: Path, tmp_path: Path) -> None:
    with (zips / f"{VAL}.zip").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(storage.CorruptError, match=r"bedroom_val_lmdb\.zip .* is not the published file: SHA-256"):
        lsun.read(given(zips), tmp_path / "downloads")


@pytest.mark.parametrize("how", ["absent", "damaged"])
def test_a_zip_file_without_a_sound_lmdb_leaves_nothing(
    zips: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zips / f"{TRAIN}.zip"
    if how == "absent":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.mdb", "elsewhere")
    else:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 255
        path.write_bytes(raw)
    monkeypatch.setitem(lsun.CATEGORIES, "bedroom", (storage.sha256(path), lsun.CATEGORIES["bedroom"][1]))
    with pytest.raises(storage.CorruptError, match=r"_train_lmdb\.zip has no sound bedroom_train_lmdb/data\.mdb"):
        lsun.read(given(zips), tmp_path / "downloads")
    assert not [path for path in (tmp_path / "downloads").rglob("[!.]*") if path.is_file()]


def test_a_disk_too_small_is_refused_before_unpacking(
    zips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(OSError, match=r"data\.mdb needs 0\.0 GB, 0\.0 GB are free"):
        lsun.read(given(zips), tmp_path / "downloads")


def test_an_unknown_category_names_the_known_ones(tmp_path: Path) -> None:
    for call in (lambda data: lsun.signature(data), lambda data: lsun.read(data, tmp_path)):
        with pytest.raises(
            ValueError, match=r"data\.category='bedrom'; categories are bedroom, bridge, church_outdoor"
        ):
            call(given(tmp_path, category="bedrom"))


def test_a_directory_without_the_category_is_refused(packed: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has none of tower_train_lmdb/data\.mdb, tower_train_lmdb\.zip"):
        lsun.signature(given(packed, category="tower"))


def test_the_signature_is_cheap_and_follows_the_files(
    packed: Path, zips: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = lsun.signature(Data(name="lsun", size=64))
    monkeypatch.setattr(storage, "sha256", None)
    assert lsun.signature(given(zips)) == published
    assert lsun.signature(given("http://mirror/lsun")) == published
    before = lsun.signature(given(tree))
    assert before != published
    os.utime(tree / VAL / "data.mdb", ns=(0, 0))
    after = lsun.signature(given(tree))
    assert (before["train"] == after["train"], before["test"] == after["test"]) == (True, False)


def test_every_category_has_two_digests() -> None:
    digests = [digest for pair in lsun.CATEGORIES.values() for digest in pair]
    assert len(set(digests)) == 20
    assert {len(bytes.fromhex(digest)) for digest in digests} == {32}
