"""Run directories as training and evaluation would leave them, written in milliseconds."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dcgan import checkpoint, models, pictures, storage
from dcgan.config import build
from dcgan.data import shards
from dcgan.data.ingest import assemble
from dcgan.data.records import Pixels
from dcgan.data.sources.base import Opened
from dcgan.data.store import Description, SourceFile, Store
from dcgan.distributed import Place
from dcgan.run import Run
from dcgan.step import Game


class Bomb:
    """Unpickling this makes a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def write_store(
    home: Path,
    description: Description,
    splits: Mapping[str, Sequence[tuple[np.ndarray, int]]],
    sources: Sequence[SourceFile] = (),
    shard_images: int | None = None,
) -> Store:
    """A store of (uint8 image (C, H, W), label) pairs, label -1 for none."""
    records = {
        name: _pixels([image for image, _ in pairs], [label for _, label in pairs]) for name, pairs in splits.items()
    }
    directory = home / "stores" / ".ingest-fabricated"
    directory.mkdir(parents=True, exist_ok=True)
    opened = Opened(description, records, tuple(sources))
    return Store.open(home, assemble(opened, home, directory, shard_images=shard_images))


def _pixels(images: Sequence[np.ndarray], labels: Sequence[int]) -> Pixels:
    rows = [image[0] if len(image) == 1 else image.transpose(1, 2, 0) for image in images]
    return Pixels(np.array(rows), np.array(labels, np.int64))


def decoded(opened: Opened) -> dict[str, list[tuple[np.ndarray, int]]]:
    """What the shards of a source would hold: (uint8 (C, size, size), label) of every image, by split."""
    return {
        split: [(shards.pixels(item, opened.description.size, records.exif), item.label) for item in records]
        for split, records in opened.splits.items()
    }


def new_run(home: Path, overrides: Sequence[str] = (), preset: str = "digits") -> Run:
    """A run, nothing in it but its experiment, on the one store under `home`."""
    store = Store.open(home, next(path.name for path in (home / "stores").iterdir() if len(path.name) == 16))
    return Run.create(build(preset, ["train.steps=600", f"data.home={home}", *overrides]), store)


def line(run: Run, step: int, quality: float = 1.0) -> dict[str, float]:
    """The line of metrics.jsonl of a step: a game that settles, noisily, better with more `quality`."""
    settings, noise = run.experiment.train, np.random.default_rng(step).normal(0, 0.04, 6)
    left = math.exp(-step / 200 * quality)
    values = {
        "step": step,
        "images": step * settings.batch_size,
        "d_loss": 0.9 - 0.5 * left + noise[0],
        "g_loss": 1.4 + 1.6 * left + noise[1],
        "d_real": 0.62 + 0.3 * left + noise[2] / 2,
        "d_fake": 0.35 - 0.25 * left + noise[3] / 2,
        "d_grad_norm": 0.8 + left + noise[4],
        "g_grad_norm": 0.5 + 2 * left + noise[5],
        "images_per_second": 850 + 400 * noise[0],
        "seconds": settings.log_every * settings.batch_size / 850,
    }
    if step % settings.checkpoint_every == 0:
        values["swd"] = 0.1 + 0.5 * left / quality
    return values


def play(run: Run, start: int, stop: int, quality: float = 1.0) -> None:
    """Append the lines of the steps after `start` up to `stop`, as training does."""
    with (run.path / "metrics.jsonl").open("a") as file:
        for step in range(start + run.experiment.train.log_every, stop + 1, run.experiment.train.log_every):
            file.write(json.dumps(line(run, step, quality)) + "\n")


def cut(run: Run, step: int) -> None:
    """Drop the lines after a step, as a resumed training does."""
    kept = "".join(json.dumps(one) + "\n" for one in run.metrics() if one["step"] <= step)
    (run.path / "metrics.jsonl").write_text(kept)


def draw(run: Run, steps: Iterable[int]) -> None:
    """Sample grids, 8 by 8: real images out of noise, the less of it the later the step."""
    images = np.asarray(run.store().images("train")[:64], np.float32)
    for step in steps:
        share = math.exp(-step / 150)
        noise = np.random.default_rng(step).uniform(0, 255, images.shape)
        picture = pictures.grid((images * (1 - share) + noise * share).astype(np.uint8), 8)
        pictures.write_png(run.samples / f"{step:08d}.png", picture)


def score(run: Run, step: int = 600, better: float = 0.0) -> None:
    """The scores of two protocols with their controls."""
    scores = {
        "svm": {
            "discriminator": {"svm/accuracy": 0.93 + better, "svm/c": 0.001},
            "random_init": {"svm/accuracy": 0.88, "svm/c": 0.01},
            "raw_pixels": {"svm/accuracy": 0.91, "svm/c": 0.01},
        },
        "clustering": {
            "discriminator": {"clustering/accuracy": 0.7 + better, "clustering/nmi": 0.66},
            "random_init": {"clustering/accuracy": 0.61, "clustering/nmi": 0.6},
            "raw_pixels": {"clustering/accuracy": 0.72, "clustering/nmi": 0.69},
        },
    }
    for protocol, values in scores.items():
        content = {
            "protocol": protocol,
            "checkpoint": step,
            "chosen": "best",
            "settings": run.experiment.evaluate.model_dump(mode="json", exclude={"protocols", "checkpoint"}),
            "seconds": 1.5,
            "scores": values,
        }
        storage.write_json(run.path / "scores" / f"{protocol}.json", content)


def save(run: Run, step: int, swd: float = 0.2) -> None:
    """A real checkpoint, of nets that were never trained."""
    store, settings = run.store(), run.experiment
    nets = models.build(settings.model, store.channels, len(store.classes), settings.data.size, settings.train.seed)
    game = Game(*nets, settings.train, Place(0, 1, torch.device("cpu")))
    writer = checkpoint.Writer(run)
    writer.save(checkpoint.snapshot(game, step, run, store), swd)
    writer.close()


def finished(run: Run, better: float = 0.0) -> None:
    """Everything that a finished run has, but for checkpoints."""
    play(run, 0, 600, 1 + 5 * better)
    draw(run, range(0, 601, 100))
    score(run, better=better)
