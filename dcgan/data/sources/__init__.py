"""The data sets: one module each, see `base.Source`."""

from dcgan.data.sources import cifar10, digits, folder, mnist
from dcgan.data.sources.base import Source

SOURCES: dict[str, Source] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": cifar10,
    "folder": folder,
}
