"""A directory is complete or absent, whatever happens to the process that writes it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcgan import storage

WRITER = """
import sys, time
from pathlib import Path
from dcgan import storage
parent = Path(sys.argv[1])
with storage.staging(parent) as staged:
    (staged / "half").write_bytes(b"x" * 1000)
    if sys.argv[2] == "sealed":
        storage.seal(staged, {})
    print("ready", flush=True)
    time.sleep(60)
"""


def published(parent: Path, content: dict[str, bytes]) -> Path:
    with storage.staging(parent) as staged:
        for name, data in content.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_bytes(data)
        storage.seal(staged, {"kind": "test"})
        storage.publish(staged, parent / "final")
    return parent / "final"


def test_published_directory_is_what_was_staged(tmp_path: Path) -> None:
    final = published(tmp_path, {"a": b"1", "deep/b": b"22"})
    manifest = storage.read_manifest(final)
    assert manifest["kind"] == "test"
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {"a": 1, "deep/b": 2}
    assert (final / "deep/b").read_bytes() == b"22"
    assert os.listdir(tmp_path) == ["final"]


def test_nothing_appears_when_writing_raises(tmp_path: Path) -> None:
    def fail(staged: Path) -> None:
        (staged / "a").write_bytes(b"1")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), storage.staging(tmp_path) as staged:
        fail(staged)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("moment", ["unsealed", "sealed"])
def test_sigkill_leaves_nothing_visible_and_the_next_staging_cleans_up(tmp_path: Path, moment: str) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, moment], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with storage.staging(tmp_path):
            assert len(os.listdir(tmp_path)) == 2, "a living writer's directory must stay"
        process.send_signal(signal.SIGKILL)
    left = os.listdir(tmp_path)
    assert len(left) == 1
    assert left[0].startswith("."), "what a killed writer left is hidden"
    with storage.staging(tmp_path):
        assert left[0] not in os.listdir(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_is_staged_is_told_by_its_lock_whatever_its_name(tmp_path: Path) -> None:
    """Process numbers mean nothing on another host, or in another container of the same host name."""
    (tmp_path / ".staging-elsewhere-1-ab").mkdir()
    with storage.staging(tmp_path) as first, storage.staging(tmp_path) as second:
        assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name}
    assert os.listdir(tmp_path) == []


def test_second_publisher_of_the_same_thing_changes_nothing(tmp_path: Path) -> None:
    first = published(tmp_path, {"a": b"first"})
    published(tmp_path, {"a": b"second"})
    assert (first / "a").read_bytes() == b"first"
    storage.read_manifest(first)


def test_publish_refuses_a_destination_that_is_not_a_stored_directory(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "mine").write_text("not to be lost")
    with pytest.raises(OSError, match="final"):
        published(tmp_path, {"a": b"1"})
    assert (tmp_path / "final" / "mine").exists()


def test_discard_removes_a_directory_whole(tmp_path: Path) -> None:
    storage.discard(published(tmp_path, {"a": b"1"}))
    assert os.listdir(tmp_path) == []


def test_missing_short_and_changed_files_are_named(tmp_path: Path) -> None:
    final = published(tmp_path, {"a": b"1234"})
    (final / "a").write_bytes(b"1235")
    storage.read_manifest(final, hashes=False)
    with pytest.raises(storage.CorruptError, match=r"final/a is corrupt"):
        storage.read_manifest(final)
    (final / "a").write_bytes(b"123")
    with pytest.raises(storage.CorruptError, match=r"final/a has 3 bytes; its manifest says 4"):
        storage.read_manifest(final, hashes=False)
    (final / "a").unlink()
    with pytest.raises(storage.CorruptError, match=r"final/a is missing"):
        storage.read_manifest(final, hashes=False)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {"a": {"bytes": 1}}}', '{"files": {"a": 1}}']
)
def test_a_manifest_that_makes_no_sense_is_corrupt(tmp_path: Path, content: str) -> None:
    (tmp_path / storage.MANIFEST).write_text(content)
    with pytest.raises(storage.CorruptError, match=r"manifest.json is missing or unreadable"):
        storage.read_manifest(tmp_path)


def test_write_bytes_keeps_the_old_content_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "value"
    storage.write_bytes(path, b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["value"]


def test_a_value_is_computed_once_and_is_the_same_then_and_later(tmp_path: Path) -> None:
    calls = []
    for _ in range(2):
        assert storage.once(tmp_path / "new" / "value", lambda: calls.append(1) or {"a": (1, 2)}) == {"a": [1, 2]}
    assert calls == [1]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_dump_json_is_one_form_of_one_value(value: object) -> None:
    text = storage.dump_json(value)
    assert json.loads(text) == value
    assert storage.dump_json(json.loads(text)) == text
    text.encode("ascii")
