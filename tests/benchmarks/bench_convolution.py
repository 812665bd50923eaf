"""Layers computed in our ways beside PyTorch's: python tests/benchmarks/bench_convolution.py [--repeats 7]

A layer's convolution and gradients in turn, once with the weight gradient and once with that of the input alone: the
ratio of median times. Layers at the pixels, by patches; wide ones by Winograd's filtering, beside the ratio that
`dcgan/convolution.py` expects and chooses by, whose constants are fitted to what this prints. float32, channels last.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dcgan import im2col, memory, winograd
from dcgan.convolution import LIMIT, NARROW, winograd_time
from dcgan.models import GEOMETRY
from dcgan.winograd import Layer

# images, channels of the larger map, of the smaller one, pixels of the larger one
WIDE = [
    *[(128, 64, 128, 16), (128, 128, 256, 8), (128, 64, 128, 32), (128, 128, 256, 16), (128, 256, 512, 8)],
    *[(128, 64, 128, 14), (128, 74, 128, 14), (128, 128, 256, 14), (128, 32, 64, 16), (64, 128, 128, 16)],
    *[(64, 256, 512, 8), (32, 128, 256, 8), (16, 128, 256, 16)],
]
PIXELS = [
    *[(128, 1, 64, 28), (128, 1, 74, 28), (128, 3, 64, 32), (128, 3, 64, 64), (128, 3, 128, 64), (16, 3, 64, 32)],
    *[(128, 11, 64, 28), (128, 13, 64, 32)],
]


class Case(NamedTuple):
    kernel: int
    images: int
    larger: int
    smaller: int
    size: int
    transposed: bool

    @property
    def layer(self) -> Layer:
        return Layer(self.kernel, GEOMETRY[self.kernel][0], self.size // 2, self.size // 2)

    def __str__(self) -> str:
        return (
            f"{self.kernel} taps, {self.images:3d} images, {self.larger:3d} and {self.smaller:3d} channels, "
            f"{self.size:2d} px{', transposed' if self.transposed else ''}"
        )


def seconds(apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, gradient: Tensor) -> float:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_(weight.requires_grad)
    began = time.perf_counter()
    apply(x, weight).backward(gradient)
    return time.perf_counter() - began


def compare(case: Case, repeats: int) -> Iterator[tuple[Tensor, float]]:
    """The weight and the ratio of our time to PyTorch's, with the weight gradient and without."""
    (padding, more), layer = GEOMETRY[case.kernel], case.layer
    way = winograd if case in wide() else im2col
    shape = (
        (case.images, case.smaller, layer.height, layer.width)
        if case.transposed
        else (case.images, case.larger, case.size, case.size)
    )
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(case.smaller, case.larger, case.kernel, case.kernel).mul(0.02)
    weight = weight.to(memory_format=torch.channels_last)
    ours, theirs = (
        (lambda x, w: way.Transposed.apply(x, w, layer), lambda x, w: F.conv_transpose2d(x, w, None, 2, padding, more))
        if case.transposed
        else (lambda x, w: way.Convolution.apply(x, w, layer), lambda x, w: F.conv2d(x, w, None, 2, padding))
    )
    gradient = torch.randn_like(theirs(x, weight))
    for wanted in (True, False):
        weight.requires_grad_(wanted)
        times: dict[Callable[[Tensor, Tensor], Tensor], list[float]] = {ours: [], theirs: []}
        for _ in range(repeats + 2):
            for apply, found in times.items():
                found.append(seconds(apply, x, weight, gradient))
        a, b = (1e3 * statistics.median(times[apply][2:]) for apply in (ours, theirs))
        gradients = "all gradients" if wanted else "of the input"
        print(f"{case}, {gradients}: {b:.1f} ms, ours {a:.1f} ms: {a / b:.2f}", end="", flush=True)
        yield weight, a / b


def wide() -> list[Case]:
    shapes = [(kernel, *shape) for kernel in (3, 4, 5) for shape in WIDE if kernel > 3 or shape[3] == 16]
    return [Case(*shape, transposed) for shape in shapes for transposed in (False, True)]


def at_the_pixels() -> list[Case]:
    return [Case(kernel, *shape, transposed) for kernel in (4, 5) for shape in PIXELS for transposed in (False, True)]


def told(ratios: list[float]) -> str:
    return f"{len(ratios)} are chosen, median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    memory.keep()
    chosen = []
    for case in at_the_pixels():
        for weight, ratio in compare(case, repeats):
            numbers = im2col.columns(weight, case.layer)
            print(f", {numbers} numbers a patch")
            chosen += [ratio] if numbers <= NARROW else []
    print(f"at the pixels: {told(chosen)}")
    found: list[tuple[float, float]] = []
    for case in wide():
        for weight, ratio in compare(case, repeats):
            expected = winograd_time(case.images, weight, case.layer)
            print(f", expected {expected:.2f}")
            found.append((ratio, expected))
    off = math.sqrt(statistics.fmean(math.log(ratio / expected) ** 2 for ratio, expected in found))
    print(
        f"by Winograd's filtering: {len(found)} cases, off by {math.expm1(off):.0%} (root mean square); "
        f"{told([ratio for ratio, expected in found if expected < LIMIT])}"
    )


if __name__ == "__main__":
    main()
