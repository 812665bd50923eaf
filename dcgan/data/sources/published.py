"""Files that somebody published with their MD5: found in a directory or downloaded, and never used unchecked."""

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from dcgan import storage
from dcgan.config import Data
from dcgan.data.store import SourceFile

log = logging.getLogger(__name__)

ATTEMPTS = 2  # a truncated or corrupt download is refetched once (design, section 6)
TIMEOUT = 30  # seconds without a byte before a server counts as gone


class DownloadError(OSError):
    """No address gave the published file; the message names each address and what was wrong."""


def is_address(source: str) -> bool:
    """Whether `data.source` is an http(s) mirror rather than a directory."""
    return source.startswith(("http://", "https://", "s3://"))


def find(source: str, candidates: Sequence[str]) -> Path:
    """The first of the candidate paths, relative to the directory `source`, that exists.

    Raises FileNotFoundError, naming `source`, if it is no directory or has none of them.
    """
    root = Path(source).expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"data.source={source} is neither a directory nor an http(s) address")
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise FileNotFoundError(f"data.source={source} has none of {', '.join(candidates)}")


def check(path: Path, md5: str) -> Path:
    """`path`, if it has the published MD5; raises CorruptError, naming the file, if not, or FileNotFoundError."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        size = path.stat().st_size
        raise storage.CorruptError(f"{path} ({size} bytes) is not the published file: MD5 {found}, published {md5}")
    return path


def describe(path: Path) -> SourceFile:
    """The manifest's entry for a checked file."""
    return SourceFile(path.name, path.stat().st_size, storage.sha256(path))


def fetch(addresses: Sequence[str], name: str, md5: str, folder: Path, data: Data) -> Path:
    """`folder/name`, downloaded from the first address that gives the published bytes, unless it is there already.

    addresses: http(s) directories; the mirror `data.source`, if it is given, stands in their place.
    Raises DownloadError when all of them failed twice.
    """
    path, problems = folder / name, []
    addresses = [data.source] if data.source else addresses
    if path.exists():
        try:
            return check(path, md5)
        except storage.CorruptError as error:
            log.warning("%s; downloading it again", error)
    for url in [f"{address.rstrip('/')}/{name}" for address in addresses for _ in range(ATTEMPTS)]:
        try:
            return _download(url, path, md5)
        except (OSError, HTTPException, storage.CorruptError) as error:
            problems.append(f"{url}: {error}")
            log.warning("download refused: %s", problems[-1])
    raise DownloadError("; ".join(dict.fromkeys(problems)))


def _download(url: str, path: Path, md5: str) -> Path:
    log.info("downloading %s", url)
    request = Request(url, headers={"User-Agent": "dcgan"})
    with storage.staging(path.parent) as staged, urlopen(request, timeout=TIMEOUT) as response:
        aside = staged / path.name
        with aside.open("wb") as file:
            shutil.copyfileobj(response, file)
        os.replace(check(aside, md5), path)
    return path
