"""On a CUDA device: recorded steps, bfloat16, resuming, several ranks, features and SVM against the plain CPU path.

Needs torch, numpy, pydantic and, for what tests share, pytest, hypothesis, Pillow and simplejpeg; the last test
scikit-learn, too. In a checkout that is not installed: python -m pytest tests/gpu
"""

import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from dcgan import checkpoint, features, models, train
from dcgan.config import Model, Train, validate
from dcgan.data.batches import Batch, Batches
from dcgan.data.store import Store
from dcgan.distributed import Place
from dcgan.player import Player
from dcgan.run import Run
from dcgan.step import Game

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PLAIN = {"precision": "float32", "memory_format": "contiguous"}
MODEL = {"kernel": 4, "width": 16, "z_dim": 10}


@pytest.fixture(autouse=True)
def exact_float32():
    """Float32 is float32: no TF32 in convolutions."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def player(device, graph=True, model=None, classes=0, **settings):
    settings = Train(**{"steps": 1000, "batch_size": 32, **PLAIN, **settings})
    nets = models.build(Model(**{**MODEL, **(model or {})}), 3, classes, 32, seed=0)
    return Player(Game(*nets, settings, Place(0, 1, device)), graph)


def batch(step, device, classes=1):
    stream = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (32, 3, 32, 32), generator=stream, dtype=torch.uint8)
    labels = torch.randint(0, classes, (32,), generator=stream)
    return Batch(*(part.to(device) for part in (images, labels, torch.randn(32, 10, generator=stream))))


def losses(play, steps, classes=1):
    """d_loss and g_loss of each step, as far as it has them."""
    found = []
    for step in range(steps):
        play.play(step, batch(step, play.game.place.device, classes))
        found.append([float(play.sums[n]) if n in play.counts else 0.0 for n in ("d_loss", "g_loss")])
        play.restart()
    return np.array(found)


def weights(play):
    return torch.cat([p.detach().flatten().cpu() for p in play.game.generator.parameters()])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema": 0.9},
        {"decay": 1.0, "weight_decay": 1e-4},
        {"update": "alternate"},
        {"model": {"conditional": True, "hidden": 8, "affine": False}, "classes": 4},
        {"model": {"spectral_norm": True}},
        {"model": {"kernel": 3}},
    ],
    ids=str,
)
def test_a_recorded_step_does_what_the_plain_one_does(settings):
    classes = settings.get("classes", 1)
    plain, recorded = player(CUDA, graph=False, **settings), player(CUDA, **settings)
    expected, got = losses(plain, 12, classes), losses(recorded, 12, classes)
    assert recorded._recorded
    np.testing.assert_allclose(got, expected, rtol=2e-3)
    # Adam's first step is its rate, 2e-4, with the sign of a gradient that may be nothing but rounding.
    apart = (weights(recorded) - weights(plain)).abs()
    assert apart.max() < 1e-3
    assert apart.mean() < 1e-5
    if "ema" in settings:
        ours, theirs = recorded.game.average.state_dict(), plain.game.average.state_dict()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=1e-3)


def test_cuda_agrees_with_the_cpu():
    np.testing.assert_allclose(losses(player(CUDA), 12), losses(player(CPU), 12), rtol=1e-2)


def test_bfloat16_in_channels_last_agrees_with_float32():
    fast = player(CUDA, precision="auto", memory_format="auto")
    assert fast.game.numerics == (torch.bfloat16, torch.channels_last)
    np.testing.assert_allclose(losses(fast, 12), losses(player(CPU), 12), rtol=0.08)


@pytest.fixture
def make_run(tmp_path, make_store):
    def make(name, **settings):
        store = make_store(tmp_path / name, size=32, channels=3, train=200)
        sections = {
            "data": {"name": "digits", "size": 32, "home": tmp_path / name},
            "model": MODEL,
            "train": {
                "steps": 30,
                "batch_size": 16,
                "log_every": 5,
                "checkpoint_every": 10,
                "sample_every": 10,
                **PLAIN,
                **settings,
            },
            "compute": {"workers": 0, "device": "cuda"},
        }
        return Run.create(validate(sections), store)

    return make


def lines(run):
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "seconds")} for line in run.metrics()]


def test_a_run_holds_all_it_should_and_goes_on_where_it_stopped(make_run, monkeypatch):
    whole, broken = make_run("whole", ema=0.9), make_run("broken", ema=0.9)
    train.train(whole)
    assert [line["step"] for line in whole.metrics()] == [5, 10, 15, 20, 25, 30]
    assert [line["step"] for line in whole.metrics() if "swd" in line] == [10, 20, 30]
    assert sorted(p.name for p in whole.samples.iterdir()) == [f"{step:08d}.png" for step in (0, 10, 20, 30)]
    play = Player.play

    def stopping(self, step, batch):
        if step == 17:
            raise KeyboardInterrupt
        play(self, step, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Player, "play", stopping)
        with pytest.raises(KeyboardInterrupt):
            train.train(broken)
    assert checkpoint.steps(broken) == [10]
    train.train(broken)
    for ours, theirs in zip(lines(broken), lines(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=0.05)


def test_images_that_do_not_fit_are_streamed_and_are_the_same(make_run, monkeypatch):
    run = make_run("streams")
    store, place = run.store(), Place(0, 1, CUDA)

    def some():
        stream = Batches(store, store.training, 16, 0, place, run.experiment.model).from_step(3)
        return [Batch(*(part.cpu() for part in next(stream))) for _ in range(20)]

    resident = some()
    monkeypatch.setattr("dcgan.data.batches.RESIDENT_SHARE", 0.0)
    for ours, theirs in zip(some(), resident, strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_one_rank_of_nccl_records_its_gradients_exchange(tmp_path):
    """The steps with DistributedDataParallel and its hooks are a graph. In a group of one NCCL has nothing to send."""
    script = """
        import os, sys, numpy as np, torch
        import torch.distributed as dist
        sys.path[:0] = sys.argv[1:]
        import test_cuda as here
        from dcgan.distributed import Place, recordable
        from dcgan import distributed, models
        from dcgan.player import Player
        from dcgan.config import Model, Train
        from dcgan.step import Game

        torch.backends.cudnn.allow_tf32 = False
        expected = here.losses(here.player(here.CUDA, graph=False), 30)
        dist.init_process_group("nccl", rank=0, world_size=1)
        torch.cuda.set_device(0)
        place = Place(0, 2, here.CUDA)  # a group of one that is treated as several
        nets = models.build(Model(**here.MODEL), 3, 0, 32, seed=0)
        play = Player(Game(*nets, Train(steps=1000, batch_size=32, **here.PLAIN), place), True)
        assert recordable(place)
        got = here.losses(play, 30)
        assert play._recorded, "nothing was recorded"
        np.testing.assert_allclose(got, expected, rtol=1e-2)
        play.close()
        dist.destroy_process_group()
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", textwrap.dedent(script), os.path.dirname(__file__), os.getcwd()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_ranks_that_recorded_their_exchange_end(make_run):
    """NCCL waits for ever to end a group whose collectives a graph still holds."""
    run = make_run("ranks")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "dcgan.train"]
    subprocess.run([sys.executable, *command, str(run.path)], check=True, timeout=300)
    assert checkpoint.steps(run)[-1] == 30


