"""Extracts discriminator features: each conv layer max-pooled to 4x4, flattened, concatenated (paper, section 5.1).

BatchNorm is frozen to the statistics of real training images, averaged over batches, as in the original code; the
running statistics from training mix real and generated images. Both this and the extraction are done in parts, which
any number of processes may share; the features are the same.

    features/<source>-<step>-<fingerprint>/   for the images that are scored:
        discriminator.safetensors             the net, with those statistics
        <split>-<part>-<layer>.npy            float16 (n, channels * 16), one file per layer and PART images
    export/discriminator.safetensors          the chosen checkpoint's, calibrated
    export/generator.safetensors
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgan import checkpoint, export, models, storage
from dcgan.data import batches
from dcgan.data.batches import Images, normalise
from dcgan.data.store import Store
from dcgan.models import Discriminator, Generator
from dcgan.numerics import layout, on_cuda
from dcgan.run import Run

POOL = 4  # paper, section 5.1: each layer's maps are pooled to a 4x4 grid
BATCH = 250
PART = 5_000  # images that one process does at a time
CALIBRATION = 60_000  # images at most: all of CIFAR's and MNIST's, one in 21 of ImageNet's

# cuDNN would round to TF32: features are those of any device, as far as float32 goes.
EXACT = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)

Maker = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]  # `map`, or what hands the jobs to others
Statistics = tuple[int, list[np.ndarray]]
# A net, the fingerprint of its checkpoint (None: a random initialisation), the generator to export with it.
Bank = tuple[Discriminator, str | None, Generator | None]


class Extractor(nn.Module):
    """images (N, C, size, size) float32 in [-1, 1] -> features (N, 16 * sum of channels) float32.

    A conditional discriminator is given every class as equally likely: the label is what the features must reveal.
    """

    def __init__(self, discriminator: Discriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def layers(self, images: Tensor) -> list[Tensor]:
        """One tensor per convolution layer: (N, channels * 16)."""
        net = self.discriminator
        onehot = images.new_full((images.shape[0], net.labels), 1 / net.labels) if net.labels else None
        return [F.adaptive_max_pool2d(maps, POOL).flatten(1) for maps in net.activations(images, onehot)]

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(self.layers(images), 1)


def calibrate(discriminator: Discriminator, store: Store, device: torch.device) -> None:
    """Replace BatchNorm's running statistics by their mean over batches of training images, in a fixed order."""
    _freeze(discriminator, [batch_statistics(discriminator, store, device, part) for part in _calibration_parts(store)])


