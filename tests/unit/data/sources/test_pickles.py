"""Pickles of arrays come back as pickle itself reads them, and nothing in a pickle runs code."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from fabricated import Bomb

from dcgan.data.sources import pickles


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_arrays_numbers_and_containers_come_back(protocol: int, module: bytes) -> None:
    content = {
        "data": np.arange(12, dtype=np.uint8).reshape(3, 4),
        "mean": np.linspace(0, 1, 5),
        "labels": [1, np.int64(2), np.float32(0.5)],
        "raw": b"\x00\xff",
        "names": ("ä", None),
    }
    raw = pickle.dumps(content, protocol)
    if protocol < 4:  # from there on names have their length before them
        raw = raw.replace(b"numpy._core", module)
    found = pickles.load(io.BytesIO(raw))
    assert found.keys() == content.keys()
    for name in ("data", "mean"):
        assert found[name].dtype == content[name].dtype
        np.testing.assert_array_equal(found[name], content[name])
    assert [found[name] for name in ("labels", "raw", "names")] == [
        content[name] for name in ("labels", "raw", "names")
    ]


def test_byte_strings_of_python_2_are_text() -> None:
    assert pickles.load(io.BytesIO(b"\x80\x02U\x04data.")) == "data"
    assert pickles.load(io.BytesIO(b"\x80\x02U\x02\x00\xff.")) == "\x00\xff"


def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path: Path) -> None:
    for protocol in range(6):
        with pytest.raises(ValueError, match=r"a pickle refers to posix\.mkdir; only arrays"):
            pickles.load(io.BytesIO(pickle.dumps(Bomb(tmp_path / "marker"), protocol)))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.",
        b"\x80\x02]\x82\x01.",
    ],
)
def test_nothing_but_arrays_is_named(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"a pickle refers to|unregistered extension"):
        pickles.load(io.BytesIO(raw))
