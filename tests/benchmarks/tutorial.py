"""What a user would train otherwise: the loop of PyTorch's DCGAN tutorial, from its published architecture.

4x4 kernels, width 64, z of 100 normals, BCELoss on a sigmoid, Adam (2e-4, 0.5), float32, two backwards for D, and the
numbers that it prints read from the device at every step. At 32 px one level less, otherwise the same.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def generator(size: int, width: int = 64, z: int = 100, channels: int = 3) -> nn.Module:
    """z (n, z, 1, 1) to images (n, channels, size, size)."""
    top = width * size // 8
    layers = [nn.ConvTranspose2d(z, top, 4, 1, 0, bias=False), nn.BatchNorm2d(top), nn.ReLU(True)]
    while top > width:
        layers += [nn.ConvTranspose2d(top, top // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(top // 2), nn.ReLU(True)]
        top //= 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh()).apply(_initial)


def discriminator(size: int, width: int = 64, channels: int = 3) -> nn.Module:
    """Images to the probability (n, 1, 1, 1) that they are real."""
    layers = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    while width < 64 * size // 8:
        layers += [nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width)]
        layers += [nn.LeakyReLU(0.2, inplace=True)]
        width *= 2
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 0, bias=False), nn.Sigmoid()).apply(_initial)


def _initial(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
        nn.init.zeros_(layer.bias)


class Tutorial:
    """Its loop: one call plays one batch, images float32 (n, 3, size, size) in [-1, 1] on the CPU or the device."""

    def __init__(self, size: int, device: torch.device, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.device, self.loss = device, nn.BCELoss()
        self.g, self.d = generator(size).to(device), discriminator(size).to(device)
        self.g_adam, self.d_adam = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (self.g, self.d))

    def __call__(self, images: Tensor) -> list[float]:
        real = images.to(self.device)
        count = real.size(0)
        self.d.zero_grad()
        label = torch.full((count,), 1.0, dtype=torch.float, device=self.device)
        output = self.d(real).view(-1)
        d_real = self.loss(output, label)
        d_real.backward()
        d_x = output.mean().item()
        fake = self.g(torch.randn(count, 100, 1, 1, device=self.device))
        label.fill_(0.0)
        output = self.d(fake.detach()).view(-1)
        d_fake = self.loss(output, label)
        d_fake.backward()
        d_g_z1 = output.mean().item()
        self.d_adam.step()
        self.g.zero_grad()
        label.fill_(1.0)
        output = self.d(fake).view(-1)
        g_loss = self.loss(output, label)
        g_loss.backward()
        d_g_z2 = output.mean().item()
        self.g_adam.step()
        return [(d_real + d_fake).item(), g_loss.item(), d_x, d_g_z1, d_g_z2]


def loaded(directory: str, size: int, batch: int) -> Iterator[Tensor]:
    """Its input: ImageFolder, Resize, CenterCrop, a DataLoader of two processes that shuffles; epoch after epoch."""
    import torchvision.transforms as T
    from torchvision.datasets import ImageFolder

    steps = [T.Resize(size), T.CenterCrop(size), T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)]
    data = ImageFolder(directory, T.Compose(steps))
    while True:
        for images, _ in torch.utils.data.DataLoader(data, batch, shuffle=True, num_workers=2, drop_last=True):
            yield images
