"""Chooses the device, and the dtype and memory format that a step computes in: the fastest, or those asked for."""

from typing import NamedTuple

import torch

from dcgan.config import Train


class Numerics(NamedTuple):
    """float32 or bfloat16 (by autocast: weights and updates stay float32), and the format of images and weights."""

    dtype: torch.dtype
    memory_format: torch.memory_format


FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def numerics(settings: Train, device: torch.device) -> Numerics:
    """Those of `train.precision` and `train.memory_format`; for auto, on CPUs the fastest (docs/performance.md).

    bfloat16 where the processor multiplies in it: CUDA from compute capability 8.0 on, x86 with AVX-512 BF16 or AMX.
    Elsewhere it is converted before each operation and slower than float32. Channels last: with it and on every CPU.
    """
    dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    if settings.precision == "auto" and multiplies_bfloat16(device):
        dtype = torch.bfloat16
    if settings.memory_format == "auto":
        return Numerics(dtype, torch.channels_last if dtype == torch.bfloat16 else layout(device))
    return Numerics(dtype, FORMATS[settings.memory_format])


def on_cuda(wanted: str) -> bool:
    """Whether `compute.device` (auto, cpu or cuda) means CUDA here. Raises ValueError if it is asked for and absent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("compute.device=cuda, but this process sees no CUDA device")
    return wanted != "cpu" and torch.cuda.is_available()


def layout(device: torch.device) -> torch.memory_format:
    """The memory format in which nets compute float32 fastest: on a CPU, pooling takes a seventh of the time, too."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is multiplied as such, and not converted first."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported()  # every processor with AMX has it, too
