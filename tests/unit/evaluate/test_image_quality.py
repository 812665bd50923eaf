"""Image quality against independent computations, with InceptionV3 of random weights on images of 75 px."""

import hashlib
import io
import itertools
import json
import pickle
import re
from unittest import mock

import numpy as np
import pytest
import torch
from fabricated import Bomb
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.special import softmax
from sklearn.metrics.pairwise import polynomial_kernel
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dcgan.evaluate import image_quality
from dcgan.evaluate.image_quality import Features, NotInceptionError, calibrate, compare, features, load, score


def untrained():
    """torch-fidelity's network, whose constructor loads weights, without loading any."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty
        )


@pytest.fixture(scope="module")
def network():
    """Of random weights, yet it tells images apart: BatchNorm has seen some, or 90 layers would leave nothing."""
    torch.manual_seed(0)
    net = untrained()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # PyTorch's cumulative average
    with mock.patch.object(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75):
        net.train()(torch.from_numpy(pictures(32, seed=9)))
    nn.init.normal_(net.fc.weight, std=0.1)
    return net.eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A sixteenth of the work an image; and sets of a dozen images."""
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    monkeypatch.setattr(image_quality, "FEWEST", 12)
    monkeypatch.setattr(image_quality, "KID_SUBSET", 12)
    monkeypatch.setattr(image_quality, "KID_SUBSETS", 3)


def pictures(count=12, seed=0, channels=3, most=256):
    return np.random.default_rng(seed).integers(0, most, (count, channels, 8, 8), np.uint8)


def drawn(count=40, width=6, seed=0, shift=0.0, spread=1.0, classes=5):
    """Features as a network might give them; compare() asks for no particular width."""
    rng = np.random.default_rng(seed)
    pooled = shift + spread * rng.standard_normal((count, width))
    return Features(torch.tensor(pooled, dtype=torch.float32), torch.tensor(rng.normal(0, 3, (count, classes))).float())


