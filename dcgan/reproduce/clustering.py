"""k-means on features and on pixels: the row "GAN" of Chang et al. (ICCV 2017) and of Wu et al. (ICCV 2019)."""

from functools import partial

from dcgan import scoring
from dcgan.config import DataSet
from dcgan.evaluate import EVALUATORS
from dcgan.evaluate.published import PUBLISHED, RAW_PIXELS, Published
from dcgan.reproduce.rows import Column, Figure, Measured, Row, Setting, Table, features

NAMES = {name: f"clustering/{name}" for name in ("nmi", "nmi_geometric", "ari", "accuracy")}
DATA: dict[DataSet, str] = {
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100 (20 superclasses)",
    "stl10": "STL-10",
    "imagenet10": "ImageNet-10",
    "imagenet_dog15": "ImageNet-Dog-15",
    "tiny_imagenet": "Tiny-ImageNet",
}


def _features(preset: DataSet, setting: Setting) -> Measured:
    return features(setting.extracted(preset, ["clustering"]), "clustering", NAMES)


def _pixels(preset: DataSet, setting: Setting) -> Measured:
    store, settings = setting.images(preset)
    found = scoring.of_pixels(setting.home, store, settings, EVALUATORS["clustering"])
    return Measured(
        {column: Figure(found.values[metric]) for column, metric in NAMES.items()},
        f"{store.count(*store.clustered):,} images of {store.size} px, {settings.restarts} starts",
    )


def _figures(published: dict[str, Published]) -> dict[str, Figure]:
    return {column: Figure(published[metric].value) for column, metric in NAMES.items() if metric in published}


def _rows(preset: DataSet, name: str) -> tuple[Row, Row]:
    gan, raw = PUBLISHED[preset], RAW_PIXELS[preset]
    source = gan["clustering/nmi"].source
    return (
        Row(preset, f"{name}: DCGAN features", _figures(gan), source, partial(_features, preset), (preset,)),
        Row(f"{preset}_pixels", f"{name}: raw pixels", _figures(raw), source, partial(_pixels, preset), (preset,)),
    )


TABLE = Table(
    "Clustering",
    (
        Column("nmi", "NMI"),
        Column("nmi_geometric", "NMI, geometric mean"),
        Column("ari", "ARI"),
        Column("accuracy", "accuracy"),
    ),
    tuple(row for preset, name in DATA.items() for row in _rows(preset, name)),
    "Train and test merged; as many clusters as classes; the start of lowest inertia is scored. Features come from "
    "all convolution layers, pooled to 4x4 and unscaled. It is not known which layers, which mean of the entropies, or "
    "how many starts the published figures used; their NMI is listed under the arithmetic mean. Of "
    "Tiny-ImageNet train alone is clustered, as published.",
)
