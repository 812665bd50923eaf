"""Downloads bytes over http(s) and from S3, resuming where an attempt ended, after ever longer pauses.

The network fails in two ways: Interrupted is worth another attempt, Refused is not.
"""

import logging
import os
import random
import re
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import partial as bind
from http.client import HTTPException, HTTPResponse, InvalidURL
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from dcgan.data.sources.partial import Partial, Progress, Version

log = logging.getLogger(__name__)

TIMEOUT = 30  # seconds without a byte before a server counts as gone
ATTEMPTS = 6  # in a row without a new byte: half a minute with the delays below, in which a server restarts
DELAY = 1.0  # seconds before the second attempt; doubles from there
LONGEST_DELAY = 30.0  # seconds
PATIENCE = 60.0  # the longest Retry-After to wait for, in seconds; a server that asks for more will not serve us
TRANSIENT = (408, 425, 429)  # the HTTP statuses below 500 that mean "later"
CHUNK = 1 << 20  # bytes of a file in memory at once
PIECE = 16 << 20  # the same for S3, where each is a request
LISTED = 1000  # objects per page of a listing; S3's maximum
CONNECTIONS = 16  # to S3 at once
T = TypeVar("T")


class DownloadError(OSError):
    """No address gave the published file; the message names each address and what was wrong.

    transient: whether one of them may give it later.
    """

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class Refused(Exception):  # noqa: N818
    """An address will not give a file, however often it is asked."""


class Interrupted(Exception):  # noqa: N818
    """An attempt failed, and another may follow. wait: seconds that the server asks for."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


def download(url: str, part: Partial) -> None:
    """Fetch what `part` lacks of the file at `url`, an http(s):// or s3:// address.

    Raises Refused if the address will not give it, Interrupted after ATTEMPTS without progress, or OSError, naming
    the path, if it can't be written.
    """
    progress = Progress(part)
    persist(bind(_attempt, url, part, progress), part.final.name, lambda: part.size)


def persist(action: Callable[[], T], name: str, reached: Callable[[], int] = lambda: 0) -> T:
    """What `action` returns, retried when it is Interrupted until ATTEMPTS in a row made no progress.

    reached: how much there is now; more than ever before is progress.
    """
    failures = best = 0
    while True:
        try:
            return action()
        except Interrupted as error:
            if (now := reached()) > best:
                failures, best = 0, now
            failures += 1
            if failures == ATTEMPTS:
                raise Interrupted(f"{error} ({ATTEMPTS} attempts)") from error
            backoff = min(LONGEST_DELAY, DELAY * 2 ** (failures - 1))
            wait = max(error.wait, random.uniform(backoff / 2, backoff))  # so that not all clients return at once
            log.warning("%s: %s; again in %.1f s", name, error, wait)
            time.sleep(wait)


def shown(url: str) -> str:
    """A URL that is safe to show: without the query, where servers that redirect pass secrets."""
    return urlsplit(url)._replace(query="", fragment="").geturl()


class Answer(NamedTuple):
    """A file from `offset` on; an error while reading `pieces` is Interrupted or Refused."""

    version: Version
    offset: int
    pieces: Iterator[bytes]


def _attempt(url: str, part: Partial, progress: Progress) -> None:
    if part.complete:
        return
    answer = (_ask_s3 if url.startswith("s3://") else _ask_http)(url, part)
    part.begin(answer.version, answer.offset)
    progress.begin()
    for piece in answer.pieces:
        part.append(piece)
        progress.step()
    if part.length not in (None, part.size):
        raise Interrupted(f"the connection ended after {part.size} of {part.length} bytes")


# http(s)


def _ask_http(url: str, part: Partial) -> Answer:
    response = _open(_request(url, part), part)
    version, offset = _described(url, response)
    if offset and not (offset == part.size and version.continues(part.version)):
        response.close()
        part.discard()  # bytes of a version that is no longer there
        raise Interrupted(f"{shown(url)} has changed since a part of it was downloaded")
    return Answer(version, offset, _received(response, version.length, offset))


def _request(url: str, part: Partial) -> Request:
    """A GET of what is missing, with the user and password that `netrc` has for this host, and for no other."""
    request = Request(url, headers={"User-Agent": "dcgan"})
    if known := _known(urlsplit(url).hostname or ""):
        user, _, password = known
        request.add_unredirected_header("Authorization", f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}")
    if part.size and part.version:
        request.add_header("Range", f"bytes={part.size}-")
        if part.version.address == shown(url) and part.version.validator:
            request.add_header("If-Range", part.version.validator)
    return request


def _known(host: str) -> tuple[str, str | None, str | None] | None:
    """The entry of a host in `netrc`: user, account, password; None if absent or, with a warning, unreadable."""
    try:
        file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        return netrc(str(file)).hosts.get(host) if file.is_file() else None
    except NetrcParseError as error:  # its message quotes the word that it stumbles over, maybe a password
        log.warning("no password is known for %s: line %s of %s can't be read", host, error.lineno, error.filename)
        return None
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        log.warning("no password is known for %s: %s", host, error)
        return None


def _open(request: Request, part: Partial) -> HTTPResponse:
    try:
        return urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        refusal = error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)  # urllib wraps what went wrong while connecting
        if isinstance(reason, ssl.SSLCertVerificationError | InvalidURL):
            raise Refused(str(reason)) from error
        raise Interrupted(str(reason) or type(reason).__name__) from error
    if refusal.code == 416:  # the file is shorter than what is here
        part.discard()
    raise _judged(refusal)


def _judged(error: HTTPError) -> Refused | Interrupted:
    said = f"HTTP {error.code} {error.reason}"
    wait = _seconds(error.headers.get("Retry-After", ""))
    if error.code != 416 and error.code < 500 and error.code not in TRANSIENT:
        return Refused(said)
    if wait > PATIENCE:
        return Refused(f"{said}, which asks clients to wait {wait:.0f} s")
    return Interrupted(said, wait)


def _seconds(retry_after: str) -> float:
    """Retry-After, a number of seconds or a date; 0 if it is neither."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


