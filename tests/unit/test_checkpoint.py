"""Atomic, verified, prunable checkpoints, refused by name where they don't fit."""

import json
import os
import shutil
from dataclasses import replace

import fabricated
import pytest
import torch

from dcgan import checkpoint, models, storage
from dcgan.config import validate
from dcgan.distributed import Place
from dcgan.run import Run
from dcgan.step import Game


@pytest.fixture
def store(tmp_path, make_store):
    return make_store(tmp_path / "home", size=28, channels=1, train=32)


def make_run(store, steps=100, **model):
    sections = {
        "data": {"name": "digits", "size": 28, "home": store.path.parent.parent},
        "model": {"kernel": 4, "width": 2, "z_dim": 3, **model},
        "train": {"steps": steps, "batch_size": 8, "keep": 2, "ema": 0.5, "checkpoint_every": 2},
    }
    return Run.create(validate(sections), store)


def make_game(run, store, train=None):
    nets = models.build(run.experiment.model, store.channels, len(store.classes), 28, 0)
    return Game(*nets, train or run.experiment.train, Place(0, 1, torch.device("cpu")))


def play(game, steps=2):
    for step in range(steps):
        game.step(step, torch.rand(8, 1, 28, 28), None, torch.randn(8, 3))


def save(run, game, store, *steps_and_distances):
    writer = checkpoint.Writer(run)
    for step, swd in steps_and_distances:
        writer.save(checkpoint.snapshot(game, step, run, store), swd)
    writer.close()


def flat(state):
    for value in state.values() if isinstance(state, dict) else state:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list)):
            yield from flat(value)


def test_everything_comes_back(store):
    run = make_run(store)
    game = make_game(run, store)
    play(game)
    save(run, game, store, (2, 0.5))
    fresh = make_game(run, store)
    assert checkpoint.restore(fresh, checkpoint.latest(run), run) == 2
    for name in ("generator", "discriminator", "average", "g_optimizer", "d_optimizer"):
        ours, theirs = (list(flat(getattr(g, name).state_dict())) for g in (game, fresh))
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), name


