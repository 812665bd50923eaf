"""A mirror at s3://, behind a proxy that breaks what it passes on: single files, and trees staged from a prefix."""

import hashlib
import logging
import math
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3

from dcgan.config import Data
from dcgan.data.sources import attempts, published
from dcgan.data.sources import s3 as source

pytestmark = pytest.mark.slow

PIECE = 50_000
GOOD = random.Random(0).randbytes(6 * PIECE - 7)
MD5 = hashlib.md5(GOOD).hexdigest()
OTHER = GOOD[::-1]
TREE = {"n01/a.jpg": b"a" * 10, "n01/deep/b c+é.jpg": b"b" * 20, "n02/c.jpg": b"", "d.txt": b"d" * 120_000}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Store]:
    with s3.server(tmp_path_factory.mktemp("s3")) as store:
        yield store


@pytest.fixture
def store(running: s3.Store, monkeypatch: pytest.MonkeyPatch) -> s3.Store:
    """A store without faults, read in small pieces and almost without pauses."""
    monkeypatch.setattr(attempts, "DELAY", 0.001)
    monkeypatch.setattr(source, "PIECE", PIECE)
    running.clear()
    return running


def given(store: s3.Store, path: str, offline: bool = False) -> Data:
    return Data(name="folder", size=32, source=store.url(path), offline=offline)


def get(store: s3.Store, path: str, folder: Path, digest: str = MD5, offline: bool = False) -> bytes:
    return published.fetch((), "f", digest, folder, given(store, path, offline)).read_bytes()


def ranges(store: s3.Store) -> list[int]:
    """Where the pieces began that arrived whole."""
    starts = [re.match(r"bytes=(\d+)-", seen.range or "") for seen in store.log if seen.status == 206]
    return [int(start[1]) for start in starts if start]


# Single files


def test_a_file_comes_in_pieces_each_once(store: s3.Store, tmp_path: Path) -> None:
    store.put("bucket/m/f", GOOD)
    for _ in range(2):
        assert get(store, "bucket/m/", tmp_path) == GOOD
    assert ranges(store) == list(range(0, len(GOOD), PIECE))
    assert sum(seen.sent for seen in store.log if seen.method == "GET") == len(GOOD)


@pytest.mark.parametrize("fault", [503, 500, "reset", "truncate"])
def test_what_passes_is_waited_for(store: s3.Store, tmp_path: Path, fault: int | str) -> None:
    store.put("bucket/m/f", GOOD)
    store.faults(503, 2, method="HEAD")
    store.faults(fault, 3, at=1000)
    assert get(store, "bucket/m", tmp_path) == GOOD
    assert sum(seen.method == "HEAD" for seen in store.log) == 2 + 3 + 1
    assert sum(seen.method == "GET" for seen in store.log) == 3 + 6


