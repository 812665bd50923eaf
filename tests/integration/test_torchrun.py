"""Two ranks under torchrun, on gloo, against one process that does what both do.

What equals one worker, and what does not: the ranks together see the same images and the same z in the same order,
exactly. BatchNorm's statistics are each rank's own, so two ranks of four images equal one process that puts the two
halves through the nets separately and averages the gradients. It does not equal one batch of eight.
"""

import copy
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

from dcgan import checkpoint, models
from dcgan.config import validate
from dcgan.data import batches
from dcgan.distributed import Place
from dcgan.run import Run
from dcgan.step import Game, fake_loss, generator_loss, real_loss

STEPS, BATCH = 3, 8
# Sums in another order, in float32, through three Adam steps: Adam divides by sqrt(v), so an absolute bound.
TOLERANCE = 2e-5


RANKS = ["--nproc-per-node", "2", "--standalone"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", *RANKS, "-m", "dcgan.train"]


def environment():
    """Of ranks that hear of what PyTorch will change as an error."""
    quiet = {"PYTHONWARNINGS": "error::FutureWarning:dcgan.distributed"}
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **quiet}


def torchrun(run):
    subprocess.run([*TORCHRUN, str(run.path)], env=environment(), check=True, timeout=300)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, make_store):
    home = tmp_path_factory.mktemp("ranks")
    store = make_store(home, size=28, channels=1, train=40)
    sections = {
        "data": {"name": "digits", "size": 28, "home": home},
        "model": {"kernel": 4, "width": 2, "z_dim": 3},
        "train": {"steps": STEPS, "batch_size": BATCH, "log_every": 1, "checkpoint_every": 2, "precision": "float32"},
        "compute": {"device": "cpu"},
    }
    run = Run.create(validate(sections), store)
    torchrun(run)
    return run


def reference(run):
    """Two replicas in one process; gradients averaged by hand after each backward."""
    store, settings = run.store(), run.experiment.train
    g, d = models.build(run.experiment.model, 1, 2, 28, settings.seed)
    replicas = [(copy.deepcopy(g), copy.deepcopy(d)) for _ in range(2)]
    adams = [[torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in pair] for pair in replicas]
    data = batches.Batches(
        store, ("train",), BATCH, settings.seed, Place(0, 1, torch.device("cpu")), run.experiment.model
    )
    for step in range(STEPS):
        rows = data.rows(step)
        z = torch.from_numpy(batches.noise("uniform", (BATCH, 3), settings.seed, step))
        halves = [slice(0, BATCH // 2), slice(BATCH // 2, BATCH)]
        fakes = []
        for (g, d), half in zip(replicas, halves, strict=True):
            d.zero_grad()
            real = torch.from_numpy(store.images("train")[rows[half]]).float() / 127.5 - 1
            fakes.append(g(z[half]))
            (real_loss(d(real), 0.0) + fake_loss(d(fakes[-1].detach()))).backward()
        average([d for _, d in replicas])
        for _, adam in adams:
            adam.step()
        for (g, d), fake in zip(replicas, fakes, strict=True):
            g.zero_grad()
            generator_loss(d(fake)).backward()
        average([g for g, _ in replicas])
        for adam, _ in adams:
            adam.step()
        if step + 1 in (2, STEPS):  # statistics are averaged where something is saved
            for nets in zip(*replicas, strict=True):
                for ours, theirs in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
                    if ours.is_floating_point():
                        ours.copy_((ours + theirs) / 2)
                        theirs.copy_(ours)
    return replicas[0]


def average(nets):
    for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
        ours.grad = (ours.grad + theirs.grad) / 2
        theirs.grad = ours.grad.clone()


def test_two_ranks_equal_two_halves_with_averaged_gradients(two_ranks):
    state = checkpoint.load(checkpoint.latest(two_ranks))
    for name, net in zip(("generator", "discriminator"), reference(two_ranks), strict=True):
        for key, value in net.state_dict().items():
            torch.testing.assert_close(
                state[name][key], value, atol=TOLERANCE, rtol=0, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_only_the_first_rank_writes(two_ranks):
    assert [line["step"] for line in two_ranks.metrics()] == [1, 2, 3]
    assert checkpoint.steps(two_ranks) == [2, 3]


def test_sigterm_keeps_a_checkpoint_on_all_ranks(tmp_path, make_store):
    store = make_store(tmp_path, size=28, channels=1, train=40)
    sections = {
        "data": {"name": "digits", "size": 28, "home": tmp_path},
        "model": {"kernel": 4, "width": 2, "z_dim": 3},
        "train": {"steps": 10**6, "batch_size": BATCH, "log_every": 1, "checkpoint_every": 10**6},
        "compute": {"device": "cpu"},
    }
    run = Run.create(validate(sections), store)
    with subprocess.Popen([*TORCHRUN, str(run.path)], env=environment(), start_new_session=True) as ranks:
        try:
            until = time.monotonic() + 120
            while not run.metrics():
                assert ranks.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
            ranks.send_signal(signal.SIGTERM)
            assert ranks.wait(60) != 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(ranks.pid, signal.SIGKILL)
    (step,) = checkpoint.steps(run)
    assert run.metrics()[-1]["step"] == step


def test_metrics_are_means_over_ranks(two_ranks):
    """One process playing only the first half sees another D(real) than the mean of both."""
    settings = two_ranks.experiment.train
    store = two_ranks.store()
    d_real = []
    for rank in range(2):
        place = Place(rank, 2, torch.device("cpu"))
        game = Game(*models.build(two_ranks.experiment.model, 1, 2, 28, 0), settings, Place(0, 1, place.device))
        rows = batches.Batches(store, ("train",), BATCH, 0, place, two_ranks.experiment.model).rows(0)
        real = torch.from_numpy(store.images("train")[rows]).float() / 127.5 - 1
        z = torch.from_numpy(batches.noise("uniform", (BATCH, 3), 0, 0))[rank * 4 : rank * 4 + 4]
        d_real.append(float(game.step(0, real, None, z)["d_real"]))
    assert two_ranks.metrics()[0]["d_real"] == pytest.approx(sum(d_real) / 2, abs=1e-5)
    assert abs(d_real[0] - d_real[1]) > 1e-4
