"""The loop: what it writes and when, that it goes on exactly, and that it stops when it must."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from fabricated import write_store
from PIL import Image

from dcgan import checkpoint, distributed, feature_banks, keeper, models, pictures, sampling, train
from dcgan.config import validate
from dcgan.data import batches
from dcgan.data.store import Description
from dcgan.distributed import Place
from dcgan.player import Player
from dcgan.reproduce import rows
from dcgan.run import Run, read_lines
from dcgan.step import Game
from dcgan.storage import BusyError, CorruptError


@pytest.fixture
def make_run(tmp_path, make_store):
    def make(home="home", model=None, **settings):
        store = make_store(tmp_path / home, size=28, channels=1, train=40)
        sections = {
            "data": {"name": "digits", "size": 28, "home": tmp_path / home},
            "model": {"kernel": 4, "width": 2, "z_dim": 3, **(model or {})},
            "train": {
                "steps": 10,
                "batch_size": 8,
                "log_every": 2,
                "sample_every": 4,
                "checkpoint_every": 5,
                "precision": "float32",
                **settings,
            },
            "compute": {"workers": 0, "device": "cpu"},
        }
        return Run.create(validate(sections), store)

    return make


def interrupt_at(monkeypatch, step):
    """Make the game raise KeyboardInterrupt instead of playing that step."""
    play = Game.step

    def stepping(self, number, *args):
        if number == step:
            raise KeyboardInterrupt
        return play(self, number, *args)

    monkeypatch.setattr(Game, "step", stepping)


TIMINGS = ("images_per_second", "seconds")


def without_timings(run):
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in run.metrics()]


def states_equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return all(states_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_a_run_holds_all_it_should(make_run):
    run = make_run()
    train.train(run)
    lines = run.metrics()
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10]
    assert [line["images"] for line in lines] == [16, 32, 40, 48, 64, 80]
    assert {"d_loss", "g_loss", "d_real", "d_fake", "d_grad_norm", "g_grad_norm", *TIMINGS} <= lines[0].keys()
    assert [line["step"] for line in lines if "swd" in line] == [5, 10]
    assert sorted(p.name for p in run.samples.iterdir()) == [f"{s:08d}.png" for s in (0, 4, 8, 10)]
    assert Image.open(run.samples / "00000010.png").size == (8 * 30 + 2, 8 * 30 + 2)
    assert checkpoint.steps(run) == [5, 10]
    assert not (run.path / "events.jsonl").exists()


@pytest.mark.parametrize(("seed", "z"), [(0, "uniform"), (3, "normal")])
def test_metrics_are_means_over_the_steps_since_the_last_line(make_run, seed, z):
    run = make_run(seed=seed, model={"z": z})
    train.train(run)
    store = run.store()
    settings = run.experiment.train
    game = Game(*models.build(run.experiment.model, 1, 2, 28, seed), settings, Place(0, 1, torch.device("cpu")))
    data = batches.Batches(store, ("train",), 8, seed, game.place, run.experiment.model)
    losses = []
    for step in range(4):
        real = torch.from_numpy(store.images("train")[data.rows(step)]).float() / 127.5 - 1
        losses.append(game.step(step, real, None, torch.from_numpy(batches.noise(z, (8, 3), seed, step))))
    for first, line in zip((0, 2), run.metrics(), strict=False):
        for name, value in losses[first].items():
            expected = (value + losses[first + 1][name]) / 2
            assert line[name] == pytest.approx(float(expected), rel=1e-4)


def test_a_line_counts_the_time_of_its_steps_alone(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    restarted = []
    player = SimpleNamespace(
        counts={"d_loss": 2}, sums={"d_loss": torch.tensor(3.0)}, restart=lambda: restarted.append(1)
    )
    window = train.Window(4, 8, Place(0, 1, torch.device("cpu")))
    with window.paused():
        now[0] += 100
    for number in (1, 2):
        now[0] += 4
        line = window.close(4 + 2 * number, player)
        with window.paused():
            now[0] += 50
        assert line == {
            **{"step": 4 + 2 * number, "images": 8 * (4 + 2 * number), "seconds": 4.0},
            **{"images_per_second": 2 * 8 / 4, "d_loss": 1.5},
        }
    assert len(restarted) == 2


@pytest.mark.parametrize("z", ["uniform", "normal"])
def test_a_grid_is_of_the_net_that_is_kept(make_run, z):
    run = make_run(ema=0.9, learning_rate=0.01, model={"z": z})
    train.train(run)
    net = checkpoint.load_generator(checkpoint.latest(run))
    noise = torch.from_numpy(batches.noise(z, (64, 3), 0, sampling.FIXED))
    expected = pictures.grid(pictures.to_uint8(net(noise).detach().numpy()), 8)
    found = np.asarray(Image.open(run.samples / "00000010.png"))
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("graph", [True, False])
def test_steps_are_recorded_only_if_the_setting_says_so(make_run, monkeypatch, graph):
    run, asked = make_run(steps=2), []
    compute = run.experiment.compute.model_copy(update={"graph": graph})
    made = Player.__init__
    monkeypatch.setattr(Player, "__init__", lambda self, game, wanted: asked.append(wanted) or made(self, game, wanted))
    train.train(replace(run, experiment=run.experiment.model_copy(update={"compute": compute})))
    assert asked == [graph]


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_resumed_equals_uninterrupted_bit_for_bit(make_run, monkeypatch, stop):
    whole = make_run("whole", ema=0.9, decay=0.6)
    train.train(whole)
    broken = make_run("broken", ema=0.9, decay=0.6)
    with monkeypatch.context() as patch:
        interrupt_at(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(broken)
    assert max(checkpoint.steps(broken), default=0) == (5 if stop >= 5 else 0)
    train.train(broken)
    assert without_timings(broken) == without_timings(whole)
    a, b = (checkpoint.load(checkpoint.latest(run)) for run in (whole, broken))
    for name in ("generator", "discriminator", "average", "g_optimizer", "d_optimizer"):
        assert states_equal(a[name], b[name]), name
    for picture in whole.samples.iterdir():
        assert (broken.samples / picture.name).read_bytes() == picture.read_bytes()


def test_a_finished_run_is_left_alone(make_run, monkeypatch):
    run = make_run()
    train.train(run)
    before = (run.path / "metrics.jsonl").read_bytes()
    interrupt_at(monkeypatch, 0)
    train.train(run)
    assert (run.path / "metrics.jsonl").read_bytes() == before


def test_alternating_lines_hold_what_was_played(make_run):
    run = make_run(update="alternate", log_every=1, steps=4, checkpoint_every=4)
    train.train(run)
    assert ["g_loss" in line for line in run.metrics()] == [True, False, True, False]
    assert ["d_loss" in line for line in run.metrics()] == [False, True, False, True]


def test_conditional_runs_draw_a_row_a_class(make_run):
    run = make_run(model={"conditional": True, "hidden": 8, "affine": False})
    train.train(run)
    assert Image.open(run.samples / "00000010.png").size == (8 * 30 + 2, 2 * 30 + 2)


def test_non_finite_stops_with_step_and_cause_and_keeps_the_last_checkpoint(make_run, monkeypatch):
    run = make_run()
    play = Game.step

    def poisoned(self, step, *args):
        metrics = play(self, step, *args)
        return metrics | {"d_loss": metrics["d_loss"] * float("nan")} if step == 6 else metrics

    monkeypatch.setattr(Game, "step", poisoned)
    with pytest.raises(train.DivergedError, match=r"d_loss not finite in the steps up to 8"):
        train.train(run)
    assert checkpoint.latest(run).name == "5"
    assert [line["step"] for line in run.metrics()] == [2, 4, 5, 6]
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["event"]) for e in events] == [(8, "non_finite")]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"d_loss": 0.049}, 1),
        ({"d_loss": 0.051}, 0),
        ({"d_real": 0.98, "d_fake": 0.02}, 1),
        ({"d_real": 0.9, "d_fake": 0.0}, 0),
    ],
)
def test_collapse_is_recorded_once_when_it_begins(make_run, monkeypatch, override, expected):
    run = make_run()
    play = Game.step

    def stepping(self, step, *args):
        forced = {"d_loss": 1.0, "d_real": 0.5, "d_fake": 0.5, **override}
        return play(self, step, *args) | {name: torch.tensor(value) for name, value in forced.items()}

    monkeypatch.setattr(Game, "step", stepping)
    train.train(run)
    file = run.path / "events.jsonl"
    events = [json.loads(line)["event"] for line in file.read_text().splitlines()] if file.exists() else []
    assert events == ["collapse"] * expected


def test_a_run_that_is_being_written_is_refused(make_run):
    run = make_run()
    with run.lock(), pytest.raises(BusyError, match=f"run {run.name} is being written by process"):
        train.train(run)


def test_corrupt_images_are_never_trained_on(make_run):
    run = make_run()
    shard = run.store().path / "train-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptError, match=r"train-00000\.npy is corrupt"):
        train.train(run)
    assert not (run.path / "metrics.jsonl").exists()


def test_a_loss_that_is_not_finite_ends_the_module_with_one_line(make_run):
    """As torchrun starts it: its own exceptions are then of the module __main__."""
    run = make_run()
    script = f"""
