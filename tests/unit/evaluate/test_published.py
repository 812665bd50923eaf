"""The registry of evaluators, and the published figures that stand beside their scores."""

import numpy as np
import pytest

from dcgan.config import PROTOCOLS, Evaluate
from dcgan.evaluate import EVALUATORS
from dcgan.evaluate.published import OTHERS, PUBLISHED, RANDOM_INIT, RAW_PIXELS
from dcgan.reproduce import svhn

TABLES = (PUBLISHED, RAW_PIXELS, RANDOM_INIT, {d: {m: p[0] for m, p in t.items()} for d, t in OTHERS.items()})


def test_every_protocol_has_an_evaluator():
    assert tuple(EVALUATORS) == PROTOCOLS


@pytest.fixture(scope="module")
def names():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((90, 4)).astype(np.float32), np.arange(90) % 3
    settings = Evaluate(labels_per_class=5, draws=2, restarts=1)
    found = {name: one.score(x[:60], y[:60], x[60:], y[60:], settings, None) for name, one in EVALUATORS.items()}
    for protocol, scores in found.items():
        assert all(name.startswith(f"{protocol}/") and type(value) is float for name, value in scores.items())
    return {name for scores in found.values() for name in scores}


def test_names_are_those_that_reports_look_for(names):
    assert names == {
        "svm/accuracy", "svm/validation_accuracy", "svm/c",
        "svm_few_labels/accuracy", "svm_few_labels/accuracy_std", "svm_few_labels/validation_accuracy",
        "svm_few_labels/c",
        "clustering/nmi", "clustering/nmi_geometric", "clustering/ari", "clustering/accuracy",
        "knn/accuracy", "knn/validation_accuracy", "knn/neighbours",
    }  # fmt: skip


class Recorded(Evaluate):
    """Settings that remember which of them were read."""

    def __getattribute__(self, name: str):
        if name in Evaluate.model_fields:
            READ.add(name)
        return super().__getattribute__(name)


READ: set[str] = set()


@pytest.mark.parametrize("evaluator", [*EVALUATORS.values(), svhn.KNN, svhn.TSVM], ids=lambda each: each.name)
def test_an_evaluator_names_the_settings_that_it_reads(evaluator):
    """By them it is decided whether scores are computed anew."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((90, 4)).astype(np.float32), np.arange(90) % 3
    settings = Recorded(labels_per_class=5, draws=2, restarts=1)
    READ.clear()
    evaluator.score(x[:60], y[:60], x[60:], y[60:], settings, None)
    assert set(evaluator.settings) == READ


def test_published_figures_have_our_names_and_are_shares(names):
    for table in TABLES:
        for metrics in table.values():
            assert set(metrics) <= names
            assert all(0 < one.value < 1 and one.source and one.method for one in metrics.values())
    assert "digits" not in PUBLISHED
    assert "folder" not in PUBLISHED


def test_figures_of_the_bar():
    pixels = {name: [RAW_PIXELS[name][f"clustering/{m}"].value for m in ("nmi", "accuracy")] for name in RAW_PIXELS}
    assert pixels["cifar10"] == [0.0871, 0.2289]
    assert pixels["mnist"] == [0.4997, 0.5723]
    assert PUBLISHED["cifar10"]["svm/accuracy"].value == 0.828