def _described(url: str, response: HTTPResponse) -> tuple[Version, int]:
    """What a response has, and the byte it begins at: it may be the whole file even if a part was asked for."""
    headers = response.headers
    etag = headers.get("ETag", "")
    # A weak ETag may stay the same when bytes change, and a server must not continue a file by it.
    validator = headers.get("Last-Modified", "") if etag.startswith("W/") else etag or headers.get("Last-Modified", "")
    where = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if response.status == 206 and where:
        start, total = where.groups()
    else:
        start, total = "0", headers.get("Content-Length", "")
    return Version(shown(url), validator, int(total) if total.isdecimal() else None), int(start)


def _received(response: HTTPResponse, length: int | None, offset: int) -> Iterator[bytes]:
    """The body as it comes in. It may end early without an error; the caller compares the length."""
    with response:
        try:
            while piece := response.read1(CHUNK if length is None else min(CHUNK, length - offset)):
                offset += len(piece)
                yield piece
        except (OSError, HTTPException) as error:
            raise Interrupted(str(error) or type(error).__name__) from error


# S3


class Bucket:
    """Objects below an s3:// address. Each call is one attempt and raises Interrupted or Refused.

    Credentials and endpoint come from the usual AWS variables.
    """

    def __init__(self, address: str) -> None:
        import s3fs  # takes a second; only s3:// needs it

        self.name, _, self.key = address.removeprefix("s3://").partition("/")
        self._files = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            # One retry policy is enough: `persist`. Two nested ones would wait for minutes.
            config_kwargs={"retries": {"total_max_attempts": 1}, "max_pool_connections": CONNECTIONS},
        )
        self._files.retries = 1

    def head(self) -> tuple[str, int]:
        """ETag and length of the object at the address."""
        with _s3_errors():
            found = self._files.call_s3("head_object", Bucket=self.name, Key=self.key)
        return found["ETag"], found["ContentLength"]

    def page(self, prefix: str, after: str | None) -> tuple[list[dict[str, Any]], str | None]:
        """Up to LISTED of the objects whose keys begin with `prefix`, and where the next ones begin, if any."""
        more = {"MaxKeys": LISTED} | ({"ContinuationToken": after} if after else {})
        with _s3_errors():
            found = self._files.call_s3("list_objects_v2", Bucket=self.name, Prefix=prefix, **more)
        return found.get("Contents", []), found.get("NextContinuationToken")

    def pieces(self, key: str, offset: int, length: int) -> Iterator[bytes]:
        """The object's bytes from `offset` to its end at `length`, in pieces that fit in memory."""
        for start in range(offset, length, PIECE):
            with _s3_errors():
                piece = self._files.cat_file(f"{self.name}/{key}", start=start, end=min(start + PIECE, length))
            yield piece


@contextmanager
def _s3_errors() -> Iterator[None]:
    """Turn what s3fs raises, which comes from four libraries, into Refused or Interrupted."""
    import aiohttp
    from botocore import exceptions as aws

    try:
        yield
    except (FileNotFoundError, PermissionError, aws.NoCredentialsError, aws.ParamValidationError) as error:
        raise Refused(str(error)) from error
    except (OSError, aws.BotoCoreError, aws.ClientError, aiohttp.ClientError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        raise Interrupted(said or str(error) or type(error).__name__) from error


def _ask_s3(url: str, part: Partial) -> Answer:
    bucket = Bucket(url)
    etag, length = bucket.head()
    version = Version(shown(url), etag, length)
    offset = part.size if version.continues(part.version) else 0
    return Answer(version, offset, bucket.pieces(bucket.key, offset, length))
