"""What is read from an LMDB is what the LMDB library reads; a damaged one is refused where the library would crash."""

import os
import random
import struct
import tempfile
from pathlib import Path

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcgan import storage
from dcgan.data.sources import lmdbs

KEYS = st.binary(min_size=1, max_size=511).filter(lambda key: not key.endswith(b"\0"))
VALUES = st.integers(0, 9000).map(os.urandom)  # up to about 2,000 bytes lie in the leaf; others in one page or several


def write(directory: Path, *transactions: dict[bytes, bytes | None]) -> Path:
    with lmdb.open(str(directory), map_size=2**26) as environment:
        for changes in transactions:
            with environment.begin(write=True) as transaction:
                for key, value in changes.items():
                    transaction.delete(key) if value is None else transaction.put(key, value)
    return directory / lmdbs.FILE


def numbered(count: int, size: int) -> dict[bytes, bytes]:
    return {f"{number:040}".encode(): number.to_bytes(8, "little") + bytes(size - 8) for number in range(count)}


def read(file: Path) -> list[tuple[bytes, bytes]]:
    return [(item.name.encode(), item.image) for item in lmdbs.images(file)]


@settings(max_examples=25)
@given(st.dictionaries(KEYS, VALUES, max_size=60), st.randoms())
def test_keys_values_and_order_are_the_librarys(content: dict[bytes, bytes], chance: random.Random) -> None:
    later = {key: chance.choice([None, os.urandom(chance.randrange(5000))]) for key in content if chance.random() < 0.3}
    with tempfile.TemporaryDirectory() as directory:
        file = write(Path(directory), content, later)
        records = lmdbs.images(file)
        with lmdb.open(directory, readonly=True, lock=False) as environment, environment.begin() as transaction:
            theirs = list(transaction.cursor())
        assert list(zip(records.keys.tolist(), (item.image for item in records), strict=True)) == theirs
    assert dict(theirs) == {key: value for key, value in {**content, **later}.items() if value is not None}


@pytest.mark.parametrize(
    ("count", "size", "depth"), [(0, 8, 0), (1, 8, 1), (20, 2_500, 1), (3_000, 8, 2), (3_000, 900, 3)]
)
def test_trees_of_any_depth(tmp_path: Path, count: int, size: int, depth: int) -> None:
    content = numbered(count, size)
    file = write(tmp_path, content)
    with lmdb.open(str(tmp_path), readonly=True) as environment:
        assert environment.stat()["depth"] == depth
    assert read(file) == sorted(content.items())


def test_the_newer_of_the_two_headers_counts(tmp_path: Path) -> None:
    content: dict[bytes, bytes] = {}
    for number in range(4):  # they are written in turn
        write(tmp_path, added := {str(number).encode(): bytes(50_000)})
        content |= added
        assert dict(read(tmp_path / lmdbs.FILE)) == content
        with lmdb.open(str(tmp_path), readonly=True) as environment:
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        (cut := tmp_path / "cut.mdb").write_bytes((tmp_path / lmdbs.FILE).read_bytes()[: needed - 1])
        with pytest.raises(storage.CorruptError, match=rf"cut\.mdb has {needed - 1} bytes and needs {needed}: it has"):
            lmdbs.images(cut)


@pytest.mark.parametrize("how", ["text", "version"])
def test_a_file_of_another_kind_or_version_is_refused(tmp_path: Path, how: str) -> None:
    raw = write(tmp_path, numbered(3, 8)).read_bytes()
    other = b"not an LMDB" * 1000 if how == "text" else raw[:20] + struct.pack("<I", 3) + raw[24:]
    (tmp_path / "other.mdb").write_bytes(other)
    with pytest.raises(storage.CorruptError, match=r"other\.mdb is no LMDB file of version 1"):
        lmdbs.images(tmp_path / "other.mdb")


def test_trees_of_duplicates_are_refused(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), max_dbs=1) as environment:
        environment.open_db(b"named")
    with pytest.raises(storage.CorruptError, match=r"data\.mdb is damaged: page \d+ is not what its tree says"):
        lmdbs.images(tmp_path / lmdbs.FILE)


def test_pages_that_never_arrived_are_refused(tmp_path: Path) -> None:
    """A file of full length whose end is zeros: the library's assertion would end the process."""
    raw = write(tmp_path, numbered(3_000, 900)).read_bytes()
    for share in range(1, 10):
        arrived = max(8192, len(raw) * share // 10)
        (tmp_path / lmdbs.FILE).write_bytes(raw[:arrived] + bytes(len(raw) - arrived))
        with pytest.raises(storage.CorruptError, match=r"data\.mdb is damaged: page \d+ is not what its tree says"):
            lmdbs.images(tmp_path / lmdbs.FILE)


def test_any_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """Most of the changed bytes are the tree's here. Values are not looked at: an image is judged by its decoder."""
    raw = write(tmp_path, numbered(600, 8)).read_bytes()
    chance, refusals = random.Random(0), []
    for _ in range(400):
        damaged = bytearray(raw)
        for _ in range(chance.choice([1, 30])):
            damaged[chance.randrange(len(raw))] = chance.randrange(256)
        (tmp_path / lmdbs.FILE).write_bytes(damaged)
        try:
            assert len(read(tmp_path / lmdbs.FILE)) == 600
        except storage.CorruptError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert all(refusal.startswith(str(tmp_path / lmdbs.FILE)) for refusal in refusals)
