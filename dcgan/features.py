"""Discriminator features: each conv layer max-pooled to 4x4, flattened, concatenated (paper, section 5.1).

BatchNorm is frozen to the statistics of real training images, averaged over batches, as in the original code; the
running statistics from training mix real and generated images. `feature_banks` extracts those of a data set.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgan import export, models
from dcgan.data import batches
from dcgan.data.batches import Images, normalise
from dcgan.data.store import Store
from dcgan.models import Discriminator
from dcgan.numerics import layout, on_cuda
from dcgan.run import Run

POOL = 4  # paper, section 5.1: each layer's maps are pooled to a 4x4 grid
BATCH = 250
PART = 5_000  # images that one process does at a time
CALIBRATION = 60_000  # images at most: all of CIFAR's and MNIST's, one in 21 of ImageNet's

# cuDNN would round to TF32: features are those of any device, as far as float32 goes.
EXACT = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)

Statistics = tuple[int, list[np.ndarray]]


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
    freeze(discriminator, [batch_statistics(discriminator, store, device, part) for part in calibration_parts(store)])


def calibration_parts(store: Store) -> range:
    """The parts of the training set that `freeze` wants the statistics of."""
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
    for batch in batched(images, order, device):
        if len(batch) > 1:  # a single image has no variance
            extractor(batch)
            count += len(batch)
            for total, norm in zip(sums, norms, strict=True):
                total += len(batch) * torch.stack([norm.running_mean, norm.running_var]).double().cpu().numpy()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return count, sums


def freeze(discriminator: Discriminator, found: Sequence[Statistics]) -> None:
    """Set BatchNorm's running statistics to the means of those of all parts, and eval mode."""
    count = sum(number for number, _ in found)
    for norm, *parts in zip(models.norms(discriminator), *(sums for _, sums in found), strict=True):
        mean, variance = torch.from_numpy(sum(parts) / count)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    discriminator.eval()


def batched(images: Images, rows: np.ndarray, device: torch.device) -> Iterator[Tensor]:
    """Those images in order, normalised, BATCH at a time."""
    for start in range(0, len(rows), BATCH):
        yield normalise(torch.from_numpy(images.gather(rows[start : start + BATCH])).to(device), layout(device))


def device_of(run: Run) -> torch.device:
    """Where the features of a run are computed."""
    return torch.device("cuda" if on_cuda(run.experiment.compute.device) else "cpu")


def load_extractor(file: Path) -> Extractor:
    """The feature extractor of an exported `discriminator.safetensors`, in eval mode: see `Extractor`."""
    net = export.load(file)
    assert isinstance(net, Discriminator)
    return Extractor(net).eval()
