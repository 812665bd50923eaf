"""From a data set's own files to an image store, once: the same input is found again without being read."""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dcgan import storage
from dcgan.config import Data
from dcgan.data import store
from dcgan.data.sources import SOURCES
from dcgan.data.sources.base import TRANSFORM, Labelled

log = logging.getLogger(__name__)

LOG_EVERY = 5  # seconds


def ingest(data: Data, home: Path, verify: bool = False) -> str:
    """Publish the images under `home/stores` and return the store's fingerprint.

    `home/stores/index` remembers which input gave which store. Input that is unchanged, by the settings and the
    source's own cheap signature, returns at once if its store is there with the right lengths (the right bytes, with
    `verify`); a store that is gone or damaged is made again. Downloads go to `home/downloads`. Raises what
    `base.Source` says, and ValueError for an image that can't be used; no store is left behind then.
    """
    source = SOURCES[data.name]
    settings = data.model_dump(mode="json", exclude={"home", "source"})
    given = {"settings": settings, "signature": source.signature(data), "transform": TRANSFORM}
    key = hashlib.sha256(storage.dump_json(given).encode()).hexdigest()[:16]
    index = home / "stores" / "index" / f"{key}.json"
    if fingerprint := _known(index, home, verify):
        return fingerprint
    opened = source.read(data, home / "downloads")
    splits = [(name, _logged(f"{data.name}, {name}", images)) for name, images in opened.splits]
    fingerprint = store.write(home, opened.description, splits, opened.sources, opened.skipped)
    storage.write_json(index, {"input": given, "fingerprint": fingerprint})
    log.info("%s: image store %s", data.name, fingerprint)
    return fingerprint


def _known(index: Path, home: Path, verify: bool) -> str | None:
    """The fingerprint of the store that this input gave before, if that store is sound."""
    if not index.exists():
        return None
    try:
        recorded: Any = json.loads(index.read_bytes())
        return store.Store.open(home, recorded["fingerprint"], verify).fingerprint
    except (ValueError, KeyError, TypeError, FileNotFoundError, storage.CorruptError) as error:
        log.warning("ingesting again: %s", error)
        return None


def _logged(what: str, images: Iterable[Labelled]) -> Iterator[Labelled]:
    """`images`, with a line in the log every few seconds and at the end."""
    count, last = 0, time.monotonic()
    for count, image in enumerate(images, 1):
        if time.monotonic() - last > LOG_EVERY:
            log.info("%s: %d images so far", what, count)
            last = time.monotonic()
        yield image
    log.info("%s: %d images", what, count)
