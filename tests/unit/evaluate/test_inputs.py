"""Stratified choices of rows and refusals, against independent computations."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dcgan.config import Evaluate
from dcgan.evaluate import EVALUATORS
from dcgan.evaluate.inputs import check, check_classes, check_labels, draw, hold_out, labelled

LABELS = st.lists(st.integers(0, 4), min_size=10, max_size=80).map(np.array)


@given(LABELS, st.integers(0, 5))
def test_hold_out_takes_a_fifth_of_each_class(labels, seed):
    fit, held = hold_out(labels, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([fit, held])), np.arange(len(labels)))
    for label, size in zip(*np.unique(labels, return_counts=True), strict=True):
        expected = 0 if size == 1 else max(1, size // 5)
        assert (labels[held] == label).sum() == expected
        assert (labels[fit] == label).any()


@given(LABELS, st.data())
def test_labelled_keeps_the_shares_of_the_classes(labels, data):
    count = data.draw(st.integers(1, len(labels)))
    classes, sizes = np.unique(labels, return_counts=True)
    try:
        rows = labelled(labels, count, 0)
    except ValueError as error:
        assert "leaves none of class" in str(error)  # noqa: PT017
        assert (sizes * count < len(labels)).any()
        return
    assert len(np.unique(rows)) == count
    for label, size in zip(classes, sizes, strict=True):
        assert abs((labels[rows] == label).sum() - size * count / len(labels)) < 1


def test_choices_are_functions_of_the_seed():
    labels = np.repeat(np.arange(5), 40)
    for choose in (
        lambda s: labelled(labels, 50, s),
        lambda s: hold_out(labels, s)[1],
        lambda s: draw(labels, 9, (s, 1)),
    ):
        np.testing.assert_array_equal(choose(3), choose(3))
        assert (choose(3) != choose(4)).any()
    assert (draw(labels, 9, (3, 1)) != draw(labels, 9, (3, 2))).any()
    np.testing.assert_array_equal(labelled(labels, 0, 0), np.arange(200))


def test_draw_takes_the_same_number_of_each_class():
    labels = np.array([0] * 30 + [7] * 12 + [2] * 9)
    rows = draw(labels, 9, (0, 0))
    assert [(labels[rows] == label).sum() for label in (0, 7, 2)] == [9, 9, 9]


def test_refusals_of_choices_name_the_numbers():
    with pytest.raises(ValueError, match=r"labels_per_class=10, but class 3 has 9 labels"):
        draw(np.array([0] * 20 + [3] * 9), 10, (0, 0))
    with pytest.raises(ValueError, match=r"evaluate.labels=11, but train has 10 labels"):
        labelled(np.arange(10), 11, 0)
    with pytest.raises(ValueError, match=r"evaluate.labels=2 leaves none of class 5"):
        labelled(np.array([0, 1] * 50 + [5]), 2, 0)
    with pytest.raises(ValueError, match=r"4 labels, one per class"):
        hold_out(np.arange(4), 0)


def good():
    x, y = np.random.default_rng(0).random((12, 3), np.float32), np.arange(12) % 3
    return x, y, x[:6].copy(), y[:6]


def test_check_passes_good_input():
    check(*good())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("split", "where"), [("train", 0), ("test", 2)])
def test_features_that_are_not_finite_are_named(split, where, value):
    arrays = good()
    arrays[where][5, 1] = value
    with pytest.raises(ValueError, match=rf"{split} features hold {value}: image 5, feature 1"):
        check(*arrays)


def test_check_names_what_is_wrong():
    x, y, test_x, test_y = good()
    with pytest.raises(ValueError, match=r"test has 2 images without a label"):
        check(x, y, test_x, np.array([0, 1, -1, -1, 0, 1]))
    with pytest.raises(ValueError, match=r"train has one class only, 2"):
        check(x, np.full(12, 2), test_x, test_y)
    with pytest.raises(ValueError, match=r"train has 3 features per image and test 2"):
        check(x, y, test_x[:, :2], test_y)
    with pytest.raises(ValueError, match=r"train has features \(12, 3\) and labels \(11,\)"):
        check(x, y[:11], test_x, test_y)
    with pytest.raises(ValueError, match=r"test has features \(0, 3\)"):
        check(x, y, test_x[:0], test_y[:0])
    with pytest.raises(ValueError, match=r"no image of class 4, 9, which test has"):
        check_classes(y, np.array([0, 9, 4]))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_labels_are_refused_before_there_are_features_as_they_are_with_them(data):
    """Whatever an evaluator says of labels is said at once, and nothing else is."""
    lists = st.lists(st.integers(-1, 3), min_size=4, max_size=40)
    labels = {split: np.array(data.draw(lists)) for split in ("train", "test")}
    if data.draw(st.booleans()):
        labels["validation"] = np.array(data.draw(lists))
    protocol = data.draw(st.sampled_from(["svm", "svm_few_labels", "knn", "clustering"]))
    chosen = Evaluate(
        protocols=(protocol,),
        labels=data.draw(st.sampled_from([0, 8, 30])),
        labels_per_class=data.draw(st.integers(1, 4)),
        draws=2,
        c_grid=(1.0,),
        neighbours=data.draw(st.sampled_from([(1,), (1, 9)])),
    )
    assume(len(set(labels["train"])) > 1)  # of a data set with one class nothing is scored
    features = {split: np.random.default_rng(0).random((len(y), 2)).astype(np.float32) for split, y in labels.items()}
    held = (features["validation"], labels["validation"]) if "validation" in labels else None
    refusals = []
    for work in (
        lambda: check_labels(labels, chosen),
        lambda: EVALUATORS[protocol].score(
            features["train"], labels["train"], features["test"], labels["test"], chosen, held
        ),
    ):
        try:
            work()
            refusals.append("")
        except ValueError as error:
            refusals.append(str(error))
    if protocol != "clustering":
        assert bool(refusals[0]) == bool(refusals[1]), refusals
