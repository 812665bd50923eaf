"""Inception score, FID, KID, precision and recall of generated images, by torch-fidelity's InceptionV3.

The network's weights are a local file: nothing is fetched, nothing is kept in the home directory. Any weights give
numbers, but only the original ones give an Inception score, so they are first calibrated on images whose score is
published.
"""

import hashlib
import io
import pickle
import struct
import textwrap
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's own, of its release v0.2.0
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CIFAR10_TRAIN = (50_000, 3, 32, 32)
CIFAR10_SCORE = (11.237, 0.095)  # of those images: mean and standard deviation over the splits (torch-fidelity)
FEWEST = 2049  # images: with no more than there are features, their covariance is singular and FID means little
SEED = 2020  # torch-fidelity's, with which the published score's images were shuffled and split
SPLITS = 10  # Salimans et al. 2016
KID_SUBSETS, KID_SUBSET = 100, 1000  # torch-fidelity's defaults
NEIGHBOURS = 3  # Kynkaanniemi et al. 2019
BATCH = 16  # images in the network at once: 0.13 s of a CPU core per image and 0.2 GB; with 64, 0.17 s and 0.9 GB
COMPARED = 2000  # images compared at once with all others: 0.4 GB of distances to 50,000

# What PyTorch's restricted unpickler raised for 12,000 files that were truncated, changed or random.
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


class NotInceptionError(ValueError):
    """The weights do not give CIFAR-10's training images their published Inception score."""


class Calibration(TypedDict):
    """What `calibrate` found; plain JSON. It holds for these weights, whatever images they score afterwards."""

    weights_sha256: str
    inception_score: float
    inception_score_std: float


class Features(NamedTuple):
    """The network's outputs for N images. pooled: float32 (N, 2048). logits: float32 (N, 1008), without bias."""

    pooled: torch.Tensor
    logits: torch.Tensor


def calibrate(images: np.ndarray, weights: Path, device: str | torch.device) -> Calibration:
    """Measure the Inception score of CIFAR-10's training images, uint8 (50000, 3, 32, 32), in any order.

    The original weights give 11.237 with torch-fidelity; torchvision's about 9.7. A difference of up to 0.095 is
    accepted, the published deviation over splits: another order of the images, hence other splits, moves the mean by
    less.
    Raises NotInceptionError for any other score, ValueError for other images, and what `load` raises.
    """
    _check(images, "the training images")
    if images.shape != CIFAR10_TRAIN:
        raise ValueError(f"calibration needs CIFAR-10's training images, {CIFAR10_TRAIN}, not {images.shape}")
    extractor, digest = load(weights, device)
    found = _inception_score(features(images, extractor, device).logits)
    score, deviation = found["image_quality/inception_score"], found["image_quality/inception_score_std"]
    published, tolerance = CIFAR10_SCORE
    if not abs(score - published) <= tolerance:
        raise NotInceptionError(
            f"{weights} gives CIFAR-10's training images a score of {score:.3f} where the original's weights give "
            f"{published} +- {tolerance}: no number of theirs is an Inception score. {_wanted()}"
        )
    return Calibration(weights_sha256=digest, inception_score=score, inception_score_std=deviation)


def score(
    generated: np.ndarray, reference: np.ndarray, weights: Path, calibration: Calibration, device: str | torch.device
) -> dict[str, float]:
    """The scores of generated against reference images, uint8 (N, C, H, W) and (M, C, H, W), as `compare` names them.

    All depend on N and M, so only scores with the same N and the same reference images may be compared. Grey images
    (C = 1) are repeated to three channels. The same input gives the same scores, whatever the seed of a run.
    Raises ValueError for images that are not uint8, differ in size, are 2,048 or fewer, or for a calibration of other
    weights; FileNotFoundError and ValueError as `load` does.
    """
    for images, name in ((generated, "generated"), (reference, "reference")):
        _check(images, name)
        if len(images) < FEWEST:
            raise ValueError(
                f"FID needs at least {FEWEST} images, one more than it has features: {name} has {len(images)}"
            )
    if generated.shape[1:] != reference.shape[1:]:
        raise ValueError(f"generated images are {generated.shape[1:]} and reference images {reference.shape[1:]}")
    extractor, digest = load(weights, device)
    if calibration["weights_sha256"] != digest:
        raise ValueError(
            f"{weights} has sha256 {digest}, but the calibration is of {calibration['weights_sha256']}: calibrate anew"
        )
    return compare(features(generated, extractor, device), features(reference, extractor, device))


