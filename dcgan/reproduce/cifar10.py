"""CIFAR-10 classification: table 1 of Radford et al. (2015), with all labels and with 400 per class."""

from functools import partial

from dcgan.config import DataSet, Protocol
from dcgan.evaluate import patch_kmeans
from dcgan.evaluate.published import OTHERS, PAPER, PUBLISHED
from dcgan.reproduce.rows import QUOTED, Column, Figure, Measured, Row, Setting, Table, arrays, features, merged

ACCURACY = {"accuracy": "svm/accuracy"}
CIFAR10: tuple[DataSet, ...] = ("cifar10",)
SCORED: tuple[Protocol, ...] = ("svm", "svm_few_labels")
DEEP = "model.kernel=3"  # the architecture that the paper scores, here at the preset's width, half of the paper's
FEW = {"few": "svm_few_labels/accuracy"}


def _patch_kmeans(centroids: int, setting: Setting) -> Measured:
    store, settings = setting.images("cifar10")
    (train_x, train_y), _, (test_x, test_y) = arrays(store)
    found = patch_kmeans.score(train_x, train_y, test_x, test_y, settings, centroids)
    few = Figure(
        found["patch_kmeans/few_labels_accuracy"],
        found["patch_kmeans/few_labels_accuracy_std"],
        f"{settings.draws} draws",
    )
    return Measured(
        {"accuracy": Figure(found["patch_kmeans/accuracy"]), "few": few},
        f"{centroids:,} centroids of 400,000 patches; all {len(train_y):,} labels, "
        f"{settings.labels_per_class} per class in each draw",
        choices={"few labels' c": found["patch_kmeans/few_labels_c"]},
    )


def _of_itself(setting: Setting) -> Measured:
    run = setting.extracted("cifar10", SCORED, DEEP, "evaluate.labels=0")
    return merged(features(run, "svm", ACCURACY), features(run, "svm_few_labels", FEW))


def _of_imagenet(setting: Setting) -> Measured:
    source = setting.experiment("cifar10").data.source
    where = [f"evaluate.images_source={source}"] if source else []
    run = setting.extracted("imagenet32", SCORED, "evaluate.images=cifar10", *where)
    return merged(features(run, "svm", ACCURACY), features(run, "svm_few_labels", FEW))


def _published(method: str) -> dict[str, Figure]:
    """Both columns of a row of the paper's table."""
    figures = {}
    for column, metric in (ACCURACY | FEW).items():
        known = (PUBLISHED["cifar10"][metric], *OTHERS["cifar10"][metric])
        figure = next(one for one in known if one.method == method)
        figures[column] = Figure(figure.value, figure.spread)
    return figures


def _quoted(key: str, method: str) -> Row:
    return Row(key, method, _published(method), PAPER, QUOTED)


TABLE = Table(
    "CIFAR-10 classification",
    (
        Column("accuracy", "accuracy, all labels, %", percent=True),
        Column("few", "accuracy, 400 labels per class, %", percent=True),
    ),
    (
        Row("patch_kmeans_400", "1-layer k-means, 400 centroids", {}, "", partial(_patch_kmeans, 400), CIFAR10),
        Row(
            "patch_kmeans_1600",
            "1-layer k-means, 1,600 centroids",
            {"accuracy": Figure(0.779)},
            "Coates, Lee and Ng, AISTATS 2011",
            partial(_patch_kmeans, 1600),
            CIFAR10,
        ),
        Row(
            "patch_kmeans_4800",
            "1-layer k-means, 4,800 centroids",
            _published("1-layer k-means"),
            PAPER,
            partial(_patch_kmeans, 4800),
            CIFAR10,
        ),
        _quoted("kmeans_3_layers", "3-layer k-means, learned RF"),
        _quoted("view_invariant", "view-invariant k-means"),
        _quoted("exemplar_cnn", "Exemplar CNN"),
        Row(
            "dcgan_imagenet",
            "DCGAN (ImageNet, 28,672 features) + L2-SVM",
            _published("DCGAN + L2-SVM"),
            PAPER,
            _of_imagenet,
            ("imagenet32", *CIFAR10),
        ),
        Row("dcgan_cifar10", "DCGAN (CIFAR-10 itself, 3x3) + L2-SVM", {}, "", _of_itself, CIFAR10),
    ),
    "The discriminator's features come from all convolution layers, pooled to 4x4 and standardised; C is chosen on "
    "images held out of train, except for k-means with all labels, whose C is the published 100 / N. A centroid "
    "without patches becomes one of them, where the published code makes it zero.",
)
