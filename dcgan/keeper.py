"""Records a run while it trains: lines of metrics, events, sample grids, and checkpoints with their distance.

On CUDA a second thread does all of it, from copies of the nets on the device and on its own stream, while training
continues. On a CPU that would compete with training for the cores, so it is done between steps; only writing a
checkpoint's bytes overlaps the next steps.
"""

import json
import logging
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcgan import checkpoint, pictures, wasserstein
from dcgan.data import batches
from dcgan.data.batches import Images, normalise
from dcgan.data.store import Store
from dcgan.models import Generator
from dcgan.run import Run
from dcgan.sampling import FIXED, draw, fixed_noise
from dcgan.step import Game

log = logging.getLogger(__name__)

COLLAPSED_LOSS = 0.05  # D's loss below this, or D(real) - D(fake) above 0.95: the generator gets no gradient
COLLAPSED_GAP = 0.95
GRID = 64  # images in a sample grid, eight per row; a conditional net draws one row per class
COLUMNS = 8

Line = dict[str, Any]


class Keeper:
    """Keeps the record, on the first rank only. A failure (a full disk) is raised by the next call, or by `close`.

    Everything appears in the order of the calls: a line before its step's checkpoint, so that a kill in between loses
    no line of a step that is not repeated.
    """

    def __init__(self, run: Run, game: Game, store: Store) -> None:
        self.run, self.game, self.store = run, game, store
        self._writer = checkpoint.Writer(run)
        self._collapsed = any(
            map(_has_collapsed, [line for line in run.metrics() if "d_loss" in line][-1:])
        )  # it may have been reported before a restart
        self._real: tuple[wasserstein.Reference, Tensor] | None = None  # real images and their labels
        self._beside = _Beside(game.place.device) if game.place.device.type == "cuda" else None
        self._shown = deepcopy(game.sampler) if self._beside else game.sampler

    def keep(self, step: int, line: Line | None, saving: bool = False, drawing: bool = False) -> None:
        """Append a line to metrics.jsonl; draw a grid; publish a checkpoint, whose distance the line gets.

        Each only if asked for; saving needs a line.
        """
        state = checkpoint.snapshot(self.game, step, self.run, self.store) if saving else None

        def work() -> None:
            if line is not None:
                self._line(line, state)
            if drawing:
                self._grid(step)

        self._do(work, looks=saving or drawing)

    def event(self, step: int, event: str, message: str) -> None:
        """Append to events.jsonl, with a warning in the log."""
        self._do(lambda: self._event(step, event, message), looks=False)

    def wait(self) -> None:
        """Return when nothing is left for the second thread to do."""
        if self._beside:
            self._beside.wait()

    def close(self) -> None:
        """Return when all is on disk."""
        try:
            if self._beside:
                self._beside.close()
        finally:
            self._writer.close()

    def _do(self, work: Callable[[], None], looks: bool) -> None:
        """Do the work here or in the second thread. looks: it uses the generator, of which that thread has a copy."""
        if self._beside is None:
            work()
            return
        if looks:
            self._beside.wait()  # earlier work may still use the copy
            _copy(self.game.sampler, self._shown)
        self._beside.do(work)

    def _line(self, line: Line, state: dict[str, Any] | None) -> None:
        if state is not None:
            line["swd"] = self._distance()
        append(self.run.path / "metrics.jsonl", line)
        self._warn_of_collapse(line)
        if state is not None:
            self._writer.save(checkpoint.to_cpu(state), line["swd"])

    def _warn_of_collapse(self, line: Line) -> None:
        """Record when the discriminator wins outright, once each time it happens."""
        if "d_loss" not in line:  # of a generator's turn, with train.update=alternate
            return
        collapsed = _has_collapsed(line)
        if collapsed and not self._collapsed:
            message = (
                f"the discriminator has won: loss {line['d_loss']:.3f}, D(real) {line['d_real']:.2f}, "
                f"D(fake) {line['d_fake']:.2f}; the generator learns nothing from here unless it recovers"
            )
            self._event(line["step"], "collapse", message)
        self._collapsed = collapsed

    def _event(self, step: int, event: str, message: str) -> None:
        log.warning("step %d: %s", step, message)
        append(self.run.path / "events.jsonl", {"step": step, "event": event, "message": message})

    def _grid(self, step: int) -> None:
        model, classes = self.run.experiment.model, len(self.store.classes)
        count = COLUMNS if model.conditional else GRID
        z, labels = fixed_noise(model, classes, count, self.run.experiment.train.seed)
        images = pictures.to_uint8(draw(self._shown, z, labels).numpy())
        pictures.write_png(self.run.samples / f"{step:08d}.png", pictures.grid(images, COLUMNS))

    def _distance(self) -> float:
        """Sliced Wasserstein distance between real images and as many generated from fixed z."""
        device = self.game.place.device
        if self._real is None:
            source, seed = Images(self.store, self.store.compared), self.run.experiment.train.seed
            rows = np.sort(batches.permutation(source.count, seed, 0)[: wasserstein.IMAGES])
            real = normalise(torch.from_numpy(source.gather(rows)).to(device))
            self._real = wasserstein.Reference(real), torch.from_numpy(source.labels[rows])
        reference, labels = self._real
        model = self.run.experiment.model
        shape = (len(labels), model.z_dim)
        z = torch.from_numpy(batches.noise(model.z, shape, self.run.experiment.train.seed, FIXED))
        drawn = draw(self._shown, z, labels if model.conditional else None)
        return reference.distance(drawn.to(device))


class _Beside:
    """A thread with its own CUDA stream, whose work starts after what the caller has already launched."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keeper")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def do(self, work: Callable[[], None]) -> None:
        """Queue work. Raises what earlier work raised."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        launched = torch.cuda.Event()
        launched.record()
        self._pending.append(self._thread.submit(self._run, work, launched))

    def wait(self) -> None:
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _run(self, work: Callable[[], None], launched: torch.cuda.Event) -> None:
        if self._failed:
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(launched)
            self._failed = True  # until it is done: half a line may have been written, which no other must follow
            try:
                work()
                self._failed = False
            finally:
                self.stream.synchronize()  # before the memory that it reads is given back


def _has_collapsed(line: Line) -> bool:
    return line["d_loss"] < COLLAPSED_LOSS or line["d_real"] - line["d_fake"] > COLLAPSED_GAP


@torch.no_grad()
def _copy(source: Generator, target: Generator) -> None:
    ours: list[Tensor] = [*target.parameters(), *target.buffers()]
    torch._foreach_copy_(ours, [*source.parameters(), *source.buffers()])


def append(path: Path, line: Line) -> None:
    """Append a line of JSON that is on disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
