"""A run: the directory that holds everything one experiment produced, and the paths in it.

experiment.json   the experiment and the fingerprints of its image store and of the one it is scored on
metrics.jsonl     one line every `train.log_every` steps
events.jsonl      what went wrong or looked wrong in training
environment.json  where and with what it was trained
checkpoints/      <step>/ and best.json
samples/          <step>.png
features/         <source>-<step>-<fingerprint>/, see dcgan/feature_banks.py
scores/           <protocol>.json
export/           weights as safetensors
report.html       the page
mlflow.json       what has been delivered to MLflow
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcgan import storage
from dcgan.config import Experiment, digest, validate
from dcgan.data.store import Store

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Run:
    """The paths of a run, and what is in its files. `path` is `<home>/runs/<name>`."""

    path: Path
    experiment: Experiment
    fingerprint: str
    scored: str

    @classmethod
    def create(cls, experiment: Experiment, store: Store, scored: Store | None = None) -> "Run":
        """The run of this experiment on this store: a new directory, or the one that is already there.

        scored: the images that features are scored on; None: those of `store`.

        The name is a function of data, model, training and images, so the same command finds its run again, here or
        at `data.remote`; `compute` and `evaluate` may differ from last time and are recorded anew.
        """
        name = f"{store.dataset}-{digest([experiment.identity(), store.fingerprint])}"
        run = cls(experiment.home / "runs" / name, experiment, store.fingerprint, (scored or store).fingerprint)
        if experiment.data.remote:
            from dcgan import mirror_runs

            mirror_runs.pull_run(run.path, experiment.data.remote)
        run.record()
        return run

    def record(self) -> None:
        """Write experiment.json, which all processes of the run read. Raises BusyError if one holds the run."""
        content = {
            "experiment": self.experiment.model_dump(mode="json"),
            "fingerprint": self.fingerprint,
            "scored": self.scored,
        }
        file = self.path / "experiment.json"
        if not file.is_file() or file.read_text() != storage.dump_json(content):
            self.path.mkdir(parents=True, exist_ok=True)
            with self.lock():
                storage.write_json(file, content)

    @classmethod
    def open(cls, path: Path) -> "Run":
        """The run in a directory. Raises FileNotFoundError or ValueError, naming the path, if there is none."""
        file = path / "experiment.json"
        if not file.is_file():
            raise FileNotFoundError(f"{path} is not a run: it has no experiment.json")
        recorded = json.loads(file.read_text())
        try:
            return cls(path.absolute(), validate(recorded["experiment"]), recorded["fingerprint"], recorded["scored"])
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{file} was written by another version of this package, which can still use it; start a new run "
                f"here: {error}"
            ) from error

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def home(self) -> Path:
        """The home that the run lies in, wherever that has been copied or mounted."""
        return self.path.parent.parent

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def features(self) -> Path:
        return self.path / "features"

    def store(self, verify: bool = False, share: tuple[int, int] = (0, 1)) -> Store:
        """The images trained on, copied from `data.remote` first if they are not here; see `Store.open`."""
        return self._open(self.fingerprint, verify, share)

    def scored_store(self) -> Store:
        """The images that features are scored on: those trained on, unless `evaluate.images` says otherwise."""
        return self._open(self.scored)

    def _open(self, fingerprint: str, verify: bool = False, share: tuple[int, int] = (0, 1)) -> Store:
        data = self.experiment.data
        if data.remote:
            from dcgan import mirror_stores

            mirror_stores.used_or_copied(self.home, data.remote, fingerprint, data.cache_gb)
        return Store.open(self.home, fingerprint, verify, share)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far; a last line that is still being written is left out."""
        return read_lines(self.path / "metrics.jsonl")

    def scores(self) -> dict[str, dict[str, Any]]:
        """Protocol to the content of its scores/<protocol>.json, see `stages.evaluate`; not those for other images."""
        found = {file.stem: json.loads(file.read_text()) for file in sorted((self.path / "scores").glob("*.json"))}
        return {name: content for name, content in found.items() if content.get("images", self.scored) == self.scored}

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Hold the run for training it, from before its workers start. Raises BusyError if it is held or written."""
        with storage.hold(self.path / ".claim", f"run {self.name}"):
            with self.lock():
                pass
            yield

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for writing. Raises BusyError if it is held."""
        with storage.hold(self.path / ".lock", f"run {self.name}"):
            yield


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; [] if it does not exist."""
    if not path.exists():
        return []
    complete, _, _ = path.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in complete.split(b"\n") if line]


@contextmanager
def watched(run: Run, report: Report | None) -> Iterator[None]:
    """Call `report` with each new line of metrics.jsonl, once a second, from a thread."""
    if report is None:
        yield
        return
    stop = threading.Event()

    def watch() -> None:
        seen = max((line["step"] for line in run.metrics()), default=0)
        while True:
            last = stop.wait(1.0)
            lines = run.metrics()
            seen = min(seen, max((line["step"] for line in lines), default=0))  # a restart cuts the newest ones
            for line in lines:
                if line["step"] > seen:
                    seen = line["step"]
                    report(line)
            if last:
                return

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
