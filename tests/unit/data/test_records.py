"""Lists of images that are cut and sent elsewhere: whatever the cut, the images stay the same."""

import hashlib
import pickle
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcgan.data import records
from dcgan.data.records import Block, Tree

T = TypeVar("T")
# What a file system may hand over: any text, and bytes that are no UTF-8, which Python hands over as U+DC80 to U+DCFF.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.characters(
    min_codepoint=0xDC80, max_codepoint=0xDCFF
)


def sent(value: T) -> T:
    """As it arrives in another process."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301


@given(st.lists(st.text(CHARACTERS, min_size=1), min_size=1))
def test_packed_names_come_back(names: list[str]) -> None:
    assert records.unpack(records.pack(names)) == names


@given(st.lists(st.integers()), st.integers(1, 7))
def test_batches_are_the_items_in_order(items: list[int], count: int) -> None:
    batches = list(records.batched(iter(items), count))
    assert [item for batch in batches for item in batch] == items
    assert all(len(batch) == count for batch in batches[:-1])
    assert all(batches)


def sha256(i: int) -> bytes:
    return hashlib.sha256(f"content {i}".encode()).digest()


def tree_of(root: Path, count: int) -> Tree:
    """Files of classes a, b and c in turn, in blocks as large as PACKED is now."""
    blocks = [
        Block(records.pack(name(i) for i in some), b"".join(sha256(i)[:8] for i in some))
        for some in records.batched(range(count), records.PACKED)
    ]
    return Tree.of(root, {"a": 0, "b": 1, "c": 2}, blocks)


def name(i: int) -> str:
    return f"{'abc'[i % 3]}/{i:06d}.png"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Twenty files in blocks of six."""
    monkeypatch.setattr(records, "PACKED", 6)
    for i in range(20):
        (path := tmp_path / name(i)).parent.mkdir(exist_ok=True)
        path.write_bytes(f"content {i}".encode())
    return tree_of(tmp_path, 20)


def content(tree: Tree) -> list[tuple[str, object, int]]:
    assert len(list(tree)) == len(tree)
    return [(item.name, item.image, item.label) for item in tree]


def test_any_cut_gives_the_same_images(tree: Tree) -> None:
    whole = content(tree)
    assert whole == [(name(i), f"content {i}".encode(), i % 3) for i in range(20)]
    for step in range(1, 21):
        parts = [tree.part(start, min(start + step, 20)) for start in range(0, 20, step)]
        assert [image for part in parts for image in content(sent(part))] == whole
    for start in range(20):
        for stop in range(start + 1, 21):
            part = tree.part(start, stop)
            assert content(part) == whole[start:stop]
            assert content(part.part(1, len(part))) == whole[start:stop][1:]


def test_what_is_chosen_by_its_hash_can_be_cut_too(tree: Tree) -> None:
    chosen = {sha256(i)[:8] for i in range(0, 20, 2)}
    some = tree.where(chosen.__contains__)
    assert content(some) == content(tree)[::2]
    assert content(some.part(3, 9)) == content(tree)[::2][3:9]
    assert len(tree.where(lambda _: False)) == 0


def test_a_directory_that_is_no_class_has_no_label(tree: Tree) -> None:
    flat = Tree.of(tree.root / "a", {}, [Block(records.pack(["000003.png"]), sha256(3)[:8])])
    assert content(flat) == [("000003.png", b"content 3", -1)]


def test_a_file_that_changed_is_refused(tree: Tree) -> None:
    (tree.root / name(7)).write_bytes(b"content 8")
    with pytest.raises(ValueError, match=r"b/000007\.png changed while it was being read"):
        list(tree)


def test_a_hundred_thousand_images_take_a_dozen_bytes_each_and_a_part_no_more_than_itself() -> None:
    tree = tree_of(Path("/tree"), 100_000)
    assert sum(len(block.names) + len(block.hashes) for block in tree.blocks) < 13 * 100_000
    assert len(pickle.dumps(tree.part(40_000, 44_000))) < 13 * (4_000 + 2 * 256)
