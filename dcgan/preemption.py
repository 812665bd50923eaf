"""Handles SIGTERM, which a scheduler sends before it takes a machine away: training saves a checkpoint and ends.

The signal reaches the process that trains, or the one that waits for Ray's workers. Both know the run's directory, so
the request is a file in it.
"""

import logging
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

log = logging.getLogger(__name__)

FILE = ".stop"
GRACE = 25.0  # seconds for the checkpoint: torchrun, Kubernetes and Prefect kill after 30
LOOK = 1.0  # seconds between checks for the file, which take milliseconds over a network


@contextmanager
def awaited(run: Run) -> Iterator[None]:
    """Have SIGTERM end the run's training, which the body waits for, and then do what it did before.

    By default that is KeyboardInterrupt, as with Ctrl-C. A second SIGTERM, or GRACE seconds, ends the body by
    KeyboardInterrupt, whatever SIGTERM did before: other exceptions of a handler Ray prints and forgets while it waits
    for workers. Nothing changes where SIGTERM is ignored, or outside the main thread, where signals can't be handled.
    """
    before, file = signal.getsignal(signal.SIGTERM), run.path / FILE
    file.unlink(missing_ok=True)  # left by a killed process
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return
    act = before if callable(before) else signal.default_int_handler
    asked = threading.Event()
    again = threading.Timer(GRACE, os.kill, (os.getpid(), signal.SIGTERM))
    again.daemon = True

    def ask(*_: Any) -> None:
        if asked.is_set():  # Ray puts this handler back if SIGTERM arrives while it starts
            raise KeyboardInterrupt
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        asked.set()
        file.touch()
        again.start()

    signal.signal(signal.SIGTERM, ask)
    ended: BaseException | None = None
    try:
        yield
    except BaseException as error:
        if not asked.is_set():
            raise
        ended = error
    finally:
        again.cancel()
        signal.signal(signal.SIGTERM, before)
        file.unlink(missing_ok=True)
    if asked.is_set():
        if not isinstance(ended, KeyboardInterrupt | None):
            log.warning("%s", ended)
        act(signal.SIGTERM, None)
        raise KeyboardInterrupt from ended  # whatever the handler did: training has not finished


class Request:
    """Whether a run's training has been asked to end; the answer is the same on all ranks."""

    def __init__(self, run: Run, place: Place) -> None:
        self.file, self.place = run.path / FILE, place
        self._due, self._seen = 0.0, False

    def __call__(self, waiting: bool) -> bool:
        """After every step; waiting: whether the device is waited for after this one, to read metrics or to save.

        Several ranks have to agree, for which on CUDA they would wait for it: there they do only after such steps.
        """
        if self.place.world > 1 and self.place.device.type == "cuda" and not waiting:
            return False
        if (now := time.monotonic()) >= self._due:
            self._due, self._seen = now + LOOK, self.file.exists()
        return distributed.any_rank(self._seen, self.place) if self.place.world > 1 else self._seen
