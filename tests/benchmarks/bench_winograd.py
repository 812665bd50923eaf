"""Layers by Winograd's filtering beside PyTorch's: python tests/benchmarks/bench_winograd.py [--repeats 7]

A layer's convolution and gradients in turn, once with the weight gradient and once with that of the input alone: the
ratio of median times, beside the one that `dcgan/convolution.py` expects and chooses by. Its constants are fitted to
what this prints. float32, channels last.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dcgan import memory
from dcgan.convolution import LIMIT, winograd_time
from dcgan.models import GEOMETRY
from dcgan.winograd import Convolution, Layer, Transposed

# images, channels of the larger map, of the smaller one, pixels of the larger one
LAYERS = [
    *[(128, 64, 128, 16), (128, 128, 256, 8), (128, 64, 128, 32), (128, 128, 256, 16), (128, 256, 512, 8)],
    *[(128, 64, 128, 14), (128, 74, 128, 14), (128, 128, 256, 14), (128, 32, 64, 16), (64, 128, 128, 16)],
    *[(64, 256, 512, 8), (32, 128, 256, 8), (16, 128, 256, 16)],
]


def seconds(apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, gradient: Tensor) -> float:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_(weight.requires_grad)
    began = time.perf_counter()
    apply(x, weight).backward(gradient)
    return time.perf_counter() - began


def compare(
    kernel: int, images: int, larger: int, smaller: int, size: int, transposed: bool, repeats: int
) -> Iterator[tuple[float, float]]:
    """The measured ratio and the expected one, with the weight gradient and without."""
    (padding, more), side = GEOMETRY[kernel], size // 2
    layer = Layer(kernel, padding, side, side)
    shape = (images, smaller, side, side) if transposed else (images, larger, size, size)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(smaller, larger, kernel, kernel).mul(0.02).contiguous(memory_format=torch.channels_last)
    ours, theirs = (
        (lambda x, w: Transposed.apply(x, w, layer), lambda x, w: F.conv_transpose2d(x, w, None, 2, padding, more))
        if transposed
        else (lambda x, w: Convolution.apply(x, w, layer), lambda x, w: F.conv2d(x, w, None, 2, padding))
    )
    gradient = torch.randn_like(theirs(x, weight))
    for wanted in (True, False):
        weight.requires_grad_(wanted)
        times: dict[Callable[[Tensor, Tensor], Tensor], list[float]] = {ours: [], theirs: []}
        for _ in range(repeats + 2):
            for apply, found in times.items():
                found.append(seconds(apply, x, weight, gradient))
        a, b = (1e3 * statistics.median(times[apply][2:]) for apply in (ours, theirs))
        expected = winograd_time(images, weight, layer)
        print(
            f"{kernel} taps, {images:3d} images, {larger:3d} and {smaller:3d} channels, {size:2d} px, "
            f"{'transposed, ' if transposed else ''}{'all gradients' if wanted else 'of the input'}: "
            f"{b:.1f} ms, {a:.1f} ms by tiles: {a / b:.2f}, expected {expected:.2f}",
            flush=True,
        )
        yield a / b, expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    memory.keep()
    found: list[tuple[float, float]] = []
    for kernel in (3, 4, 5):
        for layer in LAYERS:
            for transposed in (False, True):
                if kernel > 3 or layer[3] == 16:
                    found += compare(kernel, *layer, transposed, repeats)
    off = math.sqrt(statistics.fmean(math.log(ratio / expected) ** 2 for ratio, expected in found))
    chosen = [ratio for ratio, expected in found if expected < LIMIT]
    print(
        f"{len(found)} cases, off by {math.expm1(off):.0%} (root mean square); {len(chosen)} are chosen, median "
        f"{statistics.median(chosen):.2f}, {min(chosen):.2f} to {max(chosen):.2f}"
    )


if __name__ == "__main__":
    main()
