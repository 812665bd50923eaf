"""Objects on S3, listed and read one attempt at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dcgan import remote
from dcgan.data.sources.attempts import Answer, Interrupted, Refused, shown
from dcgan.data.sources.partial import Partial, Version

PIECE = 16 << 20  # bytes of an object in memory at once, each asked for by a request
LISTED = 1000  # objects per page of a listing; S3's maximum
CONNECTIONS = 16  # at once


class Bucket:
    """Objects below an s3:// address. Each call is one attempt and raises Interrupted or Refused.

    Credentials and endpoint come from the usual AWS variables.
    """

    def __init__(self, address: str) -> None:
        self.name, _, self.key = address.removeprefix("s3://").partition("/")
        self._files = remote.filesystem(CONNECTIONS)

    def head(self) -> tuple[str, int]:
        """ETag and length of the object at the address."""
        with _errors():
            found = self._files.call_s3("head_object", Bucket=self.name, Key=self.key)
        return found["ETag"], found["ContentLength"]

    def page(self, prefix: str, after: str | None) -> tuple[list[dict[str, Any]], str | None]:
        """Up to LISTED of the objects whose keys begin with `prefix`, and where the next ones begin, if any."""
        more = {"MaxKeys": LISTED} | ({"ContinuationToken": after} if after else {})
        with _errors():
            found = self._files.call_s3("list_objects_v2", Bucket=self.name, Prefix=prefix, **more)
        return found.get("Contents", []), found.get("NextContinuationToken")

    def pieces(self, key: str, offset: int, length: int) -> Iterator[bytes]:
        """The object's bytes from `offset` to its end at `length`, in pieces that fit in memory."""
        for start in range(offset, length, PIECE):
            with _errors():
                piece = self._files.cat_file(f"{self.name}/{key}", start=start, end=min(start + PIECE, length))
            yield piece


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what s3fs raises into Refused or Interrupted."""
    from botocore import exceptions as aws

    try:
        yield
    except (FileNotFoundError, PermissionError, aws.NoCredentialsError, aws.ParamValidationError) as error:
        raise Refused(str(error)) from error
    except remote.faults() as error:
        said = error.strerror if isinstance(error, OSError) else None
        raise Interrupted(said or str(error) or type(error).__name__) from error


def ask(url: str, part: Partial) -> Answer:
    """The object at `url`, from the end of what `part` has of this version of it on."""
    bucket = Bucket(url)
    etag, length = bucket.head()
    version = Version(shown(url), etag, length)
    offset = part.size if version.continues(part.version) else 0
    return Answer(version, offset, bucket.pieces(bucket.key, offset, length))
