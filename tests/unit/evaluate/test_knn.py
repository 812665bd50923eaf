"""k nearest neighbours against scikit-learn's, and its votes by hand."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from dcgan.config import Evaluate
from dcgan.evaluate import knn, samples
from dcgan.evaluate.inputs import hold_out
from dcgan.evaluate.samples import Samples


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    """As features of full size have: those of the tests would be a single one."""
    monkeypatch.setitem(samples.BLOCK_BYTES, "cpu", 1)  # 16 rows


def blobs(spread=0.5, n=150, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    x = (np.eye(3, 6)[labels] + spread * rng.standard_normal((n, 6))).astype(np.float32)
    cut = n * 2 // 3
    return x[:cut], labels[:cut], x[cut:], labels[cut:]


@pytest.mark.parametrize("shift", [0, 1000])
def test_accuracy_equals_scikit_learn(monkeypatch, shift):
    """Also far from the origin, where uncentred products in float32 would lose the differences."""
    monkeypatch.setattr(knn, "QUERIES", 16)
    train_x, train_y, test_x, test_y = blobs()
    train_x, test_x = train_x + np.float32(shift), test_x + np.float32(shift)
    found = knn.score(train_x, train_y, test_x, test_y, Evaluate(neighbours=(1,)))
    reference = KNeighborsClassifier(1, algorithm="brute").fit(train_x.astype(float), train_y)
    assert found["knn/accuracy"] == pytest.approx(reference.score(test_x, test_y))
    assert found["knn/neighbours"] == 1


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_votes_of_many_neighbours_equal_scikit_learn(spread):
    """Of two classes and odd numbers of neighbours, which can't tie: there scikit-learn takes the lower class."""
    train_x, train_y, test_x, test_y = blobs(spread)
    train_y, test_y = train_y % 2, test_y % 2
    known, tried = Samples.centred(train_x), [1, 3, 5, 15, 99]
    found = knn.accuracies(known, train_y, known.like(test_x), test_y, tried)
    references = [KNeighborsClassifier(k, algorithm="brute").fit(train_x.astype(float), train_y) for k in tried]
    assert found == pytest.approx([reference.score(test_x, test_y) for reference in references])


def test_the_chosen_number_is_the_best_on_the_held_out_fifth():
    train_x, train_y, test_x, test_y = blobs(1.0, n=300)
    train_y, test_y = train_y % 2, test_y % 2
    fit, held = hold_out(train_y, 0)
    held_out = {
        k: KNeighborsClassifier(k, algorithm="brute")
        .fit(train_x[fit], train_y[fit])
        .score(train_x[held], train_y[held])
        for k in (1, 3, 9, 21)
    }
    assert len(set(held_out.values())) > 1
    found = knn.score(train_x, train_y, test_x, test_y, Evaluate(neighbours=(21, 1, 9, 3)))
    assert found["knn/neighbours"] == max(sorted(held_out), key=held_out.get)
    everything = KNeighborsClassifier(int(found["knn/neighbours"]), algorithm="brute").fit(train_x, train_y)
    assert found["knn/accuracy"] == pytest.approx(everything.score(test_x, test_y))


def test_few_labels_are_those_of_the_draws_and_none_that_the_number_is_chosen_on(monkeypatch):
    train_x, train_y, test_x, test_y = blobs(0.7, n=300)
    train_y, test_y = train_y % 2, test_y % 2  # two classes can't tie
    settings = Evaluate(neighbours=(1, 5), labels_per_class=6, draws=12)
    drawn = []
    real = knn.accuracies

    def accuracies(known, known_y, asked, asked_y, tried):
        drawn.append((known.rows.numpy(), asked_y is test_y, tried))
        return real(known, known_y, asked, asked_y, tried)

    monkeypatch.setattr(knn, "accuracies", accuracies)
    found = knn.score_few_labels(train_x, train_y, test_x, test_y, settings)
    _, held = hold_out(train_y, settings.seed)
    chosen = int(found["knn_few_labels/neighbours"])
    assert [(tested, tried) for _, tested, tried in drawn] == [(False, [1, 5])] * 10 + [(True, [chosen])] * 12
    scores: dict[int | str, list[float]] = {1: [], 5: [], "test": []}
    for rows, tested, tried in drawn:
        assert (np.bincount(train_y[rows]) == 6).all()
        assert not np.intersect1d(rows, held).size
        x, y = (test_x, test_y) if tested else (train_x[held], train_y[held])
        for k in tried:
            model = KNeighborsClassifier(k, algorithm="brute").fit(train_x[rows], train_y[rows])
            scores["test" if tested else k].append(model.score(x, y))
    assert found["knn_few_labels/validation_accuracy"] == pytest.approx(max(np.mean(scores[k]) for k in (1, 5)))
    assert found["knn_few_labels/accuracy"] == pytest.approx(np.mean(scores["test"]))
    assert found["knn_few_labels/accuracy_std"] == pytest.approx(np.std(scores["test"], ddof=1))


