"""Checkpoints: written aside, hashed, then renamed into place; a run resumes from the newest valid one.

    checkpoints/<step>/state.pt        nets, moving average, optimizers, experiment, image shape; tensors and plain data
    checkpoints/<step>/manifest.json   step, identity, distance (`swd`, from which best.json is derived), the splits
                                       it is to (`compared`) and the SHA-256 of state.pt; without it there is no
                                       checkpoint
    checkpoints/best.json              the step with the lowest sliced Wasserstein distance so far, and that distance

No random generator's state is stored: what is random at a step is a pure function of seed and step (data/batches.py).
"""

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dcgan import models, storage
from dcgan.config import validate
from dcgan.data.store import Store
from dcgan.run import Run
from dcgan.step import Game

log = logging.getLogger(__name__)
STATE = "state.pt"


class IncompatibleError(ValueError):
    """A checkpoint of another architecture, training or data set; the message names every difference."""


def snapshot(game: Game, step: int, run: Run, store: Store) -> dict[str, Any]:
    """Everything needed to resume after `step`, copied on its device: training may change the nets during writing."""
    state: dict[str, Any] = {
        "step": step,
        "identity": identity(run),
        "experiment": run.experiment.model_dump(mode="json"),
        "images": {"channels": store.channels, "classes": list(store.classes)},
        "compared": list(store.compared),
        "generator": game.generator.state_dict(),
        "discriminator": game.discriminator.state_dict(),
        "average": game.average.state_dict() if game.average is not None else None,
        "g_optimizer": game.g_optimizer.state_dict(),
        "d_optimizer": game.d_optimizer.state_dict(),
    }
    return _each(lambda tensor: tensor.detach().clone(), state)


def to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A snapshot's tensors on the CPU, where `Writer.save` wants them."""
    return _each(lambda tensor: tensor.cpu(), state)


