"""Plays training steps and sums their metrics; on CUDA as a graph that is recorded once and then replayed.

A step at 32 px is some two hundred kernels of a few microseconds each, and Python takes longer than that to launch one.
Once recorded, the device runs them one after the other by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dcgan import distributed
from dcgan.data.batches import Batch, normalise
from dcgan.step import Game

# Steps of each kind played before one is recorded: in them libraries choose their algorithms and optimizers create
# their state. The number for several ranks is what PyTorch's notes on CUDA graphs ask for.
WARM_UP, WARM_UP_OF_RANKS = 3, 11


class Player:
    """Plays a game. `sums` and `counts` hold each metric since `restart`, summed on the device, so nothing waits.

    graph: record the steps on CUDA, unless gradients are exchanged by gloo; ignored elsewhere.
    """

    def __init__(self, game: Game, graph: bool) -> None:
        self.game = game
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._played: dict[int, int] = {}  # kind of step: how often
        self._names: dict[int, list[str]] = {}  # kind of step: the metrics it gives
        self._recorded: dict[int, _Recorded] = {}
        self._warm_up = WARM_UP if game.place.world == 1 else WARM_UP_OF_RANKS
        self._cuda = game.place.device.type == "cuda"
        recording = graph and self._cuda and distributed.recordable(game.place)
        self._recorder = distributed.recorder(game.place.device) if recording else None

    def settling(self, step: int) -> bool:
        """Whether this step, on CUDA, is among the first of its kind: nothing else may use the device meanwhile."""
        kind = self.game.kind(step)
        return self._cuda and kind not in self._recorded and self._played.get(kind, 0) <= self._warm_up

    def play(self, step: int, batch: Batch) -> None:
        """Play a step on its batch and add its metrics to the sums."""
        self.game.set_learning_rate(step)
        kind = self.game.kind(step)
        if kind in self._recorded:
            self._recorded[kind](batch)
        elif not self.settling(step):
            self._play(step, batch)
        else:
            with _timing():
                self._settle(step, batch)
        for name in self._names[kind]:
            self.counts[name] = self.counts.get(name, 0) + 1

    def restart(self) -> None:
        """Set the sums to zero, in place: the recorded steps add to them."""
        for value in self.sums.values():
            value.zero_()
        self.counts.clear()

    def close(self) -> None:
        """Forget what was recorded: NCCL waits for graphs with its collectives before a process group can end.

        Also where an error is under way, whose traceback still refers to a graph: Ray then ends the group.
        """
        for each in self._recorded.values():
            each.graph.reset()
        self._recorded.clear()

    def _play(self, step: int, batch: Batch) -> None:
        conditional = self.game.generator.labels
        real = normalise(batch.images, self.game.numerics.memory_format)
        metrics = self.game.step(step, real, batch.labels if conditional else None, batch.z)
        self._names[self.game.kind(step)] = list(metrics)
        for name in metrics:
            if name not in self.sums:
                self.sums[name] = torch.zeros((), device=self.game.place.device)
        torch._foreach_add_([self.sums[name] for name in metrics], list(metrics.values()))

    def _settle(self, step: int, batch: Batch) -> None:
        """Play the first steps, if they are to be recorded on a side stream, as that requires; record the next one."""
        kind, stream = self.game.kind(step), self._recorder
        played = self._played[kind] = self._played.get(kind, 0) + 1
        if stream is None:
            self._play(step, batch)
        elif played <= self._warm_up:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._play(step, batch)
            torch.cuda.current_stream().wait_stream(stream)
        else:
            self._recorded[kind] = _Recorded(lambda inputs: self._play(step, inputs), batch, stream)
            self._recorded[kind](batch)


@contextmanager
def _timing() -> Iterator[None]:
    """Have cuDNN time its algorithms for each layer and keep the fastest, unless they are to be deterministic."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class _Recorded:
    """A function of a batch as a CUDA graph. Recording does not run it; calling does, on a copy of the batch."""

    def __init__(self, function: Callable[[Batch], None], batch: Batch, stream: torch.cuda.Stream) -> None:
        self.inputs = Batch(*(part.clone() for part in batch))
        self.graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads may copy a checkpoint or allocate meanwhile
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                function(self.inputs)
        except RuntimeError as error:
            cause = f" ({error.__context__})" if error.__context__ else ""  # whose recording then fails at its end, too
            raise ValueError(  # a setting helps, and another attempt would not
                f"a step can't be recorded as a CUDA graph; compute.graph=false does without: {error}{cause}"
            ) from error

    def __call__(self, batch: Batch) -> None:
        for mine, theirs in zip(self.inputs, batch, strict=True):
            mine.copy_(theirs, non_blocking=True)
        self.graph.replay()
