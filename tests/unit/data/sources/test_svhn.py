"""SVHN is torchvision's pixel for pixel, and the images held out are those of the original code."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from scipy.io import savemat
from sklearn.utils import shuffle

from dcgan import storage
from dcgan.config import Data
from dcgan.data.ingest import ingest
from dcgan.data.records import Pixels
from dcgan.data.sources import SOURCES, svhn
from dcgan.data.sources.base import as_the_paper_held_out
from dcgan.data.store import Store

STRETCHES = {"train": slice(0, 500), "test": slice(500, 700), "extra": slice(700, 1083)}
HELD = 100


def given(source: object, extra: bool = False) -> Data:
    return Data(name="svhn", size=32, source=str(source), extra=extra)


@pytest.fixture
def files(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small .mat files of real digits, laid out as the published ones are and declared to be those."""
    sample = np.load(real_data / "svhn_sample" / "svhn_train_first1083.npz")
    folder = tmp_path / "files"
    folder.mkdir()
    ours, theirs = {}, {}
    for split, stretch in STRETCHES.items():
        name, _ = svhn.FILES[split]
        labels = np.where(sample["y"][stretch] == 0, 10, sample["y"][stretch]).astype(np.uint8)
        content = {"X": sample["x"][stretch].transpose(1, 2, 3, 0), "y": labels[:, None]}
        savemat(folder / name, content, do_compression=True)
        md5 = hashlib.md5((folder / name).read_bytes()).hexdigest()
        ours[split], theirs[split] = (name, md5), [f"http://127.0.0.1:9/{name}", name, md5]
    monkeypatch.setattr(svhn, "FILES", ours)
    monkeypatch.setattr(svhn, "HELD_OUT", slice(HELD))
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", theirs)
    monkeypatch.setitem(SOURCES, "svhn", svhn)
    return folder


def test_addresses_and_checksums_are_torchvisions() -> None:
    for split, (name, md5) in svhn.FILES.items():
        assert torchvision.datasets.SVHN.split_list[split] == [f"{svhn.ADDRESSES[0]}/{name}", name, md5]


def test_images_and_labels_are_torchvisions(files: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path, ingest(given(files, extra=True), tmp_path), verify=True)
    whole = torchvision.datasets.SVHN(str(files), split="train")
    chosen = np.sort(np.random.RandomState(42).permutation(500)[:HELD])
    expected = {
        "train": (np.delete(whole.data, chosen, 0), np.delete(whole.labels, chosen)),
        "validation": (whole.data[chosen], whole.labels[chosen]),
    }
    for split in ("test", "extra"):
        theirs = torchvision.datasets.SVHN(str(files), split=split)
        expected[split] = theirs.data, theirs.labels
    assert set(store.splits) == set(expected)
    for split, (images, labels) in expected.items():
        np.testing.assert_array_equal(store.images(split), images)
        np.testing.assert_array_equal(store.labels(split), labels)
        assert set(labels) == set(range(10))
    assert store.training == ("train", "extra")


def test_a_pixel_is_where_it_was(files: Path, real_data: Path, tmp_path: Path) -> None:
    """Not through torchvision: rows, columns and channels as the sample has them, and 0 for the digit 0."""
    sample = np.load(real_data / "svhn_sample" / "svhn_train_first1083.npz")
    test = list(svhn.read(given(files), tmp_path).splits["test"])
    np.testing.assert_array_equal(np.stack([item.image for item in test]), sample["x"][STRETCHES["test"]])
    assert [item.label for item in test] == sample["y"][STRETCHES["test"]].tolist()


def test_the_extra_images_are_used_only_if_asked_for(files: Path, tmp_path: Path) -> None:
    (files / "extra_32x32.mat").unlink()
    opened = svhn.read(given(files), tmp_path)
    assert {split: len(records) for split, records in opened.splits.items()} == {
        "train": 400,
        "validation": HELD,
        "test": 200,
    }
    assert opened.description.training == ("train",)
    assert svhn.signature(given(files)) == json.loads(json.dumps(dict([svhn.FILES["train"], svhn.FILES["test"]])))
    with pytest.raises(FileNotFoundError, match=r"has none of extra_32x32\.mat"):
        svhn.signature(given(files, extra=True))


def test_the_images_held_out_are_those_of_the_original_code() -> None:
    """svhn/load.py: sklearn's shuffle by a fresh RandomState(42), and the first 10,000."""
    original = shuffle(np.arange(73_257), random_state=np.random.RandomState(42))[:10_000]
    numbers = np.arange(73_257)
    kept, held_out = as_the_paper_held_out(Pixels(numbers, numbers), svhn.HELD_OUT)
    np.testing.assert_array_equal(held_out.images, np.sort(original))
    np.testing.assert_array_equal(kept.labels, np.delete(numbers, original))


def test_a_mirror_gives_the_same(files: Path, tmp_path: Path, serve: Callable) -> None:
    address, asked = serve(lambda name, _: (200, raw := (files / name).read_bytes(), len(raw)))
    assert svhn.read(given(address), tmp_path / "downloads").sources == svhn.read(given(files), tmp_path).sources
    assert asked == ["train_32x32.mat", "test_32x32.mat"]


def test_a_truncated_file_is_refused(files: Path, tmp_path: Path) -> None:
    path = files / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(storage.CorruptError, match=r"test_32x32\.mat \(\d+ bytes\) is not the published file"):
        ingest(given(files), tmp_path / "home")
    assert not list((tmp_path / "home" / "stores").glob("*/manifest.json"))


def test_a_directory_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"data\.source={tmp_path} has none of train_32x32\.mat"):
        svhn.signature(given(tmp_path))
