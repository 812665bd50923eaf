"""The supervised baseline: its architecture, a training step by hand, what is kept and chosen, and its search."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dcgan.config import Model, digest
from dcgan.evaluate import supervised, supervised_search
from dcgan.evaluate.samples import NotConvergedError
from dcgan.evaluate.supervised import Hyperparameters, classifier, train_classifier
from dcgan.evaluate.supervised_search import sample, score
from dcgan.models import Discriminator, initialise

MODEL = Model(width=2)
SETTINGS = Hyperparameters(learning_rate=1e-2, beta1=0.5, weight_decay=0.0, dropout=0.0, batch_size=32, epochs=10)


def images(n=60, classes=3, noise=40, seed=0, channels=1):
    """Class k is bright in the k-th of equal stripes; with much noise some are hard to tell."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    x = np.full((n, channels, 28, 28), 100.0)
    for image, label in zip(x, labels, strict=True):
        image[:, label * 28 // classes : (label + 1) * 28 // classes] += 40
    return np.clip(x + noise * rng.standard_normal(x.shape), 0, 255).astype(np.uint8), labels


TRAIN, VALIDATION, TEST = images(seed=0), images(300, seed=1), images(300, seed=2)
HARD = [images(n, noise=400, seed=seed) for n, seed in ((60, 3), (300, 4), (300, 5))]


def predictions(weights, x, model=MODEL):
    net = classifier(model, x.shape[1], 3, 28)
    net.load_state_dict(weights)
    with torch.no_grad():
        return net.eval()(torch.from_numpy(x) / 127.5 - 1).argmax(1).numpy()


@pytest.mark.parametrize("model", [MODEL, Model(width=4, kernel=4), Model(width=2, kernel=3), Model(width=2, hidden=8)])
def test_layers_are_those_of_the_discriminator_but_for_the_output(model):
    theirs = {name: value.shape for name, value in Discriminator(model, 3, 10, 32).state_dict().items()}
    ours = {name: value.shape for name, value in classifier(model, 3, 10, 32, 0.5).state_dict().items()}
    width = theirs.pop("output.weight")[1]
    assert ours.pop("output.1.weight") == (10, width)
    assert ours == theirs
    assert classifier(model, 3, 10, 32)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_an_epoch_of_one_batch_is_the_first_step_of_adam():
    """By hand: the net from its definition, and w - lr * g / (|g| + eps) with L2 in the gradient."""
    settings = replace(SETTINGS, weight_decay=0.1, batch_size=100, epochs=1)
    found = train_classifier(TRAIN, VALIDATION, MODEL, settings, seed=7).weights

    net = classifier(MODEL, 1, 3, 28)
    initialise(net, torch.Generator().manual_seed(7))
    before = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    x = torch.from_numpy(TRAIN[0]) / 127.5 - 1
    x = F.leaky_relu(F.conv2d(x, before["convs.0.weight"], stride=2, padding=2), 0.2)
    x = F.conv2d(x, before["convs.1.weight"], stride=2, padding=2)
    x = F.batch_norm(x, None, None, before["norms.0.weight"], before["norms.0.bias"], training=True)
    logits = F.leaky_relu(x, 0.2).flatten(1) @ before["output.1.weight"].T
    (-logits.log_softmax(1)[range(60), TRAIN[1]].mean()).backward()
    for name, weight in before.items():
        gradient = weight.grad + 0.1 * weight
        expected = weight - 1e-2 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(found[name], expected.detach(), rtol=1e-3, atol=1e-5)


def test_classes_that_differ_are_learned_and_random_labels_are_not():
    assert train_classifier(TRAIN, VALIDATION, MODEL, SETTINGS, 0).validation_error == 0
    mixed = np.random.default_rng(0).permutation(VALIDATION[1])
    assert train_classifier(TRAIN, (VALIDATION[0], mixed), MODEL, SETTINGS, 0).validation_error > 0.55


def test_the_error_is_that_of_the_weights_that_are_kept():
    train, validation, _ = HARD
    trained = train_classifier(train, validation, MODEL, SETTINGS, 0)
    assert 0.1 < trained.validation_error < 0.6
    assert trained.validation_error == (predictions(trained.weights, validation[0]) != validation[1]).mean()


def test_dropout_acts_in_training_alone():
    plain, dropped = (
        train_classifier(TRAIN, VALIDATION, MODEL, replace(SETTINGS, dropout=p, epochs=1), 0) for p in (0.0, 0.7)
    )
    assert (plain.weights["output.1.weight"] != dropped.weights["output.1.weight"]).any()
    assert dropped.validation_error == (predictions(dropped.weights, VALIDATION[0]) != VALIDATION[1]).mean()


@pytest.mark.parametrize(
    ("errors", "best", "validations"),
    [([0.9, 0.2, 0.5, 0.1], 4, 4), ([0.5, 0.5, 0.7], 1, 3), ([0.4] * 9, 1, 5), ([0.9, 0.8, 0.3] + [0.6] * 9, 3, 7)],
)
def test_the_first_lowest_error_is_kept_and_patience_ends(monkeypatch, errors, best, validations):
    """Four validations without a lower error end it; the weights are those of the best epoch, not the last."""
    asked, seen = iter(errors), []
    monkeypatch.setattr(supervised, "VALIDATE_EVERY", 2)

    def classify(net, x, device):
        seen.append(net.state_dict()["output.1.weight"].clone())
        return np.where(np.arange(len(x)) < round(next(asked) * len(x)), -1, VALIDATION[1])

    monkeypatch.setattr(supervised, "classify", classify)
    settings = replace(SETTINGS, epochs=2 * len(errors))
    trained = train_classifier(TRAIN, VALIDATION, MODEL, settings, 0)
    assert (trained.validation_error, trained.epoch) == (pytest.approx(min(errors)), 2 * best)
    assert len(seen) == validations
    assert torch.equal(trained.weights["output.1.weight"], seen[best - 1])


def test_the_last_epoch_is_validated_though_it_is_no_fifth():
    assert train_classifier(TRAIN, VALIDATION, MODEL, replace(SETTINGS, epochs=2), 0).epoch == 2


def test_validation_on_the_way_does_not_change_training(monkeypatch):
    real = supervised.classify
    weights = []
    for every in (1, 3):
        errors = iter([0.3, 0.2, 0.1])  # lower and lower, so that the last weights are kept

        def classify(net, x, device, errors=errors):
            real(net, x, device)
            return np.where(np.arange(len(x)) < next(errors) * len(x), -1, VALIDATION[1])

        monkeypatch.setattr(supervised, "classify", classify)
        monkeypatch.setattr(supervised, "VALIDATE_EVERY", every)
        weights.append(train_classifier(TRAIN, VALIDATION, MODEL, replace(SETTINGS, epochs=3), 0).weights)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_momentum_acts_from_the_second_step_on():
    def first_layer(beta1, batch_size):
        settings = replace(SETTINGS, beta1=beta1, batch_size=batch_size, epochs=1)
        return train_classifier(TRAIN, VALIDATION, MODEL, settings, 0).weights["convs.0.weight"]

    torch.testing.assert_close(first_layer(0.5, 60), first_layer(0.9, 60))
    assert (first_layer(0.5, 30) - first_layer(0.9, 30)).abs().max() > 1e-3


def test_the_seed_decides_all_and_the_callers_generator_is_left_alone():
    settings = replace(SETTINGS, dropout=0.5, epochs=2)
    trained = []
    for seed, callers in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(callers)
        state = torch.get_rng_state()
        trained.append(train_classifier(TRAIN, VALIDATION, MODEL, settings, seed).weights)
        assert torch.equal(torch.get_rng_state(), state)
    one, same, other = trained
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert (one["convs.0.weight"] != other["convs.0.weight"]).any()


def test_a_loss_that_is_not_finite_counts_as_all_wrong():
    trained = train_classifier(TRAIN, VALIDATION, MODEL, replace(SETTINGS, learning_rate=1e30), 0)
    assert (trained.validation_error, trained.epoch, trained.weights) == (1.0, 0, {})


@given(st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_hyperparameters_lie_in_their_ranges_and_follow_from_seed_and_number(seed, trial):
    found = sample(seed, trial)
    assert 1e-4 <= found.learning_rate <= 1e-2
    assert 0.5 <= found.beta1 <= 0.9
    assert 1e-6 <= found.weight_decay <= 1e-2
    assert 0 <= found.dropout <= 0.7
    assert found.batch_size in (32, 64, 128)
    assert sample(seed, trial) == found
    assert sample(seed + 1, trial) != found


def test_the_search_covers_its_ranges_and_each_decade_alike():
    found = [sample(0, trial) for trial in range(1000)]
    assert np.mean([one.learning_rate < 1e-3 for one in found]) == pytest.approx(1 / 2, abs=0.05)
    assert np.mean([one.weight_decay < 1e-5 for one in found]) == pytest.approx(1 / 4, abs=0.05)
    assert np.mean([one.beta1 < 0.7 for one in found]) == pytest.approx(1 / 2, abs=0.05)
    assert np.mean([one.dropout < 0.35 for one in found]) == pytest.approx(1 / 2, abs=0.05)
    assert np.mean([one.batch_size == 32 for one in found]) == pytest.approx(1 / 3, abs=0.05)
    assert len({one.learning_rate for one in found}) == 1000


def search(directory, splits=HARD, model=MODEL, **settings):
    return score(*splits, model, directory, **{"labels_per_class": 10, "trials": 3, "epochs": 5, **settings})


def test_the_lowest_validation_error_is_chosen_and_test_scored_with_its_weights(tmp_path):
    trials, results = [], []

    def maker(function, asked):
        trials.extend(asked)
        results.extend(map(function, asked))
        return results

    found = search(tmp_path, maker=maker)
    errors = [result["validation_error"] for result in results]
    assert len(set(errors)) > 1
    chosen = errors.index(min(errors))
    assert (found["supervised/trial"], found["supervised/validation_error"]) == (chosen, min(errors))
    assert (found["supervised/epoch"], found["supervised/failed"]) == (results[chosen]["epoch"], 0)
    assert [trial["hyperparameters"] for trial in trials] == [asdict(sample(0, n, 5)) for n in range(3)]
    for name, value in trials[chosen]["hyperparameters"].items():
        assert found[f"supervised/{name}"] == value
    weights = load_file(tmp_path / f"{digest(trials[chosen])}.safetensors")
    test_x, test_y = HARD[2]
    assert found["supervised/test_error"] == (predictions(weights, test_x) != test_y).mean()


def test_test_decides_no_choice(tmp_path):
    found = search(tmp_path / "a")
    train, validation, (test_x, test_y) = HARD
    mixed = 255 - test_x, np.random.default_rng(0).permutation(test_y)
    other = search(tmp_path / "b", (train, validation, mixed))
    assert found.pop("supervised/test_error") != other.pop("supervised/test_error")
    assert found == other


def test_equal_errors_choose_the_first_and_a_failed_trial_is_counted_as_all_wrong(tmp_path):
    def maker(function, trials):
        errors = [None, 1.0, 0.5, 0.25, 0.25]
        made = zip(errors, map(function, trials), strict=True)
        return [None if error is None else result | {"validation_error": error} for error, result in made]

    found = search(tmp_path, trials=5, epochs=1, maker=maker)
    assert (found["supervised/trial"], found["supervised/validation_error"]) == (3, 0.25)
    assert found["supervised/failed"] == 1


def test_a_trial_that_diverges_does_not_stop_the_search_but_one_has_to_learn(tmp_path, monkeypatch):
    def diverging(first):
        def drawn(seed, trial, epochs):
            return replace(sample(seed, trial, epochs), learning_rate=1e30 if trial < first else 1e-2)

        return drawn

    monkeypatch.setattr(supervised_search, "sample", diverging(2))
    found = search(tmp_path)
    assert (found["supervised/trial"], found["supervised/failed"]) == (2, 2)
    monkeypatch.setattr(supervised_search, "sample", diverging(3))
    with pytest.raises(NotConvergedError, match="none of 3 trials has learned"):
        search(tmp_path)


def test_so_many_labels_of_each_class_are_learned_from_and_all_of_validation_is_asked(tmp_path):
    search(tmp_path, trials=1, epochs=1)
    with np.load(tmp_path / "images.npz") as arrays:
        train_x, train_y, validation_x, validation_y = arrays.values()
    assert (np.bincount(train_y) == 10).all()
    known = {image.tobytes(): label for image, label in zip(*HARD[0], strict=True)}
    assert [known[image.tobytes()] for image in train_x] == train_y.tolist()
    np.testing.assert_array_equal(validation_x, HARD[1][0])
    np.testing.assert_array_equal(validation_y, HARD[1][1])


def test_the_settings_of_a_trial_change_with_all_that_decides_its_result(tmp_path):
    """A search that goes on from results that are there must not take those of other images, labels or models."""

    def first(**changes):
        asked = []

        def maker(function, trials):
            asked.extend(trials)
            return map(function, trials)

        search(tmp_path, **{"trials": 1, "epochs": 1, "maker": maker, **changes})
        return digest(asked[0])

    train, validation, test = HARD
    swapped = validation[0], validation[1][::-1].copy()
    changes = [
        {},
        {"seed": 1},
        {"epochs": 2},
        {"labels_per_class": 9},
        {"model": Model(width=3)},
        {"splits": (train, swapped, test)},
    ]
    assert len({first(**change) for change in changes}) == len(changes)
    assert first() == first(splits=(train, validation, TEST))


X, Y = TRAIN


@pytest.mark.parametrize(
    ("splits", "settings", "message"),
    [
        (((X.astype(np.float32), Y), VALIDATION, TEST), {}, r"train has float32 images .*, not uint8 \(N, C, H, W\)"),
        (((X[:, :, :27, :27], Y), VALIDATION, TEST), {}, r"H = W one of 28, 32, 64, 96, 128"),
        (((X[:, 0], Y), VALIDATION, TEST), {}, r"train has uint8 images \(60, 28, 28\)"),
        ((TRAIN, VALIDATION, (X[:0], Y[:0])), {}, r"test has uint8 images \(0, 1, 28, 28\)"),
        ((TRAIN, images(30, channels=3), TEST), {}, r"validation has images \(3, 28, 28\) and train \(1, 28, 28\)"),
        ((TRAIN, VALIDATION, (X, Y[:-1])), {}, r"test has int64 labels \(59,\), not int64 \(60,\)"),
        (((X, Y.astype(np.int32)), VALIDATION, TEST), {}, r"train has int32 labels"),
        ((TRAIN, (X, Y - 1), TEST), {}, "validation has 20 images without a label"),
        ((TRAIN, VALIDATION, (X, Y + 1)), {}, r"train has no image of class 3: it needs 0 to 3"),
        (((X[Y != 1], Y[Y != 1]), VALIDATION, TEST), {}, "train has no image of class 1: it needs 0 to 2"),
        (
            (TRAIN, VALIDATION, TEST),
            {"labels_per_class": 21},
            "labels_per_class=21, but a class of train has 20 images",
        ),
        ((TRAIN, VALIDATION, TEST), {"trials": 0}, "trials=0, .*each is at least 1"),
        ((TRAIN, VALIDATION, TEST), {"model": Model(width=2, conditional=True)}, "model.conditional=true"),
        (((X, Y * 0), (X, Y * 0), (X, Y * 0)), {}, "one class only"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(tmp_path, splits, settings, message):
    def never(function, trials):
        raise AssertionError("a trial was begun")

    with pytest.raises(ValueError, match=message):
        search(tmp_path / "unmade", splits, **settings, maker=never)
    assert not (tmp_path / "unmade").exists()


def test_a_handful_of_images(tmp_path):
    found = search(tmp_path, (images(3), images(3), images(2, classes=2)), labels_per_class=1, trials=1, epochs=3)
    assert 0 <= found["supervised/test_error"] <= 1
    assert math.isfinite(found["supervised/learning_rate"])