def frechet(ours, theirs):
    """Heusel et al. 2017, equation 6, with the matrix square root itself."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    a, b = np.cov(ours.T), np.cov(theirs.T)
    gap = ours.mean(0) - theirs.mean(0)
    return gap @ gap + np.trace(a + b - 2 * sqrtm(a @ b).real)


def low_rank_frechet(ours, theirs):
    """The same from singular values: tr sqrt(A'A B'B) is the nuclear norm of A B', for any number of features."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (ours, theirs))
    gap = ours.mean(0) - theirs.mean(0)
    return gap @ gap + (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()


def unbiased_mmd(ours, theirs):
    """Binkowski et al. 2018, equation 4, with their kernel (x y / d + 1)^3."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    within = [
        (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
        for k in (polynomial_kernel(x, degree=3, coef0=1) for x in (ours, theirs))
    ]
    return sum(within) - 2 * polynomial_kernel(ours, theirs, degree=3, coef0=1).mean()


def inception_score(logits):
    """exp of the mean KL(p(y|x), p(y)) in each of ten splits of the shuffled images; Salimans et al. 2016."""
    count = len(logits)
    answers = softmax(np.asarray(logits, float)[np.random.RandomState(2020).permutation(count)], axis=1)
    scores = []
    for first, last in itertools.pairwise(i * count // 10 for i in range(11)):
        split = answers[first:last]
        scores.append(np.exp((split * np.log(split / split.mean(0))).sum(1).mean()))
    return np.mean(scores), np.std(scores)


def share_within(points, others, k=3):
    """Of `points`, the share that is no farther from some of `others` than that one's k-th neighbour."""
    radii = np.sort(cdist(others, others), axis=1)[:, k]
    return (cdist(points, others) <= radii).any(axis=1).mean()


# The scores, given features.


@given(st.integers(0, 10**6), st.floats(0, 3), st.floats(0.3, 3), st.integers(30, 60))
@settings(max_examples=25)
def test_fid_equals_its_definition(seed, shift, spread, count):
    ours, theirs = drawn(count, seed=seed, shift=shift, spread=spread), drawn(seed=seed + 1)
    found = compare(ours, theirs)["image_quality/fid"]
    assert found == pytest.approx(frechet(ours.pooled, theirs.pooled), rel=1e-5, abs=1e-5)
    assert found == pytest.approx(low_rank_frechet(ours.pooled, theirs.pooled), rel=1e-5, abs=1e-5)
    assert found == pytest.approx(compare(theirs, ours)["image_quality/fid"], rel=1e-5, abs=1e-5)


def test_fid_by_hand():
    theirs = drawn()
    moved = Features(theirs.pooled + torch.tensor([3.0, 4, 0, 0, 0, 0]), theirs.logits)
    assert compare(moved, theirs)["image_quality/fid"] == pytest.approx(25, rel=1e-4)
    # Doubled deviations: tr(4C + C - 2 * 2C) = tr C, and the mean moves by itself.
    doubled = Features(2 * theirs.pooled, theirs.logits)
    mean, variances = theirs.pooled.mean(0), theirs.pooled.var(0)
    assert compare(doubled, theirs)["image_quality/fid"] == pytest.approx(
        float(mean @ mean + variances.sum()), rel=1e-4
    )


@given(st.integers(0, 10**6), st.floats(0, 2))
@settings(max_examples=25)
def test_kid_equals_its_definition(seed, shift):
    """Subsets of all images, so that each is the whole."""
    ours, theirs = drawn(12, seed=seed, shift=shift), drawn(12, seed=seed + 1)
    found = compare(ours, theirs)
    assert found["image_quality/kid"] == pytest.approx(unbiased_mmd(ours.pooled, theirs.pooled), rel=1e-3, abs=1e-4)
    assert found["image_quality/kid_std"] == pytest.approx(0, abs=1e-4)


def test_kid_is_a_mean_over_subsets(monkeypatch):
    ours, theirs = drawn(40, shift=0.5), drawn(60, seed=1)
    monkeypatch.setattr(image_quality, "KID_SUBSETS", 300)
    found = compare(ours, theirs)
    assert found["image_quality/kid"] == pytest.approx(unbiased_mmd(ours.pooled, theirs.pooled), rel=0.1)
    monkeypatch.setattr(image_quality, "KID_SUBSET", 36)
    assert 0 < compare(ours, theirs)["image_quality/kid_std"] < found["image_quality/kid_std"] / 2


@given(st.integers(0, 10**6), st.integers(23, 50))
@settings(max_examples=25)
def test_inception_score_equals_its_definition(seed, count):
    ours = drawn(count, seed=seed)
    mean, deviation = inception_score(ours.logits)
    found = compare(ours, ours)
    assert found["image_quality/inception_score"] == pytest.approx(mean)
    assert found["image_quality/inception_score_std"] == pytest.approx(deviation)


def test_inception_score_by_hand(monkeypatch):
    """Sure of each of five classes equally often: 5. Always the same answer, or none at all: 1."""
    monkeypatch.setattr(image_quality, "SPLITS", 1)
    pooled = drawn().pooled
    for logits, expected in (
        (100 * torch.eye(5).repeat(8, 1), 5),
        (100 * torch.eye(5)[:1].repeat(40, 1), 1),
        (torch.zeros(40, 5), 1),
    ):
        found = compare(Features(pooled, logits), drawn())
        assert found["image_quality/inception_score"] == pytest.approx(expected)
        assert found["image_quality/inception_score_std"] == pytest.approx(0)


def test_images_in_order_of_their_class_are_shuffled_before_the_split():
    ordered = 100 * torch.eye(5).repeat_interleave(40, 0)
    found = compare(Features(drawn(200).pooled, ordered), drawn())
    assert found["image_quality/inception_score"] > 4


def test_precision_and_recall_are_not_each_other():
    """One of two modes generated: each image is plausible, half of reality is missing."""
    one, other = drawn(20, seed=1), drawn(20, seed=2, shift=50)
    both = Features(torch.cat([one.pooled, other.pooled]), torch.cat([one.logits, other.logits]))
    found = compare(drawn(20, seed=3, spread=0.3), both)
    assert found["image_quality/precision"] > 0.9
    assert found["image_quality/recall"] <= 0.5
    swapped = compare(both, drawn(20, seed=3, spread=0.3))
    assert swapped["image_quality/precision"] == found["image_quality/recall"]
    assert swapped["image_quality/recall"] == found["image_quality/precision"]


@given(st.integers(0, 10**6), st.floats(0, 2), st.integers(3, 50))
@settings(max_examples=25)
def test_precision_and_recall_equal_brute_force(seed, shift, compared):
    ours, theirs = drawn(30, seed=seed, shift=shift), drawn(50, seed=seed + 1)
    with mock.patch.object(image_quality, "COMPARED", compared):
        found = compare(ours, theirs)
    assert found["image_quality/precision"] == pytest.approx(share_within(ours.pooled, theirs.pooled))
    assert found["image_quality/recall"] == pytest.approx(share_within(theirs.pooled, ours.pooled))


def test_equal_sets_are_at_no_distance():
    found = compare(drawn(), drawn())
    assert found["image_quality/fid"] == pytest.approx(0, abs=1e-6)
    assert found["image_quality/kid"] < 0.05  # of the two unbiased estimates' own noise
    assert found["image_quality/precision"] == found["image_quality/recall"] == 1


def test_worse_images_score_worse():
    theirs = drawn(200)
    scores = [compare(drawn(200, seed=1, shift=shift), theirs) for shift in (0, 1, 3)]
    for name in ("fid", "kid"):
        assert sorted(s[f"image_quality/{name}"] for s in scores) == [s[f"image_quality/{name}"] for s in scores]
    for name in ("precision", "recall"):
        values = [s[f"image_quality/{name}"] for s in scores]
        assert sorted(values, reverse=True) == values
        assert values[0] > 0.8
        assert values[2] < 0.2


def test_constant_features_give_finite_scores():
    constant = Features(torch.ones(20, 6), torch.zeros(20, 5))
    assert all(np.isfinite(value) for value in compare(constant, drawn()).values())
    assert compare(constant, constant)["image_quality/fid"] == pytest.approx(0, abs=1e-6)


def test_the_same_features_give_the_same_scores_whatever_the_seed_of_a_run():
    ours, theirs = drawn(), drawn(seed=1)
    runs = []
    for seed in (0, 1):
        np.random.seed(seed)
        torch.manual_seed(seed)
        runs.append(compare(ours, theirs))
    assert runs[0] == runs[1]


# The network.


def test_features_are_the_networks_own_in_any_batches(network, monkeypatch):
    monkeypatch.setattr(image_quality, "BATCH", 5)
    images = pictures()
    images.flags.writeable = False  # as a memory map of the store is
    found = features(images, network, "cpu")
    pooled, logits = network(torch.from_numpy(images.copy()))
    np.testing.assert_allclose(found.pooled, pooled, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-3, atol=1e-3)
    assert found.pooled.shape == (12, 2048)
    assert found.logits.shape == (12, 1008)
    assert found.pooled.std(0).mean() > 0.1, "random weights must tell images apart, or nothing here is tested"


def test_grey_images_are_repeated_to_three_channels(network):
    grey = pictures(4, channels=1)
    np.testing.assert_array_equal(
        features(grey, network, "cpu").pooled, features(np.repeat(grey, 3, 1), network, "cpu").pooled
    )


def test_weights_are_loaded_as_they_are_and_no_random_number_is_used_up(network, weights):
    torch.manual_seed(7)
    loaded, digest = load(weights, "cpu")
    after = torch.rand(1)
    torch.manual_seed(7)
    assert after == torch.rand(1)
    assert digest == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert not loaded.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_absent_weights_are_named_with_what_belongs_there(tmp_path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(path))}\. Put .*{image_quality.WEIGHTS} there"):
            load(path, "cpu")
    assert image_quality.SHA256.startswith(image_quality.WEIGHTS.removesuffix(".pth").rpartition("-")[2])


