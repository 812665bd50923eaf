"""Image quality in a process that may not reach the network, and of real images at Inception's own 299 px."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.datasets import CIFAR10

from dcgan.evaluate import image_quality

pytestmark = pytest.mark.slow


def inception(images: np.ndarray) -> FeatureExtractorInceptionV3:
    """With random weights, and BatchNorm's statistics those of uint8 images (N, 3, H, W)."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        net = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty
        )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # PyTorch's cumulative average
    with torch.no_grad():
        net.train()(torch.from_numpy(images))
    return net.eval()


OFFLINE = """
import json, sys
from pathlib import Path

def offline(event, details):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise AssertionError(f"{event} {details}")

sys.addaudithook(offline)

import numpy as np
from dcgan.evaluate import image_quality

image_quality.FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE = 75  # a sixteenth of the work
weights = Path(sys.argv[1])
images = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), np.uint8)
image_quality.CIFAR10_TRAIN, image_quality.FEWEST, image_quality.KID_SUBSET = images[:10].shape, 10, 10
try:
    image_quality.calibrate(images[:10], weights, "cpu")
except image_quality.NotInceptionError:
    image_quality.CIFAR10_SCORE = (1, 1000)
calibration = image_quality.calibrate(images[:10], weights, "cpu")
print(json.dumps(image_quality.score(images[:10], images[10:], weights, calibration, "cpu")))
"""


def test_nothing_is_fetched_written_or_said(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (16, 3, 32, 32), np.uint8)
    torch.save(inception(images).state_dict(), tmp_path / "weights.pth")
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-B", "-c", OFFLINE, str(tmp_path / "weights.pth")],
        cwd=home,
        env={"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(json.loads(done.stdout)) == 7
    assert not list(home.iterdir())


def test_real_images_are_nearer_to_real_images_than_noise_is(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_quality, "KID_SUBSET", 12)
    real = CIFAR10(str(real_data), train=False).data.transpose(0, 3, 1, 2)
    noise = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), np.uint8)
    net = inception(real[24:32])
    reference = image_quality.features(real[:12], net, "cpu")
    close, far = (
        image_quality.compare(image_quality.features(images, net, "cpu"), reference) for images in (real[12:24], noise)
    )
    assert close["image_quality/fid"] < far["image_quality/fid"]
    assert close["image_quality/kid"] < far["image_quality/kid"]
    assert close["image_quality/precision"] > far["image_quality/precision"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; a CPU takes hours")
def test_the_originals_weights_give_the_published_score(real_data: Path) -> None:
    weights = real_data / image_quality.WEIGHTS
    if not weights.is_file():
        pytest.skip(f"no {weights.name} beside the real images")
    images = CIFAR10(str(real_data), train=True).data.transpose(0, 3, 1, 2)
    calibration = image_quality.calibrate(images, weights, "cuda")
    assert calibration["weights_sha256"] == image_quality.SHA256
    assert calibration["inception_score"] == pytest.approx(11.23678, abs=1e-3)  # torch-fidelity's README
