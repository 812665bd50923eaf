"""Standardisation and selection of rows, against independent computations."""

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from dcgan.evaluate import samples as samples_module
from dcgan.evaluate.samples import Samples


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    """As features of full size have: those of the tests would be a single one."""
    monkeypatch.setitem(samples_module.BLOCK_BYTES, "cpu", 1)  # 16 rows


def all_rows(samples, size=7):
    return np.concatenate([block.numpy().copy() for _, block in samples.blocks(size)])


def test_standardised_equals_scikit_learn_and_leaves_its_input_alone():
    x = (np.random.default_rng(0).normal(5, [1, 10, 1e-3], (600, 3))).astype(np.float32)
    before = x.copy()
    np.testing.assert_allclose(all_rows(Samples.standardised(x)), StandardScaler().fit_transform(x), atol=2e-4)
    assert (x == before).all()


@pytest.mark.parametrize("constant", [0.1, -1e4, 0.0, 3e30])
def test_a_constant_feature_gets_scale_one(constant):
    x = np.full((1001, 2), constant, np.float32)
    x[:, 1] = np.arange(1001)
    samples = Samples.standardised(x)
    assert samples.inverse_scale[0] == 1
    assert (all_rows(samples)[:, 0] == 0).all()
    assert all_rows(samples.like(x[:1] + np.float32([1, 0])))[0, 0] == pytest.approx(x[0, 0] + np.float32(1) - x[0, 0])


def test_take_composes_and_keeps_the_scale_of_all():
    x = np.arange(20, dtype=np.float32).reshape(10, 2)
    samples = Samples.standardised(x)
    taken = samples.take(np.array([8, 2, 5])).take(np.array([2, 0]))
    np.testing.assert_array_equal(all_rows(taken), all_rows(samples)[[5, 8]])
