"""Near-duplicates planted among real images: python tests/benchmarks/near_duplicates.py DIRECTORY

DIRECTORY holds rooms/, faces/ and cifar-10-batches-py/, as shared/data/restore.py leaves them. Of 900 images a
collection gets a second copy: 300 re-encoded as JPEG of quality 75, 300 shifted by a pixel of the file, 300 brightened
by 3 %. The bar: 90 % found of each kind, and fewer than 1 false pair in 100. Whether a pair that was not planted is
false only looking tells: --sheets writes them as pictures. About two minutes on 1 core (OMP_NUM_THREADS=1).
"""

import argparse
import io
import pickle
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

from dcgan import pictures
from dcgan.data import dedup
from dcgan.data.decode import square

EACH = 300  # images planted of each kind
LSUN, REMOVED = 3_000_000, 275_000  # the paper's images, and those it removed
COLLECTIONS = {"rooms": 64, "faces": 64, "cifar10": 32}  # pixels a side
PER_SHEET = 60  # pairs


def reencoded(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Image.open(file).convert("RGB")


def shifted(image: Image.Image) -> Image.Image:
    """One pixel to the left; the last column twice."""
    pixels = np.asarray(image)
    return Image.fromarray(np.concatenate([pixels[:, 1:], pixels[:, -1:]], 1))


def brightened(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1.03)


KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "re-encoded": reencoded,
    "shifted": shifted,
    "brightened": brightened,
}


def load(name: str, directory: Path) -> list[Image.Image]:
    if name != "cifar10":
        return [Image.open(file).convert("RGB") for file in sorted((directory / name).rglob("*.jpg"))]
    files = [directory / "cifar-10-batches-py" / f"data_batch_{number}" for number in range(1, 6)]
    rows = np.concatenate([pickle.loads(file.read_bytes(), encoding="bytes")[b"data"] for file in files])  # noqa: S301
    return [Image.fromarray(pixels) for pixels in rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)]


def planted(images: list[Image.Image], size: int) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Two shards, the images and their copies; and by kind the rows of originals and copies, (EACH, 2)."""
    chosen = np.random.default_rng(1).permutation(len(images))[: EACH * len(KINDS)].reshape(len(KINDS), EACH)
    copies = [
        square(make(images[row]), size) for make, rows in zip(KINDS.values(), chosen, strict=True) for row in rows
    ]
    at = len(images) + np.arange(chosen.size).reshape(chosen.shape)
    rows = {kind: np.stack([chosen[i], at[i]], 1) for i, kind in enumerate(KINDS)}
    return [np.stack([square(image, size) for image in images]), np.stack(copies)], rows


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, directory: Path, sheets: Path | None) -> tuple[str, dict[str, float]]:
    """A row of the table, and rates in images or pairs a second."""
    shards, copies = planted(load(name, directory), COLLECTIONS[name])
    images = dedup.Images(shards)
    groups = dedup.find(shards)
    first = {row: group[0] for group in groups for row in group}
    found, equal = [], []
    encoder = dedup.train(images, 0)
    codes = dedup.encode(images, encoder)
    for rows in copies.values():
        found.append(np.mean([first.get(a, -1) == first.get(b, -2) for a, b in rows.tolist()]))
        equal.append((codes[rows[:, 0]] == codes[rows[:, 1]]).all(1).mean())
    pairs = {(group[0], row) for group in groups for row in group[1:]}
    others = sorted(pairs - {(a, b) for rows in copies.values() for a, b in rows.tolist()})
    close = np.unique(np.concatenate([np.sort(np.stack(some, 1), 1) for some in dedup._close(codes, 0)]), axis=0)
    refused = int((~dedup.same(images, close[:, 0], close[:, 1])).sum())
    if sheets:
        for number in range(0, len(others), PER_SHEET):
            cells = images[np.array(others[number : number + PER_SHEET]).ravel()]
            pictures.write_png(sheets / f"{name}-{number:04d}.png", pictures.grid(cells, 12))
    updates = min(dedup.UPDATES, -(-len(images) * dedup.EPOCHS // dedup.BATCH))
    rates = {
        "training": updates * dedup.BATCH / timed(lambda: dedup.train(images, 0)),
        "coding": len(images) / timed(lambda: dedup.encode(images, encoder)),
        "comparing": len(close) / timed(lambda: dedup.same(images, close[:, 0], close[:, 1])),
    }
    shares = " | ".join(f"{100 * f:.1f} ({100 * e:.1f})" for f, e in zip(found, equal, strict=True))
    return f"| {name} | {len(images):,} | {shares} | {len(pairs):,} | {len(others):,} | {refused:,} |", rates


def sorting() -> tuple[float, int]:
    """Seconds of one of the sorts of LSUN random codes, with its comparisons, and the most bytes it holds."""
    codes = np.random.default_rng(0).integers(0, 2**64, (LSUN, 2), np.uint64)
    dedup.SORTS = 1
    seconds = timed(lambda: dedup._link(dedup.Images([np.zeros((1, 3, 1, 1), np.uint8)]), codes, 0))
    tracemalloc.start()
    dedup._link(dedup.Images([np.zeros((1, 3, 1, 1), np.uint8)]), codes, 0)
    return seconds, codes.nbytes + tracemalloc.get_traced_memory()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sheets", type=Path, help="an existing directory for pictures of the pairs not planted")
    chosen = parser.parse_args()
    print(f"Found, % (in brackets: with equal codes, the paper's rule); {torch.get_num_threads()} threads\n")
    print(f"| images | with copies | {' | '.join(KINDS)} | pairs reported | not planted | close codes refused |")
    print("|---|" + "---:|" * (len(KINDS) + 4))
    rates = {}
    for name in COLLECTIONS:
        row, rates[name] = measure(name, chosen.directory, chosen.sheets)
        print(row, flush=True)
    print("\n| a second | training, images | coding, images | comparing, pairs |\n|---|---:|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {' | '.join(f'{value:,.0f}' for value in rate.values())} |")
    sorts = dedup.SORTS
    seconds, held = sorting()
    rate = rates["rooms"]
    steps = {
        f"training ({dedup.UPDATES:,} updates)": dedup.UPDATES * dedup.BATCH / rate["training"],
        "coding": LSUN / rate["coding"],
        f"{sorts} sorts (one measured: {seconds:.1f} s on random codes)": sorts * seconds,
        f"comparing {REMOVED:,} duplicates twice": 2 * REMOVED / rate["comparing"],
    }
    print(f"\n| {LSUN:,} images of 64 px, extrapolated | seconds |\n|---|---:|")
    for step, took in steps.items():
        print(f"| {step} | {took:,.0f} |")
    print(f"| together | {sum(steps.values()):,.0f} |")
    print(f"\nCodes and sorting at {LSUN:,} held {held / 1e6:,.0f} MB (measured, random codes); reading is left out.")
    print("Left out too: looking at close codes to refuse them, which grow with the square of the images at the worst.")


if __name__ == "__main__":
    main()
