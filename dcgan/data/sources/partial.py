"""A file still being downloaded: its bytes so far and their version; survives a kill, locked against other processes.

A full or unwritable disk raises an OSError that names the path; the bytes received until then are kept.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from dcgan import storage

log = logging.getLogger(__name__)

LOG_EVERY = 5  # seconds
GB = 1e9


@dataclass(frozen=True)
class Version:
    """What an address says about its file. validator: a strong ETag or else Last-Modified; "" if it has neither."""

    address: str
    validator: str
    length: int | None

    def continues(self, other: "Version | None") -> bool:
        """Whether bytes of this version may follow bytes of `other`.

        Another address has its own validators, so there only the length is compared; the digest decides in the end.
        """
        if other is None:
            return False
        if self.address == other.address:  # a server may leave out what it was given to compare (RFC 9110, 15.3.7)
            return self.length == other.length and self.validator in ("", other.validator)
        return self.length is not None and self.length == other.length


class Partial:
    """The bytes of the file `final` so far, beside it and locked; `version` is what they belong to."""

    def __init__(self, final: Path, path: Path, file: BinaryIO) -> None:
        self.final, self.path, self._file = final, path, file
        self._about = path.with_name(f"{path.name}.json")
        self.version = self._read()

    def _read(self) -> Version | None:
        try:
            return Version(**json.loads(self._about.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @property
    def size(self) -> int:
        """Bytes received so far."""
        return os.fstat(self._file.fileno()).st_size

    @property
    def length(self) -> int | None:
        """Bytes of the whole file, if announced."""
        return self.version.length if self.version else None

    @property
    def complete(self) -> bool:
        """Whether all announced bytes are there."""
        return self.length == self.size

    def begin(self, version: Version, offset: int) -> None:
        """Expect bytes of `version` from `offset` on, which is the size or 0; at 0 the bytes so far are dropped."""
        if offset == 0:
            self.discard()
        if self.version is None or self.version.address != version.address:
            with naming(self._about):
                storage.write_json(self._about, asdict(version))
            self.version = version

    def append(self, piece: bytes) -> None:
        """Add bytes; if the disk is full, those that fit are kept."""
        rest = memoryview(piece)
        with naming(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def discard(self) -> None:
        """Drop all bytes and their version."""
        with naming(self.path):
            self._file.truncate(0)
            self._about.unlink(missing_ok=True)
        self.version = None

    def publish(self) -> None:
        """Flush the file to disk and give it its final name."""
        with naming(self.path):
            os.fsync(self._file.fileno())
            os.replace(self.path, self.final)
            self._about.unlink(missing_ok=True)


class Progress:
    """Logs where a download begins or resumes, and every few seconds how far it is."""

    def __init__(self, part: Partial) -> None:
        self.part = part
        self.start = self.last = time.monotonic()
        self.first = part.size

    def begin(self) -> None:
        """Log what is downloaded from where."""
        address = self.part.version.address if self.part.version else "?"
        log.info("%s: downloading from %s; %s", self.part.final.name, address, self._amount())

    def step(self) -> None:
        """Log how far it is, if it is time to."""
        if (now := time.monotonic()) - self.last < LOG_EVERY:
            return
        self.last = now
        rate = max(self.part.size - self.first, 1) / (now - self.start)  # negative if another version begins
        left = f", {(self.part.length - self.part.size) / rate:.0f} s left" if self.part.length else ""
        log.info("%s: %s, %.1f MB/s%s", self.part.final.name, self._amount(), rate / 1e6, left)

    def _amount(self) -> str:
        total = f"{self.part.length / GB:.2f}" if self.part.length else "unknown"
        return f"{self.part.size / GB:.2f} of {total} GB"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError the path that a failed write or fsync does not name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def partial(final: Path) -> Iterator[Partial]:
    """The partial of `final`, for this process alone; kept unless it is empty. Waits while another process fills it."""
    final.parent.mkdir(parents=True, exist_ok=True)
    path = final.with_name(f"{final.name}.part")
    with locked(path) as file:
        part = Partial(final, path, file)
        try:
            yield part
        finally:
            if part.size == 0 and _is_at(path, file):
                part.discard()
                path.unlink()


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """`path`, open for appending and locked against other processes until this one ends, however it ends."""
    while True:
        with path.open("ab", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%s: another process is writing it; waiting", path)
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(path, file):
                yield file
                return


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether an open file still has its name: the lock's last holder may have renamed or removed it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False
