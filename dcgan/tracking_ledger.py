"""The ledger of a run, `mlflow.json`: what has arrived at MLflow, and what the MLflow run should look like."""

import json
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Self

from dcgan import storage

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass
class Ledger:
    """What has been delivered to the run's MLflow run, and what that should look like. Times are in ms since 1970.

    images: metrics up to this many images seen have arrived. sent: item to the version of it that has arrived.
    pending: items being sent; after a crash or a lost answer, the server is asked whether one arrived. server: where
    the MLflow run is. copied: it came from another machine and may be older than what that one delivered last, so the
    server is asked about the rest.
    """

    path: Path
    run_id: str = ""
    experiment_id: str = ""
    token: str = ""
    status: Status = "RUNNING"
    started: int = 0
    ended: int | None = None
    tags: dict[str, str] = field(default_factory=dict)
    images: int = -1
    sent: dict[str, str] = field(default_factory=dict)
    pending: list[str] = field(default_factory=list)
    server: str = ""
    copied: bool = False

    @classmethod
    def load(cls, path: Path) -> Self:
        known = json.loads(path.read_text()) if path.is_file() else {"started": milliseconds()}
        return cls(path, **known)

    def save(self) -> None:
        values = asdict(self)
        del values["path"]
        storage.write_json(self.path, values)

    def begin(self, item: str) -> None:
        self.pending = [*(other for other in self.pending if other != item), item]
        self.save()

    def end(self, item: str, version: str) -> None:
        self.drop(item)
        self.sent[item] = version
        self.save()

    def drop(self, item: str) -> None:
        self.pending = [other for other in self.pending if other != item]
        self.sent.pop(item, None)
        self.save()

    def forget(self) -> None:
        """Start over, for a new MLflow run; what the run should look like stays."""
        self.run_id, self.experiment_id, self.token = "", "", secrets.token_hex(8)
        self.images, self.sent, self.pending, self.copied = -1, {}, [], False

    def trust(self) -> None:
        """What it lacks has not arrived: all of it has just been delivered."""
        if self.copied:
            self.copied = False
            self.save()


def milliseconds() -> int:
    return int(time.time() * 1000)
