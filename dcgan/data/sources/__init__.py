"""The data sets: one module each, see `base.Source`."""

from dcgan.data.sources import (
    celeba,
    cifar10,
    cifar100,
    digits,
    folder,
    imagenet,
    imagenet32,
    imagenet_subsets,
    lfw,
    lsun,
    mnist,
    stl10,
    svhn,
    tiny_imagenet,
)
from dcgan.data.sources.base import Source

SOURCES: dict[str, Source] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
    "stl10": stl10,
    "celeba": celeba,
    "lfw": lfw,
    "lsun": lsun,
    "imagenet": imagenet,
    "imagenet32": imagenet32,
    "imagenet10": imagenet_subsets.IMAGENET10,
    "imagenet_dog15": imagenet_subsets.IMAGENET_DOG15,
    "tiny_imagenet": tiny_imagenet,
    "folder": folder,
}