def load(weights: Path, device: str | torch.device) -> tuple[FeatureExtractorInceptionV3, str]:
    """The network in eval mode on the device, and the sha256 of its weights, torch-fidelity's InceptionV3 state dict.

    Raises FileNotFoundError if there is no such file, ValueError if it is damaged, holds anything but tensors (which
    is never run) or another network's.
    """
    if not weights.is_file():
        raise FileNotFoundError(f"no weights of InceptionV3 at {weights}. {_wanted()}")
    content = weights.read_bytes()  # once, so that what was hashed is what is loaded
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(f"{weights} is damaged or holds more than tensors. {_wanted()}") from error
    if not (isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())):
        raise ValueError(f"{weights} holds no state dict of tensors. {_wanted()}")
    # torch-fidelity unpickles whatever it is given, so it is given a copy that was written here.
    tensors = io.BytesIO()
    torch.save(state, tensors)
    tensors.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # it draws weights first, which must not affect a run in training
            extractor = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=tensors
            )
    except RuntimeError as error:
        raise ValueError(f"{weights} fits another network: {textwrap.shorten(str(error), 400)}. {_wanted()}") from error
    return extractor.to(device), hashlib.sha256(content).hexdigest()


@torch.no_grad()
def features(images: np.ndarray, extractor: FeatureExtractorInceptionV3, device: str | torch.device) -> Features:
    """The features of uint8 images (N, C, H, W), C = 1 or 3, on the CPU. The network resizes them to 299 px itself.

    An image takes 0.13 s of a CPU core: 50,000 generated and 50,000 reference images take 1.8 hours on two.
    """
    found = []
    # The published figures use full float32, which cuDNN would round to TF32.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for first in range(0, len(images), BATCH):
            batch = torch.tensor(images[first : first + BATCH], device=device).expand(-1, 3, -1, -1)
            found.append([layer.cpu() for layer in extractor(batch)])
    return Features(*map(torch.cat, zip(*found, strict=True)))


def compare(generated: Features, reference: Features) -> dict[str, float]:
    """All scores of generated images against reference images, each with its name and direction.

    `image_quality/inception_score` (1 to 1,008, higher is better) and `_std` over 10 splits: Salimans et al. 2016;
    generated alone. `image_quality/fid` (0 and up, lower is better): Heusel et al. 2017. `image_quality/kid` (near 0
    for equal distributions, or just below; lower is better) and `_std` over 100 subsets of 1,000: Binkowski et al.
    2018. `image_quality/precision`, the share of generated images among the reference images, and
    `image_quality/recall`, the share of reference images among the generated (0 to 1, higher is better): Kynkaanniemi
    et al. 2019, k = 3, but on Inception's features rather than the paper's VGG-16's.
    """
    ours, theirs = generated.pooled, reference.pooled
    fid = fid_statistics_to_metric(fid_features_to_statistics(ours), fid_features_to_statistics(theirs), verbose=False)
    kid = kid_features_to_metric(
        ours, theirs, kid_subsets=KID_SUBSETS, kid_subset_size=KID_SUBSET, rng_seed=SEED, verbose=False
    )
    prc = prc_features_to_metric(
        ours, theirs, prc_neighborhood=NEIGHBOURS, prc_batch_size=COMPARED, save_cpu_ram=True, verbose=False
    )
    return _inception_score(generated.logits) | {
        "image_quality/fid": fid[KEY_METRIC_FID],
        "image_quality/kid": kid[KEY_METRIC_KID_MEAN],
        "image_quality/kid_std": kid[KEY_METRIC_KID_STD],
        "image_quality/precision": prc[KEY_METRIC_PRECISION],
        "image_quality/recall": prc[KEY_METRIC_RECALL],
    }


def _inception_score(logits: torch.Tensor) -> dict[str, float]:
    found = isc_features_to_metric(logits, SPLITS, shuffle=True, rng_seed=SEED)
    return {
        "image_quality/inception_score": found[KEY_METRIC_ISC_MEAN],
        "image_quality/inception_score_std": found[KEY_METRIC_ISC_STD],
    }


def _check(images: np.ndarray, name: str) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"{name} is {images.dtype} {images.shape}, not uint8 (N, 1 or 3, H, W)")


def _wanted() -> str:
    return f"Put torch-fidelity's {WEIGHTS} there (its release v0.2.0; sha256 {SHA256})"
