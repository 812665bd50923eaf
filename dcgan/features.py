"""Discriminator features: every convolution layer max-pooled to 4x4, flattened, concatenated (paper, section 5.1).

BatchNorm is frozen to the statistics of real training images, the mean over batches, as in the original code; during
training its running statistics mix real and generated images.

    features/<source>-<step>-<fingerprint>/   of the images that are scored:
        <split>-<layer>.npy                   float16 (N, channels * 16), one file a layer and split
    export/discriminator.safetensors        the weights with those statistics
    export/generator.safetensors
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgan import checkpoint, models, storage
from dcgan.config import Model
from dcgan.data import batches
from dcgan.data.batches import Images, normalise
from dcgan.data.store import Store
from dcgan.models import Discriminator, Generator
from dcgan.run import Run

POOL = 4  # paper, section 5.1: each layer's maps are pooled to a 4x4 grid
BATCH = 250  # divides the published data sets' sizes, so that calibration sees every image
CALIBRATION = 60_000  # images at most: every one of the published tables' data sets, a fiftieth of LSUN


class Extractor(nn.Module):
    """images (N, C, size, size) float32 in [-1, 1] -> features (N, 16 * sum of channels) float32.

    A conditional discriminator is asked with every class equally likely: the label is what the features must tell.
    """

    def __init__(self, discriminator: Discriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def layers(self, images: Tensor) -> list[Tensor]:
        """One array a convolution layer: (N, channels * 16)."""
        net = self.discriminator
        onehot = images.new_full((images.shape[0], net.labels), 1 / net.labels) if net.labels else None
        return [F.adaptive_max_pool2d(maps, POOL).flatten(1) for maps in net.activations(images, onehot)]

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(self.layers(images), 1)


@torch.no_grad()
def calibrate(discriminator: Discriminator, store: Store, device: torch.device) -> None:
    """Replace BatchNorm's running statistics by their mean over batches of training images, in a fixed order."""
    norms = [m for m in discriminator.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's cumulative average
    extractor = Extractor(discriminator.train())
    for images in _images(store, store.training, device, shuffle=True, most=CALIBRATION):
        if len(images) > 1:  # a single image has no variance
            extractor(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    discriminator.eval()


def extract(run: Run) -> None:
    """Write the feature banks of the chosen checkpoint and of a random initialisation, and the exported weights.

    Banks that are there already, of the same checkpoint, are kept; those of another checkpoint are removed. Where no
    image has a label nothing is scored, and the banks have no arrays.
    """
    store, scored, directory = run.store(), run.scored_store(), checkpoint.chosen(run)
    device = torch.device("cuda" if torch.cuda.is_available() and run.experiment.compute.device != "cpu" else "cpu")
    generator, trained, _ = checkpoint.load_nets(directory)
    _, random, _ = _untrained(run, store)
    wanted = {"discriminator": (trained, int(directory.name)), "random_init": (random, 0)}
    for source, (net, step) in wanted.items():
        bank = bank_of(run, source, step)
        if not (bank / storage.MANIFEST).is_file():
            calibrate(net.to(device), store, device)
            if source == "discriminator":
                _export(run, generator, trained, store)
            _write_bank(bank, Extractor(net), scored, device, {"source": source, "step": step})
    for other in run.features.iterdir():
        if other not in {bank_of(run, source, step) for source, (_, step) in wanted.items()}:
            shutil.rmtree(other)


def bank_of(run: Run, source: str, step: int) -> Path:
    """The directory of a bank; it is there once `extract` has written it whole."""
    return run.features / f"{source}-{step}-{run.scored}"


def _untrained(run: Run, store: Store) -> tuple[Generator, Discriminator, None]:
    """The control: the nets as training found them, from the same seed."""
    experiment = run.experiment
    nets = models.build(
        experiment.model, store.channels, len(store.classes), experiment.data.size, experiment.train.seed
    )
    return *nets, None


@torch.no_grad()
def _write_bank(bank: Path, extractor: Extractor, store: Store, device: torch.device, metadata: dict) -> None:
    with storage.staging(bank.parent) as staged:
        for split in store.scored:
            count = store.count(split)
            arrays = [
                np.lib.format.open_memmap(
                    staged / f"{split}-{layer}.npy", "w+", np.float16, (count, channels * POOL * POOL)
                )
                for layer, channels in enumerate(extractor.discriminator.channels)
            ]
            done = 0
            for images in _images(store, (split,), device):
                for array, layer in zip(arrays, extractor.layers(images), strict=True):
                    array[done : done + len(images)] = layer.cpu().numpy()
                done += len(images)
            for array in arrays:
                array.flush()
        storage.seal(staged, metadata | {"fingerprint": store.fingerprint})
        storage.publish(staged, bank)


def _images(
    store: Store, splits: Sequence[str], device: torch.device, shuffle: bool = False, most: int | None = None
) -> Iterator[Tensor]:
    """The splits' images in order, or `most` in one fixed shuffled order, normalised, a batch at a time."""
    source = Images(store, splits)
    order = (batches.permutation(source.count, 0, 0) if shuffle else np.arange(source.count))[:most]
    for start in range(0, len(order), BATCH):
        images = torch.from_numpy(source.gather(order[start : start + BATCH]))
        yield normalise(images.to(device))


def read_bank(run: Run, source: str, step: int, split: str) -> np.ndarray:
    """All layers of a bank side by side, float16 (N, F). source: discriminator or random_init (step 0).

    Raises CorruptError if the bank is absent or damaged.
    """
    bank = bank_of(run, source, step)
    manifest = storage.read_manifest(bank, hashes=False)
    layers = sorted(
        (n for n in manifest["files"] if n.startswith(f"{split}-")), key=lambda n: int(n[:-4].split("-")[1])
    )
    return np.concatenate([np.load(bank / name, mmap_mode="r") for name in layers], axis=1)


def _export(run: Run, generator: Generator, discriminator: Discriminator, store: Store) -> None:
    from safetensors.torch import save

    shape = {"channels": store.channels, "classes": len(store.classes), "size": store.size}
    metadata = {"model": run.experiment.model.model_dump_json(), "images": json.dumps(shape)}
    for name, net in (("generator", generator), ("discriminator", discriminator)):
        weights = {key: value.contiguous().cpu() for key, value in net.state_dict().items()}
        storage.write_bytes(run.path / "export" / f"{name}.safetensors", save(weights, metadata))


def load_exported(file: Path) -> nn.Module:
    """The net in an exported `generator.safetensors` or `discriminator.safetensors`, on the CPU in eval mode."""
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        metadata = weights.metadata()
        state = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118  not a dict
    shape = json.loads(metadata["images"])
    model = Model.model_validate_json(metadata["model"])
    generator, discriminator = models.build(model, shape["channels"], shape["classes"], shape["size"], seed=0)
    net = generator if file.stem == "generator" else discriminator
    net.load_state_dict(state)
    return net.eval()


def load_extractor(file: Path) -> Extractor:
    """The feature extractor of an exported `discriminator.safetensors`, in eval mode: see `Extractor`."""
    net = load_exported(file)
    assert isinstance(net, Discriminator)
    return Extractor(net).eval()
