"""The image stores in a home: list, verify, describe, draw."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dcgan import pictures, storage
from dcgan.data.store import Store

COLUMNS = 16  # images in a row of a contact sheet
FINGERPRINT = "[0-9a-f]" * 16


def paths(home: Path) -> list[Path]:
    """The directories of the stores, sorted by name."""
    return sorted((home / "stores").glob(FINGERPRINT))


def chosen(home: Path, words: Sequence[str]) -> list[Path]:
    """The stores whose fingerprints start with the given words; all stores if there are no words.

    Raises ValueError for a word that matches none or several, and FileNotFoundError if the home has no store.
    """
    there = paths(home)
    if not there:
        raise FileNotFoundError(f"{home / 'stores'} has no image store: `dcgan ingest` makes one")
    found = []
    for word in words:
        matches = [path for path in there if path.name.startswith(word)]
        if len(matches) != 1:
            names = ", ".join(path.name for path in matches or there)
            raise ValueError(f"{word!r} is the beginning of {len(matches) or 'no'} stores: {names}")
        found += matches
    return found or there


def table(home: Path) -> str:
    """For each store: fingerprint, data set, pixels per side, gigabytes, images per split, and where it came from.

    Interrupted ingestions come last; repeating their command resumes them.
    """
    lines = [f"{'fingerprint':16}  {'data set':14}  {'px':>3}  {'GB':>7}  images"]
    for path in paths(home):
        try:
            store = Store.open(home, path.name)
        except storage.CorruptError as error:
            lines.append(f"{path.name}  damaged: {error}")
            continue
        counts = ", ".join(f"{store.count(split):,} {split}" for split in store.splits)
        lines.append(f"{path.name}  {store.dataset:14}  {store.size:3}  {_bytes(path) / 1e9:7.2f}  {counts}")
        lines.append(f"{'':18}from {_origin(store)}")
    for path in sorted((home / "stores").glob(".ingest-*")):
        made = len(list(path.glob("*-[0-9]*.json")))
        lines.append(f"{'unfinished':16}  {path.name}: {made} shards, {_bytes(path) / 1e9:.2f} GB")
    return "\n".join(lines)


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _origin(store: Store) -> str:
    sources = store.manifest["sources"]
    return f"{sources[0]['name']}{f' and {len(sources) - 1} more files' if len(sources) > 1 else ''}"


def verify(path: Path) -> str:
    """Read every byte of a store again; returns a line that says it is sound. Raises CorruptError, naming the file."""
    store = Store.open(path.parent.parent, path.name, verify=True)
    return f"{path.name}  {store.dataset}: {len(store.manifest['files'])} files, {_bytes(path):,} bytes, sound"


def describe(path: Path) -> str:
    """The `profile` of a store as lines, then the transform and the sources with their hashes."""
    store = Store.open(path.parent.parent, path.name)
    lines = [f"{key}: {value}" for key, value in profile(store).items()]
    lines.append(f"transform: {store.manifest['transform']}")
    duplicates = path.parent.parent / "duplicates" / path.name
    if duplicates.exists():
        lines.append(f"duplicates are shown in {duplicates}")
    lines += [f"from {file['name']}, {file['bytes']:,} bytes, {file['sha256']}" for file in store.manifest["sources"]]
    return "\n".join(lines)


def profile(store: Store) -> dict[str, str]:
    """Counts, class balance and pixel statistics per split, and what was left out, as short texts to read."""
    found = {"data set": store.dataset, "size": f"{store.size} px, {store.channels} channels"}
    for split in store.splits:
        found[f"{split} images"] = f"{store.count(split):,}"
        found[f"{split} pixels"] = ", ".join(
            f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in store.pixel_statistics(split)
        )
        found[f"{split} classes"] = _balance(store, split)
    found["duplicates removed"] = f"{store.manifest['duplicates_removed']:,}"
    found["skipped"] = f"{len(store.manifest['skipped']):,}"
    return found


def _balance(store: Store, split: str) -> str:
    """Each class's count if they fit on a line, else the range of the counts."""
    counts = store.balance(split)
    if not counts:
        return "no labels"
    if len(counts) > COLUMNS:
        return f"{len(counts)} of {min(counts.values()):,} to {max(counts.values()):,} images"
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def show(path: Path, count: int, out: Path) -> None:
    """Write a PNG of up to `count` images of each split, evenly spaced, one split below the other."""
    store = Store.open(path.parent.parent, path.name)
    rows = []
    for split in store.splits:
        shards = store.shards(split)
        starts = np.cumsum([0, *map(len, shards)])
        for row in np.unique(np.linspace(0, starts[-1] - 1, count).astype(int)):
            shard = int(np.searchsorted(starts, row, side="right")) - 1
            rows.append(shards[shard][row - starts[shard]])
        blank = np.full((-len(rows) % COLUMNS, store.channels, store.size, store.size), 255, np.uint8)
        rows += list(blank)
    pictures.write_png(out, pictures.grid(np.stack(rows), COLUMNS))
