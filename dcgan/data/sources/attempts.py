"""Attempts at something on the network, repeated after ever longer pauses; what one answers, and how it fails.

Interrupted is worth another attempt, Refused is not; DownloadError is what users see in the end.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from dcgan.data.sources.partial import Version

log = logging.getLogger(__name__)

ATTEMPTS = 6  # in a row without a new byte: half a minute with the delays below, in which a server restarts
DELAY = 1.0  # seconds before the second attempt; doubles from there
LONGEST_DELAY = 30.0  # seconds

T = TypeVar("T")


class Refused(Exception):  # noqa: N818
    """An address will not give a file, however often it is asked."""


class Interrupted(Exception):  # noqa: N818
    """An attempt failed, and another may follow. wait: seconds that the server asks for."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class DownloadError(OSError):
    """No address gave the published file; the message names each address and what was wrong.

    transient: whether one of them may give it later.
    """

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


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
