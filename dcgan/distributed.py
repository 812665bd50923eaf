"""The process group: rank, world, collectives and the division of batches. All functions work in a single process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dcgan.numerics import on_cuda

# A rank that hangs is given up on after this long. A healthy rank waits for rank 0 to score and copy a checkpoint:
# seconds on a GPU, a minute at 128 px on one CPU core.
TIMEOUT = timedelta(minutes=10)
# The name of the option changed in PyTorch 2.13, which warns of the old one in every rank.
_NAMES = signature(nn.parallel.DistributedDataParallel).parameters
OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank among `world` processes, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank writes files and logs."""
        return self.rank == 0


@contextmanager
def join(device: str) -> Iterator[Place]:
    """This process's place, in the existing process group (Ray Train) or the one the environment names (torchrun).

    device: auto, cpu or cuda. Raises ValueError if CUDA is asked for and absent.
    """
    use_cuda = on_cuda(device)
    owned = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if owned:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if use_cuda and here > (gpus := torch.cuda.device_count()):
            raise ValueError(
                f"{here} processes on this machine need a GPU each, and it has {gpus}: start fewer, "
                "or set compute.device=cpu"
            )
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=TIMEOUT)
    grouped = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    where = torch.device("cpu")
    if use_cuda:
        # torchrun shows every rank all devices, Ray may show each only its own
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(where)
    yield Place(rank, world, where)
    # Not after an error, for which NCCL would have this process wait for ranks that wait for it: it ends, and they see.
    if owned:
        dist.destroy_process_group()


def share(batch_size: int, world: int) -> int:
    """Images a rank takes from each global batch. Raises ValueError if they can't be shared equally."""
    if batch_size % world:
        raise ValueError(f"train.batch_size={batch_size} is not divisible by {world} workers")
    return batch_size // world


def wrap(net: nn.Module, place: Place) -> nn.Module:
    """`net` in DistributedDataParallel, or itself in a single process.

    Buffers are not broadcast: rank 0's BatchNorm statistics would overwrite the others' in the middle of a step
    (pytorch/pytorch#175024). `average_buffers` reconciles them when something is saved or drawn.
    """
    if place.world == 1:
        return net
    if place.device.type != "cuda":
        return nn.parallel.DistributedDataParallel(net, **OWN_BUFFERS)
    # Built on a side stream, or its collectives can't be recorded (PyTorch's notes on CUDA graphs).
    own, side = torch.cuda.current_stream(place.device), recorder(place.device)
    side.wait_stream(own)  # the weights may still be on their way to the device
    with torch.cuda.stream(side):
        wrapped = nn.parallel.DistributedDataParallel(net, **OWN_BUFFERS)
    own.wait_stream(side)  # which sends rank 0's to the others
    return wrapped


@cache
def recorder(device: torch.device) -> torch.cuda.Stream:
    """The stream on which steps are warmed up and recorded.

    DistributedDataParallel is built there, too: its gradients stay on the stream that it was built on.
    """
    return torch.cuda.Stream(device)


def recordable(place: Place) -> bool:
    """Whether a step with its gradient exchange can be a CUDA graph: with NCCL it can; gloo goes through the CPU."""
    return place.world == 1 or dist.get_backend() == "nccl"


def mean(values: Tensor, place: Place) -> Tensor:
    """The mean over ranks, on every rank."""
    if place.world > 1:
        dist.all_reduce(values)
        values /= place.world
    return values


def any_rank(flag: bool, place: Place) -> bool:
    """Whether the flag is true on any rank; the same answer on every rank."""
    return bool(mean(torch.tensor(float(flag), device=place.device), place) > 0)


def barrier(place: Place) -> None:
    """Wait for all ranks."""
    if place.world > 1:
        dist.barrier()


def average_buffers(net: nn.Module, place: Place) -> None:
    """Replace every floating-point buffer (BatchNorm's running statistics) by its mean over ranks, on every rank."""
    if place.world > 1:
        for buffer in net.buffers():
            if buffer.is_floating_point():
                mean(buffer, place)