@pytest.mark.parametrize("formats", [("contiguous", "channels_last"), ("channels_last", "contiguous")])
def test_moments_belong_to_the_same_weights_in_another_memory_format(store, formats):
    """As after a move from a GPU to a CPU: fused Adam there takes numbers in the order in which they lie."""
    run = make_run(store)
    settings = [run.experiment.train.model_copy(update={"memory_format": name, "ema": 0.0}) for name in formats]
    first, moved, stayed = (make_game(run, store, train) for train in (settings[0], settings[1], settings[0]))
    torch.manual_seed(0)
    play(first)
    save(run, first, store, (2, 0.5))
    for game in (moved, stayed):
        checkpoint.restore(game, checkpoint.latest(run), run)
        torch.manual_seed(1)
        play(game, 1)
    for ours, theirs in zip(moved.discriminator.parameters(), stayed.discriminator.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_what_a_device_asks_of_an_optimizer_is_not_taken_from_a_checkpoint(store):
    run = make_run(store)
    game = make_game(run, store)
    play(game)
    for optimizer in (game.g_optimizer, game.d_optimizer):
        optimizer.param_groups[0]["capturable"] = True  # as on CUDA
    save(run, game, store, (2, 0.5))
    fresh = make_game(run, store)
    checkpoint.restore(fresh, checkpoint.latest(run), run)
    assert fresh.g_optimizer.param_groups[0]["capturable"] is False
    play(fresh)


def test_a_snapshot_does_not_change_while_training_goes_on(store):
    run = make_run(store)
    game = make_game(run, store)
    state = checkpoint.snapshot(game, 0, run, store)
    before = state["generator"]["project.weight"].clone()
    play(game)
    assert torch.equal(state["generator"]["project.weight"], before)
    assert not torch.equal(game.generator.project.weight, before)


def test_newest_and_best_are_kept_and_the_rest_removed(store):
    run = make_run(store)
    save(run, make_game(run, store), store, (2, 0.9), (4, 0.1), (6, 0.5), (8, 0.4), (10, 0.1))
    assert checkpoint.steps(run) == [4, 8, 10]
    assert checkpoint.read_best(run) == {"step": 4, "metric": "swd", "value": 0.1}  # the first of equals
    assert checkpoint.best(run).name == "4"
    assert checkpoint.latest(run).name == "10"


def test_a_checkpoint_that_a_kill_kept_from_being_named_best_is_found(store, caplog):
    """Between the renaming and the pointer."""
    run = make_run(store)
    save(run, make_game(run, store), store, (2, 0.2), (4, 0.1))
    pointer = run.checkpoints / "best.json"
    pointer.unlink()
    assert checkpoint.best(run).name == "4"
    storage.write_json(pointer, {"step": 2, "metric": "swd", "value": 0.2})
    assert checkpoint.best(run).name == "4"
    (run.checkpoints / "2" / storage.MANIFEST).write_text("{")
    save(run, make_game(run, store), store, (6, 0.3))
    assert json.loads(pointer.read_text()) == {"step": 4, "metric": "swd", "value": 0.1}
    assert "checkpoint 2 of run" in caplog.text


def test_a_stop_does_not_change_which_checkpoint_is_best(store):
    run = make_run(store, steps=5)
    save(run, make_game(run, store), store, (1, 0.1))
    assert checkpoint.read_best(run)["step"] == 1, "there is no other"
    save(run, make_game(run, store), store, (2, 0.3))
    assert checkpoint.read_best(run)["step"] == 2
    save(run, make_game(run, store), store, (4, 0.4), (5, 0.2))
    assert checkpoint.read_best(run)["step"] == 5, "the last step is as planned"


def test_only_distances_to_the_same_images_are_compared(store):
    """A run that an older version began has checkpoints whose distances are to training images, and says nothing."""
    run = make_run(store)
    game = make_game(run, store)
    save(run, game, store, (2, 0.1), (4, 0.3))
    assert storage.read_manifest(run.checkpoints / "4")["compared"] == list(store.compared) == ["train"]
    manifest = run.checkpoints / "2" / storage.MANIFEST
    told = json.loads(manifest.read_text())
    storage.write_json(manifest, told | {"compared": ["validation"]})
    assert checkpoint.read_best(run) == {"step": 4, "metric": "swd", "value": 0.3}
    for before in (told, {key: value for key, value in told.items() if key != "compared"}):
        storage.write_json(manifest, before)
        assert checkpoint.read_best(run) == {"step": 2, "metric": "swd", "value": 0.1}


def test_chosen_follows_the_experiment(store):
    run = make_run(store)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint: `dcgan train .*` makes one"):
        checkpoint.chosen(run)
    save(run, make_game(run, store), store, (2, 0.1), (4, 0.2))
    assert checkpoint.chosen(run).name == "2"
    newest = run.experiment.evaluate.model_copy(update={"checkpoint": "latest"})
    other = replace(run, experiment=run.experiment.model_copy(update={"evaluate": newest}))
    assert checkpoint.chosen(other).name == "4"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_taken(store, damage, caplog):
    run = make_run(store)
    save(run, make_game(run, store), store, (1, 0.1), (2, 0.2))
    file = run.checkpoints / "2" / "state.pt"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "delete":
        file.unlink()
    else:
        (run.checkpoints / "2" / "manifest.json").write_text("{")
    assert checkpoint.latest(run).name == "1"
    assert (run.checkpoints / "corrupt-2").is_dir()
    assert "set aside" in caplog.text
    with pytest.raises(storage.CorruptError):
        checkpoint.load(run.checkpoints / "corrupt-2")


def test_a_checkpoint_of_another_architecture_is_refused_by_name(store):
    small, wide = make_run(store), make_run(store, width=3)
    save(small, make_game(small, store), store, (1, 0.1))
    shutil.copytree(small.checkpoints, wide.checkpoints)
    with pytest.raises(checkpoint.IncompatibleError, match=r"model\.width: 2 there, 3 here"):
        checkpoint.restore(make_game(wide, store), checkpoint.latest(wide), wide)


def test_a_checkpoint_of_another_data_set_is_refused_by_name(store, tmp_path, make_store):
    other = make_store(tmp_path / "home", size=28, channels=1, train=32, seed=1)
    ours, theirs = make_run(store), make_run(other)
    assert ours.path != theirs.path
    save(theirs, make_game(theirs, other), other, (1, 0.1))
    with pytest.raises(
        checkpoint.IncompatibleError, match=f"image store: {other.fingerprint} there, {store.fingerprint} here"
    ):
        checkpoint.restore(make_game(ours, store), checkpoint.latest(theirs), ours)


def test_a_failed_write_leaves_the_checkpoints_before_it_and_is_raised(store, monkeypatch):
    run = make_run(store)
    game = make_game(run, store)
    save(run, game, store, (1, 0.1))

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save(run, game, store, (2, 0.05))
    assert [p.name for p in sorted(run.checkpoints.iterdir())] == ["1", "best.json"]
    assert json.loads((run.checkpoints / "best.json").read_text())["step"] == 1
    assert checkpoint.latest(run).name == "1"


def test_the_moving_average_is_what_is_shown(store):
    run = make_run(store)
    game = make_game(run, store)
    play(game)
    save(run, game, store, (2, 0.1))
    shown = checkpoint.load_generator(checkpoint.latest(run))
    assert torch.equal(shown.project.weight, game.average.project.weight)
    assert not torch.equal(shown.project.weight, game.generator.project.weight)
    assert not shown.training


def test_a_hostile_state_is_refused(store):
    """weights_only: a pickle that calls a function is not executed, even behind a valid manifest."""

    class Hostile:
        def __reduce__(self):
            return (pytest.fail, ("code in a checkpoint was executed",))

    run = make_run(store)
    with storage.staging(run.checkpoints) as staged:
        torch.save({"step": Hostile()}, staged / "state.pt")
        storage.seal(staged, {"step": 1, "identity": checkpoint.identity(run)})
        storage.publish(staged, run.checkpoints / "1")
    with pytest.raises(Exception, match="Unsupported global"):
        checkpoint.load(checkpoint.latest(run))


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_none_of_it(home, monkeypatch):
    run = fabricated.new_run(home, ["train.keep=1"])
    fabricated.save(run, 1, 0.5)
    fabricated.save(run, 2, 0.6)  # the first is the best, until the third
    unlink, left = os.unlink, []

    def killed(path, *others, **more):
        if os.path.basename(path) in ("state.pt", "manifest.json"):
            left.append(path)
            raise KeyboardInterrupt
        unlink(path, *others, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            fabricated.save(run, 3, 0.3)
    assert left
    assert not (run.checkpoints / "1").exists()
