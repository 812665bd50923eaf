"""Epochs of device batches. What a step sees is a pure function of (seed, step, rank, world).

So a resumed run needs no saved generator state, and the ranks' batches together are the single process's batch.
"""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from dcgan.data.store import Store
from dcgan.distributed import Place, share

Stream = Generator[tuple[Tensor, Tensor], None, None]
ORDER, NOISE = range(2)  # independent random streams of one seed
RESIDENT_SHARE = 0.5  # of a GPU's free memory that the images may take; the nets at 128 px need the rest
AHEAD = 4  # batches that the reading thread prepares


def stream(seed: int, kind: int, index: int) -> np.random.Generator:
    """The random stream number `index` of a kind: counter-based (Philox, Salmon et al., 2011), so independent."""
    key = np.array([(kind << 32) + seed, index], np.uint64)  # of a list with numbers from 2**63 on NumPy makes floats
    return np.random.Generator(np.random.Philox(key=key))


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` images in an epoch, int64 (count,)."""
    return stream(seed, ORDER, epoch).permutation(count)


def noise(kind: str, shape: tuple[int, int], seed: int, step: int) -> np.ndarray:
    """z of one step over all ranks, float32 (batch, z_dim): U(-1, 1) or N(0, 1)."""
    generator = stream(seed, NOISE, step)
    if kind == "normal":
        return generator.standard_normal(shape, np.float32)
    return generator.random(shape, np.float32) * 2 - 1


class Batches:
    """The batches of one rank, in order, from a given step on, for ever.

    Iterating gives (images uint8 (n, C, H, W), labels int64 (n,)) on the rank's device, n = batch_size / world; an
    incomplete last batch of an epoch is left out. On a GPU that has room the images live there; otherwise one thread
    gathers them from the memory maps ahead of time, into pinned memory if they go to a GPU.
    splits: whose images these are, one after the other. Raises ValueError if they hold fewer images than one batch.
    """

    def __init__(self, store: Store, splits: Sequence[str], batch_size: int, seed: int, place: Place) -> None:
        self.count = store.count(*splits)
        if self.count < batch_size:
            raise ValueError(f"train.batch_size={batch_size} exceeds the {self.count} images of {', '.join(splits)}")
        self.batch_size, self.seed, self.place = batch_size, seed, place
        self.share = share(batch_size, place.world)
        self.shards = store.shards(*splits)
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self.labels = store.labels(*splits)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def rows(self, step: int) -> np.ndarray:
        """Which images this rank sees at a step, int64 (n,)."""
        per_epoch = self.count // self.batch_size
        epoch, batch = divmod(step, per_epoch)
        start = batch * self.batch_size + self.place.rank * self.share
        return self.permutation(epoch)[start : start + self.share]

    def permutation(self, epoch: int) -> np.ndarray:
        if self._epoch != epoch:
            self._epoch, self._order = epoch, permutation(self.count, self.seed, epoch)
        return self._order

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Those images from the memory maps, uint8 (n, C, H, W)."""
        shard_of = np.searchsorted(self.starts, rows, side="right") - 1
        images = np.empty((len(rows), *self.shards[0].shape[1:]), np.uint8)
        for shard in np.unique(shard_of):
            chosen = shard_of == shard
            images[chosen] = self.shards[shard][rows[chosen] - self.starts[shard]]
        return images

    def from_step(self, step: int) -> Stream:
        """Batches from `step` on; close the stream to stop the reading thread."""
        device = self.place.device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if sum(shard.nbytes for shard in self.shards) <= RESIDENT_SHARE * free:
                return self._resident(step)
        return self._prefetched(step)

    def _resident(self, step: int) -> Stream:
        device = self.place.device
        images = torch.cat([torch.from_numpy(np.array(shard)).to(device) for shard in self.shards])
        labels = torch.from_numpy(self.labels).to(device)
        while True:
            rows = torch.from_numpy(self.rows(step)).pin_memory().to(device, non_blocking=True)
            yield images[rows], labels[rows]
            step += 1

    def _prefetched(self, step: int) -> Stream:
        device = self.place.device
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
            ahead = deque(reader.submit(self._read, step + i) for i in range(AHEAD))
            while True:
                images, labels = ahead.popleft().result()
                ahead.append(reader.submit(self._read, step + AHEAD))
                yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                step += 1

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        rows = self.rows(step)
        batch = torch.from_numpy(self.gather(rows)), torch.from_numpy(self.labels[rows])
        if self.place.device.type == "cuda":
            return batch[0].pin_memory(), batch[1].pin_memory()
        return batch


def normalise(images: Tensor, channels_last: bool) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1] (paper, section 4: no other preprocessing), in the wanted memory layout."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(torch.float32, memory_format=layout).div_(127.5).sub_(1)