def _calibration_parts(store: Store) -> range:
    return range(-(-min(store.count(*store.training), CALIBRATION) // PART))


@torch.no_grad()
def batch_statistics(discriminator: Discriminator, store: Store, device: torch.device, part: int) -> Statistics:
    """Number of images in a part of the training set, and for each BatchNorm the sums of the means and variances.

    Each batch is weighted by its number of images, so that a small last one counts no more than its images do.

    The part starts at position `part` * PART of one fixed shuffled order. The net's own statistics are lost.
    """
    norms = models.norms(discriminator)
    extractor = Extractor(discriminator.eval()).to(device).to(memory_format=layout(device))
    images = Images(store, store.training)
    order = batches.permutation(images.count, 0, 0)[:CALIBRATION][part * PART : (part + 1) * PART]
    sums = [np.zeros((2, norm.num_features)) for norm in norms]
    momenta = [norm.momentum for norm in norms]
    count = 0
    for norm in norms:  # and no other layer: a spectral norm would change with each batch
        norm.train()
        norm.momentum = 1.0  # the running statistics are then those of the last batch
    for batch in _batches(images, order, device):
        if len(batch) > 1:  # a single image has no variance
            extractor(batch)
            count += len(batch)
            for total, norm in zip(sums, norms, strict=True):
                total += len(batch) * torch.stack([norm.running_mean, norm.running_var]).double().cpu().numpy()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return count, sums


def _freeze(discriminator: Discriminator, found: Sequence[Statistics]) -> None:
    count = sum(number for number, _ in found)
    for norm, *parts in zip(models.norms(discriminator), *(sums for _, sums in found), strict=True):
        mean, variance = torch.from_numpy(sum(parts) / count)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    discriminator.eval()


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
        bank_of(run, "discriminator", int(directory.name)): (trained, storage.fingerprint(directory), generator),
        bank_of(run, "random_init", 0): (random, None, None),
    }
    for bank, (_, weights, _) in wanted.items():
        if bank.is_dir() and _weights(bank) != weights:  # trained anew, to the same step
            storage.discard(bank)
    _write_banks(run, {bank: of for bank, of in wanted.items() if not bank.is_dir()}, maker)
    for other in run.features.iterdir():
        if other.is_dir() and other not in wanted:
            shutil.rmtree(other)


def bank_of(run: Run, source: str, step: int) -> Path:
    """The directory of a bank, which exists once `extract` has written it whole."""
    return run.features / f"{source}-{step}-{run.scored}"


def _weights(bank: Path) -> str | None:
    """The fingerprint of the checkpoint that a bank is of; None for a random initialisation."""
    return storage.read_manifest(bank, hashes=False).get("weights")


def _write_banks(run: Run, wanted: Mapping[Path, Bank], maker: Maker) -> None:
    """Write banks side by side, since it takes `maker` seconds to start; each is published when its last part is there.

    A generator is exported, with the bank's net, before its bank is published.
    """
    store, scored = run.store(), run.scored_store()
    with ExitStack() as stack:
        staged = {str(stack.enter_context(storage.staging(run.features))): bank for bank in wanted}
        for directory, bank in staged.items():
            export.write(Path(directory) / export.DISCRIMINATOR, wanted[bank][0], run, store)
        parts = _calibration_parts(store)
        found = dict(
            maker(partial(_calibrate_part, str(run.path)), [(place, part) for place in staged for part in parts])
        )
        for directory, bank in staged.items():
            net = wanted[bank][0]
            _freeze(net, [found[directory, part] for part in parts])
            export.write(Path(directory) / export.DISCRIMINATOR, net, run, store)
        rows = [(split, part) for split in scored.scored for part in range(-(-scored.count(split) // PART))]
        jobs = [(place, split, part) for place in staged for split, part in rows]
        for directory in _whole(maker(partial(_extract_part, str(run.path)), jobs), len(rows)) if rows else staged:
            bank = staged[directory]
            net, weights, exported = wanted[bank]
            if exported is not None:
                export.write(run.path / "export" / export.GENERATOR, exported, run, store)
                export.write(run.path / "export" / export.DISCRIMINATOR, net, run, store)
            storage.seal(Path(directory), {"weights": weights, "fingerprint": scored.fingerprint})
            storage.publish(Path(directory), bank)


def _whole(done: Iterable[str], parts: int) -> Iterator[str]:
    """Each name when it has come up as often as there are parts."""
    counts: Counter[str] = Counter()
    for name in done:
        counts[name] += 1
        if counts[name] == parts:
            yield name


@EXACT
def _calibrate_part(run_path: str, job: tuple[str, int]) -> tuple[tuple[str, int], Statistics]:
    directory, part = job
    run = Run.open(Path(run_path))
    net = load_extractor(Path(directory) / export.DISCRIMINATOR).discriminator
    return job, batch_statistics(net, run.store(), _device(run), part)


@EXACT
@torch.no_grad()
def _extract_part(run_path: str, job: tuple[str, str, int]) -> str:
    """Write the arrays of a part of a split next to the weights; returns the directory of both."""
    directory, split, part = job
    run = Run.open(Path(run_path))
    images, device = Images(run.scored_store(), (split,)), _device(run)
    extractor = load_extractor(Path(directory) / export.DISCRIMINATOR).to(device).to(memory_format=layout(device))
    rows = np.arange(images.count)[part * PART : (part + 1) * PART]
    arrays = [np.empty((len(rows), channels * POOL**2), np.float16) for channels in extractor.discriminator.channels]
    done = 0
    for batch in _batches(images, rows, device):
        for array, layer in zip(arrays, extractor.layers(batch), strict=True):
            array[done : done + len(batch)] = layer.half().cpu().numpy()
        done += len(batch)
    for number, array in enumerate(arrays):
        np.save(Path(directory) / f"{split}-{part:05d}-{number}.npy", array)
    return directory


def _batches(images: Images, rows: np.ndarray, device: torch.device) -> Iterator[Tensor]:
    """Those images in order, normalised, BATCH at a time."""
    for start in range(0, len(rows), BATCH):
        yield normalise(torch.from_numpy(images.gather(rows[start : start + BATCH])).to(device), layout(device))


def _device(run: Run) -> torch.device:
    return torch.device("cuda" if on_cuda(run.experiment.compute.device) else "cpu")


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


def load_extractor(file: Path) -> Extractor:
    """The feature extractor of an exported `discriminator.safetensors`, in eval mode: see `Extractor`."""
    net = export.load(file)
    assert isinstance(net, Discriminator)
    return Extractor(net).eval()