import runpy, sys
from dcgan.player import Player

def play(self, step, batch, played=Player.play):
    played(self, step, batch)
    self.sums["d_loss"].fill_(float("nan"))

Player.play = play
sys.argv = ["dcgan.train", {str(run.path)!r}]
runpy.run_module("dcgan.train", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: run {run.name}: d_loss not finite in the steps up to 2")
    assert "Traceback" not in done.stderr


def test_nothing_follows_what_may_have_been_written_in_part():
    """What the second thread does on CUDA, with a stream that does nothing."""
    beside = keeper._Beside.__new__(keeper._Beside)
    beside._failed, done = False, []
    beside.stream = SimpleNamespace(wait_event=lambda _: None, synchronize=lambda: None)

    def full():
        raise OSError("no space left")

    with mock.patch.object(torch.cuda, "stream", return_value=nullcontext()):
        beside._run(lambda: done.append(1), None)
        with pytest.raises(OSError, match="no space"):
            beside._run(full, None)
        beside._run(lambda: done.append(2), None)
    assert done == [1]


def test_seed_decides_the_run(make_run):
    a, b, c = make_run("a"), make_run("b"), make_run("c", seed=1)
    for run in (a, b, c):
        train.train(run)
    assert without_timings(a) == without_timings(b) != without_timings(c)


def test_the_distance_of_a_checkpoint_is_measured_on_training_images_only(make_run, monkeypatch):
    run = make_run()
    asked = []
    count = type(run.store()).shards
    monkeypatch.setattr(type(run.store()), "shards", lambda self, split: asked.append(split) or count(self, split))
    train.train(run)
    assert set(asked) == {"train"}


@pytest.fixture
def of_splits(tmp_path, monkeypatch):
    """A run on a store with these numbers of images, and which splits are read from now on."""

    def make(training, counts):
        pairs = [(np.full((1, 28, 28), i, np.uint8), i % 2) for i in range(20)]
        about = Description("random", ("a", "b"), 28, 1, "none", training=training)
        store = write_store(tmp_path, about, {split: pairs[:count] for split, count in counts.items()})
        sections = {
            "data": {"name": "digits", "size": 28, "home": tmp_path},
            "model": {"kernel": 4, "width": 2},
            "train": {"steps": 2, "batch_size": 4, "checkpoint_every": 2, "sample_every": 2},
            "compute": {"workers": 0, "device": "cpu"},
        }
        run, asked = Run.create(validate(sections), store), []
        shards = type(store).shards
        monkeypatch.setattr(type(store), "shards", lambda self, *splits: asked.append(splits) or shards(self, *splits))
        return run, asked

    return make


def test_the_splits_trained_on_are_those_of_the_data_set(of_splits):
    """As of STL-10, whose images without labels are, and of SVHN with its extra ones."""
    run, asked = of_splits(("extra", "train"), {"train": 8, "extra": 20, "test": 20})
    train.train(run)
    assert asked == [("extra", "train")] * 2, "batches, and the distance of a checkpoint"
    asked.clear()
    feature_banks.extract(run)
    assert set(asked) == {("extra", "train"), ("train",), ("test",)}, "BatchNorm's statistics, and what is scored"


@pytest.mark.parametrize(("training", "compared"), [(("train",), ("validation",)), (("train", "validation"), None)])
def test_the_distance_of_a_checkpoint_is_measured_on_images_held_out_where_there_are_some(
    of_splits, training, compared
):
    run, asked = of_splits(training, {"train": 20, "validation": 5, "test": 20})
    train.train(run)
    assert asked == [training, compared or training]
    assert rows.checkpoint_rule(run).endswith(f"generated and {'validation' if compared else 'training'} images")


def test_fixed_noise_never_meets_training_noise():
    settings = validate({"data": {"name": "digits", "size": 28}, "model": {"z_dim": 3}, "train": {"steps": 1}}).model
    z, labels = sampling.fixed_noise(settings, 0, 8, seed=0)
    assert labels is None
    assert not any(np.allclose(z, batches.noise("uniform", (8, 3), 0, step)) for step in range(100))


@pytest.mark.parametrize("content", ['{"step": 2, "d_', '{"step": 1}\n{"step": 2, "d_'])
def test_a_torn_line_spoils_no_other(make_run, content):
    run = make_run(log_every=5)
    (run.path / "metrics.jsonl").write_text(content)
    train.train(run)
    assert [line["step"] for line in run.metrics()] == [5, 10]


@pytest.mark.parametrize(("world", "first"), [(1, 4), (2, 12)])
def test_on_cuda_cudnn_times_its_algorithms_in_the_first_steps_alone(monkeypatch, world, first):
    seen, settling = [], []

    def play(self, step, batch):
        self._names[0] = []
        seen.append(torch.backends.cudnn.benchmark)

    monkeypatch.setattr(Player, "_play", play)
    place = Place(0, world, torch.device("cuda"))
    player = Player(SimpleNamespace(place=place, kind=lambda _: 0, set_learning_rate=lambda _: None), graph=False)
    for step in range(first + 2):
        settling.append(player.settling(step))
        player.play(step, None)
    assert seen == settling == [True] * first + [False] * 2


def test_while_a_step_settles_nothing_else_uses_the_device(make_run, monkeypatch):
    monkeypatch.setattr(Player, "settling", lambda self, step: step in (0, 1, 7))
    waited = []
    monkeypatch.setattr(keeper.Keeper, "wait", lambda self: waited.append(self))
    train.train(make_run())
    assert len(waited) == 3


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "on_cuda", lambda _: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match="2 processes on this machine need a GPU each, and it has 1"):
        distributed.join("auto").__enter__()


