"""Layers computed in our ways beside PyTorch's: python tests/benchmarks/bench_convolution.py [--help]

A layer's convolution and gradients in turn, once with the weight gradient and once with that of the input alone: the
ratio of median times. `winograd` is for wide layers on processors with AVX2: beside each ratio stands the one that
`dcgan/convolution/modules.py` expects and chooses by, whose constants are fitted to this output. `im2col` is for layers
at the pixels there, `subpixel` for those on processors that multiply in bfloat16. Of wide layers on the latter, in
bfloat16, `weights` computes the weight gradients by patches, `patches` everything. Channels last.
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

from dcgan import memory
from dcgan.convolution import im2col, patches, subpixel, winograd
from dcgan.convolution.layer import Layer
from dcgan.convolution.modules import LIMIT, NARROW, _operations, winograd_time
from dcgan.convolution.strided import Operations, Strided
from dcgan.models import GEOMETRY

# images, channels of the larger map, of the smaller one, pixels of the larger one
WIDE = [
    *[(128, 64, 128, 16), (128, 128, 256, 8), (128, 64, 128, 32), (128, 128, 256, 16), (128, 256, 512, 8)],
    *[(128, 64, 128, 14), (128, 74, 128, 14), (128, 128, 256, 14), (128, 32, 64, 16), (64, 128, 128, 16)],
    *[(64, 256, 512, 8), (32, 128, 256, 8), (16, 128, 256, 16)],
]
OPERATIONS = {
    "subpixel": Operations(larger=subpixel.larger),
    "weights": Operations(weight_gradient=patches.weight_gradient),
    "patches": Operations(patches.smaller, patches.larger, patches.weight_gradient),
}
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


Apply = Callable[[Tensor, Tensor], Tensor]


def library(case: Case) -> Apply:
    padding, more = GEOMETRY[case.kernel]
    if case.transposed:
        return lambda x, w: F.conv_transpose2d(x, w, None, 2, padding, more)
    return lambda x, w: F.conv2d(x, w, None, 2, padding)


def ours(case: Case, way: str) -> Apply:
    if operations := OPERATIONS.get(way):
        return lambda x, w: Strided.apply(x, w, case.layer, operations, case.transposed)
    module = {"winograd": winograd, "im2col": im2col}[way]
    function = module.Transposed if case.transposed else module.Convolution
    return lambda x, w: function.apply(x, w, case.layer)


def seconds(apply: Apply, x: Tensor, weight: Tensor, gradient: Tensor) -> float:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_(weight.requires_grad)
    began = time.perf_counter()
    apply(x, weight).backward(gradient)
    return time.perf_counter() - began


def compare(case: Case, way: str, dtype: torch.dtype, repeats: int) -> Iterator[tuple[Tensor, float]]:
    """The weight and the ratio of our time to PyTorch's, with the weight gradient and without."""
    layer = case.layer
    shape = (
        (case.images, case.smaller, layer.height, layer.width)
        if case.transposed
        else (case.images, case.larger, case.size, case.size)
    )
    x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(case.smaller, case.larger, case.kernel, case.kernel).mul(0.02)
    weight = weight.to(dtype).to(memory_format=torch.channels_last)  # even of one channel
    both = ours(case, way), library(case)
    gradient = torch.randn_like(both[1](x, weight))
    for wanted in (True, False) if way != "weights" else (True,):
        weight.requires_grad_(wanted)
        times: dict[Apply, list[float]] = {apply: [] for apply in both}
        for _ in range(repeats + 2):
            for apply, found in times.items():
                found.append(seconds(apply, x, weight, gradient))
        a, b = (1e3 * statistics.median(times[apply][2:]) for apply in both)
        gradients = "all gradients" if wanted else "of the input"
        print(f"{way}, {case}, {gradients}: {b:.1f} ms, ours {a:.1f} ms: {a / b:.2f}", end="", flush=True)
        yield weight, a / b


def wide() -> list[Case]:
    shapes = [(kernel, *shape) for kernel in (3, 4, 5) for shape in WIDE if kernel > 3 or shape[3] == 16]
    return [Case(*shape, transposed) for shape in shapes for transposed in (False, True)]


def at_the_pixels() -> list[Case]:
    return [Case(kernel, *shape, transposed) for kernel in (4, 5) for shape in PIXELS for transposed in (False, True)]


def told(ratios: list[float]) -> str:
    if not ratios:
        return "none is chosen"
    return f"{len(ratios)} are chosen, median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"


def measure(cases: list[Case], way: str, dtype: torch.dtype, repeats: int, choose: Callable[..., bool]) -> None:
    """Print all ratios, then a line about those for which `choose(case, weight)` holds."""
    chosen = []
    for case in cases:
        for weight, ratio in compare(case, way, dtype, repeats):
            print(", chosen" if choose(case, weight) else "")
            chosen += [ratio] if choose(case, weight) else []
    print(f"{way} in {dtype}: {told(chosen)}")


def measure_winograd(repeats: int) -> None:
    found: list[tuple[float, float]] = []
    for case in wide():
        for weight, ratio in compare(case, "winograd", torch.float32, repeats):
            expected = winograd_time(case.images, weight, case.layer)
            print(f", expected {expected:.2f}")
            found.append((ratio, expected))
    off = math.sqrt(statistics.fmean(math.log(ratio / expected) ** 2 for ratio, expected in found))
    print(
        f"winograd: {len(found)} cases, off by {math.expm1(off):.0%} (root mean square); "
        f"{told([ratio for ratio, expected in found if expected < LIMIT])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = ["winograd", "im2col", *OPERATIONS]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    memory.keep()
    if "im2col" in given.ways:
        narrow = lambda case, weight: im2col.columns(weight, case.layer) <= NARROW  # noqa: E731
        measure(at_the_pixels(), "im2col", torch.float32, given.repeats, narrow)
    for dtype in (torch.float32, torch.bfloat16) if "subpixel" in given.ways else ():
        measure(at_the_pixels(), "subpixel", dtype, given.repeats, chosen_operations("subpixel"))
    for way in ("weights", "patches"):
        if way in given.ways:
            measure(wide(), way, torch.bfloat16, given.repeats, chosen_operations(way))
    if "winograd" in given.ways:
        measure_winograd(given.repeats)


def chosen_operations(way: str) -> Callable[[Case, Tensor], bool]:
    def chosen(case: Case, weight: Tensor) -> bool:
        x = torch.empty(case.images, 0, dtype=weight.dtype)
        return _operations(x, weight, case.layer) == OPERATIONS[way]

    return chosen


if __name__ == "__main__":
    main()
