"""CelebA's images are read in place from the zip file, byte for byte, and split as published."""

import hashlib
import json
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from torchvision.transforms import v2

from dcgan import storage
from dcgan.config import Data
from dcgan.data.ingest import ingest
from dcgan.data.sources import SOURCES, celeba
from dcgan.data.store import Store

COUNT = 40
SPLITS = [0] * 25 + [1] * 8 + [2] * 7


def given(source: object) -> Data:
    return Data(name="celeba", size=128, source=str(source))


def name(number: int) -> str:
    return f"{number:06d}.jpg"


@pytest.fixture
def tree(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the unpacked images, real faces of 178x218, and the partition, declared the published one."""
    root = tmp_path / "files"
    (root / celeba.FOLDER).mkdir(parents=True)
    for number, path in enumerate(sorted((real_data / "faces").glob("*.jpg"))[:COUNT], 1):
        face = Image.open(path).resize((178, 218), Image.Resampling.BICUBIC)
        face.save(root / celeba.FOLDER / name(number), quality=90)
    monkeypatch.setitem(SOURCES, "celeba", celeba)
    partition(root, "".join(f"{name(i)} {split}\n" for i, split in enumerate(SPLITS, 1)), monkeypatch)
    return root


def partition(root: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / celeba.PARTITION).write_text(text)
    monkeypatch.setattr(celeba, "PARTITION_MD5", hashlib.md5(text.encode()).hexdigest())


@pytest.fixture
def packed(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return pack(tree, tmp_path / "packed", monkeypatch)


def pack(tree: Path, root: Path, monkeypatch: pytest.MonkeyPatch, further: Mapping[str, bytes] | None = None) -> Path:
    """A directory with the two files; every other image is deflated; declared the published ones."""
    root.mkdir()
    (root / celeba.PARTITION).write_bytes((tree / celeba.PARTITION).read_bytes())
    with zipfile.ZipFile(root / celeba.ARCHIVE, "w") as archive:
        archive.mkdir(celeba.FOLDER)
        for path in sorted((tree / celeba.FOLDER).iterdir()):
            method = zipfile.ZIP_DEFLATED if int(path.stem) % 2 else zipfile.ZIP_STORED
            archive.write(path, f"{celeba.FOLDER}/{path.name}", method)
        for member, content in (further or {}).items():
            archive.writestr(member, content)
    declare(root, monkeypatch)
    return root


def declare(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(celeba, "ARCHIVE_MD5", hashlib.md5((root / celeba.ARCHIVE).read_bytes()).hexdigest())


def test_names_and_checksums_are_torchvisions() -> None:
    theirs = {name: md5 for _, md5, name in torchvision.datasets.CelebA.file_list}
    assert theirs[celeba.ARCHIVE] == celeba.ARCHIVE_MD5
    assert theirs[celeba.PARTITION] == celeba.PARTITION_MD5
    assert celeba.PAGE in torchvision.datasets.CelebA.__doc__
    assert f"{torchvision.datasets.CelebA.base_folder}/" in celeba.PLACES


def theirs(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> np.ndarray:
    """Torchvision's images of the same files at 128 px, from twice which on a JPEG is scaled while it is decoded.

    It reads annotations that we don't, so they are made up.
    """
    loader = torchvision.datasets.CelebA
    root = tmp_path / "theirs" / loader.base_folder
    if not root.exists():
        root.parent.mkdir()
        root.symlink_to(tree)
        rows = "".join(f"{name(i)} 1\n" for i in range(1, COUNT + 1))
        for file in ("list_bbox_celeba", "list_landmarks_align_celeba", "list_attr_celeba"):
            (tree / f"{file}.txt").write_text(f"{COUNT}\na\n{rows}")
        (tree / "identity_CelebA.txt").write_text(rows)
    monkeypatch.setattr(loader, "_check_integrity", lambda self: True)
    small = v2.Compose([v2.CenterCrop(178), v2.Resize(128), v2.PILToTensor()])
    return np.stack([small(image).numpy() for image, _ in loader(str(root.parent), split=split)])


@pytest.mark.parametrize("kind", ["tree", "packed"])
def test_images_are_torchvisions(
    tree: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = {"tree": tree, "packed": packed}[kind]
    store = Store.open(tmp_path, ingest(given(source), tmp_path), verify=True)
    assert (store.classes, store.training) == ((), ("train",))
    assert {split: store.count(split) for split in store.splits} == {"train": 25, "validation": 8, "test": 7}
    for split, number in {"train": "train", "validation": "valid", "test": "test"}.items():
        np.testing.assert_array_equal(store.images(split), theirs(tree, tmp_path, monkeypatch, number))
        assert (store.labels(split) == -1).all()


def test_members_are_read_in_place_byte_for_byte(tree: Path, packed: Path, tmp_path: Path) -> None:
    opened = celeba.read(given(packed), tmp_path / "downloads")
    items = [item for records in opened.splits.values() for item in records]
    assert [item.name for item in items] == [name(i) for i in range(1, COUNT + 1)]
    assert all(item.image == (tree / celeba.FOLDER / item.name).read_bytes() for item in items)
    assert not (tmp_path / "downloads").exists(), "nothing is unpacked"


def test_the_local_header_says_where_an_image_begins(
    tree: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its extra field may be longer than the directory's: here the last member's is, by four bytes."""
    path, last = packed / celeba.ARCHIVE, f"{celeba.FOLDER}/{name(COUNT)}"
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo(last).header_offset
    raw = path.read_bytes()
    start, end = at + 30 + len(last), raw.rindex(b"PK\5\6")
    directory = struct.pack("<I", struct.unpack("<I", raw[end + 16 : end + 20])[0] + 4)
    header = raw[at : at + 28] + struct.pack("<H", 4) + last.encode() + b"\xfe\xca\0\0"
    path.write_bytes(raw[:at] + header + raw[start : end + 16] + directory + raw[end + 20 :])
    declare(packed, monkeypatch)
    *_, item = celeba.read(given(packed), tmp_path).splits["test"]
    assert item.image == (tree / celeba.FOLDER / name(COUNT)).read_bytes()


def test_a_mirror_gives_the_same_and_is_found_again(tree: Path, packed: Path, tmp_path: Path, serve: Callable) -> None:
    address, asked = serve(lambda file, _: (200, raw := (packed / file).read_bytes(), len(raw)))
    expected = celeba.read(given(packed), tmp_path).sources
    assert celeba.read(given(address), tmp_path / "downloads").sources == expected
    assert celeba.read(Data(name="celeba", size=128), tmp_path / "downloads").sources == expected
    assert asked == [celeba.PARTITION, celeba.ARCHIVE]


def test_signatures_are_equal_only_if_the_images_are(tree: Path, packed: Path) -> None:
    first = celeba.signature(given(tree))
    assert first == json.loads(json.dumps(first)) != celeba.signature(given(packed))
    assert celeba.signature(given(packed)) == celeba.signature(Data(name="celeba", size=128))
    (tree / celeba.FOLDER / name(3)).write_bytes(b"another")
    assert celeba.signature(given(tree)) != first


@pytest.mark.parametrize("source", [None, "nothing", "no partition", "no images"])
def test_the_refusal_says_which_files_to_put_where(
    tree: Path, packed: Path, tmp_path: Path, source: str | None
) -> None:
    (packed / celeba.PARTITION).unlink()
    (tree / celeba.FOLDER).rename(tree / "elsewhere")
    (tmp_path / "empty").mkdir()
    places = {"nothing": tmp_path / "empty", "no partition": packed, "no images": tree}
    data = given(places[source]) if source else Data(name="celeba", size=128)
    with pytest.raises(FileNotFoundError) as refusal:
        celeba.read(data, tmp_path / "downloads")
    message = str(refusal.value)
    for part in (
        "data.source",
        celeba.ARCHIVE,
        celeba.ARCHIVE_MD5,
        celeba.PARTITION,
        celeba.PARTITION_MD5,
        celeba.PAGE,
    ):
        assert part in message
    assert "\n" not in message
    if source:
        with pytest.raises(FileNotFoundError, match=re.escape(message)):
            celeba.signature(data)


@pytest.mark.parametrize("bad", ["../outside.jpg", "/absolute.jpg", "img_align_celeba/../../x.jpg"])
def test_a_member_that_leads_out_of_the_archive_is_refused_by_name(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    root = pack(tree, tmp_path / "mine", monkeypatch, {bad: b"x"})
    with pytest.raises(
        storage.CorruptError, match=rf"img_align_celeba\.zip: .*{re.escape(bad)} leads out of the archive"
    ):
        celeba.read(given(root), tmp_path / "downloads")


@pytest.mark.parametrize("kind", ["tree", "packed"])
def test_an_image_that_is_listed_and_absent_is_named(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tree / celeba.FOLDER / name(17)).unlink()
    root = tree if kind == "tree" else pack(tree, tmp_path / "mine", monkeypatch)
    with pytest.raises(ValueError, match=r"has no 000017\.jpg, which list_eval_partition\.txt lists"):
        ingest(given(root), tmp_path / "home")


@pytest.mark.parametrize("line", ["../../x.jpg 0", "000001.jpg 3", "000001.jpg"])
def test_a_partition_of_another_form_is_refused(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    partition(tree, f"000001.jpg 0\n{line}\n", monkeypatch)
    with pytest.raises(ValueError, match=rf"list_eval_partition\.txt:2: '{re.escape(line)}' is not the name of an im"):
        celeba.read(given(tree), tmp_path)


@pytest.mark.parametrize("file", [celeba.ARCHIVE, celeba.PARTITION])
def test_a_truncated_file_is_refused(packed: Path, tmp_path: Path, file: str) -> None:
    (packed / file).write_bytes((packed / file).read_bytes()[:-9])
    with pytest.raises(storage.CorruptError, match=rf"{re.escape(file)} \(\d+ bytes\) is not the published file"):
        celeba.read(given(packed), tmp_path)


def test_an_archive_that_is_damaged_under_a_right_checksum_is_refused(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed / celeba.ARCHIVE
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    declare(packed, monkeypatch)
    with pytest.raises(storage.CorruptError, match=r"img_align_celeba\.zip is damaged"):
        celeba.read(given(packed), tmp_path)
    first = whole.index(b"PK\3\4", 10)  # of the first image, after the directory's
    path.write_bytes(whole[:first] + b"??" + whole[first + 2 :])
    declare(packed, monkeypatch)
    with pytest.raises(storage.CorruptError, match=r"img_align_celeba/000001\.jpg has no header at byte"):
        celeba.read(given(packed), tmp_path)
