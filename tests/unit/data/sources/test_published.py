"""Downloads: checked, refetched once, kept only if they are the published bytes."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from dcgan import storage
from dcgan.data.sources import published

GOOD = bytes(range(256)) * 1000
MD5 = hashlib.md5(GOOD).hexdigest()
Serve = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def answer(serve: Serve) -> Serve:
    """answer((status, body), ...): a mirror that gives these in turn, the last one again and again."""

    def start(*answers: tuple[int, bytes]) -> tuple[str, list[str]]:
        return serve(lambda _, number: (*answers[min(number, len(answers) - 1)], len(GOOD)))

    return start


def test_a_download_is_kept_and_not_repeated(answer: Serve, tmp_path: Path) -> None:
    address, asked = answer((200, GOOD))
    for _ in range(2):
        assert published.fetch([address], "f.bin", MD5, tmp_path / "d").read_bytes() == GOOD
    assert asked == ["f.bin"]
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["f.bin"]


@pytest.mark.parametrize("bad", [GOOD[:1000], GOOD[:-1] + b"?"], ids=["truncated", "corrupt"])
def test_a_bad_download_is_refetched_once(answer: Serve, tmp_path: Path, bad: bytes) -> None:
    address, asked = answer((200, bad), (200, GOOD))
    assert published.fetch([address], "f.bin", MD5, tmp_path).read_bytes() == GOOD
    assert len(asked) == 2


@pytest.mark.parametrize("bad", [GOOD[:1000], GOOD[:-1] + b"?"], ids=["truncated", "corrupt"])
def test_a_download_that_stays_bad_is_refused_by_address(answer: Serve, tmp_path: Path, bad: bytes) -> None:
    address, asked = answer((200, bad))
    with pytest.raises(published.DownloadError, match=f"{address}f.bin: .*{len(bad)} bytes.*published {MD5}"):
        published.fetch([address], "f.bin", MD5, tmp_path)
    assert len(asked) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_next_address_is_tried_and_all_are_named(answer: Serve, tmp_path: Path) -> None:
    missing, _ = answer((404, b""))
    good, _ = answer((200, GOOD))
    assert published.fetch([missing, good], "f.bin", MD5, tmp_path / "d").read_bytes() == GOOD
    with pytest.raises(published.DownloadError, match=f"{missing}f.bin: .*404.*; http://127.0.0.1:9/f.bin: "):
        published.fetch([missing, "http://127.0.0.1:9"], "f.bin", MD5, tmp_path)  # port 9 has no listener


def test_a_kept_file_that_went_bad_is_downloaded_again(answer: Serve, tmp_path: Path) -> None:
    (tmp_path / "f.bin").write_bytes(GOOD[:5])
    address, _ = answer((200, GOOD))
    assert published.fetch([address], "f.bin", MD5, tmp_path).read_bytes() == GOOD


def test_check_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "f.bin").write_bytes(GOOD[:5])
    with pytest.raises(storage.CorruptError, match=rf"f\.bin \(5 bytes\) is not the published file: .*published {MD5}"):
        published.check(tmp_path / "f.bin", MD5)


def test_find_names_the_directory_and_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.source=/no/such is neither a directory nor an http"):
        published.find("/no/such", ["a"])
    with pytest.raises(FileNotFoundError, match=f"data.source={tmp_path} has none of a, b"):
        published.find(str(tmp_path), ["a", "b"])
