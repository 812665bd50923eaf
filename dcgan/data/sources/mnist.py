"""MNIST (LeCun, Cortes and Burges): 60,000 + 10,000 handwritten digits, 28x28 grey.

Of the 60,000 the code of Radford et al. trains on 50,000 and holds out the last 10,000 of a random order. Here the same
ones are held out.

Addresses and MD5 are torchvision's, which has those of the .gz files only; the second of each pair below is the MD5
of what they contain, for directories that hold the unpacked files (`test_mnist.py` compares both).
"""

import gzip
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import Pixels
from dcgan.data.sources import published
from dcgan.data.sources.base import Opened, as_the_paper_held_out
from dcgan.data.store import Description, SourceFile

ADDRESSES = ("https://ossci-datasets.s3.amazonaws.com/mnist", "http://yann.lecun.com/exdb/mnist")
FILES = {
    "train-images-idx3-ubyte": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
}
HELD_OUT = slice(50_000, None)  # dcgan_code, mnist/load.py


def signature(data: Data) -> Any:
    """The MD5 of the four files: wherever they come from, only those are accepted; see `base.Source`."""
    if data.source and not published.is_address(data.source):
        for name in FILES:
            _find(data.source, name)
    return {"files": FILES, "held out from": HELD_OUT.start}


def read(data: Data, downloads: Path) -> Opened:
    """Splits train, validation and test, one channel; see `base.Source`.

    data.source: a directory of the files, packed or not, or of `raw/` or `MNIST/raw/`; or a mirror of the .gz files.
    """
    content = {name: _content(name, data, downloads / "mnist") for name in FILES}
    whole, test = (
        Pixels(_idx(content[f"{split}-images-idx3-ubyte"]), _idx(content[f"{split}-labels-idx1-ubyte"]))
        for split in ("train", "t10k")
    )
    train, validation = as_the_paper_held_out(whole, HELD_OUT)
    return Opened(
        Description(data.name, tuple("0123456789"), data.size, 1, TRANSFORM),
        {"train": train, "validation": validation, "test": test},
        tuple(SourceFile(name, len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in content.items()),
    )


def _find(source: str, name: str) -> Path:
    return published.find(source, [f"{at}{name}{end}" for at in ("", "raw/", "MNIST/raw/") for end in (".gz", "")])


def _content(name: str, data: Data, downloads: Path) -> bytes:
    packed, unpacked = FILES[name]
    if data.source is None or published.is_address(data.source):
        path = published.fetch(ADDRESSES, f"{name}.gz", packed, downloads, data)
    else:
        path = _find(data.source, name)
    if path.suffix == ".gz":
        return gzip.decompress(published.check(path, packed).read_bytes())
    return published.check(path, unpacked).read_bytes()


def _idx(raw: bytes) -> np.ndarray:
    """The array in an idx file: two zero bytes, 8 for uint8, the number of dimensions, big-endian sizes, the values."""
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">i4", dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
