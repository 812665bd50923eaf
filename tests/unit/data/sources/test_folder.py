"""Any tree of images: what counts, what is refused, and that nothing but the content decides."""

import json
import logging
import os
import struct
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fabricated import decoded
from hypothesis import given as examples
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dcgan import environment
from dcgan.config import Data
from dcgan.data import catalogue, publish, records, shards
from dcgan.data.ingest import ingest
from dcgan.data.sources import folder
from dcgan.data.sources.base import Opened
from dcgan.data.store import Store


def given(source: object, **settings: object) -> Data:
    return Data(name="folder", size=28, source=str(source), **{"test_fraction": 0.5, **settings})  # type: ignore[arg-type]


def picture(path: Path, seed: int, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 34, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """cats/0.png ... cats/deep/10.png, dogs/: ten images each."""
    for i in range(10):
        picture(tmp_path / "tree" / "cats" / ("deep" if i % 2 else ".") / f"{i}.png", i)
        picture(tmp_path / "tree" / "dogs" / f"{i}.JPG", 100 + i)
    return tmp_path / "tree"


def content(opened: Opened) -> dict[str, list[tuple[bytes, int]]]:
    return {split: [(image.tobytes(), label) for image, label in images] for split, images in decoded(opened).items()}


def named(tree: Path, data: Data) -> dict[str, set[bytes]]:
    return {split: {image for image, _ in images} for split, images in content(folder.read(data, tree)).items()}


def test_images_are_torchvisions_in_its_order(tree: Path) -> None:
    opened = folder.read(given(tree), tree)
    theirs = ImageFolder(str(tree), v2.Compose([v2.CenterCrop(30), v2.Resize(28), v2.PILToTensor()]))
    assert opened.description.classes == tuple(theirs.classes) == ("cats", "dogs")
    ours = content(opened)
    assert sorted(ours["train"] + ours["test"]) == sorted((image.numpy().tobytes(), label) for image, label in theirs)
    assert len(ours["train"]) >= 2
    assert len(ours["test"]) >= 2


def test_real_photographs(real_data: Path, tmp_path: Path) -> None:
    data = Data(name="folder", size=64, source=str(real_data / "rooms"))
    store = Store.open(tmp_path, ingest(data, tmp_path), verify=True)
    theirs = ImageFolder(str(real_data / "rooms"), v2.Compose([v2.Resize(64), v2.PILToTensor()]))
    assert store.classes == tuple(theirs.classes) == ("bathroom", "bedroom", "frontal", "kitchen")
    assert store.count("train") + store.count("test") == len(theirs) == 2140
    ours = {
        image.tobytes(): label
        for split in store.splits
        for image, label in zip(store.images(split), store.labels(split), strict=True)
    }
    for i in range(0, 2140, 20):
        image, label = theirs[i]
        assert ours[image.numpy().tobytes()] == label


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i in range(20):
        picture(tmp_path / f"{i}.webp", i)
    store = Store.open(tmp_path / "home", ingest(given(tmp_path), tmp_path / "home"))
    assert store.classes == ()
    assert set(store.labels("train")) == {-1}


def test_the_order_is_that_of_the_names(tmp_path: Path) -> None:
    for i in (13 * i % 32 for i in range(32)):
        Image.new("RGB", (30, 30), (i, i, i)).save(tmp_path / f"{i:02d}.png")
    for images in decoded(folder.read(given(tmp_path), tmp_path)).values():
        values = [int(image[0, 0, 0]) for image, _label in images]
        assert values == sorted(values)


PARTS = st.text("-.a0", max_size=2).map("_{}".format)  # what sorts before a slash, and what sorts after it


@examples(st.sets(st.lists(PARTS, min_size=1, max_size=3).map("/".join)))
def test_the_order_is_that_of_the_names_whatever_they_are(names: set[str]) -> None:
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            path = Path(root, f"{name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        assert list(folder._walk(Path(root), Counter())) == sorted(f"{name}.png" for name in names)


def test_one_class_is_enough(tmp_path: Path) -> None:
    for i in range(20):
        picture(tmp_path / "only" / f"{i}.bmp", i)
    assert folder.read(given(tmp_path), tmp_path).description.classes == ("only",)


def test_images_beside_classes_are_refused(tree: Path) -> None:
    picture(tree / "stray.png", 1)
    with pytest.raises(ValueError, match=r"tree/stray\.png lies beside class directories \(cats, \.\.\.\)"):
        folder.read(given(tree), tree)


def test_links_hidden_names_and_other_files_are_passed_over(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = content(folder.read(given(tree), tree))
    signature = folder.signature(given(tree))
    (tree / "cats" / "loop").symlink_to(tree)
    (tree / "birds").symlink_to(tree / "cats")
    (tree / "cats" / "link.png").symlink_to(tree / "cats" / "0.png")
    picture(tree / ".thumbnails" / "0.png", 7)
    (tree / "cats" / ".hidden.png").write_bytes(b"")
    (tree / "cats" / "notes.txt").write_text("not an image")
    os.mkfifo(tree / "cats" / "pipe.png")
    with caplog.at_level(logging.INFO):
        assert content(folder.read(given(tree), tree)) == before
    assert "20 images; passed over: 2 hidden, 2 not images, 3 symbolic links" in caplog.text
    assert folder.signature(given(tree)) == signature


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    # Red at the left of the top edge, green at its right, as the picture is to be seen.
    seen = np.zeros((28, 28, 3), np.uint8)
    seen[:14, :14, 0] = seen[:14, 14:, 1] = 255
    turn = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    for i in range(20):
        seen[20, 20, 2] = i  # so that the files differ and fall on both sides
        Image.fromarray(np.ascontiguousarray(turn[orientation](seen))).save(tmp_path / f"{i}.png", exif=exif)
    for images in decoded(folder.read(given(tmp_path), tmp_path)).values():
        for image, _label in images:
            seen[20, 20, 2] = image[2, 20, 20]
            np.testing.assert_array_equal(image, seen.transpose(2, 0, 1))


def test_what_is_stored_is_upright(tmp_path: Path) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(20):
        upright[0, 0, 0] = i
        (tmp_path / "tree" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(tmp_path / "tree" / "a" / f"{i}.png", exif=exif)
    store = Store.open(tmp_path, ingest(given(tmp_path / "tree"), tmp_path))
    for split in store.splits:
        for image in store.images(split):
            upright[0, 0, 0] = image[0, 0, 0]
            assert np.array_equal(image.transpose(1, 2, 0), upright)


NOT_IMAGES = {
    "text": b"not an image",
    "empty": b"",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 30\n%%EndComments\n%%EOF\n",
}


def damaged(path: Path, how: str) -> None:
    good = picture(path, 50).read_bytes()
    if how == "deep":
        Image.fromarray(np.zeros((30, 30), np.uint16)).save(path)
    elif how == "bomb":  # 40,000 x 40,000 pixels in a few bytes
        header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
        path.write_bytes(good[:12] + header + struct.pack(">I", zlib.crc32(header)) + good[33:])
    else:
        path.write_bytes(good[:-500] if how == "truncated" else NOT_IMAGES[how])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", "truncated"),
        ("text", "not a JPEG, PNG, "),
        ("eps", "not a JPEG, PNG, "),
        ("empty", "not a JPEG, PNG, "),
        ("bomb", "decompression bomb|more than Pillow's limit"),
        ("deep", "mode I;16: more than 8 bits a channel"),
    ],
)
def test_an_unreadable_image_is_refused_or_skipped_by_name(
    tree: Path, tmp_path: Path, how: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    damaged(tree / "cats" / "bad.png", how)
    home = tmp_path / "home"
    with pytest.raises(ValueError, match=rf"cats/bad\.png can't be decoded \(.*({reason}).*\): set data\.unr"):
        ingest(given(tree), home)
    assert not list((home / "stores").glob("[0-9a-f]*"))
    caplog.clear()
    store = Store.open(home, ingest(given(tree, unreadable="skip"), home))
    assert store.manifest["skipped"] == ["cats/bad.png"]
    assert "cats/bad.png skipped" in caplog.text
    assert store.count("train") + store.count("test") == 20
    (tree / "cats" / "bad.png").unlink()
    whole = Store.open(home, ingest(given(tree), home))
    for split in store.splits:
        assert np.array_equal(store.images(split), whole.images(split))
        assert np.array_equal(store.labels(split), whole.labels(split))


def test_what_was_skipped_is_refused_before_other_images_are_decoded(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a command without `skip`, which goes on with the shards of one that was killed."""
    damaged(tree / "cats" / "bad.png", "empty")
    monkeypatch.setattr(shards, "BYTES", 4 * 3 * 32 * 32)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(publish, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        ingest(given(tree, unreadable="skip"), tmp_path / "home")
    for record in (tmp_path / "home").rglob("*.json"):
        if "bad.png" not in record.read_text():
            record.unlink()  # as if the others had not been made yet
    monkeypatch.setattr(shards, "make", lambda job: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"cats/bad\.png can't be decoded"):
        ingest(given(tree), tmp_path / "home")


def test_a_class_whose_name_is_not_utf_8_can_be_shown(tree: Path, tmp_path: Path) -> None:
    os.rename(tree / "cats", os.fsencode(tree) + b"/caf\xe9")
    opened = Store.open(tmp_path / "home", ingest(given(tree), tmp_path / "home"))
    assert sorted(opened.classes)[0] == "caf\\xe9"
    catalogue.describe(opened.path).encode()
    json.dumps(catalogue.profile(opened)).encode()


def test_pixels_over_pillows_limit_are_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow itself only warns below twice the limit
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="34 x 30 pixels are more than"):
        content(folder.read(given(tree), tree))


def test_an_empty_folder_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no images \(it is empty\); they end in \.bmp, "):
        ingest(given(tmp_path), tmp_path / "home")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"has no images \(1 not images\)"):
        ingest(given(tmp_path), tmp_path / "home")
    with pytest.raises(FileNotFoundError, match=r"data\.source=/no/such is not a directory"):
        ingest(given("/no/such"), tmp_path / "home")


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "0.png", 0)
    with pytest.raises(ValueError, match=r"1 images with data\.test_fraction=0\.5 leave split '(train|test)' empty"):
        ingest(given(tmp_path), tmp_path / "home")


def test_an_image_stays_on_its_side_whatever_is_around_it(tree: Path, tmp_path: Path) -> None:
    before = named(tree, given(tree))
    for path in [*tree.rglob("*.png"), *tree.rglob("*.JPG")]:
        path.rename(path.with_name(f"renamed-{path.name}"))
    for i in range(20):
        picture(tree / "birds" / f"{i}.png", 200 + i)
    after = named(tree, given(tree))
    assert before["train"] < after["train"]
    assert before["test"] < after["test"]


def test_the_number_of_threads_and_blocks_changes_nothing(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = []
    for number, (threads, block) in enumerate([(1, 512), (7, 512), (3, 4)]):
        monkeypatch.setattr(environment, "cpus", lambda threads=threads: threads)
        monkeypatch.setattr(folder, "PACKED", block)
        monkeypatch.setattr(records, "PACKED", block)
        stores.append(ingest(given(tree), tmp_path / f"home{number}"))
    assert len(set(stores)) == 1


def test_a_file_that_changes_meanwhile_is_refused(tree: Path) -> None:
    opened = folder.read(given(tree), tree)
    picture(tree / "dogs" / "3.JPG", 999)
    with pytest.raises(ValueError, match=r"dogs/3\.JPG changed while it was being read"):
        content(opened)


def test_the_signature_follows_names_lengths_and_times(tree: Path) -> None:
    seen = [folder.signature(given(tree))]
    (tree / "dogs" / "0.JPG").rename(tree / "dogs" / "x.JPG")
    seen.append(folder.signature(given(tree)))
    os.utime(tree / "dogs" / "x.JPG", ns=(0, 0))
    seen.append(folder.signature(given(tree)))
    with (tree / "dogs" / "x.JPG").open("ab") as file:
        file.write(b"\0")
    os.utime(tree / "dogs" / "x.JPG", ns=(0, 0))
    seen.append(folder.signature(given(tree)))
    assert len(set(seen)) == 4
    assert folder.signature(given(tree)) == seen[-1]