@pytest.mark.parametrize("end", ["normally", "by Ctrl-C"])
def test_no_recorded_step_outlives_the_loop(make_run, monkeypatch, end):
    """A process group of NCCL could not end while a graph holds its collectives."""
    played, left, reset = Player.play, [], []

    def playing(self, step, batch):
        self._recorded[7] = SimpleNamespace(graph=SimpleNamespace(reset=lambda: reset.append(self)))
        if step == 4 and end == "by Ctrl-C":
            raise KeyboardInterrupt
        played(self, step, batch)
        left[:] = [self]

    monkeypatch.setattr(Player, "play", playing)
    with pytest.raises(KeyboardInterrupt) if end == "by Ctrl-C" else nullcontext():
        train.train(make_run())
    (player,) = left
    assert player._recorded == {}
    assert reset == [player], "also if something still refers to it"


def test_each_rank_compares_its_share_of_the_images(make_run):
    run = make_run()
    files = sorted(path for path in run.store().path.iterdir() if path.name != "manifest.json")
    shard = run.store().path / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    place = sorted(run.store().manifest["files"]).index("train-00000.npy") % 2
    with pytest.raises(CorruptError, match="train-00000"):
        run.store(verify=True, share=(place, 2))
    run.store(verify=True, share=(1 - place, 2))
    assert len(files) > 1


@pytest.mark.parametrize("update", ["both", "alternate"])
@pytest.mark.parametrize("checkpoint_every", [5, 10])
def test_a_collapse_is_told_once_over_a_restart(make_run, monkeypatch, update, checkpoint_every):
    """Also from the first step on, whose record is not that of the steps that are repeated."""
    monkeypatch.setattr(keeper, "COLLAPSED_LOSS", 1e9)  # every line of the discriminator's is one
    settings = {"log_every": 1, "update": update, "checkpoint_every": checkpoint_every}
    run = make_run(**settings)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train.train(run)
    train.train(run)
    events = [event["event"] for event in read_lines(run.path / "events.jsonl")]
    assert events == ["collapse"]
