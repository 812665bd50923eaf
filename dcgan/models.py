"""The generator and discriminator of Radford, Metz and Chintala (2015), section 3, built from the `model` settings.

`kernel` chooses between three published families, all without biases, and without hidden layers unless asked for:

    5  the paper's and its code's 5x5, stride 2 (faces, SVHN, MNIST)
    4  the 4x4, stride 2 of pytorch/examples and dcgan.torch
    3  the code's deep ImageNet pair: 3x3, strides 1 and 2 in turn, twice as many layers

BatchNorm follows every layer except the generator's output and the discriminator's input and output. Its statistics are
those of the rank's own batch: ranks share gradients, not statistics. Epsilon is PyTorch's 1e-5; the original's 1e-8
overflows on a dead channel in bfloat16.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgan.config import Model
from dcgan.convolution.modules import Conv2d, ConvTranspose2d

INIT_STD = 0.02  # paper, section 4: weights ~ N(0, 0.02); the code draws BatchNorm's gamma from N(1, 0.02)
SLOPE = 0.2  # paper, section 4: LeakyReLU's
GEOMETRY = {3: (1, 1), 4: (1, 0), 5: (2, 1)}  # kernel: padding, and output padding of a transposed stride-2 layer
# Image size: smallest map, number of halvings down to it.
STEM = {28: (7, 2), 32: (4, 3), 64: (4, 4), 96: (6, 4), 128: (4, 5)}


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight from N(0, 0.02) and every BatchNorm gamma from N(1, 0.02), as the original code does."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(layer.weight, 0.0, INIT_STD, generator=generator)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) and layer.affine:
            nn.init.normal_(layer.weight, 1.0, INIT_STD, generator=generator)


def norms(net: nn.Module) -> list[Any]:
    """The BatchNorm layers of a net, in the order of its modules."""
    return [layer for layer in net.modules() if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]


class _Uncounted(nn.modules.batchnorm._BatchNorm):
    """BatchNorm that does not count its batches: nothing reads that, and on CUDA it is a kernel per layer and pass."""

    def forward(self, x: Tensor) -> Tensor:
        momentum = self.momentum
        assert momentum is not None  # the mean over all batches would need their number
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, momentum, self.eps)


class BatchNorm1d(_Uncounted, nn.BatchNorm1d):
    """Of (N, C)."""


class BatchNorm2d(_Uncounted, nn.BatchNorm2d):
    """Of (N, C, H, W)."""


def join(x: Tensor, onehot: Tensor | None) -> Tensor:
    """Append the one-hot label (N, K) to features (N, F)."""
    return x if onehot is None else torch.cat([x, onehot.to(x.dtype)], 1)


class _Network(nn.Module):
    """What both nets share: the sizes of their layers and the one-hot label."""

    def __init__(self, model: Model, classes: int, size: int) -> None:
        super().__init__()
        if model.conditional and not classes:
            raise ValueError("model.conditional=true needs images with labels; this data set has none")
        self.side, self.levels = STEM[size]
        self.widths = [model.width * 2**level for level in range(self.levels)]
        self.deep = model.kernel == 3
        self.labels = classes if model.conditional else 0

    def onehot(self, labels: Tensor | None) -> Tensor | None:
        """(N,) int64 to (N, K) float32; None for an unconditional net. Raises ValueError where labels are missing."""
        if not self.labels:
            return None
        if labels is None:
            raise ValueError("this net is label-conditional: labels are required")
        return F.one_hot(labels, self.labels).float()


class Generator(_Network):
    """z (N, z_dim) float32, and labels (N,) int64 if conditional -> images (N, channels, size, size) in [-1, 1].

    z is projected to `width * 2**(levels-1)` maps of the smallest size, then upsampled by transposed convolutions;
    ReLU everywhere, Tanh last. The MNIST code's sigmoid on [0, 1] is this Tanh on [-1, 1] with a halved argument.
    """

    def __init__(self, model: Model, channels: int, classes: int, size: int) -> None:
        super().__init__(model, classes, size)
        self.z_dim = model.z_dim
        top = self.widths[-1]
        self.hidden = None
        if model.hidden:
            self.hidden = nn.Sequential(
                nn.Linear(model.z_dim + self.labels, model.hidden, bias=False),
                BatchNorm1d(model.hidden, affine=model.affine),
            )
        self.project = nn.Linear((model.hidden or model.z_dim) + self.labels, top * self.side**2, bias=False)
        # The original code normalises each projected unit; pytorch/examples, whose projection is a transposed
        # convolution, each channel. The published parameter counts differ by that.
        self.project_norm: nn.Module
        if model.kernel == 4:
            self.project_norm = BatchNorm2d(top, affine=model.affine)
        else:
            self.project_norm = BatchNorm1d(top * self.side**2, affine=model.affine)
        padding, output_padding = GEOMETRY[model.kernel]
        plan = self._plan(channels)
        self.convs = nn.ModuleList(
            ConvTranspose2d(
                before + self.labels,
                after,
                model.kernel,
                stride,
                padding,
                output_padding if stride == 2 else 0,
                bias=False,
            )
            for before, after, stride in plan
        )
        self.norms = nn.ModuleList(BatchNorm2d(after, affine=model.affine) for _, after, _ in plan[:-1])

    def _plan(self, channels: int) -> list[tuple[int, int, int]]:
        """(channels in, channels out, stride) of each transposed convolution."""
        below = [channels, *self.widths]  # the channels that a level passes on to the next larger one
        plan = []
        current = self.widths[-1]
        for level in reversed(range(self.levels)):
            if self.deep:
                plan += [(current, self.widths[level], 2), (self.widths[level], below[level], 1)]
            else:
                plan.append((current, below[level], 2))
            current = below[level]
        return plan

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        onehot = self.onehot(labels)
        x = z
        if self.hidden is not None:
            x = F.relu(self.hidden(join(x, onehot)))
        x = self.project(join(x, onehot))
        if isinstance(self.project_norm, nn.BatchNorm1d):
            x = self.project_norm(x)
        x = x.unflatten(1, (-1, self.side, self.side))
        first = self.convs[0]
        assert isinstance(first, ConvTranspose2d)
        if first.weight.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        if isinstance(self.project_norm, nn.BatchNorm2d):
            x = self.project_norm(x)
        x = F.relu(x, inplace=True)
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = F.relu(norm(conv(x, onehot)), inplace=True)
        return torch.tanh(self.convs[-1](x, onehot))


class Discriminator(_Network):
    """images (N, channels, size, size) in [-1, 1], and labels (N,) int64 if conditional -> logits (N,).

    Strided convolutions, LeakyReLU(0.2), no pooling; one linear unit reads the last maps.
    """

    def __init__(self, model: Model, channels: int, classes: int, size: int) -> None:
        super().__init__(model, classes, size)
        padding, _ = GEOMETRY[model.kernel]
        plan = self._plan(channels)
        self.channels = [after for _, after, _ in plan]
        self.convs = nn.ModuleList(
            Conv2d(before + self.labels, after, model.kernel, stride, padding, bias=False)
            for before, after, stride in plan
        )
        self.norms = nn.ModuleList(BatchNorm2d(after, affine=model.affine) for after in self.channels[1:])
        flat = self.channels[-1] * self.side**2
        self.hidden = None
        if model.hidden:
            self.hidden = nn.Sequential(
                nn.Linear(flat + self.labels, model.hidden, bias=False),
                BatchNorm1d(model.hidden, affine=model.affine),
            )
        self.output = nn.Linear((model.hidden or flat) + self.labels, 1, bias=False)

    def _plan(self, channels: int) -> list[tuple[int, int, int]]:
        """(channels in, channels out, stride) of each convolution."""
        plan = []
        current = channels
        for width in self.widths:
            if self.deep:
                plan += [(current, width, 1), (width, width, 2)]
            else:
                plan.append((current, width, 2))
            current = width
        return plan

    def activations(self, x: Tensor, onehot: Tensor | None = None) -> list[Tensor]:
        """The output of every convolution layer after BatchNorm and LeakyReLU: (N, channels[i], h, w) each."""
        layers = []
        for index, conv in enumerate(self.convs):
            x = conv(x, onehot)
            if index:
                x = self.norms[index - 1](x)
            x = F.leaky_relu(x, SLOPE, inplace=True)
            layers.append(x)
        return layers

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        onehot = self.onehot(labels)
        maps = self.activations(x, onehot)[-1]
        if maps.requires_grad and maps.is_contiguous(memory_format=torch.channels_last):
            # Otherwise LeakyReLU's backward mixes two memory formats, which takes ten times as long on a CPU.
            maps.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
        x = maps.flatten(1)
        if self.hidden is not None:
            x = F.leaky_relu(self.hidden(join(x, onehot)), SLOPE)
        return self.output(join(x, onehot)).squeeze(1)


def build(model: Model, channels: int, classes: int, size: int, seed: int) -> tuple[Generator, Discriminator]:
    """Both nets on the CPU in float32, initialised from `seed` alone: the same weights on every machine and rank."""
    with torch.random.fork_rng(devices=[]):  # PyTorch's own initialisation draws from the global generator
        torch.manual_seed(seed)
        generator = Generator(model, channels, classes, size)
        discriminator = Discriminator(model, channels, classes, size)
        stream = torch.Generator().manual_seed(seed)
        initialise(generator, stream)
        initialise(discriminator, stream)
        if model.spectral_norm:
            for layer in [m for m in discriminator.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
                nn.utils.parametrizations.spectral_norm(layer)
    return generator, discriminator
