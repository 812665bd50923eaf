"""Published shapes and parameter counts, and activations against a computation by definition in NumPy."""

import numpy as np
import pytest
import torch

from dcgan import models
from dcgan.config import Model

FACES = Model(kernel=5, width=128)
SVHN = Model(kernel=5, width=64, z="normal")
IMAGENET = Model(kernel=3, width=128, z_dim=256)
MNIST = Model(kernel=5, width=64, conditional=True, hidden=1024, affine=False)
TORCH = Model(kernel=4, width=64, z="normal")


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("model", "channels", "classes", "size", "generator", "discriminator", "widths"),
    [
        # Newmu/dcgan_code faces/train_uncond_dcgan.py: gw ... gwx and dw ... dwy, with per-unit gamma and beta after gw
        (FACES, 3, 0, 64, 18_885_760, 17_232_768, [128, 256, 512, 1024]),
        (SVHN, 3, 0, 32, 1_446_976, 1_033_664, [64, 128, 256]),
        # its 28,672 features come from 128, 128, 256, 256, 512, 512 maps at 4x4
        (IMAGENET, 3, 0, 32, 6_690_688, 4_586_112, [128, 128, 256, 256, 512, 512]),
        # mnist/train_cond_dcgan.py: 110*1024 + 1034*6272 + 138*64*25 + 74*25
        # and 11*64*25 + 74*128*25 + 6282*1024 + 1034
        (MNIST, 1, 10, 28, 6_820_538, 6_688_202, [64, 128]),
        # pytorch/examples dcgan: the widely quoted 3,576,704 and 2,765,568
        (TORCH, 3, 0, 64, 3_576_704, 2_765_568, [64, 128, 256, 512]),
    ],
)
def test_published_parameter_counts(model, channels, classes, size, generator, discriminator, widths):
    g, d = models.build(model, channels, classes, size, seed=0)
    assert parameters(g) == generator
    assert parameters(d) == discriminator
    assert d.channels == widths


def test_imagenet_features_number_exactly_28672():
    _, d = models.build(IMAGENET, 3, 0, 32, seed=0)
    assert 16 * sum(d.channels) == 28_672


@pytest.mark.parametrize("kernel", [3, 4, 5])
@pytest.mark.parametrize("size", [28, 32, 64, 96, 128])
@pytest.mark.parametrize("conditional", [False, True])
def test_every_size_and_kernel_makes_images_of_that_size(kernel, size, conditional):
    model = Model(kernel=kernel, width=2, z_dim=3, conditional=conditional)
    g, d = models.build(model, 3, 4, size, seed=0)
    labels = torch.tensor([0, 3]) if conditional else None
    images = g(torch.randn(2, 3), labels)
    assert images.shape == (2, 3, size, size)
    assert images.abs().max() <= 1
    assert d(images, labels).shape == (2,)


def test_generator_maps_are_the_papers():
    """Paper, figure 1: 1024x4x4, 512x8x8, 256x16x16, 128x32x32, 3x64x64."""
    g, _ = models.build(FACES, 3, 0, 64, seed=0)
    shapes = []
    for conv in g.convs:
        conv.register_forward_hook(
            lambda _m, inputs, out: shapes.append((tuple(inputs[0].shape[1:]), tuple(out.shape[1:])))
        )
    g(torch.zeros(2, 100))
    assert [before for before, _ in shapes] == [(1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32)]
    assert shapes[-1][1] == (3, 64, 64)


def test_initialisation_is_published_and_depends_on_the_seed_alone():
    torch.manual_seed(1)
    g, d = models.build(FACES, 3, 0, 64, seed=7)
    torch.manual_seed(2)
    again, _ = models.build(FACES, 3, 0, 64, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(g.parameters(), again.parameters(), strict=True))
    weights = torch.cat([c.weight.flatten() for c in [*g.convs, *d.convs, g.project]])
    gammas = torch.cat([n.weight for n in [*g.norms, *d.norms, g.project_norm]])
    betas = torch.cat([n.bias for n in [*g.norms, *d.norms, g.project_norm]])
    assert weights.mean().abs() < 1e-4
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert gammas.mean().item() == pytest.approx(1.0, abs=1e-3)
    assert gammas.std().item() == pytest.approx(0.02, rel=0.05)
    assert not betas.any()


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    models.build(Model(width=2, spectral_norm=True), 1, 0, 28, seed=0)
    assert torch.equal(torch.rand(1), expected)


def test_batch_norm_stands_where_the_paper_puts_it():
    g, d = models.build(SVHN, 3, 0, 32, seed=0)
    assert len(d.norms) == len(d.convs) - 1  # not after D's input layer
    assert len(g.norms) == len(g.convs) - 1  # not after G's output layer
    assert not any(
        name.endswith("bias") and "norm" not in name for name, _ in [*g.named_parameters(), *d.named_parameters()]
    )