def stop_after_two_pieces(store: s3.Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("bucket/m/f", GOOD)
    store.faults("slow", 2, seconds=0)
    store.faults("truncate", math.inf, at=1000)
    with monkeypatch.context() as patch:
        patch.setattr(attempts, "ATTEMPTS", 1)
        with pytest.raises(attempts.DownloadError, match=r"s3://bucket/m/f: .*"):
            get(store, "bucket/m", folder)
    assert (folder / "f.part").stat().st_size == 2 * PIECE
    store.clear()


def test_a_download_that_was_given_up_goes_on(store: s3.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after_two_pieces(store, tmp_path, monkeypatch)
    assert get(store, "bucket/m", tmp_path) == GOOD
    assert ranges(store) == list(range(2 * PIECE, len(GOOD), PIECE))


def test_a_part_of_another_version_is_not_continued(
    store: s3.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after_two_pieces(store, tmp_path, monkeypatch)
    store.put("bucket/m/f", OTHER)
    assert get(store, "bucket/m", tmp_path, hashlib.md5(OTHER).hexdigest()) == OTHER
    assert ranges(store) == list(range(0, len(OTHER), PIECE))


@pytest.mark.parametrize("path", ["bucket/nothing", "nowhere/m"])
def test_what_is_not_there_is_refused_at_once(store: s3.Store, tmp_path: Path, path: str) -> None:
    with pytest.raises(attempts.DownloadError, match=f"s3://{path}/f: Not Found"):
        get(store, path, tmp_path)
    assert len(store.log) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_stays_broken_is_given_up(store: s3.Store, tmp_path: Path) -> None:
    store.put("bucket/m/f", GOOD)
    store.faults(503, math.inf, method="HEAD")
    with pytest.raises(attempts.DownloadError, match=rf"s3://bucket/m/f: .*\({attempts.ATTEMPTS} attempts\)"):
        get(store, "bucket/m", tmp_path)
    assert len(store.log) == attempts.ATTEMPTS


def test_missing_credentials_are_said_at_once(store: s3.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(attempts.DownloadError, match=r"s3://bucket/m/f: Unable to locate credentials$"):
        get(store, "bucket/m", tmp_path)
    assert store.log == []


def test_offline_opens_no_connection(store: s3.Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.offline=true: put s3://bucket/m/f there"):
        get(store, "bucket/m", tmp_path, offline=True)
    with pytest.raises(
        FileNotFoundError, match=r"is not complete, and data\.offline=true: .* complete copy of s3://bucket/tree"
    ):
        published.tree(given(store, "bucket/tree", offline=True), tmp_path)
    assert store.log == []


# Trees


@pytest.fixture
def tree(store: s3.Store, request: pytest.FixtureRequest) -> str:
    """The path in the store of a tree of this test's own."""
    path = f"bucket/{request.node.name}"
    for name, content in TREE.items():
        store.put(f"{path}/{name}", content)
    store.put(f"{path}/empty/", b"")  # what a console makes for an empty directory
    store.put(f"{path}2/sibling.jpg", b"of a prefix that begins alike")
    return path


def content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def fetched(store: s3.Store) -> list[str]:
    """The last parts of the keys whose bytes were asked for, each as often as that."""
    return sorted(seen.path.rpartition("/")[2] for seen in store.log if seen.range)


def test_a_tree_is_staged_once(store: s3.Store, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "LISTED", 2)  # a page
    root = published.tree(given(store, tree), tmp_path / "d")
    assert root.parent == tmp_path / "d"
    assert content(root) == TREE
    assert sorted(path.name for path in root.parent.iterdir()) == sorted(
        [root.name, f".{root.name}.lock", f".{root.name}.complete"]
    )
    store.clear()
    assert published.tree(given(store, f"{tree}/"), tmp_path / "d") == root
    assert fetched(store) == []
    store.clear()
    assert published.tree(given(store, tree, offline=True), tmp_path / "d") == root
    assert store.log == []
    shutil.rmtree(root)
    with pytest.raises(FileNotFoundError, match="is not complete"):
        published.tree(given(store, tree, offline=True), tmp_path / "d")


def test_two_trees_do_not_meet(store: s3.Store, tree: str, tmp_path: Path) -> None:
    store.put(f"{tree}/again/n01/x.jpg", b"x")
    store.put(f"{tree}2/again/n01/x.jpg", b"y")
    roots = [published.tree(given(store, f"{path}/again"), tmp_path) for path in (tree, f"{tree}2")]
    assert [content(root) for root in roots] == [{"n01/x.jpg": b"x"}, {"n01/x.jpg": b"y"}]


def test_what_changed_is_fetched_again_and_what_is_gone_removed(
    store: s3.Store, tree: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = published.tree(given(store, tree), tmp_path)
    time.sleep(1.1)  # S3 tells times of change to the second
    store.put(f"{tree}/n01/a.jpg", b"A" * 10)
    store.put(f"{tree}/d.txt", b"d")
    store.delete(f"{tree}/n02/c.jpg")
    edited = root / "n01/deep/b c+é.jpg"
    kept = edited.stat().st_mtime_ns
    edited.write_bytes(b"edited here")
    os.utime(edited, ns=(kept, kept))
    store.clear()
    with caplog.at_level(logging.WARNING):
        published.tree(given(store, tree), tmp_path)
    expected = {**TREE, "n01/a.jpg": b"A" * 10, "d.txt": b"d"}
    del expected["n02/c.jpg"]
    assert content(root) == expected
    assert [name[0] for name in fetched(store)] == ["a", "b", "d"]
    assert f"{root / 'n02/c.jpg'} is no longer at" in caplog.text
    assert all(list(path.iterdir()) for path in root.rglob("*") if path.is_dir()), "directories are gone, too"


@pytest.mark.parametrize("fault", [503, "reset", "truncate"])
def test_a_tree_is_staged_over_a_bad_line(store: s3.Store, tree: str, tmp_path: Path, fault: int | str) -> None:
    store.faults(503, 3, contains="list-type")
    store.faults(fault, 3, contains="d.txt", at=1000)
    assert content(published.tree(given(store, tree), tmp_path)) == TREE


def test_a_staging_that_failed_leaves_whole_files_and_goes_on(store: s3.Store, tree: str, tmp_path: Path) -> None:
    root = published.tree(given(store, tree), tmp_path)
    (root / "d.txt").unlink()
    store.faults("truncate", math.inf, contains="d.txt", at=1000)
    with pytest.raises(attempts.DownloadError, match=rf"s3://{re.escape(tree)}: .*\({attempts.ATTEMPTS} attempts\)"):
        published.tree(given(store, tree), tmp_path)
    assert content(root) == {name: raw for name, raw in TREE.items() if name != "d.txt"}
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(root))} is not complete, and data.offline=true"):
        published.tree(given(store, tree, offline=True), tmp_path)
    store.clear()
    assert content(published.tree(given(store, tree), tmp_path)) == TREE
    assert set(fetched(store)) == {"d.txt"}
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".aside")]


def test_a_large_file_of_a_tree_goes_on_where_it_was_given_up(
    store: s3.Store, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More pieces are lost on the way than attempts are made: each that arrived is progress, over a restart, too."""
    store.put(f"{tree}/large.tar", GOOD)
    monkeypatch.setattr(attempts, "ATTEMPTS", 2)
    pieces = source.Bucket.pieces
    asked: list[int] = []

    def faulty(bucket: source.Bucket, key: str, offset: int, length: int) -> Iterator[bytes]:
        for number, piece in enumerate(pieces(bucket, key, offset, length)):
            if key.endswith("large.tar"):
                if number == 1 or len(asked) >= 3:
                    asked.append(-1)
                    raise attempts.Interrupted("a fault")
                asked.append(offset + number * PIECE)
            yield piece

    with monkeypatch.context() as patch:
        patch.setattr(source.Bucket, "pieces", faulty)
        with pytest.raises(attempts.DownloadError, match="a fault"):
            published.tree(given(store, tree), tmp_path)
    assert asked == [0, -1, PIECE, -1, -1]
    store.clear()
    assert content(published.tree(given(store, tree), tmp_path)) == {**TREE, "large.tar": GOOD}
    starts = [start for start in ranges(store) if start]
    assert starts[0] == 2 * PIECE
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".aside")]


def test_ctrl_c_does_not_wait_for_the_rest_of_a_large_file(
    store: s3.Store, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(f"{tree}/large.tar", GOOD)
    begun, pieces = threading.Event(), source.Bucket.pieces

    def endless(bucket: source.Bucket, key: str, offset: int, length: int) -> Iterator[bytes]:
        if not key.endswith("large.tar"):
            begun.wait()
            raise KeyboardInterrupt
        while True:
            begun.set()
            yield b""

    with monkeypatch.context() as patch:
        patch.setattr(source.Bucket, "pieces", endless)
        with pytest.raises(KeyboardInterrupt):
            published.tree(given(store, tree), tmp_path)
    assert pieces is source.Bucket.pieces


def test_an_object_that_shrinks_after_it_was_listed_is_not_taken(
    store: s3.Store, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = source.Bucket.page

    def page(bucket: source.Bucket, prefix: str, after: str | None) -> object:
        found = listing(bucket, prefix, after)
        store.put(f"{tree}/n01/a.jpg", b"a")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(source.Bucket, "page", page)
        with pytest.raises(attempts.DownloadError, match=r"1 of 10 bytes received"):
            published.tree(given(store, tree), tmp_path)
    assert content(published.tree(given(store, tree), tmp_path)) == TREE | {"n01/a.jpg": b"a"}


def test_a_tree_with_files_that_could_not_be_removed_is_not_complete(
    store: s3.Store, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.tree(given(store, tree), tmp_path)
    store.delete(f"{tree}/n02/c.jpg")
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == "c.jpg":
            raise PermissionError(path)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(PermissionError):
            published.tree(given(store, tree), tmp_path)
    with pytest.raises(FileNotFoundError, match="is not complete"):
        published.tree(given(store, tree, offline=True), tmp_path)


def test_an_address_with_nothing_below_it_is_refused(store: s3.Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.source=s3://bucket/nothing has no objects below it"):
        published.tree(given(store, "bucket/nothing"), tmp_path)
    with pytest.raises(attempts.DownloadError, match=r"s3://nowhere/x: The specified bucket does not exist"):
        published.tree(given(store, "nowhere/x"), tmp_path)


@pytest.mark.parametrize("key", ["../../outside", "n01/../../outside", "/outside", "n01//outside", "./outside", ".."])
def test_a_key_that_leads_out_of_the_tree_is_refused_by_name(
    store: s3.Store, tmp_path: Path, key: str, request: pytest.FixtureRequest
) -> None:
    prefix = hashlib.md5(request.node.name.encode()).hexdigest()
    store.put(f"bucket/{prefix}/{key}", b"hostile")
    with pytest.raises(ValueError, match=re.escape(repr(f"{prefix}/{key}"))):
        published.tree(given(store, f"bucket/{prefix}"), tmp_path / "d" / "e")
    assert fetched(store) == []
    assert not list(tmp_path.rglob("*outside*"))
    assert os.listdir(tmp_path) == ["d"]
