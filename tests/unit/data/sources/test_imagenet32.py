"""ImageNet at 32x32: pixels and labels of the batches, a batch at a time, and no pickle runs code."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from dcgan import storage
from dcgan.config import Data
from dcgan.data import sources
from dcgan.data.ingest import ingest
from dcgan.data.sources import imagenet32
from dcgan.data.store import Store

SIZES = {name: 5 + i for i, name in enumerate((*imagenet32.BATCHES["train"], *imagenet32.BATCHES["test"]))}
TRAIN = sum(SIZES.values()) - SIZES["val_data"]


def given(source: object) -> Data:
    return Data(name="imagenet32", size=32, source=str(source))


@pytest.fixture(scope="module")
def photographs(real_data: Path) -> np.ndarray:
    """uint8 (N, 32, 32, 3)."""
    return CIFAR10(str(real_data), train=False).data[: sum(SIZES.values())]


@pytest.fixture
def batches(photographs: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The eleven files, of a few real photographs each; labels count upwards over all."""
    monkeypatch.setattr(imagenet32, "COUNTS", {"train": TRAIN, "test": SIZES["val_data"]})
    (root := tmp_path / "batches").mkdir()
    first = 0
    for name, size in SIZES.items():
        pixels = photographs[first : first + size].transpose(0, 3, 1, 2).reshape(size, 3072)
        labels = [1 + 37 * i % 1000 for i in range(first, first + size)]
        content = {"data": pixels, "labels": labels, "mean": pixels.mean(0)}
        (root / name).write_bytes(pickle.dumps(content, protocol=2 + first % 3))
        first += size
    return root


def content(source: Path, downloads: Path) -> dict[str, list[tuple[bytes, int]]]:
    splits = imagenet32.read(given(source), downloads).splits
    return {split: [(item.image.tobytes(), item.label) for item in records] for split, records in splits.items()}


def test_images_are_the_batches_pixel_for_pixel(
    batches: Path, photographs: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sources.SOURCES, "imagenet32", imagenet32)
    store = Store.open(tmp_path, ingest(given(batches), tmp_path), verify=True)
    stored = np.concatenate([store.images("train"), store.images("test")])
    np.testing.assert_array_equal(stored.transpose(0, 2, 3, 1), photographs)
    assert store.labels("train", "test").tolist() == [37 * i % 1000 for i in range(len(photographs))]
    assert store.classes == tuple(str(number) for number in range(1, 1001))
    assert (store.count("train"), store.count("test")) == (TRAIN, SIZES["val_data"])
    assert not imagenet32._kept, "no batch is kept when nobody reads it"


def test_the_published_zip_files_give_the_same(batches: Path, tmp_path: Path) -> None:
    (root := tmp_path / "zips").mkdir()
    for split, names in imagenet32.BATCHES.items():
        with zipfile.ZipFile(root / imagenet32.ARCHIVES[split], "w", zipfile.ZIP_DEFLATED) as archive:
            for name in reversed(names):
                archive.write(batches / name, f"inside/{name}")
    assert content(root, tmp_path) == content(batches, tmp_path)
    packed, unpacked = (imagenet32.read(given(at), tmp_path) for at in (root, batches))
    assert packed.sources == unpacked.sources
    assert sorted(os.listdir(root)) == ["Imagenet32_train.zip", "Imagenet32_val.zip"]


def test_unpacked_zip_files_may_stay_where_they_were_unpacked(batches: Path, tmp_path: Path) -> None:
    expected = content(batches, tmp_path)
    for split, names in imagenet32.BATCHES.items():
        (folder := batches / Path(imagenet32.ARCHIVES[split]).stem).mkdir()
        for name in names:
            (batches / name).rename(folder / name)
    assert content(batches, tmp_path) == expected


def test_any_cut_gives_the_same_images(batches: Path, tmp_path: Path) -> None:
    records = imagenet32.read(given(batches), tmp_path).splits["train"]
    whole = [item.name for item in records]
    assert whole[SIZES["train_data_batch_1"]] == "train_data_batch_2: image 0"
    for step in (1, 4, 7, 33, TRAIN):
        parts = [records.part(i, min(i + step, TRAIN)) for i in range(0, TRAIN, step)]
        assert [len(part) for part in parts] == [min(step, TRAIN - i) for i in range(0, TRAIN, step)]
        assert [item.name for part in parts for item in pickle.loads(pickle.dumps(part))] == whole  # noqa: S301
    assert [item.name for item in records.part(3, 40).part(1, 5)] == whole[4:8]