def test_two_ranks_that_share_a_device_exchange_by_gloo(make_run, tmp_path):
    """NCCL refuses two ranks of one device; an existing group is used as it is, and nothing is recorded."""
    run = make_run("shared")
    (tmp_path / "shared.py").write_text(
        "import sys\n"
        "import torch.distributed as dist\n"
        "from pathlib import Path\n"
        "from dcgan.run import Run\n"
        "from dcgan.train import train\n"
        "dist.init_process_group('gloo')\n"
        "train(Run.open(Path(sys.argv[1])))\n"
        "dist.destroy_process_group()\n"
    )
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(tmp_path / "shared.py")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, *command, str(run.path)], env=environment, check=True, timeout=120)
    assert checkpoint.steps(run)[-1] == 30


def test_features_are_those_of_the_cpu(tmp_path, make_store):
    store: Store = make_store(tmp_path, size=32, channels=3, train=64)
    _, net = models.build(Model(**MODEL), 3, 0, 32, seed=0)
    features.calibrate(net, store, CPU)
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = features.Extractor(net)(images)
        got = features.Extractor(net.to(CUDA))(images.to(CUDA)).cpu()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_svm_reaches_the_same_objective():
    pytest.importorskip("sklearn")
    from dcgan.evaluate.svm import L2SVM

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((600, 900)).astype(np.float32), rng.integers(0, 5, 600)
    for c in (1e-4, 1e-2):
        ours, theirs = L2SVM(C=c, device="cuda").fit(x, y), L2SVM(C=c, device="cpu").fit(x, y)
        np.testing.assert_allclose(ours.objective_, theirs.objective_, rtol=1e-3)
        assert (ours.predict(x) == theirs.predict(x)).mean() > 0.99
