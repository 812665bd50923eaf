"""Downloads: checked, continued where they stopped, and under the final name only if they are the published bytes."""

import errno
import hashlib
import logging
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dcgan import storage
from dcgan.config import Data
from dcgan.data.sources import attempts, http, partial, published

GOOD = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(GOOD).hexdigest()
OTHER = GOOD[::-1]  # another version, of the same length
NAME = "f"
Make = Callable[..., Any]

FETCH = """
import sys
from pathlib import Path
from dcgan.config import Data
from dcgan.data.sources import published
address, digest, folder = sys.argv[1:]
published.fetch([address], "f", digest, Path(folder), Data(name="mnist", size=28))
"""


def given(source: str | None = None, offline: bool = False) -> Data:
    return Data(name="mnist", size=28, source=source, offline=offline)


def get(folder: Path, *addresses: str, digest: str = MD5, data: Data | None = None) -> bytes:
    return published.fetch(addresses, NAME, digest, folder, data or given()).read_bytes()


def start(mirror: Any, folder: Path, prelude: str = "") -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", prelude + FETCH, mirror.address, MD5, str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_halfway(mirror: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, at: int = 100_000) -> None:
    """Leave a part of the file in `folder`, as a process that gave up does."""
    mirror.faults("truncate", at=at)
    with monkeypatch.context() as patch:
        patch.setattr(attempts, "ATTEMPTS", 1)
        with pytest.raises(attempts.DownloadError):
            get(folder, mirror.address)
    assert names(folder) == ["f.part", "f.part.json"]
    assert (folder / "f.part").stat().st_size == at


# What is there already


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_download_is_kept_and_not_repeated(make_mirror: Make, tmp_path: Path, algorithm: str) -> None:
    mirror = make_mirror(f=GOOD)
    for _ in range(2):
        assert get(tmp_path / "d", mirror.address, digest=hashlib.new(algorithm, GOOD).hexdigest()) == GOOD
    assert len(mirror.log) == 1
    assert names(tmp_path / "d") == ["f"]


