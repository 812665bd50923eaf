"""ImageNet, small: a tree and the published tar files give what torchvision gives, and the same store."""

import hashlib
import io
import logging
import os
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets import ImageFolder
from torchvision.datasets import imagenet as theirs
from torchvision.transforms import v2

from dcgan import storage
from dcgan.config import Data
from dcgan.data import sources
from dcgan.data.ingest import ingest
from dcgan.data.sources import archives, imagenet
from dcgan.data.sources.base import Opened
from dcgan.data.store import Store

WNIDS = {"n03000001": "bathroom", "n02000002": "bedroom", "n04000003": "kitchen"}  # not in the order of their numbers
TRAIN, VAL = 6, 7  # images of each class, and of all


def given(source: object, **settings: object) -> Data:
    return Data(name="imagenet", size=64, source=str(source), **settings)  # type: ignore[arg-type]


def validation(real_data: Path) -> list[tuple[str, Path]]:
    """The class of each validation image and its file, in the order of the published names."""
    return [
        (wnid := list(WNIDS)[int("0210122"[i])], sorted((real_data / "rooms" / WNIDS[wnid]).iterdir())[100 + i])
        for i in range(VAL)
    ]


@pytest.fixture
def tree(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """train/<wnid>/ and val/<wnid>/ of real rooms, three classes of them."""
    monkeypatch.setattr(imagenet, "CLASSES", len(WNIDS))
    monkeypatch.setattr(imagenet, "COUNTS", {"train": TRAIN * len(WNIDS), "test": VAL})
    root = tmp_path / "tree"
    for wnid, room in WNIDS.items():
        for at in ("train", "val"):
            (root / at / wnid).mkdir(parents=True)
        for i, file in enumerate(sorted((real_data / "rooms" / room).iterdir())[:TRAIN]):
            shutil.copy(file, root / "train" / wnid / f"{wnid}_{17 * i % 10}.JPEG")
    for i, (wnid, file) in enumerate(validation(real_data)):
        shutil.copy(file, root / "val" / wnid / f"ILSVRC2012_val_{i + 1:08}.JPEG")
    return root


def add(archive: tarfile.TarFile, name: str, content: bytes, **changes: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(content))


def packed(files: Mapping[str, bytes]) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            add(archive, name, content)
    return buffer.getvalue()


def kit(labels: list[int]) -> bytes:
    """A development kit like the published one: classes and a synset above them, numbered from 1, and labels."""
    fields = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    rows = [(i + 1, wnid, f"{room}, room", "", 0, [], 0, TRAIN) for i, (wnid, room) in enumerate(WNIDS.items())]
    rows.append((len(rows) + 1, "n00000001", "room", "", 3, [1, 2, 3], 1, 0))
    synsets = np.array(rows, [(field, object) for field in fields]).reshape(-1, 1)
    savemat(meta := io.BytesIO(), {"synsets": synsets})
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as archive:
        add(archive, f"{imagenet.KIT}/meta.mat", meta.getvalue())
        truth = "".join(f"{label}\n" for label in labels).encode()
        add(archive, f"{imagenet.KIT}/ILSVRC2012_validation_ground_truth.txt", truth)
    return buffer.getvalue()


@pytest.fixture
def tars(tree: Path, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same images as the published tar files have them, in another order."""
    (root := tmp_path / "tars").mkdir()
    classes = {
        f"{wnid}.tar": packed(
            {file.name: file.read_bytes() for file in sorted((tree / "train" / wnid).iterdir())[::-1]}
        )
        for wnid in WNIDS
    }
    listed = validation(real_data)
    flat = {f"ILSVRC2012_val_{i + 1:08}.JPEG": file.read_bytes() for i, (_, file) in enumerate(listed)}
    publish(root, monkeypatch, imagenet.TRAIN, packed(classes))
    publish(root, monkeypatch, imagenet.VAL, packed(dict(reversed(flat.items()))))
    publish(root, monkeypatch, imagenet.DEVKIT, kit([1 + list(WNIDS).index(wnid) for wnid, _ in listed]))
    return root


def publish(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
    (root / name).write_bytes(content)
    monkeypatch.setitem(imagenet.MD5, name, hashlib.md5(content).hexdigest())


def content(opened: Opened) -> dict[str, list[tuple[str, bytes, int]]]:
    return {split: [(i.name, i.image, i.label) for i in records] for split, records in opened.splits.items()}


def test_a_tree_is_torchvisions_pixel_for_pixel(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.SOURCES, "imagenet", imagenet)
    store = Store.open(tmp_path, ingest(given(tree), tmp_path), verify=True)
    for split, at in (("train", "train"), ("test", "val")):
        images = ImageFolder(str(tree / at), v2.Compose([v2.CenterCrop(96), v2.Resize(64), v2.PILToTensor()]))
        assert store.classes == tuple(images.classes) == tuple(sorted(WNIDS))
        assert store.labels(split).tolist() == images.targets
        for image, (expected, _) in zip(store.images(split), images, strict=True):
            np.testing.assert_array_equal(image, expected.numpy())
    assert (store.count("train"), store.count("test"), store.training) == (18, 7, ("train",))


def test_the_published_tar_files_give_the_same_store(
    tree: Path, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sources.SOURCES, "imagenet", imagenet)
    before = sorted(tars.rglob("*"))
    assert content(imagenet.read(given(tars), tmp_path)) == content(imagenet.read(given(tree), tmp_path))
    assert ingest(given(tars), tmp_path) == ingest(given(tree), tmp_path)
    assert sorted(tars.rglob("*")) == before, "nothing is unpacked"
    assert not (tmp_path / "downloads").exists()


def test_labels_of_the_validation_images_are_torchvisions(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {
        key: (imagenet_name, imagenet.MD5[imagenet_name]) for key, (imagenet_name, _) in theirs.ARCHIVE_META.items()
    }
    monkeypatch.setattr(theirs, "ARCHIVE_META", changed)
    theirs.parse_devkit_archive(tars)
    assert imagenet.validation_labels(tars / imagenet.DEVKIT) == theirs.load_meta_file(tars)[1]


def test_names_and_checksums_are_torchvisions() -> None:
    assert dict(theirs.ARCHIVE_META.values()) == imagenet.MD5


@pytest.mark.parametrize("at", ["val", "ILSVRC/Data/CLS-LOC/val"])
def test_flat_validation_images_are_labelled_by_the_kit(tree: Path, tars: Path, tmp_path: Path, at: str) -> None:
    expected = content(imagenet.read(given(tree), tmp_path))
    root = tmp_path / "flat"
    (root / at).parent.mkdir(parents=True)
    shutil.copytree(tree / "train", (root / at).parent / "train")
    shutil.copytree(tree / "val", root / at)
    for image in sorted((root / at).glob("*/*")):
        image.rename(root / at / image.name)
    for wnid in WNIDS:
        (root / at / wnid).rmdir()
    with pytest.raises(FileNotFoundError, match=rf"labels are in {root}/ILSVRC2012_devkit_t12\.tar\.gz: add it"):
        imagenet.read(given(root), tmp_path)
    shutil.copy(tars / imagenet.DEVKIT, root)
    assert content(imagenet.read(given(root), tmp_path)) == expected
    next((root / at).iterdir()).unlink()
    with pytest.raises(ValueError, match=rf"{at} has 6 images; .*devkit_t12\.tar\.gz has labels of 7"):
        imagenet.read(given(root), tmp_path)


def test_without_validation_images_there_is_no_test_split(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(tree / "val")
    assert list(imagenet.read(given(tree), tmp_path).splits) == ["train"]
    assert "will have no split test" in caplog.text


def test_other_numbers_of_classes_or_images_are_said(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = next((tree / "train" / "n03000001").iterdir())
    image.unlink()
    imagenet.read(given(tree), tmp_path)
    assert f"{tree}: 17 images in split train; 18 were published" in caplog.text
    for image in (tree / "train" / "n03000001").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match=r"tree/train: n03000001 has no images"):
        imagenet.read(given(tree), tmp_path)
    (tree / "train" / "n03000001").rmdir()
    with pytest.raises(ValueError, match=r"tree/train has 2 classes; ImageNet has 3"):
        imagenet.read(given(tree), tmp_path)


def test_a_validation_class_without_training_images_is_refused(tree: Path, tmp_path: Path) -> None:
    (tree / "val" / "n02000002").rename(tree / "val" / "n09999999")
    with pytest.raises(ValueError, match=r"tree/val has images of n09999999; .*tree/train has none"):
        imagenet.read(given(tree), tmp_path)


@pytest.mark.parametrize("name", list(imagenet.MD5))
def test_a_tar_file_that_is_not_the_published_one_is_refused_before_it_is_read(
    tars: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (tars / name).open("ab") as file:
        file.write(b"\0")
    with caplog.at_level(logging.INFO), pytest.raises(storage.CorruptError, match=rf"{name} .* is not the published"):
        imagenet.read(given(tars), tmp_path)
    assert f"{tars / imagenet.TRAIN}: comparing 0.0 GB with the published MD5" in caplog.text


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("../n1.JPEG", {}, r"the name \.\./n1\.JPEG leads out of the archive"),
        ("a/../../n1.JPEG", {}, r"the name a/\.\./\.\./n1\.JPEG leads out of the archive"),
        ("/n1.JPEG", {}, r"the name /n1\.JPEG leads out of the archive"),
        ("n1.JPEG", {"type": tarfile.SYMTYPE, "linkname": "/n2.JPEG"}, r"n1\.JPEG is a link or a special file"),
        ("n1.JPEG", {"type": tarfile.LNKTYPE, "linkname": "n2.JPEG"}, r"n1\.JPEG is a link or a special file"),
        ("n1.JPEG", {"type": tarfile.FIFOTYPE}, r"n1\.JPEG is a link or a special file"),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_members_that_are_no_plain_files_inside_are_refused_by_name(
    tars: Path, tmp_path: Path, name: str, changes: dict, reason: str, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        add(archive, "n0.JPEG", b"\xff\xd8")
        add(archive, name, b"", **changes)
    bad = packed({"n02000002.tar": buffer.getvalue()}) if nested else buffer.getvalue()
    publish(tars, monkeypatch, imagenet.TRAIN, bad)
    where = r"img_train\.tar: n02000002\.tar" if nested else r"img_train\.tar"
    with pytest.raises(storage.CorruptError, match=f"{where}: {reason}"):
        imagenet.read(given(tars), tmp_path)
    assert not (tmp_path / "n1.JPEG").exists()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_tar_that_was_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    raw = packed({f"{i}.JPEG": bytes([i]) * (700 * i) for i in range(1, 9)})
    for size in (int(len(raw) * share), int(len(raw) * share) // 512 * 512 + 100):
        (tmp_path / "a.tar").write_bytes(raw[:size])
        with pytest.raises(storage.CorruptError, match=r"a\.tar is damaged or cut short"):
            archives.in_tar(tmp_path / "a.tar")
        (tmp_path / "b.tar").write_bytes(packed({"n1.tar": raw[:size]}))
        with pytest.raises(storage.CorruptError, match=r"b\.tar: n1\.tar is damaged or cut short"):
            list(archives.in_nested_tar(tmp_path / "b.tar", lambda _: True))


def test_a_broken_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    raw = bytearray(packed({f"{i}.JPEG": bytes(700) for i in range(8)}))
    raw[3 * 1536 + 5] ^= 1
    (tmp_path / "a.tar").write_bytes(raw)
    with pytest.raises(storage.CorruptError, match=r"a\.tar is damaged or cut short: no header at byte 4608"):
        archives.in_tar(tmp_path / "a.tar")


def test_a_mirror_of_the_tar_files_gives_the_same(tars: Path, tmp_path: Path, serve: Callable) -> None:
    address, asked = serve(lambda name, _: (200, raw := (tars / name).read_bytes(), len(raw)))
    assert content(imagenet.read(given(address), tmp_path)) == content(imagenet.read(given(tars), tmp_path))
    assert sorted(asked) == sorted(imagenet.MD5)
    assert imagenet.signature(given(address)) == imagenet.MD5


def test_without_a_source_it_says_which_files_to_put_where(tmp_path: Path) -> None:
    data = Data(name="imagenet", size=64)
    for call in (imagenet.signature, lambda data: imagenet.read(data, tmp_path)):
        with pytest.raises(FileNotFoundError, match=r"data\.source is not set; ImageNet's terms forbid") as refusal:
            call(data)
        for word in (*imagenet.MD5, *imagenet.MD5.values(), "https://image-net.org/", "train/<wnid>/*.JPEG"):
            assert word in str(refusal.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has none of train, .*ILSVRC2012_img_train\.tar; ImageNet's terms"):
        imagenet.signature(given(tmp_path / "empty"))


def test_links_count_and_other_files_do_not(tree: Path, tmp_path: Path) -> None:
    expected = content(imagenet.read(given(tree), tmp_path))
    (tree / "train" / "n03000001").rename(tmp_path / "elsewhere")
    (tree / "train" / "n03000001").symlink_to(tmp_path / "elsewhere")
    (tree / "train" / "n03000001" / "notes.txt").write_text("")
    (tree / "train" / "n03000001" / "._n03000001_1.JPEG").write_text("")
    (tree / "train" / "lost+found").mkdir()
    assert content(imagenet.read(given(tree), tmp_path)) == expected


def test_the_signature_follows_the_files(tree: Path, tars: Path) -> None:
    seen = [imagenet.signature(given(tree)), imagenet.signature(given(tars))]
    os.utime(next((tree / "val" / "n02000002").iterdir()), ns=(0, 0))
    seen.append(imagenet.signature(given(tree)))
    next((tree / "train" / "n02000002").iterdir()).unlink()
    seen.append(imagenet.signature(given(tree)))
    assert all(seen.count(each) == 1 for each in seen)
    assert seen[0]["train"] == seen[2]["train"] != seen[3]["train"]
    assert seen[1] == {
        "train": imagenet.MD5[imagenet.TRAIN],
        "val": imagenet.MD5[imagenet.VAL],
        "labels": imagenet.MD5[imagenet.DEVKIT],
    }