def test_one_batch_at_a_time_is_in_memory(batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, kept = imagenet32._content, []

    def watched(batch: imagenet32.Batch) -> imagenet32.Content:
        kept.append(len(imagenet32._kept))
        return read(batch)

    monkeypatch.setattr(imagenet32, "_content", watched)
    records = imagenet32.read(given(batches), tmp_path).splits["train"]
    assert len(list(records)) == TRAIN  # each item outlives its batch
    assert kept == [0] * (11 + 10), "when one is read, none is there"


def test_a_batch_is_read_once_for_all_that_are_at_it(
    batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = imagenet32.read(given(batches), tmp_path).splits["train"]
    first, second = iter(records.part(0, 2)), iter(records.part(2, 4))
    next(first)
    monkeypatch.setattr(imagenet32, "_content", None)
    assert next(second).name == "train_data_batch_1: image 2"


def test_the_authors_names_are_used_where_they_are(batches: Path, tmp_path: Path) -> None:
    lines = [f"n{90_000_000 - number} {number} thing_{number}\n" for number in range(1, 1001)]
    (batches / "map_clsloc.txt").write_text("".join(lines[::-1]))
    classes = imagenet32.read(given(batches), tmp_path).description.classes
    assert (classes[0], classes[999]) == ("n89999999", "n89999000")
    (batches / "map_clsloc.txt").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match=r"map_clsloc\.txt has no class number '1'"):
        imagenet32.read(given(batches), tmp_path)


class Bomb:
    """Unpickling this makes a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_by_name(batches: Path, tmp_path: Path, zipped: bool) -> None:
    raw = pickle.dumps({"data": Bomb(tmp_path / "marker"), "labels": []})
    (batches / "train_data_batch_7").write_bytes(raw)
    if zipped:
        with zipfile.ZipFile(batches / "Imagenet32_train.zip", "w") as archive:
            for name in imagenet32.BATCHES["train"]:
                archive.write(batches / name, name)
                (batches / name).unlink()
    refusal = r"train_data_batch_7 can't be read: a pickle refers to posix\.mkdir; only arrays"
    with pytest.raises(storage.CorruptError, match=refusal):
        imagenet32.read(given(batches), tmp_path)
    assert not (tmp_path / "marker").exists()


def good(**changes: object) -> dict:
    return {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 1000], **changes}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1, 2], r"data are not uint8 \(N, 3072\)"),
        ({}, r"data are not uint8 \(N, 3072\)"),
        (good(data=np.zeros((2, 3072))), r"data are not uint8 \(N, 3072\)"),
        (good(data=np.zeros((2, 12288), np.uint8)), r"data are not uint8 \(N, 3072\)"),
        (good(data=np.zeros(3072, np.uint8)), r"data are not uint8 \(N, 3072\)"),
        (good(data="a" * 3072), r"data are not uint8 \(N, 3072\)"),
        (good(labels=[0, 1]), "labels are not one of 1 to 1000 for each of 2 images"),
        (good(labels=[1, 1001]), "labels are not one of 1 to 1000 for each of 2 images"),
        (good(labels=[1]), "labels are not one of 1 to 1000 for each of 2 images"),
        (good(labels=None), "can't be read"),
        (good(labels=["a", "b"]), "can't be read"),
    ],
)
def test_a_pickle_of_something_else_is_refused(batches: Path, tmp_path: Path, value: object, reason: str) -> None:
    (batches / "train_data_batch_10").write_bytes(pickle.dumps(value, protocol=4))
    with pytest.raises((ValueError, storage.CorruptError), match=f"train_data_batch_10.*{reason}"):
        imagenet32.read(given(batches), tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_a_batch_that_was_cut_short_is_refused(batches: Path, tmp_path: Path, keep: float) -> None:
    raw = (batches / "train_data_batch_3").read_bytes()
    (batches / "train_data_batch_3").write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(storage.CorruptError, match=r"train_data_batch_3 can't be read"):
        imagenet32.read(given(batches), tmp_path)


def test_a_damaged_zip_file_is_refused(batches: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(path := batches / "Imagenet32_train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in imagenet32.BATCHES["train"]:
            archive.write(batches / name, name)
            (batches / name).unlink()
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(storage.CorruptError, match=r"Imagenet32_train\.zip can't be read: File is not a zip file"):
        imagenet32.read(given(batches), tmp_path)
    damaged = bytearray(raw)
    damaged[2000:2100] = bytes(100)
    path.write_bytes(damaged)
    with pytest.raises((storage.CorruptError, ValueError), match=r"Imagenet32_train\.zip: train_data_batch_1"):
        imagenet32.read(given(batches), tmp_path)


def test_missing_and_surplus_images_are_refused(batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(imagenet32.COUNTS, "test", 50_000)
    with pytest.raises(
        ValueError, match=rf"{batches} has {SIZES['val_data']} images in split test; published are 50000"
    ):
        imagenet32.read(given(batches), tmp_path)


def test_a_missing_file_is_named_with_what_to_put_where(batches: Path, tmp_path: Path) -> None:
    (batches / "train_data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_data_batch_4 is not there, nor is .*Imagenet32_train\.zip; Im"):
        imagenet32.signature(given(batches))
    with pytest.raises(FileNotFoundError, match=r"data\.source is not set; .*Imagenet32_train\.zip and Imagenet32_val"):
        imagenet32.signature(Data(name="imagenet32", size=32))
    with pytest.raises(FileNotFoundError, match=r"a download could not be checked; ImageNet's terms"):
        imagenet32.read(given("http://mirror/files"), tmp_path)


def test_a_batch_that_changes_meanwhile_is_refused(batches: Path, tmp_path: Path) -> None:
    records = imagenet32.read(given(batches), tmp_path).splits["train"]
    shutil.copy(batches / "train_data_batch_1", batches / "train_data_batch_10")
    with pytest.raises(ValueError, match=r"train_data_batch_10 changed while it was being read"):
        list(records)


def test_the_signature_follows_every_file(batches: Path) -> None:
    seen = [imagenet32.signature(given(batches))]
    assert set(seen[0]) == set(SIZES)
    os.utime(batches / "val_data", ns=(0, 0))
    seen.append(imagenet32.signature(given(batches)))
    (batches / "map_clsloc.txt").write_text("")
    seen.append(imagenet32.signature(given(batches)))
    assert all(seen.count(each) == 1 for each in seen)
