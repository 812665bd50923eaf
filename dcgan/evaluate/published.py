"""The literature's figures under this project's metric names: accuracies as shares, 0 to 1, errors turned into them.

Each figure has its own protocol and network, which `source` names: CIFAR-10's 82.8 % is of a discriminator trained on
ImageNet, and which layer, crop and restarts the clustering rows used was never published.
"""

from dataclasses import dataclass

PAPER = "Radford et al., ICLR 2016"
DAC = "Chang et al., Deep Adaptive Image Clustering, ICCV 2017"
DCCM = "Wu et al., Deep Comprehensive Correlation Mining, ICCV 2019"
CODE = "measured with the original code's ImageNet discriminator, first four layers (12,288 features), standardised"


@dataclass(frozen=True)
class Published:
    """One figure. method: what was scored. spread: as published, after +-."""

    value: float
    source: str
    method: str = "DCGAN"
    spread: float | None = None


def _clustering(nmi: float, ari: float, accuracy: float, source: str, method: str) -> dict[str, Published]:
    values = {"nmi": nmi, "ari": ari, "accuracy": accuracy}
    return {f"clustering/{name}": Published(value, source, method) for name, value in values.items()}


def _gan(nmi: float, ari: float, accuracy: float, source: str = DAC) -> dict[str, Published]:
    return _clustering(nmi, ari, accuracy, source, "GAN (DCGAN) features, k-means")


def _pixels(nmi: float, ari: float, accuracy: float, source: str = DAC) -> dict[str, Published]:
    return _clustering(nmi, ari, accuracy, source, "raw pixels, k-means")


# Data set -> metric -> what a DCGAN's features reached.
PUBLISHED: dict[str, dict[str, Published]] = {
    "cifar10": {
        "svm/accuracy": Published(0.828, f"{PAPER}, table 1; trained on ImageNet-1k", "DCGAN + L2-SVM"),
        "svm_few_labels/accuracy": Published(
            0.738, f"{PAPER}, table 1; 400 labels per class; trained on ImageNet-1k", "DCGAN + L2-SVM", 0.004
        ),
        **_gan(0.2646, 0.1757, 0.3152),
    },
    "mnist": _gan(0.7637, 0.7360, 0.8279),
    "svhn": {
        "svm_few_labels/accuracy": Published(
            0.7752, f"{PAPER}, table 2; 100 labels per class; later replaced by 0.7782 +- 0.0113", "DCGAN + L2-SVM"
        )
    },
    "cifar100": _gan(0.1200, 0.0453, 0.1510),
    "stl10": _gan(0.2100, 0.1390, 0.2984),
    "imagenet10": _gan(0.2250, 0.1571, 0.3459),
    "imagenet_dog15": _gan(0.1213, 0.0776, 0.1738),
    "tiny_imagenet": _gan(0.135, 0.007, 0.041, DCCM),
}

# Data set -> metric -> what the pixels themselves reached.
RAW_PIXELS: dict[str, dict[str, Published]] = {
    "cifar10": {
        "svm/accuracy": Published(0.385, f"{CODE}, for 0.703; 10,000 labels", "raw pixels, L2-SVM"),
        **_pixels(0.0871, 0.0487, 0.2289),
    },
    "mnist": {
        "knn/accuracy": Published(0.969, f"{PAPER}, appendix; 50,000 images, 1 neighbour", "raw pixels, 1-NN"),
        **_pixels(0.4997, 0.3652, 0.5723),
    },
    "cifar100": _pixels(0.0839, 0.0280, 0.1297),
    "stl10": _pixels(0.1245, 0.0608, 0.1920),
    "imagenet10": _pixels(0.1186, 0.0571, 0.2409),
    "imagenet_dog15": _pixels(0.0548, 0.0204, 0.1054),
    "tiny_imagenet": _pixels(0.065, 0.005, 0.025, DCCM),
}

# Data set -> metric -> what the same network reached before any training.
RANDOM_INIT: dict[str, dict[str, Published]] = {
    "cifar10": {"svm/accuracy": Published(0.545, f"{CODE}, for 0.703; 10,000 labels", "random init, L2-SVM")},
}

# Data set -> metric -> other methods of the paper's tables.
OTHERS: dict[str, dict[str, tuple[Published, ...]]] = {
    "cifar10": {
        "svm/accuracy": tuple(
            Published(value, f"{PAPER}, table 1", method)
            for method, value in {
                "1-layer k-means": 0.806,
                "3-layer k-means, learned RF": 0.820,
                "view-invariant k-means": 0.819,
                "Exemplar CNN": 0.843,
            }.items()
        ),
        "svm_few_labels/accuracy": tuple(
            Published(value, f"{PAPER}, table 1; 400 labels per class", method, spread)
            for method, value, spread in (
                ("1-layer k-means", 0.637, 0.007),
                ("3-layer k-means, learned RF", 0.707, 0.007),
                ("view-invariant k-means", 0.726, 0.007),
                ("Exemplar CNN", 0.774, 0.002),
            )
        ),
    },
}
