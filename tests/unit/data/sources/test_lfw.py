"""LFW's images are those of the archive, byte for byte, whether they are read from it or from an unpacked tree."""

import errno
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from torchvision.transforms import v2

from dcgan import storage
from dcgan.config import Data
from dcgan.data.ingest import ingest
from dcgan.data.sources import SOURCES, attempts, lfw, published
from dcgan.data.sources.base import held_out
from dcgan.data.store import Store

PEOPLE = {"Aaron_A": 3, "Bea_B": 1, "Cy_C": 20, "Di_D": 16}


def given(source: object, **settings: object) -> Data:
    return Data(name="lfw", size=128, source=str(source), **{"test_fraction": 0.3, **settings})  # type: ignore[arg-type]


@pytest.fixture
def tree(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small unpacked tree of real faces, 250 px, named as LFW's are."""
    faces = iter(sorted((real_data / "faces").glob("*.jpg")))
    root = tmp_path / "files" / lfw.FOLDER
    for person, count in PEOPLE.items():
        (root / person).mkdir(parents=True)
        for number in range(1, count + 1):
            face = Image.open(next(faces)).resize((250, 250), Image.Resampling.BICUBIC)
            face.save(root / person / f"{person}_{number:04d}.jpg", quality=90)
    monkeypatch.setattr(lfw, "COUNT", sum(PEOPLE.values()))
    monkeypatch.setitem(SOURCES, "lfw", lfw)
    return root


@pytest.fixture
def archive(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hidden = [member(f"{lfw.FOLDER}/Di_D/._Di_D_0001.jpg"), member(f"{lfw.FOLDER}/README.txt")]
    return pack(tree, tmp_path / "mirror", monkeypatch, hidden)


def pack(tree: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, further: Sequence[tarfile.TarInfo] = ()) -> Path:
    """The tree, and members without content, in an archive of our own, declared to be the published one."""
    folder.mkdir()
    path = folder / lfw.ARCHIVE
    with tarfile.open(path, "w:gz") as packed:
        packed.add(tree, lfw.FOLDER)
        for member in further:
            packed.addfile(member, io.BytesIO())
    monkeypatch.setattr(lfw, "ARCHIVE_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_address_and_checksum_are_torchvisions() -> None:
    theirs = torchvision.datasets.LFWPeople
    assert theirs.file_dict["deepfunneled"] == (lfw.FOLDER, lfw.ARCHIVE, lfw.ARCHIVE_MD5)
    assert theirs.download_url_prefix == f"{lfw.ADDRESSES[0]}/"
    assert f"{theirs.base_folder}/" in lfw.PLACES


def theirs(tree: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Torchvision's images of the same tree and archive at 128 px, by their path within the tree."""
    loader = torchvision.datasets.LFWPeople
    root = tmp_path / "theirs" / loader.base_folder
    root.mkdir(parents=True)
    (root / lfw.FOLDER).symlink_to(tree)
    (root / lfw.ARCHIVE).symlink_to(archive)
    listed = [f"{person}\t{count}\n" for person, count in PEOPLE.items()]
    texts = {"peopleDevTrain.txt": "".join([f"{len(listed)}\n", *listed]), "lfw-names.txt": "".join(listed)}
    for name, text in texts.items():
        (root / name).write_text(text)
    md5 = {name: hashlib.md5(text.encode()).hexdigest() for name, text in texts.items()}
    monkeypatch.setattr(loader, "checksums", md5)
    monkeypatch.setattr(loader, "file_dict", {"deepfunneled": (lfw.FOLDER, lfw.ARCHIVE, lfw.ARCHIVE_MD5)})
    faces = loader(str(root.parent), split="train", image_set="deepfunneled")
    names = [str(Path(path).relative_to(root / lfw.FOLDER)) for path in faces.data]
    small = v2.Compose([v2.CenterCrop(250), v2.Resize(128), v2.PILToTensor()])
    return {name: small(faces[i][0]).numpy() for i, name in enumerate(names)}


@pytest.mark.parametrize("packed", [True, False], ids=["archive", "tree"])
def test_images_are_torchvisions(
    tree: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    source = given(archive.parent if packed else tree.parent)
    expected = theirs(tree, archive, tmp_path, monkeypatch)
    store = Store.open(tmp_path, ingest(source, tmp_path), verify=True)
    assert sum(map(store.count, store.splits)) == len(expected) == 40
    assert store.classes == ()
    for split in ("train", "test"):
        names = [item.name for item in lfw.read(source, tmp_path / "downloads").splits[split]]
        assert names == sorted(names)
        np.testing.assert_array_equal(store.images(split), [expected[name] for name in names])
        assert (store.labels(split) == -1).all()


def test_the_archive_and_the_tree_give_the_same_splits_by_content(tree: Path, archive: Path, tmp_path: Path) -> None:
    packed, unpacked = (lfw.read(given(at), tmp_path).splits for at in (archive.parent, tree))
    for split in ("train", "test"):
        ours = [(item.name, item.image, item.label) for item in packed[split]]
        assert ours == [(item.name, item.image, item.label) for item in unpacked[split]]
        for name, raw, _ in ours:
            assert raw == (tree / name).read_bytes()
            assert held_out(hashlib.sha256(raw).digest(), 0.3) == (split == "test")


def test_a_mirror_gives_the_same(archive: Path, tmp_path: Path, serve: Callable) -> None:
    address, asked = serve(lambda name, _: (200, raw := (archive.parent / name).read_bytes(), len(raw)))
    expected = lfw.read(given(archive.parent), tmp_path / "downloads0").sources
    for _ in range(2):
        assert lfw.read(given(address), tmp_path / "downloads1").sources == expected
    assert asked == [lfw.ARCHIVE]
    assert sorted(path.name for path in (tmp_path / "downloads1" / "lfw").iterdir()) == [
        f"{lfw.FOLDER}.tar",
        lfw.ARCHIVE,
    ]


def test_a_tree_that_changed_has_another_signature(tree: Path, archive: Path) -> None:
    first = lfw.signature(given(tree))
    assert first == lfw.signature(given(tree.parent)) == json.loads(json.dumps(first))
    assert lfw.signature(given(archive.parent)) == lfw.ARCHIVE_MD5
    (tree / "Bea_B" / "Bea_B_0001.jpg").write_bytes(b"another")
    assert lfw.signature(given(tree)) != first


def member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    "bad",
    [
        member("../outside.jpg"),
        member(f"{lfw.FOLDER}/../../outside.jpg"),
        member("/absolute.jpg"),
        member(f"{lfw.FOLDER}/Di_D/link.jpg", tarfile.SYMTYPE),
        member(f"{lfw.FOLDER}/Di_D/hard.jpg", tarfile.LNKTYPE),
        member(f"{lfw.FOLDER}/Di_D/device.jpg", tarfile.CHRTYPE),
    ],
    ids=lambda info: info.name,
)
def test_a_member_that_leads_out_of_the_archive_is_refused_by_name(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: tarfile.TarInfo
) -> None:
    archive = pack(tree, tmp_path / "mine", monkeypatch, [bad])
    with pytest.raises(
        storage.CorruptError, match=rf"lfw-deepfunneled\.tar: .*{bad.name} (leads out|is a link or a sp)"
    ):
        lfw.read(given(archive.parent), tmp_path / "downloads")
    assert not list(tmp_path.rglob("outside.jpg"))


def test_a_truncated_archive_is_refused_before_it_is_read(archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(storage.CorruptError, match=r"lfw-deepfunneled\.tgz \(\d+ bytes\) is not the published file"):
        ingest(given(archive.parent), tmp_path / "home")
    assert not (tmp_path / "home" / "downloads").exists()


def test_an_incomplete_tree_is_refused(tree: Path, tmp_path: Path) -> None:
    (tree / "Cy_C" / "Cy_C_0007.jpg").unlink()
    with pytest.raises(ValueError, match=r"lfw-deepfunneled has 39 images of faces; LFW has 40"):
        lfw.read(given(tree), tmp_path)


def test_a_directory_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"data\.source={tmp_path} has none of lfw-deepfunneled\.tgz, "):
        lfw.signature(given(tmp_path))


def test_a_full_disk_is_not_taken_for_a_server_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(published, "fetch", full)
    with pytest.raises(OSError, match=r"No space left on device$"):
        lfw.read(Data(name="lfw", size=128), tmp_path)


@pytest.mark.parametrize("offline", [False, True])
def test_if_its_server_is_gone_the_refusal_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    def gone(*_: object) -> None:
        raise attempts.DownloadError("no server answered")

    if not offline:
        monkeypatch.setattr(published, "fetch", gone)
    data = Data(name="lfw", size=128, offline=offline)
    with pytest.raises(
        FileNotFoundError, match=rf"put lfw-deepfunneled\.tgz \(MD5 {lfw.ARCHIVE_MD5}\) into .*data\.so"
    ):
        lfw.read(data, tmp_path)
