"""Finds near-duplicate images by the codes of a denoising autoencoder (paper, section 3.1, LSUN), compared in bulk.

As in the paper, a 3072-128-3072 ReLU autoencoder with dropout learns to restore corrupted 32x32 images, and an image's
code is which of its 128 hidden units are above 0. There, equal codes are duplicates.
tests/benchmarks/near_duplicates.py measures how many copies planted among real pictures are found. Differences:
- Each input image has zero mean and unit deviation, so that brightness and contrast do not change the code.
- Hidden units are batch-normalised before the ReLU. Without it most units are on, or off, for nearly all of a set of
  aligned faces, and the code says little.
- Codes need not be equal. ReLU units are not bistable as the logistic ones of semantic hashing are (Salakhutdinov and
  Hinton, 2009): some unit of 128 is always near 0, and a shift of a fraction of a pixel flips several. Equality finds
  13 % of rooms and 0.3 % of faces shifted like that. Close codes are found by sorting instead (Charikar, 2002): sorted
  by a random choice of bits, they soon end up near each other. The cost is that of the sorts and of looking at the
  close pairs.
- Close codes only nominate. Images count as duplicates if their edges agree too, at the best of nine offsets. This
  tells apart what 128 bits can't, such as two birds in two blue skies.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, CODE = 32, 128  # pixels and bits (paper, section 3.1)
SAMPLE = 50_000  # images that train the autoencoder: 150 MB, twice that while they are gathered
BATCH = 256  # images per update
EPOCHS, UPDATES = 20, 1_000  # of training, whichever is less: more did not make the codes steadier
RATE = 1e-3  # of Adam, falling linearly to 0
NOISE = 0.3  # Gaussian corruption, in deviations of the image's pixels
SHIFT = 1.0  # pixels: the corruption moves images by up to this, and the comparison allows for it
DROPOUT = 0.2  # of hidden units; at 0.5 the codes of different images came closer to each other
FLIPPED = 14  # bits: shifted by a pixel, 92 to 95 % of CIFAR-10's images and 99 % of faces change in no more
SORTS, WINDOW = 32, 16  # of 3 million independent codes, two 14 bits apart are within 16 places in 1 sort of 8
KEY = 32  # bits that a sort looks at first; 3 million codes differ within the first 22
EDGES = 0.2  # one minus the correlation: 95 % of shifted or re-encoded images are below 0.15, most others above 0.35
LIGHT = 0.1  # of the range: how much a colour channel's mean may differ; three times a brightening by 3 %
ROUNDING = (1 / 255) ** 2  # what storing as uint8 adds to a squared difference: edges no stronger mean nothing
BLOCK = 2_048  # images worked on at once: 25 MB as 32 px floats


def find(shards: Sequence[np.ndarray], seed: int = 0) -> list[list[int]]:
    """Groups of near-duplicates among images, by row number over all shards, ascending; the first is the one to keep.

    shards: uint8 (n, C, H, H) in order, C 1 or 3, all with the same C and H; memory maps are read in blocks. The groups
    are ordered by their first row; every other image of a group was compared with the first and agrees with it.
    The result depends on the images' order and the seed, not on shard boundaries. Images with equal pixels are always
    found, unless more than WINDOW different ones share a code. Memory: about 100 bytes per image, 8 per rejected pair
    of close codes, and the training sample.
    Raises ValueError for other shards.
    """
    images = Images(shards)
    if len(images) < 2:
        return []
    codes = encode(images, train(images, seed))
    return _stars(images, _link(images, codes, seed))


class Images:
    """The shards as one sequence, indexed by arrays of row numbers."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        shapes = {shard.shape[1:] for shard in shards}
        wrong = any(len(s) != 3 or s[0] not in (1, 3) or s[1] != s[2] for s in shapes)
        if len(shapes) != 1 or wrong or any(shard.dtype != np.uint8 for shard in shards):
            found = sorted({f"{shard.dtype} {shard.shape}" for shard in shards})
            raise ValueError(f"shards of {', '.join(found) or 'nothing'}; expected uint8 (n, 1 or 3, H, H), H equal")
        self.shards, self.shape = shards, shards[0].shape[1:]
        self.starts = np.cumsum([0, *(len(shard) for shard in shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (len(rows), C, H, H)."""
        shard_of = np.searchsorted(self.starts, rows, side="right") - 1
        chosen = np.empty((len(rows), *self.shape), np.uint8)
        for shard in np.unique(shard_of):
            here = shard_of == shard
            chosen[here] = self.shards[shard][rows[here] - self.starts[shard]]
        return chosen


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[at : at + BLOCK] for at in range(0, len(rows), BLOCK))


def _small(images: np.ndarray) -> Tensor:
    """uint8 (n, C, H, H) to float32 (n, 3, SIDE, SIDE) in [0, 1]."""
    pixels = torch.from_numpy(images).float().div_(255)
    if pixels.shape[-1] != SIDE:
        pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    return pixels.expand(-1, 3, -1, -1)


def _normalised(pixels: Tensor) -> Tensor:
    """Each image with mean 0 and deviation 1; with less contrast than rounding adds, the deviation stays below 1."""
    centred = pixels - pixels.mean((1, 2, 3), keepdim=True)
    return centred / (centred.square().mean((1, 2, 3), keepdim=True) + ROUNDING).sqrt()


# --- the autoencoder


def train(images: Images, seed: int) -> nn.Module:
    """The encoder, from normalised float32 (n, 3 * SIDE * SIDE) to (n, CODE), trained on images drawn by the seed."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(images))[:SAMPLE])
    sample = torch.cat([_small(images[block]).mul(255).round().byte() for block in _blocks(rows)])
    updates = min(UPDATES, -(-len(sample) * EPOCHS // BATCH))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(3 * SIDE**2, CODE), nn.BatchNorm1d(CODE, affine=False))
        decoder = nn.Sequential(nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(CODE, 3 * SIDE**2))
        adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], RATE)
        falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, updates)
        for _ in range(updates):
            clean = _normalised(sample[torch.randint(len(sample), (BATCH,))] / 255)
            restored = decoder(encoder(_corrupt(clean).flatten(1)))
            adam.zero_grad()
            F.mse_loss(restored, clean.flatten(1)).backward()
            adam.step()
            falling.step()
    return encoder.eval()


def _corrupt(images: Tensor) -> Tensor:
    """The images shifted by a fraction of a pixel, the same for the whole batch, edges repeated; then noise."""
    for axis, move in zip((2, 3), torch.empty(2).uniform_(-SHIFT, SHIFT).tolist(), strict=True):
        neighbours = torch.arange(SIDE).add(1 if move > 0 else -1).clamp(0, SIDE - 1)
        images = torch.lerp(images, images.index_select(axis, neighbours), abs(move))
    return images + NOISE * torch.randn_like(images)


@torch.no_grad()
def encode(images: Images, encoder: nn.Module) -> np.ndarray:
    """Codes, uint64 (N, CODE / 64). Blocks do not follow shards: rounding may depend on the size of a block."""
    codes = [
        np.packbits(encoder(_normalised(_small(images[rows])).flatten(1)).gt(0).numpy(), axis=1).view(np.uint64)
        for rows in _blocks(np.arange(len(images)))
    ]
    return np.concatenate(codes)


# --- from codes to groups


def _link(images: Images, codes: np.ndarray, seed: int) -> np.ndarray:
    """For each image, the first of those it is connected to through near-duplicates, int64 (N,)."""
    first, refused = np.arange(len(codes)), np.empty(0, np.int64)
    for one, other in _close(codes, seed):
        apart = first[one] != first[other]
        one, other = one[apart], other[apart]
        pairs = np.sort(np.minimum(one, other) * len(codes) + np.maximum(one, other))
        # Different images with close codes meet again in other sorts: 6.6 times on CIFAR-10.
        pairs = pairs[np.searchsorted(refused, pairs) == np.searchsorted(refused, pairs, "right")]
        one, other = np.divmod(pairs, len(codes))
        agree = same(images, one, other)
        refused = np.insert(refused, np.searchsorted(refused, pairs[~agree]), pairs[~agree])
        if agree.any():
            _join(first, one[agree], other[agree])
    return first


def _close(codes: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows with codes at most FLIPPED bits apart, as two int64 (m,) at a time; some repeat, some are missed.

    Sorts all codes SORTS times, and compares each with the WINDOW that follow it.
    """
    generator = np.random.default_rng(seed)
    for _ in range(SORTS):
        key = np.zeros(len(codes), np.uint64)
        for bit in generator.permutation(CODE)[:KEY]:
            key = key << np.uint64(1) | codes[:, bit // 64] >> np.uint64(bit % 64) & np.uint64(1)
        order = np.lexsort((*codes.T, key))  # ties by the whole code, so that equal ones are neighbours
        sorted_codes = codes[order]
        for step in range(1, min(WINDOW, len(codes) - 1) + 1):
            flipped = np.bitwise_count(sorted_codes[step:] ^ sorted_codes[:-step]).sum(1)
            at = np.flatnonzero(flipped <= FLIPPED)
            yield order[at], order[at + step]


def _join(first: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Record in `first` that the pairs are connected (union-find; at the end every entry points to its root again)."""
    for pair in zip(one.tolist(), other.tolist(), strict=True):
        low, high = sorted(_root(first, row) for row in pair)
        first[high] = low
    while not np.array_equal(first, higher := first[first]):
        first[:] = higher


def _root(first: np.ndarray, row: int) -> int:
    while (above := int(first[row])) != row:
        first[row] = first[above]
        row = above
    return row


def _stars(images: Images, first: np.ndarray) -> list[list[int]]:
    """Groups around an image that agrees with each of the others: A like B like C does not make A like C."""
    rows = np.flatnonzero(np.bincount(first, minlength=len(first))[first] > 1)
    groups: list[list[int]] = []
    while len(rows):
        rows = rows[np.argsort(first[rows], kind="stable")]
        _, at, together = np.unique(first[rows], return_index=True, return_inverse=True)
        centre = rows[at][together]
        agree = same(images, centre, rows)  # a centre agrees with itself, so each round leaves fewer
        groups += [g.tolist() for g in np.split(rows[agree], np.flatnonzero(np.diff(centre[agree])) + 1)]
        rows = rows[~agree]
    return sorted(group for group in groups if len(group) > 1)


def same(images: Images, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether the images in rows `one` and `other`, int64 (m,), are near-duplicates: bool (m,)."""
    blocks = zip(_blocks(one), _blocks(other), strict=True)
    answers = [_alike(_small(images[a]), _small(images[b])) for a, b in blocks]
    return np.concatenate([np.empty(0, bool), *answers])


def _alike(one: Tensor, other: Tensor) -> np.ndarray:
    """Whether images, float32 (m, 3, SIDE, SIDE), are similarly bright and their edges agree at one of nine offsets."""
    light = (one.mean((2, 3)) - other.mean((2, 3))).abs().amax(1) <= LIGHT
    a, b = _edges(one), _edges(other)
    reach, side = int(SHIFT), a.shape[-1] - 2 * int(SHIFT)
    inner = a[:, :, reach : reach + side, reach : reach + side].flatten(1)
    moved = (b[:, :, y : y + side, x : x + side].flatten(1) for y in range(2 * reach + 1) for x in range(2 * reach + 1))
    agreement = torch.stack([_correlation(inner, candidate) for candidate in moved]).amax(0)
    return (light & (agreement >= 1 - EDGES)).numpy()


def _edges(images: Tensor) -> Tensor:
    """Differences to the next pixel across and down, (m, 6, SIDE - 1, SIDE - 1)."""
    inner = images[:, :, :-1, :-1]
    return torch.cat([images[:, :, :-1, 1:] - inner, images[:, :, 1:, :-1] - inner], 1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of rows around 0, (m,): 1 for two without edges, near 0 for one without and one with."""
    product, one, other = ((x * y).mean(1) + ROUNDING for x, y in ((a, b), (a, a), (b, b)))
    return product / (one * other).sqrt()
