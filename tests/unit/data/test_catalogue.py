"""`dcgan data`: what the stores of a home are, whether they are sound, what they look like."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fabricated import write_store
from PIL import Image

from dcgan.cli import main
from dcgan.data.store import Description, Store

Make = Callable[..., Store]


@pytest.fixture
def home(tmp_path: Path, make_store: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DCGAN_HOME", str(tmp_path))
    make_store(tmp_path)
    make_store(tmp_path, size=28, channels=1, classes=0)
    return tmp_path


def test_list_names_every_store_and_what_was_interrupted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "stores" / ".ingest-0123456789abcdef").mkdir()
    assert main(["data", "list"]) == 0
    printed = capsys.readouterr().out
    for path in (home / "stores").glob("[0-9a-f]*"):
        assert path.name in printed
    assert "16 test, 64 train" in printed
    assert "unfinished        .ingest-0123456789abcdef: 0 shards" in printed


def test_verify_reads_every_byte(home: Path, make_store: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify"]) == 0
    assert capsys.readouterr().out.count("sound") == 2
    shard = make_store(home).path / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert main(["data", "verify"]) == 2
    assert "train-00000.npy is corrupt" in capsys.readouterr().err
    assert main(["data", "list"]) == 0, "lengths only"


def test_show_describes_and_draws(home: Path, make_store: Make, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(home)
    assert main(["data", "show", store.fingerprint[:6], "--count", "20", "--out", str(home / "sheet.png")]) == 0
    printed = capsys.readouterr().out
    pixels = store.images("train")[:, 0].astype(float)
    assert "train images: 64\n" in printed
    assert f"{pixels.mean():.1f} ± {pixels.std():.1f}" in printed
    assert "0 32, 1 32" in printed
    picture = np.asarray(Image.open(home / "sheet.png"))
    assert picture.shape == (3 * 34 + 2, 16 * 34 + 2, 3), "16 of 16 are one row, 20 of 64 are two"
    np.testing.assert_array_equal(picture[2:34, 2:34], store.images("test")[0].transpose(1, 2, 0))


def test_images_without_labels_can_be_shown(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (path for path in (home / "stores").glob("[0-9a-f]*") if not Store.open(home, path.name).classes)
    assert main(["data", "show", path.name, "--out", str(home / "sheet.png")]) == 0
    assert "train classes: no labels" in capsys.readouterr().out


def test_images_are_shown_from_all_shards_and_many_classes_as_a_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCGAN_HOME", str(tmp_path))
    pairs = [(np.full((1, 28, 28), 10 * i, np.uint8), i % 20) for i in range(24)]
    about = Description("random", tuple(map(str, range(20))), 28, 1, "none")
    store = write_store(tmp_path, about, {"train": pairs}, shard_images=5)
    assert main(["data", "show", store.fingerprint, "--count", "24", "--out", str(tmp_path / "sheet.png")]) == 0
    assert "train classes: 20 of 1 to 2 images" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    cells = [picture[2 + 30 * (i // 16) + 5, 2 + 30 * (i % 16) + 5] for i in range(24)]
    assert [int(cell) for cell in cells] == [10 * i for i in range(24)]
    assert main(["data", "show", store.fingerprint, "--count", "3", "--out", str(tmp_path / "sheet.png")]) == 0
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert [int(picture[7, 7 + 30 * i]) for i in range(4)] == [0, 110, 230, 255], "evenly spaced"
    (store.path / "train-00001.npy").write_bytes(b"")
    assert main(["data", "list"]) == 0
    assert "damaged: " in capsys.readouterr().out


@pytest.mark.parametrize(("word", "message"), [("zz", "'zz' is the beginning of no stores"), ("", "of 2 stores")])
def test_a_word_that_is_not_one_store_is_refused(
    home: Path, word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "show", word]) == 2
    assert message in capsys.readouterr().err


def test_a_home_without_stores_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DCGAN_HOME", str(tmp_path))
    assert main(["data", "verify"]) == 2
    assert "has no image store" in capsys.readouterr().err
