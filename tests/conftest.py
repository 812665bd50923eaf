"""Real images and small stores for every test."""

import os

# Before torch is imported, here and in every process a test starts: on tensors as small as the tests', two threads
# wait for each other more than they compute, many times more on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"
# Ray's workers have two all the same. Those that wait give their core up, since three suites run at once:
# tests/benchmarks/bench_waiting.py.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")  # as the Makefile has it
# A shell that has read var/env names the servers in use, whose record and flow runs are not the tests'.
for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RAY_ADDRESS"):
    os.environ.pop(name, None)

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from fabricated import write_store

from dcgan import tracking
from dcgan.config import build
from dcgan.data import store
from dcgan.data.ingest import ingest

# No test times anything: an example on a busy machine may take as long as it takes.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
# And a delivery to MLflow, too: one that goes on after its training has ended would be in the way of the next test.
tracking.PATIENCE = threading.TIMEOUT_MAX

RESTORE = Path(__file__).parents[2] / "shared" / "data" / "restore.py"


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `cifar-10-batches-py/`, `MNIST/raw/`, `faces/` and `rooms/`; read-only for tests."""
    if given := os.environ.get("DCGAN_TEST_DATA"):
        return Path(given)
    if not RESTORE.is_file():
        pytest.skip("real images are absent: set DCGAN_TEST_DATA, or have ../shared/data/restore.py")
    restored = tmp_path_factory.mktemp("real_data")
    subprocess.run([sys.executable, str(RESTORE), str(restored)], check=True, stdout=subprocess.DEVNULL)
    return restored


@pytest.fixture(scope="session")
def digits_store(tmp_path_factory: pytest.TempPathFactory) -> store.Store:
    """The store of the preset `digits`: 1,412 + 385 real images, 32 px, one channel; read-only for tests."""
    home = tmp_path_factory.mktemp("digits")
    return store.Store.open(home, ingest(build("digits").data, home))


@pytest.fixture
def home(tmp_path: Path, digits_store: store.Store) -> Path:
    """A home of the test's own, in which the preset `digits` has been ingested."""
    shutil.copytree(digits_store.path.parent, tmp_path / "home" / "stores")
    return tmp_path / "home"


@pytest.fixture(scope="session")
def make_store() -> Callable[..., store.Store]:
    """make_store(home, size=32, channels=3, classes=2, train=64, test=16, seed=0): random; classes=0: no labels."""
    return _make_store


def _make_store(
    home: Path, size: int = 32, channels: int = 3, classes: int = 2, train: int = 64, test: int = 16, seed: int = 0
) -> store.Store:
    generator = np.random.default_rng(seed)
    names = tuple(str(label) for label in range(classes))
    splits = {
        split: [
            (generator.integers(0, 256, (channels, size, size), np.uint8), i % classes if classes else -1)
            for i in range(count)
        ]
        for split, count in (("train", train), ("test", test))
    }
    description = store.Description("random", names, size, channels, "none")
    return write_store(home, description, splits, [store.SourceFile("random", 0, "00")])
