"""The L2-SVM against scikit-learn's LinearSVC, and both of its protocols."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator

from dcgan.config import Evaluate
from dcgan.evaluate import products, samples
from dcgan.evaluate.inputs import hold_out
from dcgan.evaluate.samples import NotConvergedError, Samples
from dcgan.evaluate.svm import L2SVM, fit_all, score, score_few_labels


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    """As features of full size have: those of the tests would be a single one."""
    monkeypatch.setitem(samples.BLOCK_BYTES, "cpu", 1)  # 16 rows
    monkeypatch.setattr(products, "COLUMNS", 50)


PEAK = """
import re, sys
from pathlib import Path
import numpy as np
from dcgan.evaluate.svm import L2SVM

def status(key):
    return 1024 * int(re.search(rf"^{key}:\\s+(\\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1])

rng = np.random.default_rng(0)
x, y = rng.standard_normal((8_000, 8_192), np.float32), rng.integers(0, 10, 8_000)
L2SVM(C=1e-4, device="cpu").fit(x[:100], y[:100])  # what libraries load on first use is not the solver's
Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
before = status("VmRSS")
L2SVM(C=1e-4, device="cpu").fit(x, y)
print((status("VmHWM") - before) / x.nbytes)
"""


def test_beyond_the_features_little_memory_is_needed():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3


def digits(scaled=True):
    x, y = load_digits(return_X_y=True)
    return (StandardScaler().fit_transform(x) if scaled else x).astype(np.float32), y


def ill_conditioned():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((300, 300)))
    x = rng.standard_normal((600, 300)) * np.logspace(1, -3, 300) @ basis
    return x.astype(np.float32), rng.integers(0, 4, 600)


def more_features_than_samples():
    rng = np.random.default_rng(1)
    return rng.standard_normal((80, 500)).astype(np.float32), rng.integers(0, 2, 80)


def objective(weights, biases, x, y, c):
    """By its definition, in float64, for each class."""
    found = []
    for label, w, b in zip(np.unique(y)[-len(weights) :], weights.astype(float), biases.astype(float), strict=True):
        slack = np.maximum(0, 1 - np.where(y == label, 1, -1) * (x.astype(float) @ w + b))
        found.append(0.5 * (w @ w + b * b) + c * (slack**2).sum())
    return np.array(found)


@pytest.mark.parametrize(
    ("data", "c"),
    [
        (digits(), 1e-5),
        (digits(), 1e-2),
        (digits(), 1.0),
        (digits(scaled=False), 1.0),
        (ill_conditioned(), 1e-2),
        (ill_conditioned(), 1.0),
        (more_features_than_samples(), 1e-3),
        (more_features_than_samples(), 10.0),
    ],
)
def test_reaches_the_objective_of_linear_svc(data, c, monkeypatch):
    # Three blocks of 80 samples, eight of the digits: 16 rows at a time would be half a million products.
    monkeypatch.setitem(samples.BLOCK_BYTES, "cpu", 65_536)
    x, y = data
    ours = L2SVM(C=c).fit(x, y)
    theirs = LinearSVC(C=c, dual=False, tol=1e-6, max_iter=2000).fit(x.astype(float), y)
    weights, biases = theirs.coef_, theirs.intercept_
    reached, reference = objective(ours.coef_, ours.intercept_, x, y, c), objective(weights, biases, x, y, c)
    assert (reached < reference * (1 + 1e-3)).all()
    np.testing.assert_allclose(ours.objective_, reached, rtol=1e-4)
    # Both are near one minimum of a strongly convex function, so they say the same but for a few on the border.
    assert (ours.predict(x) == theirs.predict(x)).mean() > 0.99


def test_behaves_like_a_scikit_learn_estimator():
    check_estimator(L2SVM())


@pytest.mark.parametrize("c", [1e-5, 1e-3, 1e-2])
def test_the_reduced_form_of_few_samples_has_the_same_minimum(monkeypatch, c):
    rng = np.random.default_rng(2)
    x, y = (
        rng.standard_normal((150, 900)).astype(np.float32) * np.logspace(1, -2, 900, dtype=np.float32),
        np.arange(150) % 3,
    )
    x += 3  # a common part: the bias takes it
    reduced = L2SVM(C=c, tol=1e-5).fit(x, y)
    monkeypatch.setattr("dcgan.evaluate.products.REDUCED_ROWS", 0)
    streamed = L2SVM(C=c, tol=1e-5).fit(x, y)
    assert (reduced.coef_ != streamed.coef_).any()
    np.testing.assert_allclose(reduced.objective_, streamed.objective_, rtol=2e-5)
    reached = objective(reduced.coef_, reduced.intercept_, x, y, c)
    np.testing.assert_allclose(reached, reduced.objective_, rtol=1e-4)


def test_features_far_from_zero_lose_no_direction():
    rng = np.random.default_rng(3)
    x, y = (1000 + rng.standard_normal((100, 500))).astype(np.float32), np.arange(100) % 2
    ours = L2SVM(C=1.0).fit(x, y)
    theirs = LinearSVC(C=1.0, dual=False, tol=1e-6, max_iter=5000).fit(x.astype(float), y)
    reached = objective(ours.coef_, ours.intercept_, x, y, 1.0)
    assert (reached < objective(theirs.coef_, theirs.intercept_, x, y, 1.0) * (1 + 1e-3)).all()
    assert (ours.predict(x) == y).all()


def test_all_penalties_at_once_are_each_fitted_alone():
    x, y = digits()
    together = fit_all(Samples.of(x), y, [1e-2, 1e-4, 1e-3])
    assert [model.C for model in together] == [1e-4, 1e-3, 1e-2]
    for model in together:
        np.testing.assert_allclose(model.objective_, L2SVM(C=model.C).fit(x, y).objective_, rtol=1e-3)


def test_half_precision_features_are_read_as_they_are():
    x, y = digits(scaled=False)  # 0 to 16: exact in float16
    np.testing.assert_array_equal(
        L2SVM(C=1e-3).fit(Samples.of(x.astype(np.float16)), y).coef_, L2SVM(C=1e-3).fit(x, y).coef_
    )


def test_choices_are_made_on_the_validation_images_where_there_are_some():
    """Validation labels that are one C's own predictions make that C the best there, and it is chosen."""
    train_x, train_y, test_x, test_y = split(spread=2.0)
    train = Samples.standardised(train_x)
    for model in fit_all(train, train_y, SETTINGS.c_grid):
        validation = test_x, model.predict(train.like(test_x))
        found = score(train_x, train_y, test_x, test_y, SETTINGS, validation)
        assert found["svm/validation_accuracy"] == 1
        assert found["svm/accuracy"] == (model.predict(train.like(test_x)) == test_y).mean()
    few = score_few_labels(train_x, train_y, test_x, test_y, SETTINGS, (test_x, test_y))
    assert few["svm_few_labels/validation_accuracy"] == few["svm_few_labels/accuracy"]


def test_c_is_chosen_on_the_first_ten_draws_and_all_are_scored():
    arrays = split(spread=2.0)
    many = score_few_labels(*arrays, Evaluate(**{**SETTINGS.model_dump(), "draws": 15}))
    ten = score_few_labels(*arrays, Evaluate(**{**SETTINGS.model_dump(), "draws": 10}))
    assert many["svm_few_labels/validation_accuracy"] == ten["svm_few_labels/validation_accuracy"]
    assert many["svm_few_labels/c"] == ten["svm_few_labels/c"]
    assert many["svm_few_labels/accuracy"] != ten["svm_few_labels/accuracy"]


def test_features_are_taken_as_they_are_where_the_settings_say_so():
    arrays = split(spread=2.0)
    raw = Evaluate(**{**SETTINGS.model_dump(), "standardise": False, "c_grid": (1e-3,)})
    model = L2SVM(C=1e-3).fit(arrays[0], arrays[1])
    assert score(*arrays, raw)["svm/accuracy"] == (model.predict(arrays[2]) == arrays[3]).mean()


def test_the_sketch_of_some_rows_only_changes_nothing_but_speed(monkeypatch):
    x, y = digits()
    full = L2SVM(C=1e-2, tol=1e-6).fit(x, y)
    monkeypatch.setattr("dcgan.evaluate.products.SKETCH_ROWS", 50)
    np.testing.assert_allclose(L2SVM(C=1e-2, tol=1e-6).fit(x, y).objective_, full.objective_, rtol=1e-5)


def test_samples_are_fitted_and_scored_like_the_array_they_stand_for():
    x, y = digits(scaled=False)
    samples = Samples.standardised(x)
    scaled = StandardScaler().fit_transform(x).astype(np.float32)
    model, plain = L2SVM(C=1e-2, tol=1e-7).fit(samples, y), L2SVM(C=1e-2, tol=1e-7).fit(scaled, y)
    np.testing.assert_allclose(model.decision_function(samples), plain.decision_function(scaled), atol=5e-3)


def test_shapes_and_labels_of_what_is_learned():
    x, y = digits()
    model = L2SVM(C=1e-3).fit(x, y * 10)
    assert (model.coef_.shape, model.intercept_.shape, model.objective_.shape) == ((10, 64), (10,), (10,))
    assert model.decision_function(x[:3]).shape == (3, 10)
    assert set(model.predict(x)) == set(range(0, 100, 10))


def test_refuses_one_class_and_a_tolerance_that_float32_can_not_reach():
    x, y = digits()
    with pytest.raises(ValueError, match="one class only, 3"):
        L2SVM().fit(x, np.full(len(x), 3))
    with pytest.raises(NotConvergedError, match=r"L2-SVM \d with C=1 is within .* of its minimum, not 1e-30"):
        L2SVM(C=1, tol=1e-30).fit(x[:100, :5], y[:100])


@pytest.mark.parametrize("c", [-1.0, 0.0, np.nan, np.inf])
def test_a_penalty_that_is_none_is_refused(c):
    with pytest.raises(ValueError, match=f"C={c}: a penalty is above 0, and finite"):
        L2SVM(C=c).fit(*digits())


def test_a_step_that_overflows_is_no_minimum():
    with pytest.raises(NotConvergedError, match=r"with C=1e\+20 is within"):
        L2SVM(C=1e20).fit(*digits())


def split(classes=5, n=60, spread=1.0, seed=0):
    """Gaussian classes in 8 dimensions of very different scale: train and test."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, 8))
    y = np.arange(n * classes) % classes
    x = (centres[y] + spread * rng.standard_normal((len(y), 8))) * np.logspace(-3, 3, 8)
    cut = len(y) * 2 // 3
    return x[:cut].astype(np.float32), y[:cut], x[cut:].astype(np.float32), y[cut:]


SETTINGS = Evaluate(labels_per_class=10, draws=3, c_grid=(1e-3, 1e-1, 1.0))


def test_score_is_the_test_accuracy_of_the_chosen_c_fitted_to_all_of_train():
    train_x, train_y, test_x, test_y = split()
    found = score(train_x, train_y, test_x, test_y, SETTINGS)
    scaler = StandardScaler().fit(train_x)
    reference = LinearSVC(C=found["svm/c"], dual=False, tol=1e-6).fit(scaler.transform(train_x), train_y)
    assert found["svm/accuracy"] == pytest.approx(reference.score(scaler.transform(test_x), test_y), abs=0.02)


@pytest.mark.parametrize("protocol", [score, score_few_labels])
def test_easy_classes_score_one_and_random_labels_score_chance(protocol):
    train_x, train_y, test_x, test_y = split(spread=0.05)
    name = "svm/accuracy" if protocol is score else "svm_few_labels/accuracy"
    assert protocol(train_x, train_y, test_x, test_y, SETTINGS)[name] == 1
    mixed = np.random.default_rng(0).permutation(test_y)
    assert protocol(train_x, train_y, test_x, mixed, SETTINGS)[name] < 0.4


@pytest.mark.parametrize(("protocol", "chosen"), [(score, "svm/c"), (score_few_labels, "svm_few_labels/c")])
def test_test_labels_decide_no_choice(protocol, chosen):
    """Test labels that are one C's own predictions make that C the best on test; it is chosen none the more."""
    train_x, train_y, test_x, test_y = split(spread=2.0)
    train = Samples.standardised(train_x)
    expected = protocol(train_x, train_y, test_x, test_y, SETTINGS)[chosen]
    for c in SETTINGS.c_grid:
        favoured = L2SVM(C=c).fit(train, train_y).predict(train.like(test_x))
        assert protocol(train_x, train_y, test_x, favoured, SETTINGS)[chosen] == expected
    shuffled = np.random.default_rng(9).permutation(test_y)
    assert protocol(train_x, train_y, test_x[::-1] * 3, shuffled, SETTINGS)[chosen] == expected


@pytest.mark.parametrize("protocol", [score, score_few_labels])
def test_test_images_are_scaled_as_train_is(protocol):
    """Images of one class alone, scaled by their own mean, would lie where no class is."""
    train_x, train_y, test_x, test_y = split(spread=0.05)
    found = protocol(train_x, train_y, test_x[test_y == 2], test_y[test_y == 2], SETTINGS)
    assert found[f"{'svm' if protocol is score else 'svm_few_labels'}/accuracy"] == 1


@pytest.mark.parametrize("protocol", [score, score_few_labels])
def test_the_seed_decides_the_score(protocol):
    arrays = split(spread=2.0)
    settings = Evaluate(**{**SETTINGS.model_dump(), "labels": 60})
    assert protocol(*arrays, settings) == protocol(*arrays, settings)
    others = [Evaluate(**{**settings.model_dump(), "seed": seed}) for seed in (1, 2, 3)]
    assert any(protocol(*arrays, other) != protocol(*arrays, settings) for other in others)


def test_equal_validation_accuracies_choose_the_smaller_c():
    arrays = split(spread=0.01)
    assert score(*arrays, Evaluate(c_grid=(1.0, 0.1)))["svm/c"] == 0.1
    settings = Evaluate(c_grid=(1.0, 0.1), draws=2, labels_per_class=10)
    assert score_few_labels(*arrays, settings)["svm_few_labels/c"] == 0.1


def test_draws_have_the_labels_asked_for_and_none_that_c_is_chosen_on(monkeypatch):
    from dcgan.evaluate import svm

    drawn = []
    real = svm.fit_all
    monkeypatch.setattr(svm, "fit_all", lambda x, y, grid: drawn.append((x.rows.numpy(), y)) or real(x, y, grid))
    train_x, train_y, test_x, test_y = split(spread=2.0)
    score_few_labels(train_x, train_y, test_x, test_y, SETTINGS)
    _, held = hold_out(train_y, SETTINGS.seed)
    assert len({tuple(rows) for rows, _ in drawn}) == SETTINGS.draws
    for rows, y in drawn:
        assert (y == train_y[rows]).all()
        assert (np.bincount(y) == SETTINGS.labels_per_class).all()
        assert not np.intersect1d(rows, held).size


def test_few_labels_mean_and_deviation_are_those_of_its_draws(monkeypatch):
    from dcgan.evaluate import svm

    seen = []
    real = svm._accuracies
    monkeypatch.setattr(svm, "_accuracies", lambda *arguments: seen.append(real(*arguments)) or seen[-1])
    arrays = split(spread=2.0)
    found = score_few_labels(*arrays, SETTINGS)
    *validation, test = seen
    assert found["svm_few_labels/c"] == sorted(SETTINGS.c_grid)[int(np.argmax([np.mean(v) for v in validation]))]
    assert len(test) == SETTINGS.draws
    assert found["svm_few_labels/accuracy"] == pytest.approx(sum(test) / 3)
    variance = sum((value - sum(test) / 3) ** 2 for value in test) / 2
    assert found["svm_few_labels/accuracy_std"] == pytest.approx(variance**0.5)


@pytest.mark.parametrize("protocol", [score, score_few_labels])
def test_features_that_are_all_constant_score_one_class(protocol):
    _, train_y, _, test_y = split()
    train_x, test_x = np.full((len(train_y), 4), 0.3, np.float32), np.full((len(test_y), 4), 0.3, np.float32)
    found = protocol(train_x, train_y, test_x, test_y, SETTINGS)
    assert found[f"{'svm' if protocol is score else 'svm_few_labels'}/accuracy"] == pytest.approx(0.2)


@pytest.mark.parametrize("protocol", [score, score_few_labels])
def test_refusals(protocol):
    train_x, train_y, test_x, test_y = split()
    with pytest.raises(ValueError, match="train has no image of class 2, which test has"):
        protocol(train_x[train_y != 2], train_y[train_y != 2], test_x, test_y, SETTINGS)
    with pytest.raises(ValueError, match="one class only"):
        protocol(train_x, train_y * 0, test_x, test_y, SETTINGS)
    test_x[0, 0] = np.nan
    with pytest.raises(ValueError, match="test features hold nan: image 0, feature 0"):
        protocol(train_x, train_y, test_x, test_y, SETTINGS)


def test_more_labels_a_class_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"labels_per_class=100, but class \d has 32 labels"):
        score_few_labels(*split(), Evaluate())


def test_a_handful_of_samples():
    train_x, train_y, test_x, test_y = split(classes=2, n=3, spread=0.01)
    assert score(train_x, train_y, test_x, test_y, Evaluate())["svm/accuracy"] == 1
