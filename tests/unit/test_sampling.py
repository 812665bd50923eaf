"""Images from a generator: of each class in turn or of none, the same ones however many are drawn."""

from functools import cache
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcgan import models, sampling
from dcgan.config import Model
from dcgan.data import batches
from dcgan.pictures import to_uint8
from dcgan.sampling import CHUNK, sampled

MODEL = Model(kernel=4, width=2, z_dim=3, conditional=True, hidden=4, affine=False)
HERE = torch.device("cpu")


def generator(model=MODEL, classes=3):
    net, _ = models.build(model, 1, classes, 28, seed=0)
    stream = torch.Generator().manual_seed(0)
    for _ in range(60):  # so that the running statistics are those of many batches
        net(torch.randn(8, model.z_dim, generator=stream), torch.arange(8) % classes if model.conditional else None)
    return net


def together(count, seed=0, net=None):
    parts = list(sampled(net or generator(), MODEL, 3, count, seed, HERE))
    assert max(len(images) for images, _ in parts) <= CHUNK
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


@cache
def larger():
    """A generator and the 2,500 images it draws."""
    net = generator()
    return net, together(2500, net=net)


@settings(max_examples=10)
@given(st.integers(1, 2500))
def test_every_count_is_the_beginning_of_a_larger_one_and_balanced(count):
    net, (more, more_labels) = larger()
    images, labels = together(count, net=net)
    assert (images.shape, images.dtype, labels.dtype) == ((count, 1, 28, 28), np.uint8, np.int64)
    assert np.ptp(np.bincount(labels, minlength=3)) <= 1
    assert np.array_equal(images, more[:count])
    assert np.array_equal(labels, more_labels[:count])


def test_images_are_the_generators_with_running_statistics():
    net = generator().eval()
    images, labels = together(CHUNK + 6, net=net)
    z = batches.noise("uniform", (CHUNK, 3), 0, 2**62 + 1)[:6]
    with torch.no_grad():
        expected = net(torch.from_numpy(z), torch.from_numpy(labels[-6:])).numpy() * 127.5 + 127.5
    assert np.abs(images[-6:] - expected).max() < 0.51


def test_drawing_leaves_the_generator_as_it_was():
    net = generator()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    together(5, net=net)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_on_a_cpu_it_is_drawn_in_channels_last():
    net = generator()
    together(1, net=net)
    assert all(conv.weight.stride(1) == 1 for conv in net.convs)


def test_the_seed_decides():
    net = generator()
    assert np.array_equal(together(9, net=net)[0], together(9, net=net)[0])
    assert not np.array_equal(together(9, net=net)[0], together(9, seed=1, net=net)[0])


def test_no_z_is_drawn_twice(monkeypatch):
    """Not in two chunks, and not in the sample grid. A list of numbers beyond 2**63 would be rounded by NumPy."""
    drawn = []
    monkeypatch.setattr(sampling, "draw", lambda net, z, labels: drawn.append(z) or torch.zeros(len(z), 1, 1, 1))
    together(5 * CHUNK)
    grid, _ = sampling.fixed_noise(MODEL, 3, 3, seed=0)
    seen = torch.cat([grid, *drawn])
    assert len(torch.unique(seen, dim=0)) == len(seen) == 5 * CHUNK + 9


def test_ten_million_images_are_drawn_one_chunk_at_a_time():
    stream = sampled(generator(), MODEL, 3, 10_000_000, 0, HERE)
    assert [len(images) for images, _ in islice(stream, 2)] == [CHUNK, CHUNK]


def test_a_generator_without_labels_draws_images_of_no_class():
    plain = Model(kernel=4, width=2, z_dim=3)
    net = generator(plain)
    images, labels = zip(*sampled(net, plain, 0, CHUNK + 3, 0, HERE), strict=True)
    assert [len(part) for part in images] == [CHUNK, 3]
    assert set(np.concatenate(labels)) == {-1}
    z = torch.from_numpy(batches.noise(plain.z, (CHUNK, 3), 0, sampling.FIRST))
    np.testing.assert_array_equal(images[0], to_uint8(sampling.draw(net, z, None).numpy()))


def test_refusals_come_with_the_call():
    with pytest.raises(ValueError, match="count=0: at least 1 image is drawn"):
        sampled(generator(), MODEL, 3, 0, 0, HERE)


def test_a_conditional_grid_has_a_class_after_the_other():
    z, labels = sampling.fixed_noise(Model(z_dim=2, conditional=True), 3, 2, seed=0)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(z) == 6
