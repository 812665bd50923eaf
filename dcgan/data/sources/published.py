"""Finds or downloads files that were published with a digest; none is used unchecked.

A digest is an MD5 or a SHA-256 in hex, told apart by its length. A download stays in `NAME.part` until it is complete
and has its digest, so nothing else is ever found under the final name; see `partial.py` and `fetch.py`.
"""

import hashlib
import json
import logging
import tarfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from dcgan import storage
from dcgan.config import Data
from dcgan.data.sources.attempts import DownloadError, Interrupted, Refused, shown
from dcgan.data.sources.fetch import download
from dcgan.data.sources.partial import GB, Partial, partial
from dcgan.data.sources.tree import tree as tree
from dcgan.data.store import SourceFile

log = logging.getLogger(__name__)

ATTEMPTS = 2  # a corrupt download is fetched once more
REMEMBERED = 1 << 30  # bytes from which on a check is remembered; a smaller file is hashed in a second or two
ALGORITHMS = {32: ("MD5", "md5"), 64: ("SHA-256", "sha256")}  # by the number of hex digits


def is_address(source: str) -> bool:
    """Whether `data.source` is a mirror, http(s) or S3, rather than a directory."""
    return source.startswith(("http://", "https://", "s3://"))


def find(source: str, candidates: Sequence[str]) -> Path:
    """The first of the candidate paths, relative to the directory `source`, that exists.

    Raises FileNotFoundError, naming `source`, if it is not a directory or has none of them.
    """
    root = Path(source).expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"data.source={source} is neither a directory nor an http(s) or S3 address")
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise FileNotFoundError(f"data.source={source} has none of {', '.join(candidates)}")


def check(path: Path, digest: str) -> Path:
    """`path`, if it has the published digest; raises CorruptError, naming the file, if not, or FileNotFoundError.

    It is hashed on every call: a note of an earlier check may have come with the file, from whoever forged it.
    """
    if problem := _problem(path, digest):
        raise storage.CorruptError(f"{path} {problem}")
    return path


def describe(path: Path) -> SourceFile:
    """The manifest's entry for a checked file."""
    return SourceFile(path.name, path.stat().st_size, storage.sha256(path))


def fetch(addresses: Sequence[str], name: str, digest: str, folder: Path, data: Data) -> Path:
    """`folder/name`, downloaded from the first address that gives the published bytes, unless it is there already.

    addresses: http(s):// or s3:// directories; the mirror `data.source`, if given, replaces them. A download resumes
    where it was killed or cut off, whichever address it came from. Raises DownloadError if all addresses fail,
    FileNotFoundError if the file would have to be downloaded and `data.offline` forbids it, or OSError, naming the
    path, if it can't be written; what was downloaded by then is used next time.
    """
    path = folder / name
    urls = [f"{address.rstrip('/')}/{name}" for address in ([data.source] if data.source else addresses)]
    if _is_there(path, digest):
        return path
    if data.offline:
        places = " or ".join(map(shown, urls))
        lacking = "is not the published file" if path.exists() else "is missing"
        raise FileNotFoundError(f"{path} {lacking}, and data.offline=true: put {places} there")
    with partial(path) as part:
        if not _is_there(path, digest):  # another process may just have downloaded it
            _download(urls, part, digest)
    return path


def locate(
    data: Data, addresses: Sequence[str], name: str, digest: str, downloads: Path, candidates: Sequence[str]
) -> Path:
    """The first of the candidates found in the directory `data.source`; if it is unset or a mirror, `name`, fetched."""
    if data.source is None or is_address(data.source):
        return fetch(addresses, name, digest, downloads, data)
    return find(data.source, candidates)


def unpack(archive: Path, digest: str, names: Iterable[str], folder: Path) -> Path:
    """Write the files `names`, and no others, from the archive's directory with `folder`'s name into `folder`.

    Raises CorruptError, naming the archive, if it does not have the published digest.
    """
    check(archive, digest)
    with tarfile.open(archive) as opened:
        for name in names:
            member = opened.extractfile(f"{folder.name}/{name}")
            assert member is not None, "the archive's digest says that this is a file"
            storage.write_bytes(folder / name, member.read())
    return folder


def _is_there(path: Path, digest: str) -> bool:
    """Whether the published file is at `path`, by its digest or by a check that is remembered."""
    if not path.exists():
        return False
    if path.stat().st_size >= REMEMBERED and _noted(path) == _state(path, digest):
        return True
    if problem := _problem(path, digest):
        log.warning("%s %s", path, problem)
        return False
    _remember(path, digest)
    return True


def _remember(path: Path, digest: str) -> None:
    """Record that a large file has this digest, valid while its length and modification time are unchanged."""
    if path.stat().st_size >= REMEMBERED:
        with suppress(OSError):  # a directory that can't be written only costs a hash each time
            storage.write_json(_note(path), _state(path, digest))


def _state(path: Path, digest: str) -> dict[str, str | int]:
    seen = path.stat()
    return {"digest": digest, "bytes": seen.st_size, "mtime_ns": seen.st_mtime_ns}


def _noted(path: Path) -> object:
    try:
        return json.loads(_note(path).read_bytes())
    except (OSError, ValueError):
        return None


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.checked")


def _problem(path: Path, digest: str) -> str:
    """What is wrong with the file's bytes, as a predicate; "" if nothing is."""
    title, algorithm = ALGORITHMS[len(digest)]
    if path.stat().st_size >= REMEMBERED:
        log.info("%s: comparing %.1f GB with the published %s", path, path.stat().st_size / GB, title)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    if found == digest:
        return ""
    return f"({path.stat().st_size} bytes) is not the published file: {title} {found}, published {digest}"


def _download(urls: Sequence[str], part: Partial, digest: str) -> None:
    """Fill and publish `part` from the first of the URLs that gives it; raises DownloadError if none does."""
    problems, transient, start = [], False, time.monotonic()
    for url in urls:
        if (problem := _try(url, part, digest)) is None:
            part.publish()
            _remember(part.final, digest)
            size = part.final.stat().st_size
            log.info("%s: %.2f GB are complete after %.0f s", part.final.name, size / GB, time.monotonic() - start)
            return
        problems.append(f"{shown(url)}: {problem}")
        transient |= isinstance(problem, Interrupted)
        log.warning("download refused: %s", problems[-1])
    raise DownloadError(f"{part.final.name} could not be downloaded: {'; '.join(problems)}", transient)


def _try(url: str, part: Partial, digest: str) -> Refused | Interrupted | None:
    """What is wrong with this address, or None if `part` is now the published file."""
    problem = ""
    for _ in range(ATTEMPTS):
        try:
            download(url, part)
        except (Refused, Interrupted) as error:
            return error
        if not (problem := _problem(part.path, digest)):
            return None
        part.discard()
        log.warning("%s: %s %s", shown(url), part.final.name, problem)
    return Refused(f"{part.final.name} {problem}")
