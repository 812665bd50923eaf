"""SVHN (Netzer et al. 2011), cropped digits: 73,257 + 26,032 colour images of ten digits, 32x32; 531,131 extra ones.

Addresses and MD5 are torchvision's. The paper (section 5.2) holds out 10,000 of the 73,257 for every choice, the first
10,000 of a random order. Here the same ones are held out.

Memory: the images of all files at once, uncompressed, and those of the training file twice while they are split: 0.5
GB, or 2.2 GB with data.extra. Decompressing takes no more (measured: 1.01 times the images of a file).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import Pixels
from dcgan.data.sources import published
from dcgan.data.sources.base import Opened, as_the_paper_held_out
from dcgan.data.store import Description

ADDRESSES = ("http://ufldl.stanford.edu/housenumbers",)
FILES = {
    "train": ("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
    "test": ("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
    "extra": ("extra_32x32.mat", "a93ce644f1a588dc4d68dda5feec44a7"),
}
HELD_OUT = slice(10_000)  # paper, section 5.2; dcgan_code, svhn/load.py


def signature(data: Data) -> Any:
    """The MD5 of the two or three files: wherever they come from, only those are accepted; see `base.Source`."""
    if data.source and not published.is_address(data.source):
        for name in _wanted(data):
            published.find(data.source, [name])
    return _wanted(data)


def read(data: Data, downloads: Path) -> Opened:
    """Splits train, validation, test and, with data.extra, extra, which is also trained on; see `base.Source`.

    data.source: a directory of the .mat files, or a mirror of them.
    """
    files = {name: _file(name, md5, data, downloads / "svhn") for name, md5 in _wanted(data).items()}
    whole = {split: _pixels(files[name]) for split, (name, _) in FILES.items() if name in files}
    train, validation = as_the_paper_held_out(whole.pop("train"), HELD_OUT)
    training = ("train", "extra") if data.extra else ("train",)
    return Opened(
        Description(data.name, tuple("0123456789"), data.size, 3, TRANSFORM, training),
        {"train": train, "validation": validation, **whole},
        tuple(published.describe(file) for file in files.values()),
    )


def _wanted(data: Data) -> Mapping[str, str]:
    """File name to MD5."""
    return {name: md5 for split, (name, md5) in FILES.items() if split != "extra" or data.extra}


def _file(name: str, md5: str, data: Data, downloads: Path) -> Path:
    if data.source is None or published.is_address(data.source):
        return published.fetch(ADDRESSES, name, md5, downloads, data)
    return published.check(published.find(data.source, [name]), md5)


def _pixels(path: Path) -> Pixels:
    """The images of a .mat file, X (32, 32, 3, N), and their labels, y (N, 1) from 1 to 10, where 10 is the digit 0."""
    from scipy.io import loadmat  # takes seconds; only this data set needs it

    content = loadmat(path, variable_names=["X", "y"])
    labels = content["y"].reshape(-1).astype(np.int64)
    return Pixels(content["X"].transpose(3, 0, 1, 2), np.where(labels == 10, 0, labels))
