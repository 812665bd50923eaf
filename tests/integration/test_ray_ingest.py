"""Ingestion by Ray Data: the same store as by threads, errors that name the file, shards that are made once."""

import functools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray_nodes
from PIL import Image

from dcgan import cluster
from dcgan.config import Data
from dcgan.data import ingest, shards

pytestmark = pytest.mark.slow
ROUND = 16 * 3 * 28 * 28  # bytes: sixteen images a shard


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """150 JPEG in two classes; shards small enough that Ray is worth it."""
    monkeypatch.setattr(shards, "BYTES", ROUND)
    monkeypatch.setattr(ingest, "MANY", 2)
    for i in range(150):
        path = tmp_path / "tree" / "ab"[i % 2] / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (90, 120, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "tree"


def by_ray(home: Path, concurrency: int | None = None) -> ingest.Maker:
    return functools.partial(cluster.scatter, home=home, concurrency=concurrency)


def data(tree: Path, **settings: object) -> Data:
    return Data(name="folder", size=28, source=str(tree), test_fraction=0.3, **settings)  # type: ignore[arg-type]


def test_any_number_of_workers_makes_the_same_store(tree: Path, tmp_path: Path) -> None:
    made = {
        ingest.ingest(data(tree), tmp_path / "threads"),
        ingest.ingest(data(tree), tmp_path / "ray", maker=by_ray(tmp_path / "ray")),
        ingest.ingest(data(tree), tmp_path / "one", maker=by_ray(tmp_path / "one", 1)),
    }
    assert len(made) == 1


def test_an_unreadable_image_is_named_and_what_is_mended_goes_on(tree: Path, tmp_path: Path) -> None:
    bad = tree / "a" / "100.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:500])
    home = tmp_path / "home"
    says = r"a/100\.jpg can't be decoded \(.*[Tt]runcated.*\): set data\.unreadable=skip"
    with pytest.raises(ValueError, match=says):
        ingest.ingest(data(tree), home, maker=by_ray(home))
    assert not list((home / "stores").glob("[0-9a-f]*")), "no store"
    records = list((home / "stores").glob(".ingest-*/*-[0-9]*.json"))
    made = {(path.parent / "store" / f"{path.stem}.npy").stat().st_mtime_ns for path in records}
    assert made, "shards that were complete before"
    skipping = ingest.ingest(data(tree, unreadable="skip"), home, maker=by_ray(home))
    kept = {path.stat().st_mtime_ns for path in (home / "stores" / skipping).iterdir()}
    assert made < kept, "what was complete is used"
    with pytest.raises(ValueError, match=r"100\.jpg can't be decoded"):
        ingest.ingest(data(tree), home)
    bad.write_bytes(whole)
    assert ingest.ingest(data(tree), home) != skipping


def test_a_job_whose_process_is_killed_is_done_again(tmp_path: Path) -> None:
    def slowly(job: int) -> tuple[int, int]:
        time.sleep(0.3)
        return job, os.getpid()

    done: list[tuple[int, int]] = []
    for result in cluster.scatter(slowly, range(16), tmp_path, 2):
        done.append(result)
        if len(done) == 3:
            os.kill(result[1], signal.SIGKILL)
    assert sorted(job for job, _ in done) == list(range(16))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ray_nodes.Nodes]:
    with ray_nodes.cluster(tmp_path_factory.mktemp("nodes")) as nodes:
        yield nodes


@pytest.mark.parametrize("lost", [False, True])
def test_two_nodes_make_the_same_store_and_one_may_be_lost(
    nodes: ray_nodes.Nodes, tree: Path, tmp_path: Path, lost: bool
) -> None:
    """The second node, one machine of two, is killed while it has shards to make; the first makes them."""
    other, at, home = nodes.add(), tmp_path / "at", tmp_path / "home"

    def on_both(make: Callable[[shards.Job], dict[str, Any]], job: shards.Job) -> dict[str, Any]:
        import ray

        (mine := at / ray.get_runtime_context().get_node_id()).mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + 300
        while len(list(at.iterdir())) < 2:  # the first waits for the other, which would come too late for a share
            assert time.monotonic() < deadline, "only one node was used"
            time.sleep(0.05)
        time.sleep(0.3)  # so that none has made all that it was given when the other is lost
        record = make(job)
        (mine / job.path.name).touch()
        return record

    def maker(make: Callable[[shards.Job], dict[str, Any]], jobs: Sequence[shards.Job]) -> Iterator[dict[str, Any]]:
        for number, record in enumerate(cluster.scatter(functools.partial(on_both, make), jobs, home)):
            if lost and number == 1:
                other.kill()
            yield record

    fingerprint = ingest.ingest(data(tree), home, maker=maker)
    other.kill()
    made = [len(list(node.iterdir())) for node in at.iterdir()]
    assert len(made) == 2
    assert min(made) >= 1 if not lost else max(made) >= 5
    assert fingerprint == ingest.ingest(data(tree), tmp_path / "threads")
    ours, threads = (tmp_path / name / "stores" / fingerprint for name in ("home", "threads"))
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == {
        path.name: path.read_bytes() for path in threads.iterdir()
    }