def test_a_kept_file_that_went_bad_is_downloaded_again(make_mirror: Make, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(OTHER)
    assert get(tmp_path, make_mirror(f=GOOD).address) == GOOD


def test_a_check_of_a_large_file_is_remembered_while_the_file_is_unchanged(
    make_mirror: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "REMEMBERED", len(GOOD))
    mirror, path = make_mirror(f=GOOD), tmp_path / "f"
    get(tmp_path, mirror.address)
    kept = path.stat().st_mtime_ns
    path.write_bytes(OTHER)
    os.utime(path, ns=(kept, kept))
    assert get(tmp_path, mirror.address) == OTHER, "it was not hashed again"
    with pytest.raises(storage.CorruptError):
        published.check(path, MD5)  # trusts no note
    assert get(tmp_path, mirror.address, digest=hashlib.sha256(GOOD).hexdigest()) == GOOD, "the note is for one digest"
    assert get(tmp_path, mirror.address) == GOOD
    kept = path.stat().st_mtime_ns
    path.write_bytes(OTHER)
    os.utime(path, ns=(kept + 1, kept + 1))
    assert get(tmp_path, mirror.address) == GOOD


def test_a_directory_that_cannot_take_notes_is_used_all_the_same(
    make_mirror: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "REMEMBERED", 1)
    (tmp_path / "f").write_bytes(GOOD)
    (tmp_path / ".f.checked").mkdir()
    assert get(tmp_path) == GOOD


def test_offline_opens_no_connection(make_mirror: Make, tmp_path: Path) -> None:
    mirror = make_mirror(f=GOOD)
    offline = given(offline=True)
    for lacking in ("is missing", "is not the published file"):
        says = f"{tmp_path / 'f'} {lacking}, and data.offline=true: put {mirror.address}/f there"
        with pytest.raises(FileNotFoundError, match=re.escape(says)):
            get(tmp_path, mirror.address, data=offline)
        (tmp_path / "f").write_bytes(OTHER)
    (tmp_path / "f").write_bytes(GOOD)
    assert get(tmp_path, mirror.address, data=offline) == GOOD
    assert mirror.log == []


# Where a download goes on


@pytest.mark.parametrize("seed", range(3))
def test_a_truncated_download_goes_on_and_no_byte_is_fetched_twice(
    make_mirror: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(attempts, "ATTEMPTS", 2)  # fewer than the cuts, each of which made progress
    mirror = make_mirror(f=GOOD)
    cuts = [random.Random(seed).randrange(1, 60_000) for _ in range(4)]
    for cut in cuts:
        mirror.faults("truncate", at=cut)
    assert get(tmp_path, mirror.address) == GOOD
    starts = [sum(cuts[:number]) for number in range(1, 5)]
    assert [seen.range for seen in mirror.log] == [None, *(f"bytes={start}-" for start in starts)]
    assert {seen.headers.get("If-Range") for seen in mirror.log[1:]} == {f'"{MD5}"'}
    assert sum(seen.sent for seen in mirror.log) == len(GOOD)


def test_a_killed_download_goes_on(make_mirror: Make, tmp_path: Path) -> None:
    mirror = make_mirror(f=GOOD)
    mirror.faults("slow", seconds=0.3)
    process = start(mirror, tmp_path)
    part = tmp_path / "f.part"
    while not part.exists() or part.stat().st_size == 0:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    size = part.stat().st_size
    assert 0 < size < len(GOOD)
    assert get(tmp_path, mirror.address) == GOOD
    assert [seen.range for seen in mirror.log] == [None, f"bytes={size}-"]
    assert mirror.log[1].sent == len(GOOD) - size
    assert names(tmp_path) == ["f"]


def test_a_download_that_was_killed_before_its_renaming_is_not_repeated(make_mirror: Make, tmp_path: Path) -> None:
    mirror = make_mirror(f=GOOD)
    (tmp_path / "f.part").write_bytes(GOOD)
    storage.write_json(tmp_path / "f.part.json", {"address": "a", "validator": "v", "length": len(GOOD)})
    assert get(tmp_path, mirror.address) == GOOD
    assert mirror.log == []


@pytest.mark.parametrize("about", [None, "{", "[]", '{"address": "a"}'])
def test_a_part_of_nobody_knows_what_is_not_continued(make_mirror: Make, tmp_path: Path, about: str | None) -> None:
    mirror = make_mirror(f=GOOD)
    (tmp_path / "f.part").write_bytes(OTHER[:1000])
    if about is not None:
        (tmp_path / "f.part.json").write_text(about)
    assert get(tmp_path, mirror.address) == GOOD
    assert [seen.range for seen in mirror.log] == [None]


@pytest.mark.parametrize("conditions", [True, False], ids=["if-range", "ignores-if-range"])
@pytest.mark.parametrize(
    "changed", [OTHER, OTHER[:200_000], OTHER[:50_000]], ids=["bytes", "shorter", "below-the-part"]
)
def test_a_part_of_another_version_is_not_continued(
    make_mirror: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    conditions: bool,
    changed: bytes,
) -> None:
    mirror = make_mirror(f=GOOD)
    stop_halfway(mirror, tmp_path, monkeypatch)
    mirror.files["f"], mirror.conditions = changed, conditions
    assert get(tmp_path, mirror.address, digest=hashlib.md5(changed).hexdigest()) == changed
    assert [seen.range for seen in mirror.log[1:]] == ["bytes=100000-"] + [None] * (not conditions)
    assert "is not the published file" not in caplog.text


def test_a_server_without_ranges_gives_the_whole_file(make_mirror: Make, tmp_path: Path) -> None:
    mirror = make_mirror(f=GOOD)
    mirror.ranges = False
    mirror.faults("truncate", at=1000)
    assert get(tmp_path, mirror.address) == GOOD
    assert [seen.status for seen in mirror.log] == [200, 200]


def test_a_server_without_ranges_that_never_gets_to_the_end_is_given_up(make_mirror: Make, tmp_path: Path) -> None:
    mirror = make_mirror(f=GOOD)
    mirror.ranges = False
    mirror.faults("truncate", math.inf, at=1000)
    with pytest.raises(attempts.DownloadError, match="ended after 1000 of 300000 bytes"):
        get(tmp_path, mirror.address)
    assert len(mirror.log) == attempts.ATTEMPTS


def test_a_length_that_is_not_announced_is_no_reason_to_refuse(make_mirror: Make, tmp_path: Path) -> None:
    mirror = make_mirror(f=GOOD)
    mirror.lengths = False
    assert get(tmp_path, mirror.address) == GOOD


def test_the_next_address_goes_on_with_the_bytes_of_the_first(
    make_mirror: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "ATTEMPTS", 1)
    first, second = make_mirror(f=GOOD), make_mirror(f=GOOD)
    first.faults("truncate", at=100_000)
    assert get(tmp_path, first.address, second.address) == GOOD
    (seen,) = second.log
    assert (seen.range, seen.headers.get("If-Range"), seen.sent) == ("bytes=100000-", None, 200_000)


def test_an_empty_file_is_a_file(make_mirror: Make, tmp_path: Path) -> None:
    assert get(tmp_path, make_mirror(f=b"").address, digest=hashlib.md5().hexdigest()) == b""
    assert names(tmp_path) == ["f"]


def test_the_next_address_does_not_go_on_with_a_file_of_another_length(
    make_mirror: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make_mirror(f=OTHER + b"more"), make_mirror(f=GOOD)
    stop_halfway(first, tmp_path, monkeypatch)
    assert get(tmp_path, second.address) == GOOD
    assert [seen.range for seen in second.log] == ["bytes=100000-", None]
    assert "is not the published file" not in caplog.text


# What is refused


def test_a_wrong_digest_is_refetched_once(make_mirror: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = make_mirror(f=GOOD)
    stop_halfway(mirror, tmp_path, monkeypatch)
    (tmp_path / "f.part").write_bytes(OTHER[:100_000])
    assert get(tmp_path, mirror.address) == GOOD
    assert [seen.range for seen in mirror.log[1:]] == ["bytes=100000-", None]


def test_a_wrong_digest_is_refused_by_address_and_file(make_mirror: Make, tmp_path: Path) -> None:
    mirror = make_mirror(f=OTHER)
    found = hashlib.md5(OTHER).hexdigest()
    says = rf"{mirror.address}/f: f \(300000 bytes\) is not the published file: MD5 {found}, published {MD5}"
    with pytest.raises(attempts.DownloadError, match=says):
        get(tmp_path, mirror.address)
    assert len(mirror.log) == 2
    assert names(tmp_path) == []


@pytest.mark.parametrize("status", [403, 404])
def test_the_next_address_is_tried_at_once_and_all_are_named(make_mirror: Make, tmp_path: Path, status: int) -> None:
    refusing, good = make_mirror(f=GOOD), make_mirror(f=GOOD)
    refusing.faults(status, math.inf)
    assert get(tmp_path / "d", refusing.address, good.address) == GOOD
    assert len(refusing.log) == 1
    gone = "http://127.0.0.1:9"  # no listener
    says = rf"{refusing.address}/f: HTTP {status} .*; {gone}/f: .*refused"
    with pytest.raises(attempts.DownloadError, match=says) as failed:
        get(tmp_path, refusing.address, gone)
    assert failed.value.transient, "the second may be back later"
    with pytest.raises(attempts.DownloadError) as failed:
        get(tmp_path, refusing.address)
    assert not failed.value.transient


def test_a_mirror_stands_in_place_of_the_addresses(make_mirror: Make, tmp_path: Path) -> None:
    home, mirror = make_mirror(f=GOOD), make_mirror(f=GOOD)
    assert get(tmp_path, home.address, data=given(f"{mirror.address}/")) == GOOD
    assert (len(home.log), [seen.path for seen in mirror.log]) == (0, ["/f"])


def test_credentials_are_sent_and_never_shown(
    make_mirror: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = make_mirror()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s@cret\ndefault login a password b\n")
    with pytest.raises(attempts.DownloadError) as refused, caplog.at_level(logging.INFO):
        get(tmp_path / "d", mirror.address)
    assert mirror.log[0].headers["Authorization"] == "Basic bWU6c0BjcmV0"  # me:s@cret
    assert "cret" not in str(refused.value) + caplog.text
    before = len(mirror.log)
    with pytest.raises(attempts.DownloadError):
        get(tmp_path / "d", mirror.address.replace("127.0.0.1", "localhost"))
    assert len(mirror.log) > before
    assert all("Authorization" not in seen.headers for seen in mirror.log[before:]), "another host's password"
    (tmp_path / "netrc").write_text("machine 127.0.0.1\nlogin me s@cret")  # the keyword forgotten
    with pytest.raises(attempts.DownloadError):
        get(tmp_path / "d", mirror.address)
    assert "no password is known for 127.0.0.1: line 2 of" in caplog.text
    assert "cret" not in caplog.text
    assert "Authorization" not in mirror.log[-1].headers


def test_credentials_are_not_sent_where_a_server_redirects_to(
    make_mirror: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = make_mirror(f=GOOD)
    elsewhere = mirror.address.replace("127.0.0.1", "localhost")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s@cret\n")
    with HTTPServer(("127.0.0.1", 0), redirect_to(f"{elsewhere}/f")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert get(tmp_path / "d", f"http://127.0.0.1:{server.server_port}") == GOOD
        server.shutdown()
    assert mirror.log
    assert all("Authorization" not in seen.headers for seen in mirror.log)


def redirect_to(address: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Authorization"]
            self.send_response(302)
            self.send_header("Location", address)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


# How often it is asked


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "reset"])
def test_what_passes_is_waited_for(make_mirror: Make, tmp_path: Path, fault: int | str) -> None:
    mirror = make_mirror(f=GOOD)
    mirror.faults(fault, 3)
    assert get(tmp_path, mirror.address) == GOOD
    assert len(mirror.log) == 4


def test_a_reset_loses_only_what_was_on_its_way(make_mirror: Make, tmp_path: Path) -> None:
    mirror = make_mirror(f=GOOD)
    mirror.faults("reset", at=100_000)
    assert get(tmp_path, mirror.address) == GOOD
    size = int(re.sub(r"\D", "", mirror.log[1].range or "0"))
    assert mirror.log[1].sent == len(GOOD) - size


def test_a_server_that_stalls_is_asked_again(
    make_mirror: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "TIMEOUT", 0.2)
    mirror = make_mirror(f=GOOD)
    mirror.faults("slow", seconds=1)
    assert get(tmp_path, mirror.address) == GOOD
    assert len(mirror.log) == 2


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which are not made."""
    made: list[float] = []
    monkeypatch.setattr(attempts.time, "sleep", made.append)
    return made


def test_pauses_double_vary_and_end(make_mirror: Make, tmp_path: Path, pauses: list[float]) -> None:
    mirror = make_mirror(f=GOOD)
    mirror.faults(503, math.inf)
    with pytest.raises(attempts.DownloadError, match=rf"/f: HTTP 503 .* \({attempts.ATTEMPTS} attempts\)"):
        get(tmp_path, mirror.address)
    assert len(mirror.log) == len(pauses) + 1 == attempts.ATTEMPTS
    relative = [pause / attempts.DELAY / 2**number for number, pause in enumerate(pauses)]
    assert 0.5 <= min(relative) < max(relative) <= 1


@pytest.mark.parametrize("dated", [False, True], ids=["seconds", "date"])
def test_the_pause_a_server_asks_for_is_made(
    make_mirror: Make, tmp_path: Path, pauses: list[float], dated: bool
) -> None:
    mirror = make_mirror(f=GOOD)
    mirror.faults(429, retry_after=formatdate(time.time() + 40, usegmt=True) if dated else "40")
    assert get(tmp_path, mirror.address) == GOOD
    assert len(pauses) == 1
    assert 30 < pauses[0] <= 40


@pytest.mark.parametrize("retry_after", ["86400", "tomorrow"])
def test_a_pause_that_is_too_long_is_a_refusal_and_nonsense_is_none(
    make_mirror: Make, tmp_path: Path, pauses: list[float], retry_after: str
) -> None:
    mirror = make_mirror(f=GOOD)
    mirror.faults(503, retry_after=retry_after)
    if retry_after == "tomorrow":
        assert get(tmp_path, mirror.address) == GOOD
        assert max(pauses) <= attempts.DELAY
    else:
        with pytest.raises(attempts.DownloadError, match=r"HTTP 503 .* clients to wait 86400 s"):
            get(tmp_path, mirror.address)
        assert pauses == []


# This machine


def test_two_processes_download_once(make_mirror: Make, tmp_path: Path) -> None:
    mirror = make_mirror(f=GOOD)
    mirror.faults("slow", math.inf, seconds=0.3)  # 1.8 s, in which the other one starts
    processes = [start(mirror, tmp_path) for _ in range(2)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0)] * 2
    assert (tmp_path / "f").read_bytes() == GOOD
    assert [seen.sent for seen in mirror.log] == [len(GOOD)]
    assert names(tmp_path) == ["f"]


def test_a_full_disk_is_named_and_what_fitted_is_used(make_mirror: Make, tmp_path: Path) -> None:
    mirror = make_mirror(f=GOOD)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    said = start(mirror, tmp_path, limited).communicate()[1]
    assert f"[Errno {errno.EFBIG}] File too large: '{tmp_path / 'f.part'}'" in said
    assert (tmp_path / "f.part").stat().st_size == 100_000
    assert get(tmp_path, mirror.address) == GOOD
    assert mirror.log[-1].range == "bytes=100000-"


def test_a_disk_that_takes_a_piece_in_parts_gets_all_of_it(tmp_path: Path) -> None:
    with partial.partial(tmp_path / "f") as part:
        write = part._file.write
        part._file = SimpleNamespace(write=lambda rest: write(rest[:7]), fileno=part._file.fileno)  # type: ignore
        part.append(GOOD[:100])
        assert part.path.read_bytes() == GOOD[:100]


def test_a_place_that_takes_no_files_is_named(make_mirror: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=str(tmp_path / "file" / "d")):
        get(tmp_path / "file" / "d", make_mirror(f=GOOD).address)


def test_the_log_says_what_comes_from_where_how_far_it_is_and_that_it_is_done(
    make_mirror: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(partial, "LOG_EVERY", 0)
    monkeypatch.setattr(partial, "GB", 1e3)  # so that there are some
    mirror = make_mirror(f=GOOD)
    stop_halfway(mirror, tmp_path, monkeypatch)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        get(tmp_path, mirror.address)
    first, *middle, last = caplog.messages
    assert first == f"f: downloading from {mirror.address}/f; 100.00 of 300.00 GB"
    assert middle
    for line in middle:
        assert re.fullmatch(r"f: [12]\d\d\.\d\d of 300\.00 GB, [\d.]+ MB/s, \d+ s left|f: 300.00 of .*", line)
    assert re.fullmatch(r"f: .* GB are complete after \d+ s", last)


# Directories


def test_check_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(GOOD[:5])
    with pytest.raises(
        storage.CorruptError, match=rf"f \(5 bytes\) is not the published file: MD5 .*, published {MD5}"
    ):
        published.check(tmp_path / "f", MD5)
    with pytest.raises(storage.CorruptError, match=r"SHA-256 .*, published 0{64}"):
        published.check(tmp_path / "f", "0" * 64)


def test_find_names_the_directory_and_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.source=/no/such is neither a directory nor an http"):
        published.find("/no/such", ["a"])
    with pytest.raises(FileNotFoundError, match=f"data.source={tmp_path} has none of a, b"):
        published.find(str(tmp_path), ["a", "b"])


def test_a_tree_is_a_directory_or_at_s3(tmp_path: Path) -> None:
    assert published.tree(given(str(tmp_path)), tmp_path / "d") == tmp_path
    for source in ("/no/such", None):
        with pytest.raises(FileNotFoundError, match=f"data.source={source} is not a directory"):
            published.tree(given(source), tmp_path / "d")
    with pytest.raises(
        ValueError, match=r"data\.source=http://host/d: files can't be listed over http\(s\); give s3://"
    ):
        published.tree(given("http://host/d"), tmp_path / "d")
    assert not (tmp_path / "d").exists()
