"""Training batches on a device: what a step sees is a pure function of (seed, step, rank, world).

So a resumed run needs no saved generator state, and the ranks' batches together are a single process's batch.
"""

import mmap
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcgan.config import Model
from dcgan.data.store import Store
from dcgan.distributed import Place, share

ORDER, NOISE = range(2)  # independent random streams of one seed
RESIDENT_SHARE = 0.5  # of a GPU's free memory, for the images; the nets at 128 px need the rest
AHEAD = 4  # blocks that the reading thread prepares in advance
DRAWING = 4  # threads that draw z: of 1,024 normal ones it takes 1.1 ms, half with two; a step is expected to take 0.5
BLOCK = 16  # steps whose rows and z go to a GPU in one copy; a step at 32 px takes less time than a copy's overhead


class Batch(NamedTuple):
    """What a rank sees at a step, on its device."""

    images: Tensor  # uint8 (n, C, H, W), n = batch_size / world
    labels: Tensor  # int64 (n,), -1 for none
    z: Tensor  # float32 (n, z_dim)


Stream = Generator[Batch, None, None]
Parts = tuple[Tensor, ...]


def stream(seed: int, kind: int, index: int) -> np.random.Generator:
    """Random stream `index` of a kind: counter-based (Philox, Salmon et al., 2011), so independent of the others."""
    key = np.array([(kind << 32) + seed, index], np.uint64)  # NumPy makes floats of a list with numbers from 2**63 up
    return np.random.Generator(np.random.Philox(key=key))


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` images in an epoch, int64 (count,)."""
    return stream(seed, ORDER, epoch).permutation(count)


def noise(kind: str, shape: tuple[int, int], seed: int, step: int) -> np.ndarray:
    """z of one step for all ranks, float32 (batch, z_dim): U(-1, 1) or N(0, 1)."""
    generator = stream(seed, NOISE, step)
    if kind == "normal":
        return generator.standard_normal(shape, np.float32)
    return generator.random(shape, np.float32) * 2 - 1


class Images:
    """The images of some splits, concatenated, and their labels; read from the memory maps on request.

    The kernel is told which images come next, and to read nothing else: by default it reads ahead, up to 8 MiB around
    an image of 12 KiB where a disk is set up for long files, and a random order uses none of that.
    """

    def __init__(self, store: Store, splits: Sequence[str]) -> None:
        self.count = store.count(*splits)
        self.shards = store.shards(*splits)
        self._maps: list[mmap.mmap] = [shard._mmap for shard in self.shards]  # type: ignore[attr-defined]
        for each in self._maps:
            each.madvise(mmap.MADV_RANDOM)
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self.labels = store.labels(*splits)
        self.shape = self.shards[0].shape[1:]  # (C, H, W)

    def gather(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The images in `rows`, int64 (n,): uint8 (n, C, H, W), written to `out` if given."""
        images = np.empty((len(rows), *self.shape), np.uint8) if out is None else out
        shard_of = np.searchsorted(self.starts, rows, side="right") - 1
        places = rows - self.starts[shard_of]
        self._expect(shard_of, places)
        for shard in np.unique(shard_of):
            chosen = shard_of == shard
            images[chosen] = self.shards[shard][places[chosen]]
        return images

    def _expect(self, shards: np.ndarray, places: np.ndarray) -> None:
        """Have the kernel read these images of these shards from disk, all at once, without waiting for them."""
        size = self.shards[0].strides[0]
        begins = self.shards[0].offset + places * size
        pages = begins - begins % mmap.PAGESIZE
        lengths = begins - pages + size
        for shard, page, length in zip(shards.tolist(), pages.tolist(), lengths.tolist(), strict=True):
            self._maps[shard].madvise(mmap.MADV_WILLNEED, page, length)

    def resident(self, device: torch.device) -> Tensor:
        """All images on a device, uint8 (count, C, H, W), copied a shard at a time."""
        images = torch.empty(self.count, *self.shape, dtype=torch.uint8, device=device)
        for shard, start, each in zip(self.shards, self.starts, self._maps, strict=False):
            each.madvise(mmap.MADV_WILLNEED)
            images[start : start + len(shard)].copy_(torch.from_numpy(np.array(shard)))
        return images


class Batches:
    """The batches of one rank, in order, from a given step on, without end.

    An incomplete last batch of an epoch is dropped. The images live on the GPU if it has room; otherwise one thread
    gathers them from the memory maps ahead of time, into pinned memory if they go to a GPU.
    splits: the splits to read, concatenated. model: the model whose z is drawn. Raises ValueError if the splits hold
    fewer images than one batch.
    """

    def __init__(
        self, store: Store, splits: Sequence[str], batch_size: int, seed: int, place: Place, model: Model
    ) -> None:
        self.images = Images(store, splits)
        self.count = self.images.count
        if self.count < batch_size:
            raise ValueError(f"train.batch_size={batch_size} exceeds the {self.count} images of {', '.join(splits)}")
        self.batch_size, self.seed, self.place, self.model = batch_size, seed, place, model
        self.share = share(batch_size, place.world)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def rows(self, step: int) -> np.ndarray:
        """Which images this rank sees at a step, int64 (n,)."""
        per_epoch = self.count // self.batch_size
        epoch, batch = divmod(step, per_epoch)
        if self._epoch != epoch:
            self._epoch, self._order = epoch, permutation(self.count, self.seed, epoch)
        start = batch * self.batch_size + self.place.rank * self.share
        return self._order[start : start + self.share]

    def z(self, step: int) -> np.ndarray:
        """This rank's rows of a step's z, float32 (n, z_dim)."""
        z = noise(self.model.z, (self.batch_size, self.model.z_dim), self.seed, step)
        return z[self.place.rank * self.share : (self.place.rank + 1) * self.share]

    def from_step(self, step: int) -> Stream:
        """Batches from `step` on; close the stream to stop the reading thread."""
        device = self.place.device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if sum(shard.nbytes for shard in self.images.shards) <= RESIDENT_SHARE * free:
                return self._resident(step)
        return self._streamed(step)

    def _resident(self, step: int) -> Stream:
        """Images and labels live on the device; row numbers and z are sent there for a block of steps at a time."""
        device = self.place.device
        images = self.images.resident(device)
        labels = torch.from_numpy(self.images.labels).to(device)
        with (
            ThreadPoolExecutor(DRAWING, "noise") as pool,
            closing(self._ahead(partial(self._block, pool), step, BLOCK)) as blocks,
        ):
            for rows, z in blocks:
                rows, z = rows.to(device, non_blocking=True), z.to(device, non_blocking=True)
                for each, noise in zip(rows, z, strict=True):
                    yield Batch(images[each], labels[each], noise)

    def _streamed(self, step: int) -> Stream:
        device = self.place.device
        for batch in self._ahead(self._read, step, 1):
            yield Batch(*(part.to(device, non_blocking=True) for part in batch))

    def _ahead(self, read: Callable[[int], Parts], step: int, stride: int) -> Generator[Parts]:
        """read(step), read(step + stride), ..., prefetched by one thread."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
            ahead = deque(reader.submit(read, step + i * stride) for i in range(AHEAD))
            while True:
                found = ahead.popleft().result()
                ahead.append(reader.submit(read, step + AHEAD * stride))
                yield found
                step += stride

    def _block(self, pool: ThreadPoolExecutor, step: int) -> Parts:
        """Rows int64 (BLOCK, n) and z float32 (BLOCK, n, z_dim) of the steps from `step` on, in pinned memory."""
        steps = range(step, step + BLOCK)
        rows, z = np.stack([self.rows(each) for each in steps]), np.stack(list(pool.map(self.z, steps)))
        return torch.from_numpy(rows).pin_memory(), torch.from_numpy(z).pin_memory()

    def _read(self, step: int) -> Parts:
        """The batch of a step on the CPU, in pinned memory if it goes to a GPU."""
        rows = self.rows(step)
        pinned = self.place.device.type == "cuda"
        images = torch.empty(self.share, *self.images.shape, dtype=torch.uint8, pin_memory=pinned)
        self.images.gather(rows, images.numpy())
        rest = torch.from_numpy(self.images.labels[rows]), torch.from_numpy(self.z(step))
        return images, *(part.pin_memory() if pinned else part for part in rest)


def normalise(images: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1] (paper, section 4: no other preprocessing), in the given memory format."""
    return images.to(torch.float32, memory_format=memory_format).div_(127.5).sub_(1)