def _each(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(change, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_each(change, item) for item in value]
    return value


class Writer:
    """Writes snapshots in the background, one at a time, and keeps the newest few and the best.

    A failure (a full disk) is raised by the next `save` or by `close`; what was published before stays whole.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: dict[str, Any], swd: float) -> None:
        """Queue a snapshot with its distance, once the previous one is on disk."""
        self.wait()
        self._pending = self._thread.submit(self._write, state, swd)

    def wait(self) -> None:
        """Return when the last snapshot is on disk; raises what writing it raised."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, state: dict[str, Any], swd: float) -> None:
        step, directory = state["step"], self.run.checkpoints
        with storage.staging(directory) as staged:
            torch.save(state, staged / STATE)
            told = {key: state[key] for key in ("step", "identity", "compared")}
            storage.seal(staged, {**told, "swd": swd})
            storage.publish(staged, directory / str(step))
        best = read_best(self.run) or {"step": step, "metric": "swd", "value": swd}
        storage.write_json(directory / "best.json", best)
        for old in steps(self.run)[: -self.run.experiment.train.keep]:
            if old != best["step"]:
                storage.discard(directory / str(old))


def steps(run: Run) -> list[int]:
    """The steps of all published checkpoints, ascending; not yet verified."""
    return sorted(int(p.parent.name) for p in run.checkpoints.glob("*/manifest.json") if p.parent.name.isdigit())


def planned(run: Run) -> list[int]:
    """Those of them that the run also has if it is never interrupted."""
    train = run.experiment.train
    return [step for step in steps(run) if step % train.checkpoint_every == 0 or step == train.steps]


def read_best(run: Run) -> dict[str, Any] | None:
    """What best.json should hold, from the manifests: a kill may come between a checkpoint and that file.

    Step, metric and value of the checkpoint with the lowest distance, the first of equals; None if there is none.
    Compared are only distances to the same kind of images as the newest's: held out, or trained on. A checkpoint that
    was kept because training was stopped takes no part, if there is another: without the stop it would not be there.
    """
    found: list[tuple[float, int]] = []
    held_out = None
    for step in reversed(planned(run) or steps(run)):
        try:
            manifest = json.loads((run.checkpoints / str(step) / storage.MANIFEST).read_bytes())
            distance = manifest["swd"], step
            if not found or _held_out(manifest) == held_out:
                held_out = _held_out(manifest)
                found.append(distance)
        except (OSError, ValueError, KeyError) as error:  # damaged, or no longer kept
            log.warning("checkpoint %d of run %s has no distance: %s", step, run.name, error)
    if not found:
        return None
    value, step = min(found)
    return {"step": step, "metric": "swd", "value": value}


def _held_out(manifest: dict[str, Any]) -> bool:
    """Whether the distance is to validation images. A version before this one knew only those trained on."""
    return manifest.get("compared") == ["validation"]


def latest(run: Run) -> Path | None:
    """The newest valid checkpoint; a corrupt one is set aside as `corrupt-<step>` with a warning."""
    for step in reversed(steps(run)):
        directory = run.checkpoints / str(step)
        try:
            storage.read_manifest(directory)
        except storage.CorruptError as error:
            aside = run.checkpoints / f"corrupt-{step}"
            log.warning("%s; set aside as %s, going on from the checkpoint before it", error, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            directory.rename(aside)
            continue
        return directory
    return None


def best(run: Run) -> Path | None:
    """The checkpoint with the lowest distance, or None. Raises CorruptError if it is damaged."""
    lowest = read_best(run)
    if lowest is None:
        return None
    directory = run.checkpoints / str(lowest["step"])
    storage.read_manifest(directory)
    return directory


def chosen(run: Run) -> Path:
    """The checkpoint to score, by `evaluate.checkpoint`. Raises FileNotFoundError if the run has none."""
    directory = best(run) if run.experiment.evaluate.checkpoint == "best" else latest(run)
    if directory is None:
        raise FileNotFoundError(f"run {run.name} has no checkpoint: `dcgan train {run.name}` makes one")
    return directory


def load(directory: Path) -> dict[str, Any]:
    """A checkpoint's state on the CPU, as `snapshot` made it, after verifying it. Raises CorruptError."""
    storage.read_manifest(directory)
    return torch.load(directory / STATE, map_location="cpu", weights_only=True)


def identity(run: Run) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes from it: every setting of `identity`, and the images."""
    sections = run.experiment.identity()
    flat = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    return {**flat, "image store": run.fingerprint}


def check_fits(directory: Path, run: Run) -> None:
    """Raise IncompatibleError, naming what differs, if the run can't resume from this checkpoint."""
    theirs, ours = storage.read_manifest(directory, hashes=False)["identity"], identity(run)
    differences = [f"{key}: {theirs.get(key)} there, {ours[key]} here" for key in ours if theirs.get(key) != ours[key]]
    if differences:
        raise IncompatibleError(f"{directory} does not fit run {run.name}: {'; '.join(differences)}")


def restore(game: Game, directory: Path, run: Run) -> int:
    """Put a checkpoint into the game and return its step. Raises IncompatibleError if it belongs to another run."""
    check_fits(directory, run)
    state = load(directory)
    game.generator.load_state_dict(state["generator"])
    game.discriminator.load_state_dict(state["discriminator"])
    if game.average is not None:
        game.average.load_state_dict(state["average"])
    _load_optimizer(game.g_optimizer, state["g_optimizer"])
    _load_optimizer(game.d_optimizer, state["d_optimizer"])
    return state["step"]


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load its moments in the memory format that the weights have here: fused Adam on a CPU ignores strides.

    The optimizer keeps its own settings: the experiment's, except for what the device requires.
    """
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)


def load_nets(directory: Path) -> tuple[models.Generator, models.Discriminator, dict[str, Any]]:
    """Both nets of a checkpoint on the CPU in eval mode (the moving average, if kept, as generator), and its state."""
    state = load(directory)
    experiment = validate(state["experiment"])
    images = state["images"]
    generator, discriminator = models.build(
        experiment.model, images["channels"], len(images["classes"]), experiment.data.size, experiment.train.seed
    )
    generator.load_state_dict(state["average"] or state["generator"])
    discriminator.load_state_dict(state["discriminator"])
    return generator.eval(), discriminator.eval(), state


def load_generator(directory: Path) -> models.Generator:
    """The generator of a checkpoint on the CPU in eval mode, ready to draw: see `models.Generator`."""
    return load_nets(directory)[0]
