"""The image store gives back what was written, and notices every changed byte."""

import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fabricated import write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from dcgan import storage
from dcgan.data import shards
from dcgan.data.records import Item
from dcgan.data.store import Description, SourceFile, Store

LABELLED = Description("toy", ("a", "b", "c"), 4, 3, "none")
BARE = Description("toy", (), 4, 1, "none")
Make = Callable[..., Store]


def images(count: int, description: Description, seed: int = 0) -> list[tuple[np.ndarray, int]]:
    generator = np.random.default_rng(seed)
    shape = (description.channels, description.size, description.size)
    classes = len(description.classes)
    return [
        (generator.integers(0, 256, shape, np.uint8), int(generator.integers(classes)) if classes else -1)
        for _ in range(count)
    ]


def test_more_shards_than_files_may_be_open_at_first(tmp_path: Path) -> None:
    made = write_store(tmp_path, LABELLED, {"train": images(90, LABELLED)}, shard_images=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 80, hard))
    try:
        assert len(made.shards("train")) == 90
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@settings(max_examples=30, deadline=None)
@given(
    counts=st.dictionaries(st.sampled_from(["train", "test", "extra", "train-00000"]), st.integers(1, 40), min_size=1),
    shard=st.integers(1, 45),
    description=st.sampled_from([LABELLED, BARE]),
)
def test_what_is_written_is_read_back(counts: dict[str, int], shard: int, description: Description) -> None:
    written = {split: images(count, description, seed) for seed, (split, count) in enumerate(counts.items())}
    with tempfile.TemporaryDirectory() as directory:
        made = write_store(Path(directory), description, written, [SourceFile("f", 3, "00")], shard)
        read = Store.open(Path(directory), name := made.fingerprint, verify=True)
        assert read.splits == tuple(sorted(counts)), "manifests are written with sorted keys"
        assert (read.fingerprint, read.dataset, read.classes) == (name, "toy", description.classes)
        assert read.manifest["sources"] == [{"name": "f", "bytes": 3, "sha256": "00"}]
        for split, pairs in written.items():
            assert read.count(split) == len(pairs)
            assert [len(part) for part in read.shards(split)][:-1] == [shard] * ((len(pairs) - 1) // shard)
            np.testing.assert_array_equal(read.images(split), np.stack([image for image, _ in pairs]))
            np.testing.assert_array_equal(read.labels(split), [label for _, label in pairs])
            assert (read.images(split).dtype, read.labels(split).dtype) == (np.uint8, np.int64)


def test_the_fingerprint_depends_on_every_part(tmp_path: Path) -> None:
    pairs = images(6, LABELLED)
    brighter = [(image ^ np.uint8(i == 5), label) for i, (image, label) in enumerate(pairs)]
    relabelled = [(image, (label + (i == 5)) % 3) for i, (image, label) in enumerate(pairs)]
    renamed = Description("toy", ("a", "b", "d"), 4, 3, "none")
    names = [
        write_store(tmp_path, description, {"train": content}, files).fingerprint
        for description, content, files in [
            (LABELLED, pairs, ()),
            (LABELLED, pairs, ()),
            (LABELLED, brighter, ()),
            (LABELLED, relabelled, ()),
            (renamed, pairs, ()),
            (LABELLED, pairs, [SourceFile("f", 3, "00")]),
        ]
    ]
    assert names[0] == names[1]
    assert len(set(names)) == 5


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_detected(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        splits = {"train": images(3, LABELLED), "test": images(2, LABELLED)}
        name = write_store(Path(directory), LABELLED, splits).fingerprint
        path = data.draw(st.sampled_from(sorted((Path(directory) / "stores" / name).iterdir())))
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with pytest.raises(storage.CorruptError, match=path.name):
            Store.open(Path(directory), name, verify=True)


def test_a_manifest_that_says_something_else_is_detected(tmp_path: Path, make_store: Make) -> None:
    made = make_store(tmp_path)
    manifest = made.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"random"', '"Random"'))
    with pytest.raises(storage.CorruptError, match=r"manifest\.json is corrupt: its hash is not the store's name"):
        Store.open(tmp_path, made.fingerprint)


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (np.zeros((4, 5), np.uint8), 0, "image 1 has 1 channels; the store has 3"),
        (np.zeros((4, 4, 3), np.float32), 0, "image 1 is float32; expected uint8"),
        (np.zeros((4, 4, 3), np.uint8), 3, "has label 3; allowed are 0 to 2, or -1 for none"),
        (np.zeros((4, 4, 3), np.uint8), -2, "has label -2"),
        (np.zeros((4, 4, 3), np.uint8), -1, "split 'train' has images with a label and images without"),
    ],
)
def test_a_wrong_image_or_label_is_refused(tmp_path: Path, image: np.ndarray, label: int, message: str) -> None:
    items = [Item("image 0", np.zeros((4, 4, 3), np.uint8), 0, "image 0"), Item("image 1", image, label, "image 1")]
    job = shards.Job(tmp_path, "train", 0, Listed(items), 4, 3, 3, skip=True)
    with pytest.raises(ValueError, match=message):
        shards.make(job)
    assert os.listdir(tmp_path) == []


class Listed(list[Item]):
    """Records that are a list of items."""

    encoded, exif = False, False

    def part(self, start: int, stop: int) -> "Listed":
        return Listed(self[start:stop])


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="toy: split 'test' has no images"):
        write_store(tmp_path, BARE, {"train": images(1, BARE), "test": []})


def test_writing_again_mends_a_damaged_store(tmp_path: Path, make_store: Make) -> None:
    made = make_store(tmp_path)
    shard = made.path / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(storage.CorruptError, match=r"train-00000\.npy is corrupt"):
        Store.open(tmp_path, made.fingerprint, verify=True)
    assert make_store(tmp_path).fingerprint == made.fingerprint
    Store.open(tmp_path, made.fingerprint, verify=True)
    assert os.listdir(tmp_path / "stores") == [made.fingerprint]


def test_an_unknown_fingerprint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image store 0123456789abcdef under .*: run `dcgan ingest` first"):
        Store.open(tmp_path, "0123456789abcdef")


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 80), channels=st.sampled_from([1, 3]), bright=st.booleans())
def test_the_sums_of_pixels_are_exact(count: int, channels: int, bright: bool) -> None:
    """They are part of the manifest, so the same images must give the same sums on every machine."""
    low = 254 if bright else 0
    images = np.random.default_rng(count).integers(low, 256, (count, channels, 128, 128), np.uint8)
    whole = images.astype(np.int64)
    assert shards.statistics(images) == {
        "sums": whole.sum((0, 2, 3)).tolist(),
        "squares": (whole**2).sum((0, 2, 3)).tolist(),
    }
