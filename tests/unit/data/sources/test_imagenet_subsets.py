"""ImageNet-10 and ImageNet-Dog-15: the synsets that the literature has, and no other number of images."""

import hashlib
import io
import re
import shutil
import tarfile
from pathlib import Path

import pytest

from dcgan.config import Data
from dcgan.data import sources
from dcgan.data.ingest import ingest
from dcgan.data.sources import imagenet, imagenet_subsets
from dcgan.data.sources.imagenet_subsets import IMAGENET10, IMAGENET_DOG15
from dcgan.data.store import Store

EACH = 3  # images of a class here; 1,300 there


def given(source: object, name: str = "imagenet10") -> Data:
    return Data(name=name, size=64, source=str(source))  # type: ignore[arg-type]


@pytest.fixture
def tree(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The class directories of both subsets and one more, of real rooms."""
    monkeypatch.setattr(imagenet_subsets, "PER_CLASS", EACH)
    rooms = iter(sorted((real_data / "rooms").glob("*/*"))[::10])
    for wnid in {*IMAGENET10.wnids, *IMAGENET_DOG15.wnids, "n01440764"}:
        (folder := tmp_path / "imagenet" / "train" / wnid).mkdir(parents=True)
        for i in range(EACH):
            shutil.copy(next(rooms), folder / f"{wnid}_{i}.JPEG")
    return tmp_path / "imagenet"


def test_the_synsets_are_the_published_ones() -> None:
    assert (len(IMAGENET10.wnids), len(IMAGENET_DOG15.wnids)) == (10, 15)
    for subset in (IMAGENET10, IMAGENET_DOG15):
        assert sorted(set(subset.wnids)) == list(subset.wnids)
    assert set(IMAGENET10.wnids) & set(IMAGENET_DOG15.wnids) == {"n02085936"}, "Maltese dogs are in both"
    assert imagenet_subsets.PER_CLASS * 10 == 13_000
    assert imagenet_subsets.PER_CLASS * 15 == 19_500


@pytest.mark.parametrize(("name", "subset"), [("imagenet10", IMAGENET10), ("imagenet_dog15", IMAGENET_DOG15)])
def test_a_subset_has_its_classes_alone_and_one_split(
    tree: Path, tmp_path: Path, name: str, subset: imagenet_subsets.Subset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sources.SOURCES, name, subset)
    store = Store.open(tmp_path, ingest(given(tree, name), tmp_path), verify=True)
    assert store.dataset == name
    assert store.classes == tuple(subset.wnids)
    assert store.splits == ("train",)
    assert store.balance("train") == dict.fromkeys(subset.wnids, EACH)
    records = subset.read(given(tree, name), tmp_path).splits["train"]
    for item in records:
        assert item.image == (tree / "train" / item.name).read_bytes()
        assert store.classes[item.label] == item.name.partition("/")[0]


def test_a_directory_of_these_classes_alone_will_do(tree: Path, tmp_path: Path) -> None:
    whole = [item[:3] for item in IMAGENET10.read(given(tree), tmp_path).splits["train"]]
    for wnid in IMAGENET10.wnids:
        (tree / "train" / wnid).rename(tmp_path / wnid)  # tmp_path itself has them now
    assert [item[:3] for item in IMAGENET10.read(given(tmp_path), tmp_path).splits["train"]] == whole


def test_the_published_tar_file_gives_the_same_and_no_other_is_needed(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(path := tmp_path / "tars" / imagenet.TRAIN, "w") as outer:
        for folder in sorted((tree / "train").iterdir(), reverse=True):
            with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as inner:
                for file in folder.iterdir():
                    inner.add(file, file.name)
            info = tarfile.TarInfo(f"{folder.name}.tar")
            info.size = len(buffer.getvalue())
            outer.addfile(info, io.BytesIO(buffer.getvalue()))
    monkeypatch.setitem(imagenet.MD5, imagenet.TRAIN, hashlib.md5(path.read_bytes()).hexdigest())
    direct, packed = (IMAGENET_DOG15.read(given(at, "imagenet_dog15"), tmp_path) for at in (tree, path.parent))
    assert packed.sources == direct.sources
    assert [item[:3] for item in packed.splits["train"]] == [item[:3] for item in direct.splits["train"]]
    assert IMAGENET_DOG15.signature(given(path.parent)) == imagenet.MD5[imagenet.TRAIN]


def test_other_numbers_of_images_are_refused_class_by_class(tree: Path, tmp_path: Path) -> None:
    next((tree / "train" / "n02128757").iterdir()).unlink()
    shutil.copy(next((tree / "train" / "n02690373").iterdir()), tree / "train" / "n02690373" / "copy.JPEG")
    shutil.rmtree(tree / "train" / "n07747607")
    counts = "n02056570: 3, n02085936: 3, n02128757: 2, n02690373: 4, n02692877: 3, .*, n07747607: 0"
    expected = rf"{re.escape(str(tree))}/train: imagenet10 has 3 images of each class; here are {counts}$"
    with pytest.raises(ValueError, match=expected):
        IMAGENET10.read(given(tree), tmp_path)


def test_without_a_source_it_says_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.source is not set; .*ILSVRC2012_img_train\.tar"):
        IMAGENET10.signature(Data(name="imagenet10", size=64))


def test_the_signature_follows_these_classes_alone(tree: Path) -> None:
    before = IMAGENET10.signature(given(tree))
    next((tree / "train" / "n01440764").iterdir()).unlink()
    next((tree / "train" / "n02112137").iterdir()).unlink()
    assert IMAGENET10.signature(given(tree)) == before
    next((tree / "train" / "n07747607").iterdir()).unlink()
    assert IMAGENET10.signature(given(tree)) != before
