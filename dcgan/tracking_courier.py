"""Makes one delivery to MLflow: what the run directory holds and the ledger lacks. Only `tracking` imports it."""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from PIL import Image

from dcgan import checkpoint, storage, summary, tracking, tracking_models, tracking_run
from dcgan.config import digest
from dcgan.data import catalogue
from dcgan.data.store import Store
from dcgan.run import Run
from dcgan.tracking import Delivery
from dcgan.tracking_ledger import Ledger

BATCH = 1000  # metric values MLflow takes in one request
UPLOAD_SECONDS = 120
MARKER = "train/images_per_second"  # always finite and in every line: its last step is how far MLflow's record goes
FILES = ("*.json", "*.jsonl", "report.html", "checkpoints/best.json", "scores/*", "export/*")


class Courier:
    """Delivers one run. Every method sends what is missing of one kind and can be called again at any time."""

    def __init__(self, run: Run, ledger: Ledger) -> None:
        self.run, self.ledger = run, ledger
        self.client = tracking_run.connect(run.home)
        self.known = tracking_run.open_run(self.client, run, ledger)
        self.delivery = Delivery(ledger.run_id, tracking.url(run))

    def progress(self) -> None:
        """Deliver what changes while training runs."""
        self.data()
        self.metrics()
        self.samples()
        self.tags()
        tracking_run.set_status(self.client, self.ledger, self.known)
        self.ledger.trust()

    def everything(self) -> None:
        """Deliver everything, the large items last."""
        self.data()
        self.metrics()
        self.samples()
        self.tags()
        self.scores()
        self.files()
        self.checkpoints()
        self.models()
        tracking_run.set_status(self.client, self.ledger, self.known)
        self.ledger.trust()

    def data(self) -> None:
        """The image store as the run's training data, under its fingerprint."""
        self._once("data", self.run.fingerprint, self._data)

    def _data(self, again: bool) -> None:
        store = self.run.home / "stores" / self.run.fingerprint
        here = (store / storage.MANIFEST).is_file()  # it may have been removed since
        profile = catalogue.profile(Store.open(self.run.home, self.run.fingerprint)) if here else {}
        dataset = Dataset(
            name=summary.dataset(self.run),
            digest=self.run.fingerprint,
            source_type="local",
            source=json.dumps({"uri": str(store)}),
            profile=json.dumps(profile),
        )
        context = [InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(self.ledger.run_id, [DatasetInput(dataset, context)])

    # What training records.

    def metrics(self) -> None:
        """Lines of metrics.jsonl beyond the last one sent: lines rewritten after a resume have arrived already."""
        ledger = self.ledger
        if "metrics" in ledger.pending or ledger.copied:
            history = self.client.get_metric_history(ledger.run_id, MARKER)
            ledger.images = max([ledger.images, *(past.step for past in history)])
            ledger.end("metrics", str(ledger.images))
        lines = [line for line in self.run.metrics() if line["images"] > ledger.images]
        for batch in _batches(_timed(lines, self.run.path / "metrics.jsonl")):
            ledger.begin("metrics")
            metrics = [metric for when, line in batch for metric in _metrics(when, line)]
            self.client.log_batch(ledger.run_id, metrics=metrics, synchronous=True)
            ledger.images = batch[-1][1]["images"]
            ledger.end("metrics", str(ledger.images))
            self.delivery.metrics += len(metrics)

    def samples(self) -> None:
        """Sample grids, as MLflow's time-lapse `samples`, by images seen."""
        for path in sorted(self.run.samples.glob("*.png")):
            self.delivery.images += self._once(f"samples/{path.name}", "", self._sample, path)

    def _sample(self, path: Path, again: bool) -> None:
        images = int(path.stem) * self.run.experiment.train.batch_size
        there = [file.path for file in self.client.list_artifacts(self.ledger.run_id, "images")] if again else []
        if not any(f"samples+step+{images}+" in name and name.endswith(".webp") for name in there):
            with Image.open(path) as image:
                self.client.log_image(self.ledger.run_id, image, key="samples", step=images, synchronous=True)

    def tags(self) -> None:
        """Code version, packages, what went wrong, the score table as the run's description, the caller's tags."""
        tags = _tags(self.run) | self.ledger.tags
        self._once("tags", digest(tags), self._tag, tags)

    def _tag(self, tags: dict[str, str], again: bool) -> None:
        self.client.log_batch(self.ledger.run_id, tags=[RunTag(*item) for item in tags.items()], synchronous=True)

    # What the later stages record.

    def scores(self) -> None:
        """Scores as metrics, controls under their own names; at the number of images the run has seen.

        Not the scored checkpoint: MLflow shows the value of the highest step, and a choice may go back to an earlier
        one.
        """
        for path in sorted((self.run.path / "scores").glob("*.json")):
            self._once(f"metrics of {path.name}", storage.sha256(path), self._score, path)

    def _score(self, path: Path, again: bool) -> None:
        content = json.loads(path.read_text())
        lines = self.run.metrics()
        step = lines[-1]["images"] if lines else 0
        when = int(path.stat().st_mtime * 1000)  # the same each time, so that MLflow drops what it has already
        values = summary.flat(content["scores"])
        metrics = [Metric(key, value, when, step) for key, value in values.items() if math.isfinite(value)]
        self.client.log_batch(self.ledger.run_id, metrics=metrics, synchronous=True)
        self.delivery.metrics += len(metrics)

    def files(self) -> None:
        """Settings, records, scores, report and exported weights, under the paths that they have in the run."""
        files = {path for pattern in FILES for path in self.run.path.glob(pattern) if path.is_file()}
        whole = {path for path in files if not path.name.startswith(".")}  # a kill leaves others, half written
        for path in sorted(whole - {self.ledger.path}):
            name = path.relative_to(self.run.path).as_posix()
            self.delivery.files += self._once(name, storage.sha256(path), self._file, path)

    def _file(self, path: Path, again: bool) -> None:
        folder = path.parent.relative_to(self.run.path).as_posix()
        self.client.log_artifact(self.ledger.run_id, str(path), None if folder == "." else folder)

    def checkpoints(self) -> None:
        """The newest and the best checkpoint, as directories that `dcgan sample` takes; older ones are removed."""
        wanted = {f"checkpoints/{path.name}": path for path in _checkpoints(self.run)}
        for name, path in wanted.items():
            version = storage.sha256(path / storage.MANIFEST)
            self.delivery.files += self._once(name, version, self._checkpoint, path, name)
        for name in [*self.ledger.sent, *self.ledger.pending]:
            if name.startswith("checkpoints/") and name not in wanted and not name.endswith(".json"):
                repository = get_artifact_repository(self.known.info.artifact_uri, tracking.uri(self.run.home))
                repository.delete_artifacts(name)
                self.ledger.drop(name)

    def _checkpoint(self, path: Path, name: str, again: bool) -> None:
        with _time_for_uploads():
            self.client.log_artifacts(self.ledger.run_id, str(path), name)

    def models(self) -> None:
        """Generator and feature extractor as `feature_banks.extract` exported them, loadable without this package."""
        for weights in sorted((self.run.path / "export").glob("*.safetensors")):
            self.delivery.models += self._once(f"model {weights.stem}", storage.sha256(weights), self._model, weights)

    def _model(self, weights: Path, again: bool) -> None:
        with _time_for_uploads():
            tracking_models.log(self.client, self.run, self.ledger, weights, again)

    def _once(self, item: str, version: str, send: Callable[..., None], *arguments: Any) -> bool:
        """Send one item unless this version of it has arrived; returns whether it was sent.

        `again` tells `send` that an earlier attempt may have arrived after all.
        """
        if self.ledger.sent.get(item) == version:
            return False
        again = item in self.ledger.pending or self.ledger.copied
        self.ledger.begin(item)
        send(*arguments, again=again)
        self.ledger.end(item, version)
        return True


Timed = tuple[int, dict[str, Any]]  # a line of metrics.jsonl and when it was written, in ms since 1970


def _timed(lines: list[dict[str, Any]], file: Path) -> list[Timed]:
    """The last lines of the file with their times: the file's own, minus the seconds of the lines that follow."""
    timed: list[Timed] = []
    when = file.stat().st_mtime if lines else 0.0
    for line in reversed(lines):
        timed.append((int(when * 1000), line))
        when -= line["seconds"]
    return timed[::-1]


def _batches(lines: list[Timed]) -> Iterator[list[Timed]]:
    """The lines in pieces of at most BATCH values: a piece arrives whole or not at all."""
    size = BATCH // max((len(line) for _, line in lines), default=1)
    for start in range(0, len(lines), size):
        yield lines[start : start + size]


def _metrics(when: int, line: dict[str, Any]) -> list[Metric]:
    return [Metric(f"train/{key}", value, when, line["images"]) for key, value in _numbers(line).items()]


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    """The finite values: MLflow stores inf as 1.8e308, which ruins a chart. `_tags` reports the rest."""
    values = {key: value for key, value in line.items() if key not in ("step", "images", "seconds")}
    return {key: value for key, value in values.items() if value is not None and math.isfinite(value)}


def _tags(run: Run) -> dict[str, str]:
    """Everything about a run that is text."""
    file = run.path / "environment.json"
    environment = json.loads(file.read_text()) if file.is_file() else {}
    tags = {"fingerprint": run.fingerprint, "mlflow.note.content": summary.markdown(run)}
    tags |= {f"version.{name}": version for name, version in environment.get("packages", {}).items()}
    if environment.get("git_commit"):
        tags["mlflow.source.git.commit"] = environment["git_commit"]
        tags["git_changed"] = str(environment["git_changed"]).lower()
    tags |= {f"event.{e['event']}": f"step {e['step']}: {e['message']}" for e in summary.events(run)}
    for line in reversed(run.metrics()):  # so that the first one stays
        lost = set(line) - set(_numbers(line)) - {"step", "images", "seconds"}
        tags |= {f"not_finite.train/{key}": f"{line[key]} at step {line['step']}" for key in lost}
    return tags


def _checkpoints(run: Run) -> set[Path]:
    return {path for path in (checkpoint.latest(run), checkpoint.best(run)) if path is not None}


@contextmanager
def _time_for_uploads() -> Iterator[None]:
    """Allow for a server that forwards a large file to its own store and answers only when that is done."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    usual = os.environ[name]
    os.environ[name] = str(max(int(usual), UPLOAD_SECONDS))
    try:
        yield
    finally:
        os.environ[name] = usual
