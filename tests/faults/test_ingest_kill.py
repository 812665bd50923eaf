"""kill -9 during ingestion, and disks that are full or read-only: the same command then ends what was begun."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcgan.config import Data
from dcgan.data import shards
from dcgan.data.ingest import ingest

pytestmark = pytest.mark.slow
IMAGES = 32  # a shard


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for i in range(640):
        pixels = np.random.default_rng(i).integers(0, 256, (60, 60, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i:03d}.png")
    return root


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BYTES", IMAGES * 3 * 32 * 32)


def data(tree: Path, **settings: object) -> Data:
    return Data(name="folder", size=32, source=str(tree), **settings)  # type: ignore[arg-type]


def start(tree: Path, home: Path, pause: float, deduplicate: bool) -> "subprocess.Popen[bytes]":
    """Ingestion in a process of its own that waits `pause` seconds before each shard."""
    script = f"""
        import time
        from pathlib import Path
        from dcgan.config import Data
        from dcgan.data import ingest, shards

        shards.BYTES = {IMAGES} * 3 * 32 * 32
        make = shards.make

        def slowly(job):
            time.sleep({pause})
            return make(job)

        shards.make = slowly
        given = Data(name="folder", size=32, source={str(tree)!r}, deduplicate={deduplicate})
        ingest.ingest(given, Path({str(home)!r}))
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.usefixtures("small_shards")
def test_killed_ten_times_the_store_is_the_same(tree: Path, tmp_path: Path, deduplicate: bool) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fingerprint = ingest(data(tree, deduplicate=deduplicate), whole)
    seen: list[int] = []
    written: dict[str, int] = {}  # when each shard was
    for _ in range(10):
        process = start(tree, broken, 0.05, deduplicate)
        before = len(seen and made(broken))
        while process.poll() is None and len(made(broken)) <= before:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(len(made(broken)))
        shards = [record.parent / "store" / f"{record.stem}.npy" for record in made(broken)]
        now = {shard.name: shard.stat().st_mtime_ns for shard in shards if shard.exists()}
        if not deduplicate:  # which makes shards anew that have duplicates
            assert {name: now.get(name) for name in written} in (written, dict.fromkeys(written)), "made once"
            written = now
        if (broken / "stores" / fingerprint).exists():
            break
    assert sorted(seen[:-1]) == seen[:-1], "no shard that was complete is lost"
    assert ingest(data(tree, deduplicate=deduplicate), broken) == fingerprint
    assert content(broken / "stores" / fingerprint) == content(whole / "stores" / fingerprint)
    assert sorted(path.name for path in (broken / "stores").iterdir()) == sorted([fingerprint, "index"])


def made(home: Path) -> list[Path]:
    return list((home / "stores").glob(".ingest-*/*-[0-9]*.json"))


@pytest.mark.usefixtures("small_shards")
def test_a_shard_that_went_bad_meanwhile_is_made_again(tree: Path, tmp_path: Path) -> None:
    fingerprint = ingest(data(tree), tmp_path / "whole")
    home = tmp_path / "home"
    process = start(tree, home, 0.05, False)
    while len(made(home)) < 5:
        time.sleep(0.01)
    process.kill()
    process.wait()
    record = made(home)[0]
    shard = record.parent / "store" / f"{record.stem}.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    made(home)[1].write_text("{")
    assert ingest(data(tree), home) == fingerprint
    assert content(home / "stores" / fingerprint) == content(tmp_path / "whole" / "stores" / fingerprint)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.usefixtures("small_shards")
def test_a_disk_that_is_too_small_is_refused_before_work(tree: Path, small_disk: Path) -> None:
    with pytest.raises(OSError, match=r"disk/stores: 0\.0 GB of images are to be written, 0\.0 GB are free"):
        ingest(data(tree), small_disk)
    assert not made(small_disk)


@pytest.mark.usefixtures("small_shards")
def test_a_disk_that_fills_up_is_a_clear_error_and_room_is_enough_to_go_on(
    tree: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcgan.data.ingest._require_space", lambda *_: None)  # as if another process filled it
    with pytest.raises(OSError, match="No space left on device"):
        ingest(data(tree), small_disk)
    done = len(made(small_disk))
    assert done >= 2
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    assert ingest(data(tree), small_disk) == ingest(data(tree), tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_a_read_only_disk_is_a_clear_error(tree: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match=r"Read-only file system: '.*disk/stores"):
        ingest(data(tree), small_disk)
