"""Search by Ray Tune: results in order, trials that fail or die, and one that goes on where it was killed."""

import functools
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcgan import cluster_search, cluster_session
from dcgan.config import Model
from dcgan.evaluate import supervised_search

pytestmark = pytest.mark.slow

Json = dict[str, Any]


@pytest.fixture(scope="module")
def ray_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("home")
    with cluster_session.session(home, workers=2):
        yield home


def attempts(directory: Path) -> dict[str, int]:
    """How often each trial was begun."""
    return {file.name: file.stat().st_size for file in directory.glob("begun-*")}


def test_results_are_in_order_and_what_fails_or_dies_stops_no_other(
    ray_home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def trial(settings: Json) -> Json:
        number = settings["number"]
        with (tmp_path / f"begun-{number}").open("a") as file:
            file.write("x")
            begun = file.tell()
        if number == 1 and not (tmp_path / "mended").exists():
            raise ValueError("a cause\nin two lines")
        if number == 2 and begun == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 4:
            time.sleep(1)  # ends after the others
        return {"square": number**2}

    trials = [{"number": number} for number in (4, 0, 1, 2)]
    search = functools.partial(cluster_search.search, trial, trials, ray_home, tmp_path / "kept")
    with caplog.at_level(logging.INFO, "dcgan.cluster_search"):
        found = search()
    assert found == [{"square": 16}, {"square": 0}, None, {"square": 4}]
    assert "a trial failed: ValueError: a cause in two lines" in caplog.messages
    assert "4 of 4 trials have ended" in caplog.messages
    assert attempts(tmp_path) == {"begun-0": 1, "begun-1": 1, "begun-2": 2, "begun-4": 1}

    (tmp_path / "mended").touch()
    assert search() == [{"square": 16}, {"square": 0}, {"square": 1}, {"square": 4}]
    assert attempts(tmp_path) == {"begun-0": 1, "begun-1": 2, "begun-2": 2, "begun-4": 1}, "only what had failed"


def test_that_all_fail_or_that_there_is_no_gpu_is_an_error(ray_home: Path, tmp_path: Path) -> None:
    def fail(settings: Json) -> Json:
        raise ValueError("wrong")

    with pytest.raises(cluster_session.WorkerError, match=r"^all of 2 trials failed, the first: ValueError: wrong$"):
        cluster_search.search(fail, [{"n": 0}, {"n": 1}], ray_home, tmp_path / "kept")
    with pytest.raises(ValueError, match=r"a trial needs 99 of a GPU, and Ray has"):
        cluster_search.search(fail, [{"n": 0}], ray_home, tmp_path / "kept", gpus=99)


def test_a_killed_search_goes_on_from_the_trials_that_are_done(ray_home: Path, tmp_path: Path) -> None:
    script = f"""
        import time
        from pathlib import Path
        from dcgan.cluster_search import search

        def trial(settings):
            with Path({str(tmp_path)!r}, f"begun-{{settings['n']}}").open("a") as file:
                file.write("x")
            if settings["n"] > 2:
                time.sleep(600)
            return {{"n": settings["n"]}}

        search(trial, [{{"n": n}} for n in range(6)], Path({str(tmp_path)!r}), Path({str(tmp_path / "kept")!r}))
    """
    (tmp_path / "user").mkdir()
    environment = {**os.environ, "HOME": str(tmp_path / "user")}
    environment.pop("RAY_AUTH_MODE", None)
    environment.pop("RAY_AUTH_TOKEN", None)
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "kept").glob("*.json"))) < 3 or len(attempts(tmp_path)) < 4:
            assert driver.poll() is None
            assert time.monotonic() < deadline, "no three trials within 120 s"
            time.sleep(0.1)
    finally:
        driver.kill()
    assert driver.communicate()[0] == b"", "tables on the screen"
    assert list((tmp_path / "user").iterdir()) == []
    done = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}
    begun = attempts(tmp_path)

    def trial(settings: Json) -> Json:
        with (tmp_path / f"begun-{settings['n']}").open("a") as file:
            file.write("x")
        return {"n": settings["n"]}

    found = cluster_search.search(trial, [{"n": n} for n in range(6)], ray_home, tmp_path / "kept")
    assert found == [{"n": n} for n in range(6)]
    again = {name for name, count in attempts(tmp_path).items() if count > begun.get(name, 0)}
    assert again == {"begun-3", "begun-4", "begun-5"}
    assert done.items() <= {file.name: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}.items()


def test_the_supervised_baseline_is_the_same_as_without_ray(ray_home: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = rng.integers(0, 200, (60, 1, 28, 28), np.uint8) + (labels * 20).astype(np.uint8)[:, None, None, None]
    splits = [(images[part::3], labels[part::3]) for part in range(3)]
    score = functools.partial(supervised_search.score, *splits, Model(width=2), labels_per_class=8, trials=2, epochs=3)
    by_ray = functools.partial(cluster_search.search, home=ray_home, directory=tmp_path / "ray")
    assert score(tmp_path / "ray", maker=by_ray) == score(tmp_path / "here")
