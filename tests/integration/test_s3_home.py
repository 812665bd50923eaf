"""Stores and runs at s3://: a real server over HTTP, with faults, kills and a small cache."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fabricated
import numpy as np
import pytest
import s3
import torch
from botocore.loaders import JSONFileLoader

from dcgan import checkpoint, mirror, mirror_runs, mirror_stores, pictures, remote, stages, storage
from dcgan.config import Data, Experiment, build
from dcgan.data.ingest import ingest
from dcgan.data.sources import digits as source
from dcgan.data.store import Store
from dcgan.remote import Remote, RemoteError
from dcgan.run import Run
from dcgan.tracking_ledger import Ledger

pytestmark = pytest.mark.slow
URL = "s3://bucket/team"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Store]:
    with s3.server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def server(running: s3.Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Store]:
    """The server, empty and without faults; waits between attempts are a hundredth as long."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.005)
    running.clear()
    yield running
    running.clear()
    there = Remote("s3://bucket")
    there.remove(there.sizes())


def digits(home: Path, *overrides: str) -> Experiment:
    short = ["train.steps=4", "train.log_every=1", "train.checkpoint_every=2", "train.sample_every=4", "model.width=4"]
    given = [f"data.home={home}", f"data.remote={URL}", "compute.workers=0", *short, *overrides]
    return build("digits", given)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_what_one_home_ingested_another_only_copies(
    server: s3.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = ingest(digits(tmp_path / "a").data, tmp_path / "a")
    before = len(server.log)
    assert ingest(digits(tmp_path / "a").data, tmp_path / "a") == fingerprint
    assert {seen.method for seen in server.log[before:]} <= {"GET", "HEAD"}, "nothing is written twice"
    monkeypatch.setattr(source, "read", lambda *_: pytest.fail("read again"))
    assert ingest(digits(tmp_path / "b").data, tmp_path / "b") == fingerprint
    assert content(tmp_path / "a" / "stores" / fingerprint) == content(tmp_path / "b" / "stores" / fingerprint)
    assert not list((tmp_path / "b" / "stores").glob(".*"))


def test_what_was_ingested_before_there_was_a_remote_is_copied_there(server: s3.Store, tmp_path: Path) -> None:
    alone = digits(tmp_path, "data.remote=null").data
    fingerprint = ingest(alone, tmp_path)
    assert ingest(digits(tmp_path).data, tmp_path) == fingerprint
    assert mirror_stores.pull_store(tmp_path / "b", URL, fingerprint, 1)


@pytest.mark.parametrize("named", ["../../elsewhere/x", "/elsewhere", "", "0123456789abcdeg", None])
def test_an_index_that_names_no_store_is_refused(server: s3.Store, tmp_path: Path, named: str) -> None:
    ingest(digits(tmp_path / "a").data, tmp_path / "a")
    (key,) = (name for name in Remote(URL).sizes("stores/index"))
    Remote(URL).write(f"stores/index/{key}", json.dumps({"fingerprint": named}).encode())
    with pytest.raises(storage.CorruptError, match=f"{key} names no image store; without it, it is made again"):
        ingest(digits(tmp_path / "b").data, tmp_path / "b")
    assert not list(tmp_path.rglob("*elsewhere*"))
    fingerprint = ingest(digits(tmp_path / "a").data, tmp_path / "a")
    assert mirror_stores.read_index(URL, key.removesuffix(".json")) == fingerprint, "who has the images mends it"


def test_a_run_finds_its_images_at_the_remote_and_keeps_them(server: s3.Store, tmp_path: Path) -> None:
    """As a worker on a machine that has not ingested them."""
    run = stages.ingest(digits(tmp_path))
    path = tmp_path / "stores" / run.fingerprint
    other = tmp_path / "other"
    shutil.copytree(run.path, other / "runs" / run.name)
    there = Run.open(other / "runs" / run.name).store()
    assert content(there.path) == content(path)
    for store in (there.path, path):  # the second since it was ingested
        with mirror_stores._alone(store) as alone:
            assert not alone


def test_a_tree_at_s3_is_the_same_data_as_here(server: s3.Store, tmp_path: Path) -> None:
    for i in range(30):
        path = tmp_path / "tree" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.write_png(path, np.full((28, 28, 3), 5 * i, np.uint8))
        Remote("s3://bucket").upload(path, path.relative_to(tmp_path).as_posix())
    here, there = (
        ingest(
            Data(name="folder", size=28, source=source, test_fraction=0.3, home=tmp_path / "home"), tmp_path / "home"
        )
        for source in (str(tmp_path / "tree"), "s3://bucket/tree")
    )
    assert here == there


@pytest.mark.parametrize(
    ("kind", "method"),
    [(503, "PUT"), (500, "GET"), ("reset", "GET"), ("truncate", "GET"), (503, "HEAD")],
)
def test_a_fault_now_and_then_is_ridden_out(
    server: s3.Store, tmp_path: Path, kind: int | str, method: str, make_store: Callable[..., Store]
) -> None:
    made = make_store(tmp_path / "a")
    server.faults(kind, times=2, method=method, contains="stores", at=1000, seconds=0.01)
    mirror_stores.push_store(tmp_path / "a", URL, made.fingerprint)
    server.faults(kind, times=2, method=method, contains="train-00000", at=1000, seconds=0.01)
    assert mirror_stores.pull_store(tmp_path / "b", URL, made.fingerprint, 1)
    assert content(tmp_path / "b" / "stores" / made.fingerprint) == content(made.path)


@pytest.mark.parametrize("contains", ["train-00000", "manifest.json"])
def test_a_server_that_stays_broken_publishes_nothing(
    server: s3.Store, tmp_path: Path, contains: str, make_store: Callable[..., Store]
) -> None:
    made = make_store(tmp_path / "a")
    server.faults(500, times=math.inf, method="PUT", contains=contains)
    with pytest.raises(RemoteError, match=rf"writing {URL}/stores/{made.fingerprint}/{contains}.*after 6 attempts"):
        mirror_stores.push_store(tmp_path / "a", URL, made.fingerprint)
    server.clear()
    assert not mirror_stores.pull_store(tmp_path / "b", URL, made.fingerprint, 1), "half a store is none"
    mirror_stores.push_store(tmp_path / "a", URL, made.fingerprint)
    assert mirror_stores.pull_store(tmp_path / "b", URL, made.fingerprint, 1)


def test_an_object_that_is_not_what_the_manifest_says_is_refused_by_name(
    server: s3.Store, tmp_path: Path, make_store: Callable[..., Store]
) -> None:
    made = make_store(tmp_path / "a")
    mirror_stores.push_store(tmp_path / "a", URL, made.fingerprint)
    shard = (made.path / "train-00000.npy").read_bytes()
    Remote(URL).write(f"stores/{made.fingerprint}/train-00000.npy", shard[:-1] + b"?")
    advice = f"without {URL}/stores/{made.fingerprint}/ it is made again"
    with pytest.raises(storage.CorruptError, match=rf"train-00000\.npy is corrupt.*{advice}"):
        mirror_stores.pull_store(tmp_path / "b", URL, made.fingerprint, 1)
    assert not (tmp_path / "b" / "stores" / made.fingerprint).exists()


@pytest.mark.parametrize("name", ["/outside", "../outside", "samples/../../outside", "samples//outside"])
def test_a_name_that_leads_elsewhere_is_refused(server: s3.Store, tmp_path: Path, name: str) -> None:
    there, run = Remote(URL), tmp_path / "home" / "runs" / "one"
    server.put(f"bucket/team/runs/one/{name}", b"hostile")
    there.write("runs/one/experiment.json", b"{}")
    with pytest.raises(storage.CorruptError, match=re.escape(repr(name))):
        mirror_runs.pull_run(run, URL)
    manifest = json.dumps({"files": {name: {"bytes": 7, "sha256": "?"}}}).encode()
    with pytest.raises(storage.CorruptError, match=re.escape(repr(name))):
        mirror.pull(there, "stores/one", tmp_path / "stores" / "one", manifest)
    assert not list(tmp_path.rglob("*outside*"))


def test_a_full_disk_is_not_the_remotes_fault(server: s3.Store, tmp_path: Path) -> None:
    """/dev/full refuses what is written, as a disk without room does."""
    here = tmp_path / "file"
    here.write_bytes(b"content")
    there = Remote("s3://bucket")
    there.upload(here, "file")
    (tmp_path / ".copy.part").symlink_to("/dev/full")
    before = len(server.log)
    with pytest.raises(OSError, match=r"No space left on device.*copy") as error:
        there.download("file", tmp_path / "copy", 7, hashlib.sha256(b"content").hexdigest())
    assert not isinstance(error.value, RemoteError)
    assert len([seen for seen in server.log[before:] if seen.method == "GET"]) == 1


def test_the_longest_unused_stores_make_room(
    server: s3.Store, tmp_path: Path, make_store: Callable[..., Store]
) -> None:
    homes = [make_store(tmp_path / str(seed), seed=seed) for seed in range(4)]
    for made in homes[:3]:
        mirror_stores.push_store(made.path.parents[1], URL, made.fingerprint)
    home, each = tmp_path / "home", sum(map(len, content(homes[0].path).values())) / 1e9
    for made in homes[:2]:
        assert mirror_stores.pull_store(home, URL, made.fingerprint, 2.5 * each)
    mirror_stores.use(home / "stores" / homes[0].fingerprint)
    assert mirror_stores.pull_store(home, URL, homes[2].fingerprint, 2.5 * each)
    there = {path.name for path in (home / "stores").glob("[0-9a-f]*")}
    assert there == {homes[0].fingerprint, homes[2].fingerprint}
    with pytest.raises(OSError, match="of image stores that are in use"):
        mirror_stores.pull_store(home, URL, homes[1].fingerprint, 1.5 * each)
    assert (home / "stores" / homes[0].fingerprint).is_dir()
    with pytest.raises(OSError, match=r"data\.cache_gb=.* is too little for a store of"):
        mirror_stores.pull_store(home, URL, homes[1].fingerprint, 0.5 * each)
    shutil.copytree(homes[3].path, home / "stores" / homes[3].fingerprint)  # the only copy there is
    with pytest.raises(OSError, match="of image stores that are in use, or that s3://bucket/team does not have"):
        mirror_stores.pull_store(home, URL, homes[1].fingerprint, 1.5 * each)
    assert (home / "stores" / homes[3].fingerprint).is_dir()


@pytest.fixture
def three_at_the_remote(
    server: s3.Store, tmp_path: Path, make_store: Callable[..., Store]
) -> tuple[list[Store], Path, float]:
    """Stores of the same size that the remote has, an empty home to copy them to, and their size in GB."""
    made = [make_store(tmp_path / str(seed), seed=seed) for seed in range(3)]
    for one in made:
        mirror_stores.push_store(one.path.parents[1], URL, one.fingerprint)
    return made, tmp_path / "home", sum(map(len, content(made[0].path).values())) / 1e9


def test_only_what_the_remote_has_the_same_of_makes_room_and_half_a_copy_does_not_count(
    three_at_the_remote: tuple[list[Store], Path, float],
) -> None:
    made, home, each = three_at_the_remote
    assert mirror_stores.pull_store(home, URL, made[0].fingerprint, 9)
    shutil.copytree(made[1].path, home / "stores" / f".pull-{made[1].fingerprint}")
    Remote(URL).write(f"stores/{made[0].fingerprint}/manifest.json", b"{")
    with pytest.raises(OSError, match=rf"holds {each:.2f} GB of image stores"):
        mirror_stores.pull_store(home, URL, made[2].fingerprint, 1.5 * each)
    assert mirror_stores.pull_store(home, URL, made[2].fingerprint, 2.5 * each)
    assert (home / "stores" / made[0].fingerprint).is_dir()


def test_a_store_that_another_process_has_removed_is_not_in_use(
    tmp_path: Path, make_store: Callable[..., Store]
) -> None:
    made = make_store(tmp_path / "home")
    assert mirror_stores.use(made.path)
    aside = tmp_path / "aside"
    made.path.rename(aside)
    assert not mirror_stores.use(made.path)
    shutil.copytree(aside, made.path)  # as if it was copied again
    with mirror_stores._alone(made.path) as alone:
        assert alone, "the lock was the former's"
    assert mirror_stores.use(made.path)
    with mirror_stores._alone(made.path) as alone:
        assert not alone


def test_a_store_is_in_use_from_before_it_is_verified(
    server: s3.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verifying LSUN's takes minutes, in which another process may look for room."""
    path = tmp_path / "stores" / stages.ingest(digits(tmp_path)).fingerprint
    os.close(mirror_stores._used.pop(path))  # as another process finds it
    opened, seen = Store.open, []

    def watched(*given: Any) -> Store:
        with mirror_stores._alone(path) as alone:
            seen.append(alone)
        return opened(*given)

    monkeypatch.setattr(Store, "open", watched)
    stages.ingest(digits(tmp_path))
    assert seen
    assert not any(seen)


def test_a_bucket_that_is_not_there_is_named(server: s3.Store) -> None:
    with pytest.raises(FileNotFoundError, match=r"writing s3://nowhere/team/a: .*bucket does not exist"):
        Remote("s3://nowhere/team").write("a", b"")


def test_of_stores_that_nobody_uses_the_one_used_last_stays(
    three_at_the_remote: tuple[list[Store], Path, float],
) -> None:
    made, home, each = three_at_the_remote
    for recent in (0, 1):
        for number in (0, 1):
            assert mirror_stores.pull_store(home, URL, made[number].fingerprint, 9)
            time_of_use = 2_000_000_000 if number == recent else 1_000_000_000
            os.utime(home / "stores" / made[number].fingerprint, (time_of_use, time_of_use))
        assert mirror_stores.pull_store(home, URL, made[2].fingerprint, 2.5 * each)
        left = {path.name for path in (home / "stores").glob("[0-9a-f]*")}
        assert left == {made[recent].fingerprint, made[2].fingerprint}
        shutil.rmtree(home / "stores" / made[2].fingerprint)
    before = time.time()
    mirror_stores.use(home / "stores" / made[1].fingerprint)
    assert (home / "stores" / made[1].fingerprint).stat().st_mtime >= before


def test_an_interrupted_copy_sends_and_fetches_only_what_is_missing(
    server: s3.Store, tmp_path: Path, make_store: Callable[..., Store]
) -> None:
    made = make_store(tmp_path / "a")
    server.faults(500, times=math.inf, method="PUT", contains="train-00000")
    with pytest.raises(RemoteError):
        mirror_stores.push_store(tmp_path / "a", URL, made.fingerprint)
    server.clear()
    mirror_stores.push_store(tmp_path / "a", URL, made.fingerprint)
    sent = [seen.path.rpartition("/")[2] for seen in server.log if seen.method == "PUT"]
    assert sent == ["train-00000.npy", "manifest.json"]
    server.faults(500, times=math.inf, method="GET", contains="train-00000")
    with pytest.raises(RemoteError):
        mirror_stores.pull_store(tmp_path / "b", URL, made.fingerprint, 1)
    server.clear()
    assert mirror_stores.pull_store(tmp_path / "b", URL, made.fingerprint, 1)
    names = {seen.path.rpartition("/")[2] for seen in server.log if seen.method == "GET"}
    assert names == {"train-00000.npy", "manifest.json"}


@pytest.mark.usefixtures("digits_store")
def test_what_a_copy_of_a_run_lacks_at_any_moment_is_made_again(server: s3.Store, home: Path) -> None:
    """Lines before the checkpoint that they lead to, which is before its being the best; features not at all."""
    run = fabricated.new_run(home)
    fabricated.play(run, 0, 100)
    fabricated.save(run, 100)
    (run.features / "bank").mkdir(parents=True)
    (run.features / "bank" / "train-00000-0.npy").write_bytes(b"features")
    mirror_runs.push_run(run.path, URL)
    sent = [seen.path.partition(f"{run.name}/")[2] for seen in server.log if seen.method == "PUT"]
    order = ["metrics.jsonl", "checkpoints/100/state.pt", "checkpoints/100/manifest.json", "checkpoints/best.json"]
    assert [name for name in sent if name in order] == order
    assert not [name for name in sent if name.startswith("features")]
    shutil.rmtree(run.checkpoints / "100")
    fabricated.save(run, 200)
    before = len(server.log)
    mirror_runs.push_run(run.path, URL)
    gone = [seen.path.partition(f"{run.name}/")[2] for seen in server.log[before:] if seen.method == "DELETE"]
    assert gone == ["checkpoints/100/manifest.json", "checkpoints/100/state.pt"]


def test_what_was_reported_is_at_the_remote(server: s3.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = stages.ingest(digits(tmp_path))
    stages.train(run)
    stages.report(run)
    assert "report.html" in Remote(URL).sizes(f"runs/{run.name}")


def test_a_run_is_gone_on_with_from_its_copy(server: s3.Store, tmp_path: Path) -> None:
    """A machine is lost after half of the steps; another, with nothing but the address, ends what it began."""
    alone = stages.ingest(digits(tmp_path / "alone", "data.remote=null"))
    stages.train(alone)
    first = stages.ingest(digits(tmp_path / "a"))
    stages.train(first)
    there = Remote(URL)
    late = [name for name in there.sizes(f"runs/{first.name}/checkpoints") if name.startswith("4/")]
    there.remove(f"runs/{first.name}/checkpoints/{name}" for name in late)
    server.put(f"bucket/team/runs/{first.name}/samples/", b"")  # a console's "new folder"
    shutil.rmtree(tmp_path / "a")
    assert mirror_runs.pull_run(tmp_path / "c" / "runs" / first.name, URL)
    assert Ledger.load(tmp_path / "c" / "runs" / first.name / "mlflow.json").copied
    again = stages.ingest(digits(tmp_path / "b"))
    assert again.name == first.name == alone.name
    assert checkpoint.steps(again) == [2]
    stages.train(again)
    ours, theirs = (checkpoint.load(run.checkpoints / "4")["generator"] for run in (again, alone))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [line["step"] for line in again.metrics()] == [1, 2, 3, 4]


def test_a_home_that_was_left_behind_is_brought_up_to_date_and_overwrites_nothing(
    server: s3.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One machine stops after the first checkpoint, another ends the training, and then the first is back."""
    first = stages.ingest(digits(tmp_path / "a"))
    stages.train(first)
    stopped = first.path.with_name("stopped")
    shutil.copytree(first.path, stopped)
    shutil.rmtree(stopped / "checkpoints" / "4")
    shutil.rmtree(first.path)
    stopped.rename(first.path)
    kept = Remote(URL).sizes(f"runs/{first.name}")
    with pytest.raises(RemoteError, match="has a checkpoint of step 4, newer than any here"):
        mirror_runs.push_run(first.path, URL)
    assert Remote(URL).sizes(f"runs/{first.name}") == kept

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "download", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stages.ingest(digits(tmp_path / "a"))
    again = stages.ingest(digits(tmp_path / "a", "evaluate.labels=100"))
    assert checkpoint.steps(again) == [2, 4]
    assert [line["step"] for line in again.metrics()] == [1, 2, 3, 4]
    assert Run.open(again.path).experiment.evaluate.labels == 100
    mirror_runs.push_run(again.path, URL)
    assert Remote(URL).sizes(f"runs/{first.name}/checkpoints").keys() == {
        *(f"{step}/{name}" for step in (2, 4) for name in ("manifest.json", "state.pt")),
        "best.json",
    }


def test_scores_made_elsewhere_are_copied_and_not_overwritten_by_older_ones(
    server: s3.Store, home: Path, tmp_path: Path
) -> None:
    run = fabricated.new_run(home)
    fabricated.save(run, 100)
    fabricated.score(run, 100)
    mirror_runs.push_run(run.path, URL)
    other, third = (tmp_path / name / "runs" / run.name for name in ("b", "c"))
    assert mirror_runs.pull_run(other, URL)
    assert mirror_runs.pull_run(third, URL)
    assert not mirror_runs.pull_run(other, URL), "it has everything"
    (other / "scores" / "svm.json").unlink()
    (other / "metrics.jsonl").write_text("not sent yet\n")
    assert mirror_runs.pull_run(other, URL)
    assert content(other / "scores") == content(run.path / "scores")
    assert (other / "metrics.jsonl").read_text() == "not sent yet\n", "only what it lacks"

    storage.write_json(run.path / "scores" / "svm.json", {"newer": True})
    mirror_runs.push_run(run.path, URL)
    mirror_runs.push_run(third, URL)
    assert Remote(URL).read(f"runs/{run.name}/scores/svm.json") == (run.path / "scores" / "svm.json").read_bytes()


@pytest.mark.parametrize("damage", [b"", b"x"])
def test_a_checkpoint_that_was_set_aside_is_not_copied(server: s3.Store, home: Path, damage: bytes) -> None:
    """It had been copied whole, so the copy stays until training comes to that step again."""
    run = fabricated.new_run(home)
    for step in (100, 200):
        fabricated.save(run, step)
    (run.checkpoints / "200" / "state.pt").write_bytes(damage)
    assert checkpoint.latest(run) == run.checkpoints / "100"
    assert (run.checkpoints / "corrupt-200" / "manifest.json").is_file()
    mirror_runs.push_run(run.path, URL)
    there = Remote(URL).sizes(f"runs/{run.name}/checkpoints")
    assert {name.split("/")[0] for name in there} == {"100", "best.json"}


def test_a_checkpoint_that_was_made_again_takes_the_place_of_its_copy(server: s3.Store, home: Path) -> None:
    """Of the same length, as all of a run are, whether the copy was whole or not."""
    run = fabricated.new_run(home)
    fabricated.save(run, 100, 0.5)
    for whole in (True, False):
        mirror_runs.push_run(run.path, URL)
        if not whole:
            Remote(URL).remove([f"runs/{run.name}/checkpoints/100/manifest.json"])
        state = checkpoint.load(run.checkpoints / "100")
        next(iter(state["generator"].values())).add_(1)
        shutil.rmtree(run.checkpoints / "100")
        writer = checkpoint.Writer(run)
        writer.save(state, 0.5)
        writer.close()
        mirror_runs.push_run(run.path, URL)
        other = run.path.with_name(f"other-{whole}") / run.name
        assert mirror_runs.pull_run(other, URL)
        assert content(other / "checkpoints" / "100") == content(run.checkpoints / "100")
        storage.read_manifest(other / "checkpoints" / "100")


def test_processes_that_want_the_same_store_copy_it_once(server: s3.Store, tmp_path: Path) -> None:
    made = ingest(digits(tmp_path / "a").data, tmp_path / "a")
    server.log.clear()
    script = f"""
        from pathlib import Path
        from dcgan import mirror_stores
        assert mirror_stores.pull_store(Path({str(tmp_path / "b")!r}), {URL!r}, {made!r}, 1)
    """
    processes = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    files = content(tmp_path / "b" / "stores" / made)
    assert files == content(tmp_path / "a" / "stores" / made)
    read = [seen.path.rpartition("/")[2] for seen in server.log if seen.method == "GET" and made in seen.path]
    assert sorted(name for name in read if name in files) == sorted(files)
    Store.open(tmp_path / "b", made, verify=True)


def test_a_remote_that_is_away_does_not_stop_training(server: s3.Store, tmp_path: Path) -> None:
    run = stages.ingest(digits(tmp_path / "a"))
    server.faults(500, times=math.inf, method="PUT", contains="runs")
    with pytest.raises(RemoteError, match="after 6 attempts"):
        stages.train(run)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["2", "4", "best.json"], "trained to the end"
    server.clear()
    mirror_runs.push_run(run.path, URL)
    assert "checkpoints/4/manifest.json" in Remote(URL).sizes(f"runs/{run.name}")


@pytest.mark.parametrize("moment", [(Remote, "read"), (storage, "read_manifest"), (Remote, "upload")])
def test_a_checkpoint_that_is_removed_while_it_is_copied_does_not_end_the_copying(
    server: s3.Store, home: Path, moment: tuple[object, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fabricated.new_run(home)
    for step in (100, 200):
        fabricated.save(run, step, 1 / step)
    original = getattr(*moment)

    def removing(*arguments: object, **others: object) -> object:
        if any("checkpoints/100" in str(argument) for argument in arguments):
            shutil.rmtree(run.checkpoints / "100", ignore_errors=True)
        return original(*arguments, **others)

    monkeypatch.setattr(mirror_runs, "EVERY", 0.01)
    monkeypatch.setattr(*moment, removing)
    with mirror_runs.follow(run.path, URL):
        (copying,) = [thread for thread in threading.enumerate() if thread.name == "mirror"]
        while copying.is_alive() and "200/manifest.json" not in Remote(URL).sizes(f"runs/{run.name}/checkpoints"):
            time.sleep(0.05)
        assert copying.is_alive()
    there = {name.split("/")[0] for name in Remote(URL).sizes(f"runs/{run.name}/checkpoints")}
    assert there == {"200", "best.json"}, "and what had been copied of it is removed"


def test_checkpoints_that_are_gone_here_go_there(server: s3.Store, tmp_path: Path) -> None:
    run = stages.ingest(digits(tmp_path / "a", "train.steps=10", "train.keep=1"))
    stages.train(run)
    here = {path.name for path in run.checkpoints.iterdir() if path.is_dir()}
    there = {name.split("/")[0] for name in Remote(URL).sizes(f"runs/{run.name}/checkpoints") if "/" in name}
    assert here == there
    assert len(here) <= 2


def test_killed_at_random_moments_an_upload_ends_whole(
    server: s3.Store, tmp_path: Path, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten kills while a store of ten shards is copied; a reader sees no store until it is complete."""
    monkeypatch.setattr("dcgan.data.shards.BYTES", 64 * 3 * 32 * 32)
    made = make_store(tmp_path / "a", train=600)
    assert len(made.shards("train")) > 9
    script = f"""
        from pathlib import Path
        from dcgan import mirror_stores
        mirror_stores.push_store(Path({str(tmp_path / "a")!r}), {URL!r}, {made.fingerprint!r})
    """
    server.faults("slow", times=math.inf, method="PUT", seconds=0.05)
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
        seen = len(server.log)
        while len(server.log) == seen and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if mirror_stores.pull_store(tmp_path / "b", URL, made.fingerprint, 1):
            break
    server.clear()
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    shutil.rmtree(tmp_path / "b", ignore_errors=True)
    assert mirror_stores.pull_store(tmp_path / "b", URL, made.fingerprint, 1)
    assert content(tmp_path / "b" / "stores" / made.fingerprint) == content(made.path)
    Store.open(tmp_path / "b", made.fingerprint, verify=True)


def test_another_address_gets_the_whole_run_and_so_does_one_that_was_emptied(server: s3.Store, home: Path) -> None:
    run = fabricated.new_run(home)
    fabricated.finished(run)
    fabricated.save(run, 100, 0.5)
    mirror_runs.push_run(run.path, URL)
    whole = Remote(URL).sizes(f"runs/{run.name}")
    assert {"metrics.jsonl", "experiment.json", "checkpoints/best.json", "checkpoints/100/state.pt"} <= set(whole)
    mirror_runs.push_run(run.path, "s3://bucket/other")
    other = Remote("s3://bucket/other")
    assert other.sizes(f"runs/{run.name}") == whole
    fabricated.play(run, 600, 700)
    mirror_runs.push_run(run.path, URL)
    mirror_runs.push_run(run.path, "s3://bucket/other")
    assert other.read(f"runs/{run.name}/metrics.jsonl") == (run.path / "metrics.jsonl").read_bytes()
    there = Remote(URL)
    there.remove(f"runs/{run.name}/{name}" for name in whole)
    mirror_runs.push_run(run.path, URL)
    assert there.sizes(f"runs/{run.name}").keys() == whole.keys()


@pytest.mark.parametrize("fault", [503, "reset"])
def test_attempts_are_not_nested_in_those_of_the_libraries(
    server: s3.Store, fault: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
    server.faults(fault, times=math.inf)
    with pytest.raises(RemoteError, match=f"after {remote.ATTEMPTS} attempts"):
        Remote(URL).sizes()
    assert len(server.log) == remote.ATTEMPTS


def test_each_client_has_the_credentials_of_its_time_and_none_reads_the_services_anew(
    server: s3.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporary credentials are renewed while a run trains for days."""
    assert Remote(URL).sizes() == {}
    read: list[str] = []
    load = JSONFileLoader.load_file
    monkeypatch.setattr(JSONFileLoader, "load_file", lambda own, path: read.append(path) or load(own, path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "renewed")
    Remote(URL).write("a", b"")
    assert "Credential=renewed/" in server.log[-1].headers["Authorization"]
    assert "Credential=renewed/" not in server.log[0].headers["Authorization"]
    assert read == []


def test_ctrl_c_does_not_wait_for_a_remote_that_does_not_answer(
    server: s3.Store, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked, ended = fabricated.new_run(home), threading.Event(), threading.Event()

    def hanging(*_: object) -> None:
        asked.set()
        ended.wait()

    monkeypatch.setattr(mirror_runs, "push_run", hanging)
    monkeypatch.setattr(mirror_runs, "PATIENCE", 0.01)
    with pytest.raises(KeyboardInterrupt), mirror_runs.follow(run.path, URL):
        raise KeyboardInterrupt
    assert asked.wait(60), "the last copy is begun"
    ended.set()


def test_a_run_that_was_interrupted_is_copied(server: s3.Store, home: Path) -> None:
    run = fabricated.new_run(home)
    fabricated.save(run, 100, 0.5)
    with pytest.raises(KeyboardInterrupt), mirror_runs.follow(run.path, URL):
        raise KeyboardInterrupt
    assert "checkpoints/100/manifest.json" in Remote(URL).sizes(f"runs/{run.name}")
