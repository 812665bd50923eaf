"""Reads published pickles with an unpickler that knows arrays and nothing else: no code in them is run."""

import codecs
import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np

_RECONSTRUCT, _SCALAR = np.empty(0).__reduce__()[0], np.int64(0).__reduce__()[0]
# What a pickle names for an array or a number (numpy 1 and 2), and for bytes in a protocol without them.
ARRAYS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("_codecs", "encode"): codecs.encode,
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise ValueError(f"a pickle refers to {module}.{name}; only arrays, numbers and containers are read")
        return ARRAYS[module, name]


def load(file: IO[bytes]) -> Any:
    """The containers, texts, numbers and arrays in a pickle; Python 2's byte strings as text of the same code points.

    Raises ValueError if it names anything else, which is not even looked up, and whatever pickle and numpy raise if it
    is damaged.
    """
    return _Arrays(file, encoding="latin1").load()


def read(path: Path) -> Any:
    """`load` of a file."""
    with path.open("rb") as file:
        return load(file)
