"""Reads and writes objects at s3://, by s3fs with the usual AWS environment: retried with backoff, and verified.

An object appears whole or not at all, so a group of several is complete once its manifest, written last, is there.
"""

import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from dcgan import storage

log = logging.getLogger(__name__)

ATTEMPTS = 6  # waits of 1/2, 1, 2, 4 and 8 s between them, with jitter: a server that restarts is back by then
FIRST_WAIT = 0.5  # seconds
THREADS = 8  # transfers at once
CONNECTIONS = 16  # s3fs sends a long file in several parts at once
PIECE = 2**23  # bytes of a download in memory
REFUSALS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError)  # another try would not help
R = TypeVar("R")


class RemoteError(OSError):
    """The remote gave no valid answer in ATTEMPTS attempts; the message names the object and the problem."""


def filesystem(connections: int) -> Any:
    """S3 by the usual AWS variables, with so many connections at most; no answer is cached, and nothing retried."""
    import s3fs  # takes a second; only where something is at s3://
    from aiobotocore.session import AioSession

    session = AioSession()
    session.register_component("data_loader", _service_descriptions(session.get_config_variable("data_path")))
    files = s3fs.S3FileSystem(
        session=session,
        skip_instance_cache=True,
        use_listings_cache=False,  # another process may have written since
        # The caller retries; with s3fs's and botocore's own retries, nested, that took 40 minutes.
        config_kwargs={"retries": {"total_max_attempts": 1}, "max_pool_connections": connections},
    )
    files.retries = 1
    return files


@cache
def _service_descriptions(path: str | None) -> Any:
    """What botocore knows of AWS's services. Each session, whose credentials are its own, would read it anew: 0.2 s."""
    from botocore.loaders import create_loader

    return create_loader(path)


class Remote:
    """The objects under one s3:// address, by their path relative to it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs = filesystem(CONNECTIONS)

    def _at(self, path: str) -> str:
        return f"{self.url}/{path}".removeprefix("s3://")

    def _try(self, what: str, path: str, function: Callable[[], R]) -> R:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return function()
            except REFUSALS as error:
                raise type(error)(f"{what} {self.url}/{path}: {error}") from error
            except faults() as error:
                problem = f"{what} {self.url}/{path}: {type(error).__name__}: {' '.join(str(error).split())}"
                if type(error).__name__ == "NoCredentialsError":
                    raise PermissionError(problem) from error
                if attempt == ATTEMPTS:
                    raise RemoteError(f"{problem} (after {attempt} attempts)") from error
                log.warning("%s; trying again", problem)
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        raise AssertionError

    def sizes(self, path: str = "") -> dict[str, int]:
        """Every object below `path`: its path relative to that, and its size in bytes; {} if there is none.

        A console's placeholder for a directory, whose name ends in a slash, is not one.
        """
        root = self._at(path).rstrip("/")
        found = self._try("listing", path, lambda: self._fs.find(root, detail=True))
        names = {name: name.removeprefix(f"{root}/") for name in found if not name.endswith("/")}
        return {names[name]: found[name]["size"] for name in names}

    def read(self, path: str) -> bytes | None:
        """A small object's bytes, or None if it is not there."""
        try:
            return self._try("reading", path, lambda: self._fs.cat_file(self._at(path)))
        except FileNotFoundError:
            return None

    def write(self, path: str, content: bytes) -> None:
        """Write a small object, replacing what was there."""
        self._try("writing", path, lambda: self._fs.pipe_file(self._at(path), content))

    def upload(self, file: Path, path: str) -> None:
        """Upload a file and check the length that arrived; raises RemoteError if it differs from the file's."""

        def send() -> None:
            self._fs.put_file(str(file), self._at(path))
            there, here = self._fs.info(self._at(path))["size"], file.stat().st_size
            if there != here:
                raise OSError(f"{there} bytes arrived of {here}")

        self._try("writing", path, send)

    def download(self, path: str, file: Path, size: int, sha256: str) -> None:
        """Download an object into `file`, which appears only with this length and hash.

        Raises FileNotFoundError, RemoteError, CorruptError if the hash differs twice, or OSError if the file can't be
        written.
        """

        def fetch() -> bool:
            digest, done = hashlib.sha256(), 0
            with (
                self._fs.open(self._at(path), "rb", block_size=PIECE, cache_type="none") as source,
                _aside(file) as out,
            ):
                while piece := source.read(PIECE):
                    digest.update(piece)
                    done += len(piece)
                    with _naming(file):
                        out.write(piece)
                if done < size:
                    raise OSError(f"cut short: {done} bytes of {size}")
                if digest.hexdigest() != sha256:
                    raise _Differs
            return True

        for _ in range(2):
            try:
                self._try("reading", path, fetch)
                return
            except _UnwrittenError as error:  # a full disk is not the remote's fault
                raise OSError(error.errno, error.strerror, error.filename) from error
            except _Differs:
                log.warning("%s/%s has another SHA-256 than its manifest says", self.url, path)
        raise storage.CorruptError(f"{self.url}/{path} is corrupt: its SHA-256 differs from its manifest's")

    def remove(self, paths: Iterable[str]) -> None:
        """Delete objects, in the given order."""
        for path in paths:
            self._try("deleting", path, lambda path=path: self._fs.rm_file(self._at(path)))  # type: ignore[misc]


class _Differs(Exception):  # noqa: N818  not an error yet
    pass


class _UnwrittenError(Exception):
    """A local file can't be written; no OSError, so that no other attempt is made."""

    def __init__(self, error: OSError, file: Path) -> None:
        super().__init__(str(error))
        self.errno, self.strerror, self.filename = error.errno, error.strerror, str(file)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _UnwrittenError(error, file) from error


@contextmanager
def _aside(file: Path) -> Iterator[Any]:
    """A file open for writing that becomes `file`, and is on disk, if all goes well."""
    part = file.with_name(f".{file.name}.part")
    with _naming(file):
        out = part.open("wb")
    try:
        yield out
        with _naming(file):
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    finally:
        with suppress(OSError):  # what a full disk had no room for is written once more
            out.close()
        part.unlink(missing_ok=True)


def faults() -> tuple[type[Exception], ...]:
    """The network and server failures of an S3 client: OSError, and what aiohttp and botocore raise, unwrapped."""
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError

    return OSError, aiohttp.ClientError, BotoCoreError, ClientError


def in_parallel(function: Callable[..., None], arguments: Iterable[tuple[Any, ...]]) -> None:
    """Call `function` with each of the arguments, THREADS at once; the first error is raised, the rest not started."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(function, *each) for each in arguments]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
