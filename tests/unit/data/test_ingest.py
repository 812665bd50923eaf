"""The same input is ingested once; a store that is gone or damaged is made again."""

import logging
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from fabricated import write_store
from PIL import Image

from dcgan import environment, storage
from dcgan.config import Data, DataSet, build
from dcgan.data import ingest as ingestion
from dcgan.data import shards, sources
from dcgan.data.ingest import ingest
from dcgan.data.sources import digits
from dcgan.data.sources.base import Opened
from dcgan.data.store import Description, Store


def tree(root: Path, count: int = 30) -> Path:
    generator = np.random.default_rng(0)
    for i in range(count):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), np.uint8)).save(path)
    return root


def folder(root: Path, **settings: object) -> Data:
    return Data(name="folder", size=28, source=str(root), test_fraction=0.3, **settings)  # type: ignore[arg-type]


def test_what_a_kill_left_half_written_does_not_get_into_a_store(tmp_path: Path) -> None:
    image = [(np.zeros((1, 28, 28), np.uint8), 0)]
    directory = tmp_path / "stores" / ".ingest-fabricated" / "store"
    directory.mkdir(parents=True)
    (directory / ".train-00000.npy.1a2b3c4d").write_bytes(b"half")
    store = write_store(tmp_path, Description("one", ("a",), 28, 1, "none"), {"train": image})
    assert not list(store.path.glob(".*"))


def test_the_second_time_nothing_is_read(home: Path, monkeypatch: pytest.MonkeyPatch, digits_store: Store) -> None:
    def unread(data: Data, downloads: Path) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(digits, "read", unread)
    assert ingest(build("digits").data, home) == digits_store.fingerprint
    with pytest.raises(AssertionError, match="read again"):
        ingest(build("digits", ["data.size=28"]).data, home)


@pytest.mark.parametrize("damage", ["gone", "shorter", "manifest", "index"])
def test_a_damaged_store_is_made_again(
    home: Path, digits_store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = home / "stores" / digits_store.fingerprint
    if damage == "gone":
        shutil.rmtree(path)
    elif damage == "index":
        next((home / "stores" / "index").glob("*.json")).write_text("{")
    else:
        file = path / {"shorter": "train-00000.npy", "manifest": "manifest.json"}[damage]
        file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert ingest(build("digits").data, home) == digits_store.fingerprint
    assert "ingesting again" in caplog.text
    Store.open(home, digits_store.fingerprint, verify=True)


def test_a_changed_byte_is_found_on_request(home: Path, digits_store: Store) -> None:
    shard = home / "stores" / digits_store.fingerprint / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    ingest(build("digits").data, home)
    assert shard.read_bytes()[-1:] == b"?", "only lengths are compared"
    ingest(build("digits").data, home, verify=True)
    Store.open(home, digits_store.fingerprint, verify=True)


def test_a_changed_tree_is_another_store(tmp_path: Path) -> None:
    root, home = tree(tmp_path / "images"), tmp_path / "home"
    first = ingest(folder(root), home)
    assert ingest(folder(root), home) == first
    Image.new("RGB", (30, 30), "red").save(root / "a" / "new.png")
    second = ingest(folder(root), home)
    assert second != first
    (root / "a" / "new.png").unlink()
    assert ingest(folder(root), home) == first


def test_the_place_of_the_input_does_not_matter(tmp_path: Path) -> None:
    first = ingest(folder(tree(tmp_path / "here")), tmp_path / "home")
    assert ingest(folder(tree(tmp_path / "elsewhere")), tmp_path / "home") == first


def test_what_does_not_change_the_images_is_no_reason_to_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, home = tree(tmp_path / "images"), tmp_path / "home"
    first = ingest(folder(root), home)

    def unread(data: Data, downloads: Path) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(sources.SOURCES["folder"], "read", unread)
    assert ingest(folder(root, home=home, cache_gb=5.0, offline=True), home) == first
    monkeypatch.setattr(ingestion, "TRANSFORM", "another")
    with pytest.raises(AssertionError, match="read again"):
        ingest(folder(root), home)


def test_one_input_is_ingested_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, home, read = tree(tmp_path / "images"), tmp_path / "home", sources.SOURCES["folder"].read

    def reading(data: Data, downloads: Path) -> Opened:
        monkeypatch.setattr(sources.SOURCES["folder"], "read", read)
        with pytest.raises(storage.BusyError, match="is being written by process"):
            ingest(folder(root), home)
        return read(data, downloads)

    monkeypatch.setattr(sources.SOURCES["folder"], "read", reading)
    ingest(folder(root), home)


def test_only_the_room_for_what_is_missing_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, home = tree(tmp_path / "images"), tmp_path / "home"
    whole, each = 30 * 3 * 28 * 28, 4 * 3 * 28 * 28
    monkeypatch.setattr(shards, "BYTES", each)
    monkeypatch.setattr(environment, "cpus", lambda: 1)  # one after the other
    made = shards.make

    def fails(job: shards.Job) -> dict[str, Any]:
        if job.number == 3:
            raise KeyboardInterrupt
        return made(job)

    monkeypatch.setattr(shards, "make", fails)
    with pytest.raises(KeyboardInterrupt):
        ingest(folder(root), home)
    monkeypatch.setattr(shards, "make", made)
    usage = shutil.disk_usage(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(OSError, match="of images are to be written"):
        ingest(folder(root), home)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=whole - 3 * each))
    assert ingest(folder(root), home)


def test_nothing_is_written_outside_stores_and_downloads(tmp_path: Path) -> None:
    root, home = tree(tmp_path / "images"), tmp_path / "home"
    before = sorted(root.rglob("*"))
    ingest(folder(root), home)
    assert [path.name for path in home.iterdir()] == ["stores"]
    assert sorted(root.rglob("*")) == before


def test_every_data_set_has_a_source() -> None:
    assert set(sources.SOURCES) == set(get_args(DataSet))
    for source in sources.SOURCES.values():
        assert callable(source.signature)
        assert callable(source.read)
