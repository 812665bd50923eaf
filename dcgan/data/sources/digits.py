"""scikit-learn's copy of 1,797 handwritten digits (UCI, Alpaydin and Kaynak 1998), 8x8 grey: nothing is downloaded."""

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import Pixels
from dcgan.data.sources.base import Opened, held_out, require_both
from dcgan.data.store import Description, SourceFile


def signature(data: Data) -> Any:
    """The digits come with scikit-learn, so its version stands for them; see `base.Source`."""
    return {"scikit-learn": metadata.version("scikit-learn")}


def read(data: Data, downloads: Path) -> Opened:
    """Splits train and test by content hash; one channel; see `base.Source`. Raises ValueError if a split is empty."""
    from sklearn.datasets import load_digits  # takes two seconds; only this data set needs it

    bunch = load_digits()
    # The values are counts 0..16 of inked pixels in 4x4 blocks of the scan: 16 becomes 255.
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    test = np.array([held_out(hashlib.sha256(image.tobytes()).digest(), data.test_fraction) for image in images])
    require_both(data.name, int((~test).sum()), int(test.sum()), data.test_fraction)
    raw = images.tobytes() + bunch.target.astype("<i8").tobytes()
    return Opened(
        Description(data.name, tuple("0123456789"), data.size, 1, f"0..16 scaled to 0..255; {TRANSFORM}"),
        {split: Pixels(images[side], bunch.target[side]) for split, side in (("train", ~test), ("test", test))},
        (SourceFile("sklearn.datasets.load_digits", len(raw), hashlib.sha256(raw).hexdigest()),),
    )