def test_nearest_are_exact_and_in_order():
    train_x, _, test_x, _ = blobs()
    known = Samples.centred(train_x)
    (_, queries), *_ = known.like(test_x).blocks(100)
    expected = np.argsort(np.linalg.norm(test_x[:, None].astype(float) - train_x[None], axis=2), axis=1)[:, :7]
    np.testing.assert_array_equal(knn._nearest(known, queries, 7), expected)


@pytest.mark.parametrize(
    ("nearest", "winner"), [([2, 1, 1], 1), ([2, 1, 0], 2), ([0, 2, 2, 0], 0), ([1, 0, 0, 1, 2], 1), ([1, 0, 2, 0], 0)]
)
def test_a_tie_goes_to_the_class_of_the_nearest_voter(nearest, winner):
    assert knn._vote(torch.tensor([nearest]), 3) == [winner]


def test_easy_classes_score_one_and_random_labels_score_chance():
    train_x, train_y, test_x, test_y = blobs(0.01)
    assert knn.score(train_x, train_y + 4, test_x, test_y + 4, Evaluate())["knn/accuracy"] == 1
    mixed = np.random.default_rng(0).permutation(test_y)
    assert knn.score(train_x, train_y, test_x, mixed, Evaluate())["knn/accuracy"] < 0.6


def test_the_number_of_neighbours_is_chosen_on_train_alone():
    """Noisy classes want many neighbours, clean ones are content with one, whatever test says."""
    train_x, train_y, test_x, test_y = blobs(1.0, n=900)
    noisy = knn.score(train_x, train_y, test_x, test_y, Evaluate())["knn/neighbours"]
    shuffled = np.random.default_rng(1).permutation(test_y)
    assert noisy == knn.score(train_x, train_y, -test_x, shuffled, Evaluate())["knn/neighbours"] > 1
    clean = blobs(0.01)
    assert knn.score(*clean, Evaluate(neighbours=(15, 5, 1)))["knn/neighbours"] == 1


def test_the_seed_decides_the_labels_used():
    arrays = blobs(1.0, n=300)
    settings = [Evaluate(labels=60, seed=seed) for seed in (0, 0, 1, 2, 3)]
    runs = [knn.score(*arrays, one) for one in settings]
    assert runs[0] == runs[1]
    assert any(run != runs[0] for run in runs)


def test_constant_features_and_a_handful_of_samples():
    _, train_y, _, test_y = blobs()
    constant = np.ones((100, 2), np.float32), train_y, np.ones((50, 2), np.float32), test_y
    assert knn.score(*constant, Evaluate())["knn/accuracy"] < 0.4
    few = blobs(0.01, n=9)
    assert knn.score(*few, Evaluate(neighbours=(1, 3)))["knn/accuracy"] == 1


def test_a_class_that_test_lacks_and_a_single_test_image():
    train_x, train_y, test_x, test_y = blobs(0.01)
    for rows in (test_y != 1, np.arange(50) == 7):
        assert knn.score(train_x, train_y, test_x[rows], test_y[rows], Evaluate())["knn/accuracy"] == 1


def test_as_many_neighbours_as_images_give_the_most_frequent_class():
    train_x, train_y, test_x, test_y = blobs(0.01)
    known, uneven = Samples.centred(train_x), np.where(np.arange(100) < 60, 2, train_y)
    assert knn.accuracies(known, uneven, known.like(test_x), test_y, [100]) == [pytest.approx((test_y == 2).mean())]


def test_refusals():
    train_x, train_y, test_x, test_y = blobs()
    with pytest.raises(ValueError, match=r"evaluate.neighbours=15, but train has only 9 labelled images"):
        knn.score(train_x, train_y, test_x, test_y, Evaluate(labels=12))
    with pytest.raises(ValueError, match="train has no image of class 0, which test has"):
        knn.score(train_x[train_y > 0], train_y[train_y > 0], test_x, test_y, Evaluate())
    with pytest.raises(ValueError, match="train has one class only, 1"):
        knn.score(train_x, np.ones_like(train_y), test_x, test_y, Evaluate())
    with pytest.raises(ValueError, match="train has 6 features per image and test 5"):
        knn.score(train_x, train_y, test_x[:, :5], test_y, Evaluate())
    train_x[1, 0] = np.nan
    with pytest.raises(ValueError, match="train features hold nan: image 1, feature 0"):
        knn.score(train_x, train_y, test_x, test_y, Evaluate())
