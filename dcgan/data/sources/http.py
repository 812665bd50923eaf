"""One attempt to get a file, or the rest of it, over http(s)."""

import logging
import os
import re
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, InvalidURL
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from dcgan.data.sources.attempts import Answer, Interrupted, Refused, shown
from dcgan.data.sources.partial import Partial, Version

log = logging.getLogger(__name__)

TIMEOUT = 30  # seconds without a byte before a server counts as gone
PATIENCE = 60.0  # the longest Retry-After to wait for, in seconds; a server that asks for more will not serve us
TRANSIENT = (408, 425, 429)  # the HTTP statuses below 500 that mean "later"
CHUNK = 1 << 20  # bytes of a file in memory at once


def ask(url: str, part: Partial) -> Answer:
    """What the server at `url` has of the file, from the end of `part` on where it can; Interrupted or Refused else."""
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
