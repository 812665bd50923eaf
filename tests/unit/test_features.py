"""Feature banks: pooled layers, BatchNorm frozen to the statistics of real images, exported weights."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dcgan import checkpoint, export, feature_banks, features, models, storage, train
from dcgan.config import Model, validate
from dcgan.data.batches import normalise
from dcgan.run import Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_store):
    """A run of four steps on random images with its banks written."""
    home = tmp_path_factory.mktemp("features")
    store = make_store(home, size=28, channels=1, classes=3, train=60, test=20)
    sections = {
        "data": {"name": "digits", "size": 28, "home": home},
        "model": {"kernel": 5, "width": 3, "z_dim": 4, "conditional": True},
        "train": {"steps": 4, "batch_size": 10, "checkpoint_every": 2, "sample_every": 4},
        "compute": {"workers": 0, "device": "cpu"},
        "evaluate": {"checkpoint": "latest"},
    }
    run = Run.create(validate(sections), store)
    train.train(run)
    feature_banks.extract(run)
    return run


def test_layers_are_max_pooled_to_4x4_flattened_and_concatenated():
    _, d = models.build(Model(kernel=3, width=2), 3, 0, 32, seed=0)
    extractor = features.Extractor(d.eval())
    images = torch.randn(2, 3, 32, 32)
    got = extractor(images).detach().numpy()
    expected = []
    for maps in d.activations(images):
        maps = maps.detach().numpy()
        cell = maps.shape[-1] // 4
        pooled = maps.reshape(2, maps.shape[1], 4, cell, 4, cell).max((3, 5))
        expected.append(pooled.reshape(2, -1))
    np.testing.assert_array_equal(got, np.concatenate(expected, 1))
    assert got.shape == (2, 16 * sum(d.channels))


@pytest.mark.parametrize("batch", [20, 25])
def test_calibration_is_the_mean_over_batches_of_real_images(trained, monkeypatch, batch):
    """Each batch counts as many times as it has images."""
    monkeypatch.setattr(features, "BATCH", batch)
    store = trained.store()
    _, d = models.build(Model(kernel=4, width=2), 1, 0, 28, seed=0)
    d(torch.randn(4, 1, 28, 28) + 5)  # statistics that must vanish
    features.calibrate(d, store, torch.device("cpu"))
    order = features.batches.permutation(store.count("train"), 0, 0)
    means, variances, sizes = [], [], []
    for start in range(0, 60, batch):
        images = normalise(torch.from_numpy(np.array(store.images("train")[order[start : start + batch]])))
        sizes.append(len(images))
        maps = d.convs[1](torch.nn.functional.leaky_relu(d.convs[0](images), 0.2)).detach().double().numpy()
        means.append(maps.mean((0, 2, 3)))
        variances.append(maps.var((0, 2, 3), ddof=1))
    np.testing.assert_allclose(d.norms[0].running_mean, np.average(means, 0, sizes), atol=1e-6)
    np.testing.assert_allclose(d.norms[0].running_var, np.average(variances, 0, sizes), rtol=1e-4)
    assert not d.training
    assert d.norms[0].momentum == 0.1


def test_each_layer_is_calibrated_on_what_the_calibrated_ones_before_it_give(make_store, tmp_path, monkeypatch):
    """Batch by batch, as in training; here from the definition, layer by layer."""
    monkeypatch.setattr(features, "BATCH", 25)
    store = make_store(tmp_path, size=32, channels=1, train=60)
    _, d = models.build(Model(kernel=3, width=2), 1, 0, 32, seed=0)
    features.calibrate(d, store, torch.device("cpu"))
    order = features.batches.permutation(60, 0, 0)
    means, variances = [[] for _ in d.norms], [[] for _ in d.norms]
    with torch.no_grad():
        for start in range(0, 60, 25):
            x = normalise(torch.from_numpy(np.array(store.images("train")[order[start : start + 25]])))
            for number, conv in enumerate(d.convs):
                x = conv(x)
                if number:
                    norm, mean = d.norms[number - 1], x.mean((0, 2, 3))
                    means[number - 1].append(mean.numpy())
                    variances[number - 1].append(x.var((0, 2, 3)).numpy())
                    x = (x - mean[:, None, None]) / (x.var((0, 2, 3), False) + norm.eps).sqrt()[:, None, None]
                    x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
                x = torch.where(x > 0, x, 0.2 * x)
    assert len(d.norms) == 5
    for norm, mean, variance in zip(d.norms, means, variances, strict=True):
        np.testing.assert_allclose(norm.running_mean, np.average(mean, 0, [25, 25, 10]), atol=1e-5)
        np.testing.assert_allclose(norm.running_var, np.average(variance, 0, [25, 25, 10]), rtol=1e-4)


def test_a_conditional_net_is_told_that_every_class_is_as_likely():
    _, d = models.build(Model(kernel=5, width=3, conditional=True), 1, 4, 28, seed=0)
    images = torch.randn(2, 1, 28, 28)
    expected = [maps.flatten(1) for maps in d.eval().activations(images, torch.full((2, 4), 0.25))]
    got = features.Extractor(d).layers(images)
    for layer, maps in zip(got, expected, strict=True):
        cells = maps.reshape(2, layer.shape[1] // 16, -1)
        assert torch.equal(layer.reshape(2, -1, 16).amax(2), cells.amax(2)), "pooling keeps each map's maximum"


def test_calibration_changes_nothing_but_the_statistics(trained):
    _, d = models.build(Model(kernel=4, width=2, spectral_norm=True), 1, 0, 28, seed=0)
    before = {name: value.clone() for name, value in d.state_dict().items()}
    features.calibrate(d, trained.store(), torch.device("cpu"))
    changed = {name for name, value in d.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"norms.0.running_mean", "norms.0.running_var"}


def test_banks_hold_every_image_in_order_and_both_sources(trained):
    store = trained.store()
    banks = {f"{source}-{trained.scored}" for source in ("discriminator-4", "random_init-0")}
    assert {p.name for p in trained.features.iterdir() if p.is_dir()} == banks
    extractor = features.load_extractor(trained.path / "export" / "discriminator.safetensors")
    with torch.no_grad():
        expected = extractor(normalise(torch.from_numpy(np.array(store.images("test"))))).numpy()
    bank = feature_banks.read_bank(trained, "discriminator", 4, "test")
    assert bank.dtype == np.float16
    np.testing.assert_allclose(bank, expected, rtol=2e-3, atol=1e-4)  # float16 on disk
    control = feature_banks.read_bank(trained, "random_init", 0, "test")
    assert control.shape == bank.shape == (20, 16 * (3 + 6))
    assert not np.allclose(control, bank, atol=1e-2)
    assert feature_banks.read_bank(trained, "discriminator", 4, "train").shape[0] == 60


def test_who_does_the_parts_and_in_which_order_changes_nothing(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(features, "PART", 16)  # several of each split, the last one smaller
    monkeypatch.setattr(features, "BATCH", 8)
    kept = dict.fromkeys((trained.features, trained.path / "export"))
    for directory in kept:
        shutil.move(directory, tmp_path / directory.name)
    try:
        found = []
        for maker in (map, lambda work, jobs: [work(job) for job in reversed(list(jobs))]):
            shutil.rmtree(trained.features, ignore_errors=True)
            feature_banks.extract(trained, maker)
            found.append({file.name: file.read_bytes() for file in trained.features.glob("*/*.npy")})
            bank = feature_banks.read_bank(trained, "discriminator", 4, "train")
        assert found[0] == found[1]
        assert {"train-00003-1.npy", "test-00001-0.npy"} <= found[0].keys()
        whole = np.concatenate([np.load(next(trained.features.glob(f"disc*/train-{i:05d}-1.npy"))) for i in range(4)])
        assert np.array_equal(bank[:, -whole.shape[1] :], whole)

        monkeypatch.setattr(features, "PART", 5000)
        _, net, _ = checkpoint.load_nets(checkpoint.chosen(trained))
        features.calibrate(net, trained.store(), torch.device("cpu"))
        with torch.no_grad():
            images = normalise(torch.from_numpy(np.array(trained.store().images("train"))))
            expected = features.Extractor(net)(images).numpy()
        assert bank.shape == expected.shape
        np.testing.assert_allclose(bank, expected, rtol=2e-3, atol=1e-4)  # float16 on disk
    finally:
        for directory in kept:
            shutil.rmtree(directory, ignore_errors=True)
            shutil.move(tmp_path / directory.name, directory)


def test_who_extracts_at_the_same_time_is_refused(trained):
    def maker(function, jobs):
        with pytest.raises(storage.BusyError, match=f"features of run {trained.name} is being written by process"):
            feature_banks.extract(trained)
        return map(function, jobs)

    shutil.rmtree(trained.features)
    feature_banks.extract(trained, maker)


def test_extraction_is_not_repeated_but_follows_the_chosen_checkpoint(trained):
    before = {p: p.stat().st_mtime_ns for p in trained.features.glob("*/*")}
    feature_banks.extract(trained)
    assert {p: p.stat().st_mtime_ns for p in trained.features.glob("*/*")} == before

    newest = trained.experiment.evaluate.model_copy(update={"checkpoint": "latest"})
    other = replace(trained, experiment=trained.experiment.model_copy(update={"evaluate": newest}))
    step = max(checkpoint.steps(trained)) + 1
    state = checkpoint.load(checkpoint.best(trained))
    state["generator"]["project.weight"].add_(1)
    state["average"] = None
    writer = checkpoint.Writer(trained)
    writer.save({**state, "step": step}, 1e6)
    writer.close()
    with pytest.raises(FileNotFoundError, match=rf"no features of step {step}: `dcgan extract {trained.name}` makes"):
        feature_banks.read_bank(other, "discriminator", step, "train")
    feature_banks.extract(other)
    names = {bank.name.rpartition("-")[0] for bank in other.features.iterdir() if bank.is_dir()}
    assert names == {f"discriminator-{step}", "random_init-0"}
    exported = export.load(trained.path / "export" / export.GENERATOR)
    assert torch.equal(exported.project.weight, state["generator"]["project.weight"])
    shutil.rmtree(trained.checkpoints / str(step))
    feature_banks.extract(trained)


def test_a_bank_is_kept_if_the_next_one_fails_and_all_start_the_processes_twice(trained):
    began = []

    def maker(function, jobs):
        began.append(len(jobs))
        if len(began) == 2:
            jobs = jobs[:-1]  # the last part of the random initialisation
        yield from map(function, jobs)
        if len(began) == 2:
            raise RuntimeError("a node is lost")

    shutil.rmtree(trained.features)
    with pytest.raises(RuntimeError, match="a node is lost"):
        feature_banks.extract(trained, maker)
    assert began == [2, 4], "statistics of two nets, then two splits with each"
    (kept,) = (path for path in trained.features.iterdir() if path.is_dir())
    assert kept == feature_banks.bank_of(trained, "discriminator", 4)
    feature_banks.extract(trained, maker)
    assert began == [2, 4, 1, 2], "those of one net"
    assert len(feature_banks.read_bank(trained, "random_init", 0, "test")) == 20


def test_a_kill_before_the_bank_is_there_leaves_nothing_that_is_not_made_again(trained, monkeypatch):
    shutil.rmtree(trained.features)
    shutil.rmtree(trained.path / "export")
    publish = storage.publish
    monkeypatch.setattr(storage, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        feature_banks.extract(trained)
    monkeypatch.setattr(storage, "publish", publish)
    feature_banks.extract(trained)
    assert {file.name for file in (trained.path / "export").iterdir()} == {export.GENERATOR, export.DISCRIMINATOR}


def test_exported_generator_draws_what_the_checkpoint_draws(trained):
    exported = export.load(trained.path / "export" / "generator.safetensors")
    original = checkpoint.load_generator(checkpoint.latest(trained))
    z, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with torch.no_grad():
        assert torch.equal(exported(z, labels), original(z, labels))
