"""Near-duplicates leave the training images, and only they; what was found can be looked at."""

import json
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcgan.config import Data
from dcgan.data import dedup, pruning, shards
from dcgan.data.ingest import ingest
from dcgan.data.store import Store


def smooth(seed: int) -> np.ndarray:
    """uint8 (40, 40, 3), like no other seed's."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((40, 40), Image.Resampling.BICUBIC))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """120 pictures of two classes; every third has a copy, 3 % brighter, in a file of its own."""
    monkeypatch.setattr(shards, "BYTES", 32 * 3 * 32 * 32)
    for i in range(120):
        directory = tmp_path / "tree" / "ab"[i % 2]
        directory.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth(i)).save(directory / f"{i:03d}.png")
        if i % 3 == 0:
            brighter = np.clip(smooth(i) * 1.03, 0, 255).astype(np.uint8)
            Image.fromarray(brighter).save(directory / f"{i:03d}-copy.png")
    return tmp_path / "tree"


def opened(tree: Path, home: Path, deduplicate: bool) -> Store:
    data = Data(name="folder", size=32, source=str(tree), test_fraction=0.05, deduplicate=deduplicate)
    return Store.open(home, ingest(data, home), verify=True)


def test_one_of_each_group_stays_with_its_label(tree: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    all_of_them, pruned = opened(tree, home, False), opened(tree, home, True)
    removed = pruned.manifest["duplicates_removed"]
    assert removed >= 30, "40 copies, some of them on the test side"
    assert pruned.count("train") == all_of_them.count("train") - removed
    np.testing.assert_array_equal(pruned.images("test"), all_of_them.images("test"))
    label = {
        image.tobytes(): label
        for image, label in zip(all_of_them.images("train"), all_of_them.labels("train"), strict=True)
    }
    for image, found in zip(pruned.images("train"), pruned.labels("train"), strict=True):
        assert label[image.tobytes()] == found
    mean, _ = pruned.pixel_statistics("train")[0]
    assert mean == pytest.approx(pruned.images("train")[:, 0].mean())


def test_what_was_found_is_shown(tree: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    pruned = opened(tree, home, True)
    report = home / "duplicates" / pruned.fingerprint
    found = json.loads((report / "groups.json").read_text())
    assert sum(len(group) - 1 for group in found["groups"]) == pruned.manifest["duplicates_removed"]
    everything = opened(tree, home, False).images("train")
    for group in found["groups"]:
        first, *others = everything[group].astype(int)
        assert all(np.abs(other - first).mean() < 8 for other in others), "brightened by 3 % and no more"
    with Image.open(report / "sheet.png") as sheet:
        assert sheet.width > 2 * 32


def test_stores_on_another_file_system_are_as_good(tree: Path, tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("a single file system")
    home = tmp_path / "home"
    home.mkdir()
    with tempfile.TemporaryDirectory(dir=other) as stores:
        (home / "stores").symlink_to(stores)
        pruned = opened(tree, home, True)
        assert (home / "duplicates" / pruned.fingerprint / "sheet.png").is_file()
        assert not list((home / "stores").glob(".*"))


def test_more_shards_than_files_may_be_open_at_first(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BYTES", 3 * 32 * 32)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    find = dedup.find

    def limited(arrays: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return find(arrays)

    made = shards.made
    monkeypatch.setattr(dedup, "find", limited)

    def low(job: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 80, hard))
        return made(job)

    monkeypatch.setattr(shards, "made", low)
    try:
        assert opened(tree, tmp_path / "home", True).count("train") > 80
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_images_that_differ_all_stay(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for i in range(60):
        Image.fromarray(smooth(i)).save(tmp_path / "tree" / f"{i:03d}.png")
    pruned = opened(tmp_path / "tree", tmp_path / "home", True)
    assert pruned.manifest["duplicates_removed"] == 0
    assert pruned.count("train", "test") == 60


def test_images_that_are_all_the_same_leave_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BYTES", 8 * 3 * 32 * 32)
    (tmp_path / "tree").mkdir()
    for i in range(40):  # PNG of one picture with text of its own: other bytes, so both sides get some
        Image.fromarray(smooth(0)).save(tmp_path / "tree" / f"{i}.png", dpi=(i + 1, 1))
    data = Data(name="folder", size=32, source=str(tmp_path / "tree"), test_fraction=0.3, deduplicate=True)
    store = Store.open(tmp_path / "home", ingest(data, tmp_path / "home"), verify=True)
    assert store.count("train") == 1
    assert len(store.shards("train")) == 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["os.rename", "shutil.move", "shutil.rmtree"])
def test_killed_while_it_is_published_the_store_is_the_same(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Before the shards are renamed, none is made again; then, before the report is, and before the rest goes."""
    whole = opened(tree, tmp_path / "whole", True)

    def killed(path: Path, *_: object, **__: object) -> None:
        if ".ingest-" in str(path):
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(at, killed)
        with pytest.raises(Killed):
            opened(tree, tmp_path / "home", True)
    made = []
    make = shards.make
    monkeypatch.setattr(shards, "make", lambda job: made.append(job.path.name) or make(job))
    again = opened(tree, tmp_path / "home", True)
    assert (made == []) == (at == "os.rename")
    assert again.fingerprint == whole.fingerprint
    assert (tmp_path / "home" / "duplicates" / again.fingerprint / "groups.json").exists()
    assert not list((tmp_path / "home" / "stores").glob(".ingest-*"))


def test_a_sheet_has_a_group_a_row() -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 3, 8, 8), np.uint8)
    picture = pruning.sheet([images[:5], images[5:]], [[0, 4], [1, 5, 29], [2, 3]], most=2)
    assert picture.shape == (2 + 2 * 10, 2 + pruning.SHOWN * 10, 3)
    assert np.array_equal(picture[12:20, 22:30], images[29].transpose(1, 2, 0))
    assert (picture[2:10, 22:30] == 255).all(), "the first group has two images"
    assert pruning.sheet([images], [list(range(30))], most=5).shape == (12, 2 + pruning.SHOWN * 10, 3)
    assert pruning.sheet([images], [], most=5).shape[2] == 3
