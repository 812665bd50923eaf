"""One update of the discriminator, one of the generator (paper, section 4): tensors in, metrics out.

Real and generated images go through the discriminator in separate batches, so that each has its own BatchNorm
statistics, as in the paper. Losses are the non-saturating ones of Goodfellow et al. (2014) on logits.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgan import distributed
from dcgan.config import Train
from dcgan.distributed import Place
from dcgan.models import Discriminator, Generator
from dcgan.numerics import numerics

BETA2 = 0.999  # Adam's default; the paper changes only beta1


def real_loss(logits: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy of D's logits (n,) for real images against the target `1 - smoothing` (Salimans et al., 2016).

    -(1-s) log D - s log(1-D), where -log sigmoid(l) = softplus(-l).
    """
    logits = logits.float()
    if smoothing == 0:
        return F.softplus(-logits).mean()
    return ((1 - smoothing) * F.softplus(-logits) + smoothing * F.softplus(logits)).mean()


def fake_loss(logits: Tensor) -> Tensor:
    """Mean cross-entropy of D's logits (n,) for generated images against 0: -log(1 - D)."""
    return F.softplus(logits.float()).mean()


def generator_loss(logits: Tensor) -> Tensor:
    """Mean cross-entropy of D's logits (n,) for generated images against 1: -log D, the non-saturating loss."""
    return F.softplus(-logits.float()).mean()


def learning_rate(step: int, settings: Train) -> float:
    """Adam's learning rate at a step (from 0): constant, then falling linearly over the last fraction `decay` of steps.

    It would be 0 at the step after the last. The MNIST code's 100 + 100 epochs, falling once per epoch, are 0.5.
    """
    falling = settings.decay * settings.steps
    left = settings.steps - step
    return settings.learning_rate * left / falling if left < falling else settings.learning_rate


class Game:
    """Both nets with their optimizers and, if `ema`, the generator's moving average. One object per rank.

    `generator` and `discriminator` are the plain nets, whose state is saved; the wrapped ones synchronise gradients.
    """

    def __init__(self, generator: Generator, discriminator: Discriminator, settings: Train, place: Place) -> None:
        self.settings, self.place, self.numerics = settings, place, numerics(settings, place.device)
        layout = self.numerics.memory_format
        self.generator = generator.to(place.device).to(memory_format=layout)
        self.discriminator = discriminator.to(place.device).to(memory_format=layout)
        self.average = deepcopy(self.generator).requires_grad_(False) if settings.ema else None
        self.wrapped_generator = distributed.wrap(self.generator, place)
        self.wrapped_discriminator = distributed.wrap(self.discriminator, place)
        # On the device: a recorded step reads it there.
        self.rate, self._last_rate = torch.tensor(settings.learning_rate, device=place.device), settings.learning_rate
        self.g_optimizer = _adam(self.generator, settings, self.rate)
        self.d_optimizer = _adam(self.discriminator, settings, self.rate)

    @property
    def sampler(self) -> Generator:
        """The generator that is shown and scored: the moving average if there is one."""
        return self.average if self.average is not None else self.generator

    def kind(self, step: int) -> int:
        """The kind of a step: steps of one kind do the same operations on different numbers."""
        return step % 2 if self.settings.update == "alternate" else 0

    def step(self, step: int, real: Tensor, labels: Tensor | None, z: Tensor) -> dict[str, Tensor]:
        """Play one batch: real (n, C, H, W) in [-1, 1], labels (n,) or None, z (n, z_dim). Metrics stay on the device.

        update=both: the discriminator, then the generator on the same z. update=alternate: the generator at even
        steps and the discriminator at odd ones, the order of the original code. The learning rate is that of
        `set_learning_rate`.
        """
        if self.settings.update == "alternate":
            if step % 2:
                with torch.no_grad(), self._autocast():
                    fake = self.generator(z, labels)
                return self._update_discriminator(real, fake, labels)
            return self._update_generator(self._generate(z, labels), labels)
        fake = self._generate(z, labels)
        metrics = self._update_discriminator(real, fake.detach(), labels)
        return metrics | self._update_generator(fake, labels)

    def set_learning_rate(self, step: int) -> None:
        """Give both optimizers the learning rate of a step."""
        if (rate := learning_rate(step, self.settings)) != self._last_rate:
            self._last_rate = rate
            self.rate.fill_(rate)
        for optimizer in (self.g_optimizer, self.d_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = self.rate  # loading a checkpoint puts another tensor there

    def _generate(self, z: Tensor, labels: Tensor | None) -> Tensor:
        with self._autocast():
            return self.wrapped_generator(z, labels)

    def _update_discriminator(self, real: Tensor, fake: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        # Two backward passes: half the memory of one, and DDP never sees two forwards before a backward.
        net = self.wrapped_discriminator
        self.d_optimizer.zero_grad()
        with net.no_sync() if isinstance(net, nn.parallel.DistributedDataParallel) else nullcontext():
            with self._autocast():
                real_logits = net(real, labels)
            real_logits = real_logits.float()
            loss_real = real_loss(real_logits, self.settings.label_smoothing)
            loss_real.backward()
        with self._autocast():
            fake_logits = net(fake, labels)
        fake_logits = fake_logits.float()
        loss_fake = fake_loss(fake_logits)
        loss_fake.backward()
        norm = _gradient_norm(self.discriminator.parameters())
        self.d_optimizer.step()
        return {
            "d_loss": (loss_real + loss_fake).detach(),
            "d_real": real_logits.detach().sigmoid().mean(),
            "d_fake": fake_logits.detach().sigmoid().mean(),
            "d_grad_norm": norm,
        }

    def _update_generator(self, fake: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        self.g_optimizer.zero_grad()
        self.discriminator.requires_grad_(False)  # the gradient passes through D; D's own is not needed
        with self._autocast():
            logits = self.discriminator(fake, labels)
        loss = generator_loss(logits)
        loss.backward()
        self.discriminator.requires_grad_(True)
        norm = _gradient_norm(self.generator.parameters())
        self.g_optimizer.step()
        self._update_average()
        return {"g_loss": loss.detach(), "g_grad_norm": norm}

    @torch.no_grad()
    def _update_average(self) -> None:
        """EMA of the generator's weights; BatchNorm's buffers are copied, they are averages already."""
        if self.average is None:
            return
        averaged: list[Tensor] = list(self.average.parameters())
        current: list[Tensor] = list(self.generator.parameters())
        torch._foreach_lerp_(averaged, current, 1 - self.settings.ema)
        own, theirs = (_floating(net.buffers()) for net in (self.average, self.generator))
        torch._foreach_copy_(own, theirs)

    def _autocast(self) -> torch.autocast:
        dtype = self.numerics.dtype
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def _adam(net: nn.Module, settings: Train, rate: Tensor) -> torch.optim.Adam:
    return torch.optim.Adam(
        net.parameters(),
        lr=rate,
        betas=(settings.beta1, BETA2),
        weight_decay=settings.weight_decay,  # Adam's, added to the gradient, as the original's regularizer does
        fused=True,
        capturable=rate.is_cuda,
    )


def _floating(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Without BatchNorm's counters: tensors of one type are copied by a single kernel."""
    return [each for each in tensors if each.is_floating_point()]


def _gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients as one vector, a scalar on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
