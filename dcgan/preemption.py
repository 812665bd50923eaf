"""SIGTERM, which a scheduler sends before it takes a machine away: training keeps a checkpoint and ends.

It comes to the process that trains, or to the one that waits for Ray's workers. Both know the run's directory, so the
request is a file in it.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dcgan import distributed
from dcgan.distributed import Place
from dcgan.run import Run

FILE = ".stop"
GRACE = 25.0  # seconds for the checkpoint: torchrun, Kubernetes and Prefect kill after 30
LOOK = 1.0  # seconds between two looks for the file, which over a network takes milliseconds


@contextmanager
def awaited(run: Run) -> Iterator[None]:
    """Have SIGTERM end the run's training, for which the body waits, and then do what it did before.

    By default that is KeyboardInterrupt, as by Ctrl-C. A second SIGTERM, or GRACE, waits for no checkpoint. Nothing
    changes where it is ignored, or in a thread other than the main one, in which no signal can be handled.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return
    act = before if callable(before) else signal.default_int_handler
    file, asked = run.path / FILE, threading.Event()
    file.unlink(missing_ok=True)  # of a process that was killed
    again = threading.Timer(GRACE, os.kill, (os.getpid(), signal.SIGTERM))
    again.daemon = True

    def ask(*_: Any) -> None:
        signal.signal(signal.SIGTERM, act)
        asked.set()
        file.touch()
        again.start()

    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        again.cancel()
        signal.signal(signal.SIGTERM, before)
        file.unlink(missing_ok=True)
    if asked.is_set():
        act(signal.SIGTERM, None)
        raise KeyboardInterrupt  # whatever handled it: training has not come to its end


class Request:
    """Whether the training of a run is asked to end, the same for all ranks."""

    def __init__(self, run: Run, place: Place) -> None:
        self.file, self.place, self._due = run.path / FILE, place, 0.0

    def __call__(self, together: bool) -> bool:
        """Several ranks can agree only where all call it `together`; one rank looks every LOOK seconds."""
        if self.place.world > 1:
            return together and distributed.any_rank(self.file.exists(), self.place)
        if (now := time.monotonic()) < self._due:
            return False
        self._due = now + LOOK
        return self.file.exists()
