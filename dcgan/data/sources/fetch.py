"""Downloads files over http(s) and from S3, resuming where an attempt ended, after ever longer pauses."""

from functools import partial as bind

from dcgan.data.sources import http, s3
from dcgan.data.sources.attempts import Interrupted, persist
from dcgan.data.sources.partial import Partial, Progress


def download(url: str, part: Partial) -> None:
    """Fetch what `part` lacks of the file at `url`, an http(s):// or s3:// address.

    Raises Refused if the address will not give it, Interrupted after ATTEMPTS without progress, or OSError, naming
    the path, if it can't be written.
    """
    progress = Progress(part)
    persist(bind(_attempt, url, part, progress), part.final.name, lambda: part.size)


def _attempt(url: str, part: Partial, progress: Progress) -> None:
    if part.complete:
        return
    answer = (s3 if url.startswith("s3://") else http).ask(url, part)
    part.begin(answer.version, answer.offset)
    progress.begin()
    for piece in answer.pieces:
        part.append(piece)
        progress.step()
    if part.length not in (None, part.size):
        raise Interrupted(f"the connection ended after {part.size} of {part.length} bytes")
