"""Removes near-duplicates from the training shards of an unfinished store, and shows what was found.

    <working directory>/duplicates/groups.json   which images are alike, and how many each shard had before
    <working directory>/duplicates/sheet.png     some of the groups, one per row, the image that is kept on the left

The groups are recorded before the first shard changes, and each shard's record says whether it has been pruned: a run
that is killed here resumes with the same groups.
"""

import itertools
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dcgan import pictures, storage
from dcgan.data import dedup, publish, shards, store
from dcgan.data.shards import Job

log = logging.getLogger(__name__)

FOLDER = "duplicates"
GROUPS, SHOWN = 50, 8  # groups on the sheet, and images of each


def prune(directory: Path, jobs: Sequence[Job]) -> int:
    """Keep one image of each group of near-duplicates in these jobs' shards, in order; returns the number removed."""
    folder = directory / FOLDER
    found = storage.once(folder / "groups.json", partial(_groups, folder, jobs))
    removed = np.array(sorted(row for group in found["groups"] for row in group[1:]), np.int64)
    starts = np.cumsum([0, *found["counts"]])
    for job, start, stop in zip(jobs, starts[:-1], starts[1:], strict=True):
        record = shards.read(job)
        if not record.get("pruned"):
            keep = np.ones(stop - start, bool)
            keep[removed[(removed >= start) & (removed < stop)] - start] = False
            _rewrite(job, record, keep)
    return len(removed)


def _groups(folder: Path, jobs: Sequence[Job]) -> dict[str, Any]:
    """`groups` of rows over all shards as first made, and `counts` of the images in each."""
    arrays = store.mapped([job.path for job in jobs])
    groups = dedup.find(arrays)
    removed, total = sum(len(group) - 1 for group in groups), sum(map(len, arrays))
    log.info("near-duplicates: %d of %d images, in %d groups", removed, total, len(groups))
    if groups:
        pictures.write_png(folder / "sheet.png", sheet(arrays, groups, GROUPS))
    return {"groups": groups, "counts": [len(array) for array in arrays]}


def _rewrite(job: Job, record: dict[str, Any], keep: np.ndarray) -> None:
    """Drop the images not kept. A kill between the two writes leaves a wrong hash, so the shard is made again."""
    if not keep.all():
        images = np.load(job.path)[keep]
        labels = list(itertools.compress(record["labels"], keep))
        record = record | publish.write_array(job.path, images) | {"labels": labels} | shards.statistics(images)
    storage.write_json(job.record, record | {"pruned": True})


def sheet(arrays: Sequence[np.ndarray], groups: Sequence[Sequence[int]], most: int) -> np.ndarray:
    """A picture of up to `most` groups, a row for the first SHOWN images of each: uint8 (H', W') or (H', W', 3)."""
    images = dedup.Images(arrays)
    cells = np.full((min(most, len(groups)) * SHOWN, *images.shape), 255, np.uint8)
    for row, group in enumerate(groups[:most]):
        shown = np.array(group[:SHOWN])
        cells[row * SHOWN : row * SHOWN + len(shown)] = images[shown]
    return pictures.grid(cells, SHOWN)
