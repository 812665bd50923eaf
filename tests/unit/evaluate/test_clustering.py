"""k-means clustering scores against brute force and values worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcgan.config import Evaluate
from dcgan.evaluate.clustering import compare, matched, score

PAIRS = st.integers(2, 4).flatmap(
    lambda k: st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=3, max_size=30)
)


def best_assignment(labels, clusters):
    """Every one-to-one map of clusters to classes, tried."""
    classes, names = sorted(set(labels)), sorted(set(clusters))
    targets = classes + [None] * max(0, len(names) - len(classes))
    return max(
        sum(mapping[names.index(c)] == y for y, c in zip(labels, clusters, strict=True)) / len(labels)
        for mapping in itertools.permutations(targets, len(names))
    )


def entropy(values):
    shares = [values.count(v) / len(values) for v in set(values)]
    return -sum(p * math.log(p) for p in shares)


def adjusted_rand(labels, clusters):
    """Hubert and Arabie 1985 by counting pairs of images: together in both, and how many of those are expected."""
    pairs = list(itertools.combinations(range(len(labels)), 2))
    together = [labels[i] == labels[j] for i, j in pairs]
    joined = [clusters[i] == clusters[j] for i, j in pairs]
    both = sum(a and b for a, b in zip(together, joined, strict=True))
    expected = sum(together) * sum(joined) / len(pairs)
    most = (sum(together) + sum(joined)) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


@given(PAIRS)
def test_values_equal_brute_force_and_the_definition(pairs):
    labels, clusters = [list(column) for column in zip(*pairs, strict=True)]
    found = compare(np.array(labels), np.array(clusters))
    assert found["clustering/accuracy"] == pytest.approx(best_assignment(labels, clusters))
    assert found["clustering/ari"] == pytest.approx(adjusted_rand(labels, clusters), abs=1e-9)
    h_labels, h_clusters = entropy(labels), entropy(clusters)
    mutual = h_labels + h_clusters - entropy(pairs)
    if h_labels > 0 and h_clusters > 0:
        assert found["clustering/nmi"] == pytest.approx(2 * mutual / (h_labels + h_clusters), abs=1e-9)
        assert found["clustering/nmi_geometric"] == pytest.approx(mutual / math.sqrt(h_labels * h_clusters), abs=1e-9)


@given(PAIRS, st.permutations(range(4)))
def test_values_keep_their_range_and_do_not_see_the_clusters_numbers(pairs, numbers):
    labels, clusters = [np.array(column) for column in zip(*pairs, strict=True)]
    found = compare(labels, clusters)
    assert found == pytest.approx(compare(labels, np.array(numbers)[clusters]), abs=1e-9)
    assert -0.5 <= found["clustering/ari"] <= 1 + 1e-9
    assert all(-1e-9 <= found[f"clustering/{name}"] <= 1 + 1e-9 for name in ("nmi", "nmi_geometric", "accuracy"))


def test_values_by_hand():
    # Contingency [[2, 1], [0, 1]]: H(labels) = H(3/4), H(clusters) = ln 2, H(joint) = H(1/2, 1/4, 1/4).
    found = compare(np.array([0, 0, 0, 1]), np.array([5, 5, 9, 9]))
    h_labels, mutual = 0.5623351, 0.5623351 + 0.6931472 - 1.0397208
    assert found["clustering/nmi"] == pytest.approx(2 * mutual / (h_labels + 0.6931472), abs=1e-6)
    assert found["clustering/nmi_geometric"] == pytest.approx(mutual / math.sqrt(h_labels * 0.6931472), abs=1e-6)
    assert found["clustering/nmi"] < found["clustering/nmi_geometric"]
    assert found["clustering/ari"] == pytest.approx(0.0)  # 1 pair agrees, 3 * 2 / 6 = 1 is expected
    assert found["clustering/accuracy"] == 0.75


def test_direction_and_degenerate_clusters():
    labels = np.arange(60) % 3
    perfect = compare(labels, (labels + 1) % 3)
    assert perfect == pytest.approx(dict.fromkeys(perfect, 1.0))
    single = compare(labels, np.zeros(60, int))
    assert single["clustering/accuracy"] == pytest.approx(1 / 3)
    assert single["clustering/nmi"] == single["clustering/nmi_geometric"] == single["clustering/ari"] == 0
    # Six clusters for three classes: half of each class is in a cluster without a class, unlike in purity.
    assert matched(labels, labels + 3 * (np.arange(60) % 2)) == pytest.approx(0.5)


def blobs(spread, width=5):
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 4
    x = np.eye(4, width)[labels] + spread * rng.standard_normal((120, width))
    x = x.astype(np.float32)
    return x[:80], labels[:80], x[80:], labels[80:]


def test_separate_classes_are_found_and_input_is_left_alone():
    arrays = blobs(0.01)
    before = arrays[0].copy()
    found = score(*arrays, Evaluate(restarts=3))
    assert found == pytest.approx(dict.fromkeys(found, 1.0))
    assert (arrays[0] == before).all()


def test_clusters_are_the_split_of_lowest_inertia():
    """Of all 511 ways to split ten images in two. Some starts alone find others; the classes are a third."""
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((10, 2)).astype(np.float32), np.arange(10) % 2
    splits = [np.array(split) for split in itertools.product([0, 1], repeat=10) if 0 < sum(split) < 10]
    inertias = [sum(((x[split == c] - x[split == c].mean(0)) ** 2).sum() for c in (0, 1)) for split in splits]
    best = compare(labels, splits[int(np.argmin(inertias))])
    found = score(x[:6], labels[:6], x[6:], labels[6:], Evaluate(restarts=50))
    assert found == pytest.approx(best)
    assert best["clustering/accuracy"] < 1
    alone = [score(x[:6], labels[:6], x[6:], labels[6:], Evaluate(restarts=1, seed=seed)) for seed in range(20)]
    assert any(one != found for one in alone)


def test_a_data_set_without_test_images_is_clustered_whole():
    train_x, train_y, test_x, test_y = blobs(0.5)
    whole, labels = np.concatenate([train_x, test_x]), np.concatenate([train_y, test_y])
    found = score(whole, labels, whole[:0], labels[:0], Evaluate())
    assert found == score(train_x, train_y, test_x, test_y, Evaluate())


def test_a_class_of_one_split_alone_has_its_cluster():
    train_x, train_y, test_x, test_y = blobs(0.01)
    for arrays in (
        (train_x[train_y < 3], train_y[train_y < 3], test_x, test_y),
        (train_x, train_y, test_x[test_y < 3], test_y[test_y < 3]),
    ):
        assert score(*arrays, Evaluate(restarts=3))["clustering/accuracy"] == 1


def test_one_image_a_class_is_its_own_cluster():
    train_x, train_y, _, _ = blobs(0.01)
    found = score(train_x[:3], train_y[:3], train_x[3:4], train_y[3:4], Evaluate(restarts=1))
    assert found == pytest.approx(dict.fromkeys(found, 1.0))


def test_the_seed_decides_the_score():
    arrays = blobs(0.8)
    runs = [score(*arrays, Evaluate(restarts=1, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert runs[0] == runs[1]
    assert any(run != runs[0] for run in runs)


def test_features_are_not_standardised():
    """A feature of tiny scale says nothing to k-means; standardised, it would."""
    train_x, train_y, test_x, test_y = blobs(0.01)
    noise = np.random.default_rng(1).standard_normal((120, 200)).astype(np.float32) * 1e-4
    wide = (np.hstack([train_x, noise[:80]]), train_y, np.hstack([test_x, noise[80:]]), test_y)
    assert score(*wide, Evaluate())["clustering/accuracy"] == 1


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_constant_features_score_zero():
    _, train_y, _, test_y = blobs(0.1)
    found = score(np.ones((80, 3), np.float32), train_y, np.ones((40, 3), np.float32), test_y, Evaluate(restarts=1))
    assert found["clustering/nmi"] == 0
    assert found["clustering/accuracy"] == pytest.approx(0.25)


def test_refusals():
    train_x, train_y, test_x, test_y = blobs(0.1)
    with pytest.raises(ValueError, match="train has 80 images without a label"):
        score(train_x, np.full(80, -1), test_x, test_y, Evaluate())
    with pytest.raises(ValueError, match="train has one class only, 2"):
        score(train_x, np.full(80, 2), test_x, test_y, Evaluate())
    test_x[5, 1] = np.nan
    with pytest.raises(ValueError, match="test features hold nan: image 5, feature 1"):
        score(train_x, train_y, test_x, test_y, Evaluate())
    train_x[3, 2] = np.inf
    with pytest.raises(ValueError, match="train features hold inf: image 3, feature 2"):
        score(train_x, train_y, test_x, test_y, Evaluate())