REBUILD = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
LEGACY = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})  # how such a file begins
SENSELESS = {
    UnicodeDecodeError: b"\x80\x02X\x01\0\0\0\xff.",
    AssertionError: b"".join(pickle.dumps(head, 2) for head in LEGACY) + b"\x80\x02K\x01Q.",
    TypeError: REBUILD + b")R.",
    AttributeError: REBUILD + b"(ccollections\nOrderedDict\n)RK\0(K\x01t(K\x01t\x89}tR.",
}


@pytest.mark.parametrize("raised", SENSELESS)
def test_pickles_without_sense_are_refused(tmp_path, raised):
    path = tmp_path / "weights.pth"
    path.write_bytes(SENSELESS[raised])
    with pytest.raises(raised):
        torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match="is damaged"):
        load(path, "cpu")


@given(st.data())
@settings(max_examples=60)
def test_damaged_weights_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "weights.pth"
    torch.save({"fc.weight": torch.arange(6.0)}, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    whole = path.read_bytes()
    damaged = [
        st.integers(0, len(whole) - 1).map(lambda end: whole[:end]),
        st.integers(1, len(whole) - 1).map(lambda first: whole[first:]),
        st.binary(max_size=100),
    ]
    path.write_bytes(data.draw(st.one_of(damaged)))
    # A few cuts leave the tensors whole: then it is another network's.
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} (is damaged|holds no state dict|fits another)"):
        load(path, "cpu")


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_that_run_code_are_refused_unrun(tmp_path, zipped):
    path, marker = tmp_path / "weights.pth", tmp_path / "marker"
    torch.save({"fc.weight": torch.ones(1), "bomb": Bomb(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="is damaged or holds more than tensors"):
        load(path, "cpu")
    assert not marker.exists()


@pytest.mark.parametrize("state", [[torch.ones(1)], {"fc.weight": "ones"}, {"fc.weight": 1.0}, torch.ones(3)])
def test_files_without_a_state_dict_are_refused(tmp_path, state):
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        load(tmp_path / "weights.pth", "cpu")


def test_another_networks_weights_are_refused_by_name(network, tmp_path):
    shapes = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in network.state_dict().items()}
    path = tmp_path / "weights.pth"
    for state, said in (
        ({**shapes, "fc.weight": torch.zeros(1000, 2048)}, "size mismatch for fc.weight.*1000, 2048"),
        ({name: shape for name, shape in shapes.items() if name != "fc.bias"}, 'Missing key.*"fc.bias"'),
        ({**shapes, "AuxLogits.fc.weight": torch.zeros(1)}, "Unexpected key.*AuxLogits.fc.weight"),
    ):
        torch.save(state, path)
        with pytest.raises(ValueError, match=rf"fits another network.*{said}"):
            load(path, "cpu")


# Calibration.


@pytest.fixture
def twenty(monkeypatch):
    """As many images stand for CIFAR-10's."""
    monkeypatch.setattr(image_quality, "CIFAR10_TRAIN", (20, 3, 8, 8))
    return pictures(20)


def test_other_weights_are_refused_a_calibration(twenty, weights):
    with pytest.raises(
        NotInceptionError, match=r"a score of 1\.\d+ where the original's weights give 11.237 \+- 0.095"
    ):
        calibrate(twenty, weights, "cpu")


def test_a_score_within_the_tolerance_is_recorded(twenty, weights, network, monkeypatch):
    published, deviation = inception_score(features(twenty, network, "cpu").logits)
    monkeypatch.setattr(image_quality, "CIFAR10_SCORE", (published + 0.09, 0.095))
    calibration = calibrate(twenty, weights, "cpu")
    assert json.loads(json.dumps(calibration)) == {
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "inception_score": pytest.approx(published),
        "inception_score_std": pytest.approx(deviation),
    }
    for off in (0.1, -0.1):
        monkeypatch.setattr(image_quality, "CIFAR10_SCORE", (published + off, 0.095))
        with pytest.raises(NotInceptionError):
            calibrate(twenty, weights, "cpu")


def test_weights_that_are_no_numbers_are_refused_a_calibration(twenty, network, tmp_path):
    state = network.state_dict()
    torch.save({**state, "fc.weight": torch.full_like(state["fc.weight"], torch.nan)}, tmp_path / "weights.pth")
    with pytest.raises(NotInceptionError, match="a score of nan"):
        calibrate(twenty, tmp_path / "weights.pth", "cpu")


def test_calibration_is_on_cifar10_alone(tmp_path):
    """Refused before weights are looked for."""
    with pytest.raises(ValueError, match=r"\(50000, 3, 32, 32\), not \(12, 3, 8, 8\)"):
        calibrate(pictures(), tmp_path, "cpu")
    with pytest.raises(ValueError, match=r"the training images is float64 \(12, 3, 8, 8\), not uint8"):
        calibrate(pictures() / 255, tmp_path, "cpu")


# All of it.


def calibrated(digest="0" * 64):
    return image_quality.Calibration(weights_sha256=digest, inception_score=11.2, inception_score_std=0.1)


def test_scores_of_images_are_those_of_their_features(network, weights):
    ours, theirs = pictures(), pictures(14, seed=1, most=128)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    found = score(ours, theirs, weights, calibrated(digest), "cpu")
    a, b = (features(images, network, "cpu").pooled.double().numpy() for images in (ours, theirs))
    assert found["image_quality/fid"] == pytest.approx(low_rank_frechet(a, b), rel=1e-3)
    assert found["image_quality/precision"] == pytest.approx(share_within(a, b))
    assert found["image_quality/recall"] == pytest.approx(share_within(b, a))
    assert 1 <= found["image_quality/inception_score"] <= 1008
    names = "inception_score inception_score_std fid kid kid_std precision recall"
    assert set(found) == {f"image_quality/{name}" for name in names.split()}


def test_a_calibration_of_other_weights_is_refused(weights):
    with pytest.raises(ValueError, match=r"has sha256 \w{64}, but the calibration is of 0{64}: calibrate anew"):
        score(pictures(), pictures(), weights, calibrated(), "cpu")


# What follows is refused before weights are looked for: there are none.


@pytest.mark.parametrize(
    "bad", [pictures() / np.float32(255), pictures() * np.nan, pictures()[0], pictures(channels=2), pictures()[:0, :0]]
)
@pytest.mark.parametrize("where", ["generated", "reference"])
def test_what_is_no_image_is_refused(tmp_path, bad, where):
    images = {"generated": pictures(), "reference": pictures(), where: bad}
    with pytest.raises(ValueError, match=rf"{where} is {bad.dtype} {re.escape(str(bad.shape))}, not uint8 \(N, 1 or 3"):
        score(**images, weights=tmp_path, calibration=calibrated(), device="cpu")


@pytest.mark.parametrize("where", ["generated", "reference"])
def test_too_few_images_are_refused(tmp_path, monkeypatch, where):
    monkeypatch.undo()  # the true minimum: one image more than Inception has features
    images = {name: np.zeros((2049, 1, 2, 2), np.uint8) for name in ("generated", "reference")}
    with pytest.raises(FileNotFoundError):
        score(**images, weights=tmp_path, calibration=calibrated(), device="cpu")
    images[where] = images[where][:2048]
    with pytest.raises(ValueError, match=rf"FID needs at least 2049 images, .*: {where} has 2048"):
        score(**images, weights=tmp_path, calibration=calibrated(), device="cpu")


def test_images_of_two_sizes_are_refused(tmp_path):
    for other in (pictures(channels=1), pictures()[:, :, :7]):
        with pytest.raises(ValueError, match=r"generated images are \(3, 8, 8\) and reference images"):
            score(pictures(), other, tmp_path, calibrated(), "cpu")
