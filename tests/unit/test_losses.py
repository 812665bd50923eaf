"""The losses of 200 steps under a fixed seed: what every faster way to compute a step has to reproduce.

losses.json holds those of the plain step (float32, contiguous, one process). A change of the step that is not meant to
change results leaves it as it is; one that is writes it anew: python tests/unit/test_losses.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from convolutions import on_processor, recorded, recorded_operations

from dcgan import models
from dcgan.config import Model, Train
from dcgan.convolution import im2col, modules, patches, subpixel, winograd
from dcgan.data.batches import Batches
from dcgan.distributed import Place
from dcgan.player import Player
from dcgan.step import Game

FILE = Path(__file__).parent / "losses.json"
STEPS = 200
PLAIN = {"precision": "float32", "memory_format": "contiguous"}
# A slow game: at the paper's 2e-4 rounding alone changes the means of the last steps by 14 %, at this rate by 0.1 %.
RATE = 5e-5
WINDOW = 20  # steps of which the mean is compared: rounding grows from step to step, as in any game
TOLERANCE = 0.01


def play(store, device="cpu", graph=False, **settings):
    """float64 (STEPS, 2): d_loss and g_loss of each step on the digits."""
    model = Model(kernel=4, width=8, z_dim=16)
    place = Place(0, 1, torch.device(device))
    chosen = Train(**{"steps": STEPS, "batch_size": 32, "learning_rate": RATE, **PLAIN, **settings})
    player = Player(Game(*models.build(model, 1, 0, 32, seed=0), chosen, place), graph)
    stream = Batches(store, ("train",), 32, 0, place, model).from_step(0)
    found = []
    for step, batch in zip(range(STEPS), stream, strict=False):
        player.play(step, batch)
        found.append([float(player.sums[name]) for name in ("d_loss", "g_loss")])
        player.restart()
    stream.close()
    return np.array(found)


def windows(losses):
    return losses.reshape(-1, WINDOW, 2).mean(1)


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({}, 1e-4),
        ({"memory_format": "channels_last"}, 1e-3),
        ({"precision": "bfloat16"}, 0.02),
        ({"precision": "bfloat16", "memory_format": "channels_last"}, 0.02),
    ],
    ids=str,
)
def test_losses_are_those_of_the_plain_step(digits_store, settings, first):
    """The first ten steps one by one, then means of 20."""
    expected, got = np.array(json.loads(FILE.read_text())), play(digits_store, **settings)
    np.testing.assert_allclose(got[:10], expected[:10], rtol=first)
    np.testing.assert_allclose(windows(got), windows(expected), rtol=TOLERANCE)


def test_losses_by_winograds_filtering_are_those_of_the_plain_step(digits_store, monkeypatch):
    """In every layer of stride 2, however narrow."""
    on_processor(monkeypatch, "AVX2")
    monkeypatch.setattr(modules, "LIMIT", float("inf"))
    calls = recorded(monkeypatch, winograd)
    expected, got = np.array(json.loads(FILE.read_text())), play(digits_store, memory_format="channels_last")
    np.testing.assert_allclose(got[:10], expected[:10], rtol=1e-3)
    np.testing.assert_allclose(windows(got), windows(expected), rtol=TOLERANCE)
    assert len(calls) == STEPS * (3 * 3 + 3)


def test_losses_by_products_over_patches_next_to_the_image_are_those_of_the_plain_step(digits_store, monkeypatch):
    on_processor(monkeypatch, "AVX2")
    monkeypatch.setattr(modules, "LIMIT", 0.0)  # or Winograd's filtering might be chosen there, too
    calls = recorded(monkeypatch, im2col)
    expected, got = np.array(json.loads(FILE.read_text())), play(digits_store, memory_format="channels_last")
    np.testing.assert_allclose(got[:10], expected[:10], rtol=1e-3)
    np.testing.assert_allclose(windows(got), windows(expected), rtol=TOLERANCE)
    assert (calls.count("Convolution"), calls.count("Transposed")) == (3 * STEPS, STEPS)


@pytest.mark.parametrize(
    ("processor", "precision", "first"),
    [("AVX-512 BF16", "float32", 1e-3), ("AVX-512 BF16", "bfloat16", 0.02), ("AMX", "bfloat16", 0.02)],
)
def test_losses_where_bfloat16_is_fast_are_those_of_the_plain_step(
    digits_store, monkeypatch, processor, precision, first
):
    """Images by sub-pixel convolution; of the other layers, weight gradients by patches, or with AMX everything."""
    on_processor(monkeypatch, processor)
    monkeypatch.setattr(modules, "WIDE", 1)
    calls, products = recorded_operations(monkeypatch, subpixel), recorded_operations(monkeypatch, patches)
    expected = np.array(json.loads(FILE.read_text()))
    got = play(digits_store, precision=precision, memory_format="channels_last")
    np.testing.assert_allclose(got[:10], expected[:10], rtol=first)
    np.testing.assert_allclose(windows(got), windows(expected), rtol=TOLERANCE)
    assert len(calls) == STEPS * (1 + 1)  # of the generator's images, and of their gradient
    assert products.count("weight_gradient") == (STEPS * (2 * 2 + 2) if precision == "bfloat16" else 0)
    maps = STEPS * (3 * 2 + 2) if processor == "AMX" else 0  # three times through D, once through G
    assert (products.count("smaller"), products.count("larger")) == (maps, maps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("settings", [PLAIN, {"precision": "auto", "memory_format": "auto"}], ids=str)
def test_losses_of_the_recorded_step_are_those_of_the_plain_one(digits_store, settings):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected, got = np.array(json.loads(FILE.read_text())), play(digits_store, "cuda", graph=True, **settings)
    np.testing.assert_allclose(windows(got), windows(expected), rtol=TOLERANCE)


if __name__ == "__main__":
    import tempfile

    from dcgan.config import build
    from dcgan.data.ingest import ingest
    from dcgan.data.store import Store

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        store = Store.open(Path(home), ingest(build("digits").data, Path(home)))
        FILE.write_text(json.dumps([[round(x, 6) for x in row] for row in play(store).tolist()]) + "\n")
