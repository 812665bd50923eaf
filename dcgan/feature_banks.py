"""Extracts the features of a run's images into banks, in parts that any number of processes may share.

    features/<source>-<step>-<fingerprint>/   for the images that are scored:
        discriminator.safetensors             the net, with BatchNorm's statistics of real images
        <split>-<part>-<layer>.npy            float16 (n, channels * 16), one file per layer and PART images
    export/discriminator.safetensors          the chosen checkpoint's, calibrated
    export/generator.safetensors

Whoever does the parts, the features are the same.
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dcgan import checkpoint, export, features, models, storage
from dcgan.data.batches import Images
from dcgan.models import Discriminator, Generator
from dcgan.numerics import layout
from dcgan.run import Run

Maker = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]  # `map`, or what hands the jobs to others


class Source(NamedTuple):
    """What a bank is of: a net, the fingerprint of its checkpoint, and the generator to export with it.

    A random initialisation has neither checkpoint nor generator.
    """

    net: Discriminator
    weights: str | None = None
    generator: Generator | None = None


def extract(run: Run, maker: Maker = map) -> None:
    """Write the feature banks of the chosen checkpoint and of a random initialisation, and the exported weights.

    Existing banks of the same checkpoint and images are kept; all others are removed. Where the images have no labels,
    nothing is scored and the banks have no arrays. maker: runs the parts, in any order.
    Raises BusyError if another process is extracting.
    """
    run.features.mkdir(exist_ok=True)
    with storage.hold(run.features / ".lock", f"features of run {run.name}"):
        _extract(run, maker)


def _extract(run: Run, maker: Maker) -> None:
    store, directory = run.store(), checkpoint.chosen(run)
    generator, trained, _ = checkpoint.load_nets(directory)
    model, seed = run.experiment.model, run.experiment.train.seed
    _, random = models.build(
        model, store.channels, len(store.classes), store.size, seed
    )  # the control: as before training
    wanted = {
        bank_of(run, "discriminator", int(directory.name)): Source(trained, storage.fingerprint(directory), generator),
        bank_of(run, "random_init", 0): Source(random),
    }
    for bank, source in wanted.items():
        if bank.is_dir() and _weights(bank) != source.weights:  # trained anew, to the same step
            storage.discard(bank)
    _write_banks(run, {bank: source for bank, source in wanted.items() if not bank.is_dir()}, maker)
    for other in run.features.iterdir():
        if other.is_dir() and other not in wanted:
            shutil.rmtree(other)


def bank_of(run: Run, source: str, step: int) -> Path:
    """The directory of a bank, which exists once `extract` has written it whole."""
    return run.features / f"{source}-{step}-{run.scored}"


def _weights(bank: Path) -> str | None:
    """The fingerprint of the checkpoint that a bank is of; None for a random initialisation."""
    return storage.read_manifest(bank, hashes=False).get("weights")


def _write_banks(run: Run, wanted: Mapping[Path, Source], maker: Maker) -> None:
    """Write banks side by side, since it takes `maker` seconds to start; each is published when its last part is there.

    A generator is exported, with the bank's net, before its bank is published.
    """
    store, scored = run.store(), run.scored_store()
    with ExitStack() as stack:
        staged = {str(stack.enter_context(storage.staging(run.features))): bank for bank in wanted}
        for place, bank in staged.items():
            export.write(Path(place) / export.DISCRIMINATOR, wanted[bank].net, run, store)
        parts = features.calibration_parts(store)
        found = dict(
            maker(partial(_calibrate_part, str(run.path)), [(place, part) for place in staged for part in parts])
        )
        for place, bank in staged.items():
            net = wanted[bank].net
            features.freeze(net, [found[place, part] for part in parts])
            export.write(Path(place) / export.DISCRIMINATOR, net, run, store)
        rows = [(split, part) for split in scored.scored for part in range(-(-scored.count(split) // features.PART))]
        jobs = [(place, split, part) for place in staged for split, part in rows]
        for place in _whole(maker(partial(_extract_part, str(run.path)), jobs), len(rows)) if rows else staged:
            bank = staged[place]
            net, weights, generator = wanted[bank]
            if generator is not None:
                export.write(run.path / "export" / export.GENERATOR, generator, run, store)
                export.write(run.path / "export" / export.DISCRIMINATOR, net, run, store)
            storage.seal(Path(place), {"weights": weights, "fingerprint": scored.fingerprint})
            storage.publish(Path(place), bank)


def _whole(done: Iterable[str], parts: int) -> Iterator[str]:
    """Each name when it has come up as often as there are parts."""
    counts: Counter[str] = Counter()
    for name in done:
        counts[name] += 1
        if counts[name] == parts:
            yield name


@features.EXACT
def _calibrate_part(run_path: str, job: tuple[str, int]) -> tuple[tuple[str, int], features.Statistics]:
    directory, part = job
    run = Run.open(Path(run_path))
    net = features.load_extractor(Path(directory) / export.DISCRIMINATOR).discriminator
    return job, features.batch_statistics(net, run.store(), features.device_of(run), part)


@features.EXACT
@torch.no_grad()
def _extract_part(run_path: str, job: tuple[str, str, int]) -> str:
    """Write the arrays of a part of a split next to the weights; returns the directory of both."""
    directory, split, part = job
    run = Run.open(Path(run_path))
    images, device = Images(run.scored_store(), (split,)), features.device_of(run)
    extractor = features.load_extractor(Path(directory) / export.DISCRIMINATOR).to(device)
    extractor = extractor.to(memory_format=layout(device))
    rows = np.arange(images.count)[part * features.PART : (part + 1) * features.PART]
    widths = [channels * features.POOL**2 for channels in extractor.discriminator.channels]
    arrays = [np.empty((len(rows), width), np.float16) for width in widths]
    done = 0
    for batch in features.batched(images, rows, device):
        for array, layer in zip(arrays, extractor.layers(batch), strict=True):
            array[done : done + len(batch)] = layer.half().cpu().numpy()
        done += len(batch)
    for number, array in enumerate(arrays):
        np.save(Path(directory) / f"{split}-{part:05d}-{number}.npy", array)
    return directory


def fingerprint(run: Run, source: str, step: int) -> str:
    """What identifies the content of a bank. Raises FileNotFoundError if it is absent."""
    return storage.fingerprint(_existing(run, source, step))


def _existing(run: Run, source: str, step: int) -> Path:
    bank = bank_of(run, source, step)
    if not bank.is_dir():
        raise FileNotFoundError(f"run {run.name} has no features of step {step}: `dcgan extract {run.name}` makes them")
    return bank


def read_bank(run: Run, source: str, step: int, split: str) -> np.ndarray:
    """All layers of a bank side by side, float16 (N, F). source: discriminator or random_init (step 0).

    Raises FileNotFoundError if the bank is absent, CorruptError if it is damaged.
    """
    bank = _existing(run, source, step)
    files = storage.read_manifest(bank, hashes=False)["files"]
    found = [match for match in map(re.compile(rf"{re.escape(split)}-(\d+)-(\d+)\.npy").fullmatch, files) if match]
    parts: dict[int, dict[int, np.ndarray]] = {}
    for match in found:
        parts.setdefault(int(match[1]), {})[int(match[2])] = np.load(bank / match[0], mmap_mode="r")
    rows = [[layers[number] for number in sorted(layers)] for _, layers in sorted(parts.items())]
    features = np.empty((sum(len(row[0]) for row in rows), sum(layer.shape[1] for layer in rows[0])), np.float16)
    done = 0
    for row in rows:
        np.concatenate(row, axis=1, out=features[done : done + len(row[0])])
        done += len(row[0])
    return features
