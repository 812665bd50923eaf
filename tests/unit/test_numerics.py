"""The rule that chooses a device's numbers and memory format, and what overrides it."""

import pytest
import torch

from dcgan.config import Train
from dcgan.numerics import numerics, on_cuda

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LAST, PLAIN = torch.channels_last, torch.contiguous_format


def chosen(device, **settings):
    return numerics(Train(steps=1, batch_size=2, **settings), device)


@pytest.mark.parametrize(("multiplies", "expected"), [(True, (torch.bfloat16, LAST)), (False, (torch.float32, LAST))])
def test_a_cpu_computes_in_bfloat16_where_it_multiplies_in_it(multiplies, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    assert chosen(CPU) == expected


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), (torch.float32, PLAIN)), ((8, 0), (torch.bfloat16, LAST)), ((9, 0), (torch.bfloat16, LAST))],
)
def test_cuda_computes_in_bfloat16_from_ampere_on(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert chosen(CUDA) == expected


@pytest.mark.parametrize(
    ("wanted", "there", "expected"), [("auto", True, True), ("auto", False, False), ("cpu", True, False)]
)
def test_cuda_is_used_where_it_is_and_was_not_refused(wanted, there, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert on_cuda(wanted) == expected


def test_cuda_that_was_asked_for_and_is_absent_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="but this process sees no CUDA device"):
        on_cuda("cuda")


@pytest.mark.parametrize("multiplies", [True, False])
def test_what_was_asked_for_is_done(multiplies, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    assert chosen(CPU, precision="float32").dtype == torch.float32
    assert chosen(CPU, precision="bfloat16").dtype == torch.bfloat16
    assert chosen(CPU, memory_format="contiguous").memory_format == PLAIN
    assert chosen(CPU, precision="float32", memory_format="channels_last") == (torch.float32, LAST)