def test_spectral_norm_bounds_every_layer():
    _, d = models.build(Model(width=4, spectral_norm=True), 3, 0, 32, seed=0)
    for _ in range(50):  # power iteration converges while training
        d(torch.randn(2, 3, 32, 32))
    for layer in [*d.convs, d.output]:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_labels_join_every_layer_and_are_required():
    g, d = models.build(MNIST, 1, 10, 28, seed=0)
    assert [g.hidden[0].in_features, g.project.in_features] == [100 + 10, 1024 + 10]
    assert [conv.in_channels for conv in g.convs] == [128 + 10, 64 + 10]
    assert [conv.in_channels for conv in d.convs] == [1 + 10, 64 + 10]
    assert [d.hidden[0].in_features, d.output.in_features] == [128 * 49 + 10, 1024 + 10]
    z, zeros, ones = torch.randn(2, 100), torch.tensor([0, 0]), torch.tensor([1, 1])
    assert not torch.equal(g(z, zeros), g(z, ones))
    with pytest.raises(ValueError, match="labels are required"):
        g(z)
    with pytest.raises(ValueError, match="needs images with labels"):
        models.build(MNIST, 1, 0, 28, seed=0)


# The same networks by definition, in float64 NumPy.


def convolve(x, weight, stride, padding):
    """out[n, o, i, j] = sum over c, a, b of x[n, c, i*s+a-p, j*s+b-p] * w[o, c, a, b]."""
    kernel = weight.shape[-1]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    side = (x.shape[-1] - kernel) // stride + 1
    out = np.zeros((x.shape[0], weight.shape[0], side, side))
    for i in range(side):
        for j in range(side):
            patch = x[:, :, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            out[:, :, i, j] = np.einsum("ncab,ocab->no", patch, weight)
    return out


def transposed(x, weight, stride, padding, side):
    """Each input pixel adds w[c, o] to the output at i*s-p: the adjoint of `convolve`."""
    kernel = weight.shape[-1]
    full = np.zeros((x.shape[0], weight.shape[1], side + 2 * padding + kernel, side + 2 * padding + kernel))
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            y, z = i * stride, j * stride
            full[:, :, y : y + kernel, z : z + kernel] += np.einsum("nc,coab->noab", x[:, :, i, j], weight)
    return full[:, :, padding : padding + side, padding : padding + side]


def normalise(x, norm):
    """Batch statistics, biased variance, epsilon 1e-5, gamma and beta."""
    axes, shape = ((0, 2, 3), (1, -1, 1, 1)) if x.ndim == 4 else ((0,), (1, -1))
    mean, var = x.mean(axes).reshape(shape), x.var(axes).reshape(shape)
    gamma, beta = (p.detach().double().numpy().reshape(shape) for p in (norm.weight, norm.bias))
    return (x - mean) / np.sqrt(var + 1e-5) * gamma + beta


def array(parameter):
    return parameter.detach().double().numpy()


@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (4, 1), (5, 2)])
def test_activations_match_a_computation_by_definition(kernel, padding):
    g, d = models.build(Model(kernel=kernel, width=3, z_dim=5), 2, 0, 32, seed=1)
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))

    x = array(z) @ array(g.project.weight).T
    if kernel == 4:
        x = normalise(x.reshape(4, -1, 4, 4), g.project_norm)
    else:
        x = normalise(x, g.project_norm).reshape(4, -1, 4, 4)
    x = np.maximum(x, 0)
    strides = [2, 1] * 3 if kernel == 3 else [2] * 3
    for index, (conv, stride) in enumerate(zip(g.convs, strides, strict=True)):
        x = transposed(x, array(conv.weight), stride, padding, x.shape[-1] * stride)
        x = np.tanh(x) if index == len(strides) - 1 else np.maximum(normalise(x, g.norms[index]), 0)
    images = g(z)
    np.testing.assert_allclose(images.detach().numpy(), x, atol=2e-6)

    strides = [1, 2] * 3 if kernel == 3 else [2] * 3
    for index, (conv, stride, layer) in enumerate(zip(d.convs, strides, d.activations(images), strict=True)):
        x = convolve(x, array(conv.weight), stride, padding)
        x = x if index == 0 else normalise(x, d.norms[index - 1])
        x = np.where(x > 0, x, 0.2 * x)
        np.testing.assert_allclose(layer.detach().numpy(), x, atol=2e-5)
    logits = x.reshape(4, -1) @ array(d.output.weight).T
    np.testing.assert_allclose(d(images).detach().numpy(), logits[:, 0], atol=2e-5)


def test_hidden_layers_match_a_computation_by_definition():
    """Newmu/dcgan_code mnist: a fully connected layer of G before the maps, and one of D after them."""
    g, d = models.build(Model(kernel=5, width=3, z_dim=5, hidden=6), 2, 0, 32, seed=1)
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    x = np.maximum(normalise(array(z) @ array(g.hidden[0].weight).T, g.hidden[1]), 0)
    x = np.maximum(normalise(x @ array(g.project.weight).T, g.project_norm).reshape(4, -1, 4, 4), 0)
    for index, conv in enumerate(g.convs):
        x = transposed(x, array(conv.weight), 2, 2, x.shape[-1] * 2)
        x = np.tanh(x) if index == len(g.convs) - 1 else np.maximum(normalise(x, g.norms[index]), 0)
    np.testing.assert_allclose(g(z).detach().numpy(), x, atol=2e-6)

    images = torch.randn(4, 2, 32, 32)
    x = normalise(array(d.activations(images)[-1].flatten(1)) @ array(d.hidden[0].weight).T, d.hidden[1])
    x = np.where(x > 0, x, 0.2 * x)
    np.testing.assert_allclose(d(images).detach().numpy(), (x @ array(d.output.weight).T)[:, 0], atol=2e-5)
