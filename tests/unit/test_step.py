"""The update rules against plain PyTorch written out, and the effect of every option."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dcgan import models
from dcgan.config import Model, Train
from dcgan.data.batches import Batch
from dcgan.distributed import Place
from dcgan.player import Player
from dcgan.step import Game, fake_loss, generator_loss, learning_rate, real_loss

HERE = Place(0, 1, torch.device("cpu"))
MODEL = Model(kernel=4, width=4, z_dim=6)


def game(**settings):
    plain = {"steps": 10, "batch_size": 8, "precision": "float32", "memory_format": "contiguous"}
    settings = Train(**{**plain, **settings})
    return Game(*models.build(MODEL, 1, 0, 28, seed=0), settings, HERE)


def batch(step=0):
    stream = torch.Generator().manual_seed(step)
    return torch.rand(8, 1, 28, 28, generator=stream) * 2 - 1, None, torch.randn(8, 6, generator=stream)


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_losses_are_cross_entropies_of_the_sigmoid():
    logits = torch.tensor([-3.0, 0.2, 4.0])
    p = logits.sigmoid()
    torch.testing.assert_close(real_loss(logits, 0.0), F.binary_cross_entropy(p, torch.ones(3)))
    torch.testing.assert_close(real_loss(logits, 0.1), F.binary_cross_entropy(p, torch.full((3,), 0.9)))
    torch.testing.assert_close(fake_loss(logits), F.binary_cross_entropy(p, torch.zeros(3)))
    torch.testing.assert_close(generator_loss(logits), F.binary_cross_entropy(p, torch.ones(3)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_both_updates_match_plain_pytorch_over_three_steps(smoothing):
    """pytorch/examples' loop: D on real and on fake.detach(), then G through the updated D, on the same z."""
    ours = game(weight_decay=1e-3, label_smoothing=smoothing)
    g, d = copy.deepcopy(ours.generator), copy.deepcopy(ours.discriminator)
    adams = [torch.optim.Adam(n.parameters(), lr=2e-4, betas=(0.5, 0.999), weight_decay=1e-3) for n in (g, d)]
    for step in range(3):
        real, _, z = batch(step)
        metrics = ours.step(step, real, None, z)
        adams[1].zero_grad()
        fake = g(z)
        real_logits, fake_logits = d(real), d(fake.detach())
        loss_d = F.binary_cross_entropy_with_logits(real_logits, torch.full((8,), 1 - smoothing))
        loss_d = loss_d + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros(8))
        loss_d.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in d.parameters()))
        adams[1].step()
        adams[0].zero_grad()
        loss_g = F.binary_cross_entropy_with_logits(d(fake), torch.ones(8))
        loss_g.backward()
        adams[0].step()
        torch.testing.assert_close(metrics["d_loss"], loss_d.detach())
        torch.testing.assert_close(metrics["g_loss"], loss_g.detach())
        torch.testing.assert_close(metrics["d_grad_norm"], norm)
        torch.testing.assert_close(metrics["d_real"], real_logits.sigmoid().mean().detach())
        torch.testing.assert_close(metrics["d_fake"], fake_logits.sigmoid().mean().detach())
    torch.testing.assert_close(weights(ours.generator), weights(g))
    torch.testing.assert_close(weights(ours.discriminator), weights(d))
    for mine, theirs in zip(ours.discriminator.buffers(), d.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_alternating_updates_train_one_net_a_batch_generator_first():
    """Newmu/dcgan_code: `if n_updates % (k+1) == 0` the generator, else the discriminator, k = 1."""
    play = game(update="alternate")
    for step, trained, idle in [
        (0, play.generator, play.discriminator),
        (1, play.discriminator, play.generator),
        (2, play.generator, play.discriminator),
    ]:
        before, kept = weights(trained), weights(idle)
        metrics = play.step(step, *batch(step))
        assert not torch.equal(weights(trained), before)
        assert torch.equal(weights(idle), kept)
        assert ("g_loss" in metrics) == (trained is play.generator)
        assert ("d_loss" in metrics) == (trained is play.discriminator)


def test_real_and_fake_batches_keep_their_own_statistics():
    """One joint batch of real and fake would give other logits."""
    play = game()
    real, _, z = batch()
    expected = play.discriminator(real).sigmoid().mean().detach()
    metrics = play.step(0, real, None, z)
    torch.testing.assert_close(metrics["d_real"], expected)


def test_moving_average_follows_the_generator():
    play = game(ema=0.9)
    expected = weights(play.generator)
    for step in range(3):
        play.step(step, *batch(step))
        expected = 0.9 * expected + 0.1 * weights(play.generator)
    torch.testing.assert_close(weights(play.average), expected)
    for mine, theirs in zip(play.average.buffers(), play.generator.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert play.sampler is play.average
    assert game().sampler.training


@pytest.mark.parametrize(
    ("option", "tolerance"),
    [({"precision": "bfloat16"}, 0.05), ({"memory_format": "channels_last"}, 1e-4)],
)
def test_fast_paths_agree_with_the_plain_step(option, tolerance):
    """Losses after five steps; bfloat16 has 8 bits of mantissa, the other only reorders sums."""
    plain, fast = game(), game(**option)
    for step in range(5):
        expected, got = plain.step(step, *batch(step)), fast.step(step, *batch(step))
        for name in ("d_loss", "g_loss"):
            assert got[name].item() == pytest.approx(expected[name].item(), rel=tolerance)
    if "precision" in option:
        assert not torch.equal(weights(fast.generator), weights(plain.generator))
    assert weights(fast.generator).dtype == torch.float32


def test_options_have_their_effect():
    last = game(memory_format="channels_last")
    assert last.discriminator.convs[1].weight.is_contiguous(memory_format=torch.channels_last)
    group = game(learning_rate=3e-4, beta1=0.4, weight_decay=1e-5).g_optimizer.param_groups[0]
    assert (group["lr"].item(), group["betas"], group["weight_decay"]) == (pytest.approx(3e-4), (0.4, 0.999), 1e-5)


def test_the_learning_rate_falls_as_in_the_original_code():
    """Newmu/dcgan_code mnist/train_cond_dcgan.py, an epoch a step: 100 at the first rate, 100 of linear decay."""
    settings = Train(steps=200, decay=0.5)
    rate = 2e-4
    for epoch in range(200):
        assert learning_rate(epoch, settings) == pytest.approx(rate)
        if epoch + 1 > 100:
            rate -= 2e-4 / 100


@given(st.integers(1, 10**6), st.floats(0, 1), st.data())
def test_the_learning_rate_never_rises_and_never_reaches_zero(steps, decay, data):
    settings = Train(steps=steps, decay=decay)
    step = data.draw(st.integers(0, steps - 1))
    assert 0 < learning_rate(step, settings) <= learning_rate(max(0, step - 1), settings) <= 2e-4
    if step <= steps * (1 - decay):
        assert learning_rate(step, settings) == pytest.approx(2e-4)


@pytest.mark.parametrize("step", [0, 8])
def test_both_nets_move_at_the_rate_of_the_step(step):
    """Adam's first update moves a weight by the learning rate, whatever its gradient."""
    play = game(decay=1.0)
    nets = (play.generator, play.discriminator)
    before = [weights(net) for net in nets]
    real, _, z = batch()
    Player(play, graph=False).play(step, Batch(real.add(1).mul(127.5).byte(), torch.zeros(8), z))
    for net, old in zip(nets, before, strict=True):
        assert (weights(net) - old).abs().max().item() == pytest.approx(2e-4 * (10 - step) / 10, rel=0.01)


def test_discriminator_stays_trainable_after_the_generators_turn():
    play = game()
    play.step(0, *batch())
    assert all(p.requires_grad for p in play.discriminator.parameters())
