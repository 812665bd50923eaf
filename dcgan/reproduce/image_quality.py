"""Image quality on CIFAR-10, with and without labels: Inception score, FID, KID, precision and recall."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dcgan import checkpoint, sampling, storage
from dcgan.config import DataSet
from dcgan.evaluate.samples import device
from dcgan.reproduce.rows import Column, Figure, Measured, Row, Setting, Table, checkpoint_rule, scale

if TYPE_CHECKING:
    from dcgan.evaluate.image_quality import Calibration

COUNT = 50_000  # images drawn, as for the published Inception scores
WANG = "Wang and Liu, 2016; the class label is an input"
SGAN = "Huang et al., Stacked GAN, CVPR 2017"
CIFAR10: tuple[DataSet, ...] = ("cifar10",)
SPREAD = {"inception_score": "10 splits", "kid": "100 subsets"}


def _measure(conditional: bool, setting: Setting) -> Measured:
    from dcgan.evaluate import image_quality  # and torch-fidelity: four seconds, which other tables need not wait

    words = f"model.conditional={str(conditional).lower()}"
    experiment = setting.experiment("cifar10", words)
    if experiment.model.conditional is not conditional:
        raise ValueError(f"{words} is what this row is of: it can't be set otherwise")
    if experiment.evaluate.inception is None:
        raise ValueError(f"no weights: evaluate.inception names no file; {image_quality.WEIGHTS} is wanted")
    weights = Path(experiment.evaluate.inception)
    store, _ = setting.images("cifar10")
    reference = np.asarray(store.images("train"))
    calibration = _calibration(setting, reference, weights)  # fails before hours of training
    run = setting.trained("cifar10", words)
    generator = checkpoint.load_generator(checkpoint.chosen(run))
    chunks = sampling.sampled(
        generator, run.experiment.model, len(store.classes), COUNT, setting.seed, torch.device(device())
    )
    drawn = np.concatenate([images for images, _ in chunks])
    found = image_quality.score(drawn, reference, weights, calibration, device())
    figures = {
        column.key: Figure(
            found[f"image_quality/{column.key}"],
            found.get(f"image_quality/{column.key}_std"),
            SPREAD.get(column.key, ""),
        )
        for column in TABLE.columns
    }
    return Measured(
        figures,
        f"{scale(run)}; {COUNT:,} images drawn, compared with the {len(reference):,} of train",
        choices={"checkpoint": checkpoint_rule(run), "calibration": f"{calibration['inception_score']:.3f}"},
        runs=(run.name,),
    )


def _calibration(setting: Setting, images: np.ndarray, weights: Path) -> "Calibration":
    """The weights' calibration, measured once for all rows and kept."""
    from dcgan.evaluate import image_quality

    file = setting.directory.parent.parent / f"calibration-{storage.sha256(weights)[:8]}.json"
    return storage.once(file, partial(image_quality.calibrate, images, weights, device()))


TABLE = Table(
    "Image quality, CIFAR-10",
    (
        Column("inception_score", "Inception score"),
        Column("fid", "FID"),
        Column("kid", "KID"),
        Column("precision", "precision"),
        Column("recall", "recall"),
    ),
    (
        Row(
            "unconditional",
            "DCGAN, without labels",
            {"inception_score": Figure(6.16, 0.07)},
            SGAN,
            partial(_measure, False),
            CIFAR10,
        ),
        Row(
            "conditional",
            "DCGAN, with labels",
            {"inception_score": Figure(6.58)},
            WANG,
            partial(_measure, True),
            CIFAR10,
        ),
    ),
    "Computed by torch-fidelity with a local file of the original weights, `evaluate.inception=FILE`. They must give "
    "CIFAR-10's own training images their published Inception score, 11.237 +- .095, before a number is shown here.",
)
