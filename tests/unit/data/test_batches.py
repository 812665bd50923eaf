"""What a step sees: a pure function of (seed, step, rank, world), tested without any process."""

import mmap
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcgan.config import Model
from dcgan.data import batches
from dcgan.data.batches import Batches, Images, normalise
from dcgan.distributed import Place

MODEL = Model(z_dim=3)


def place(rank=0, world=1):
    return Place(rank, world, torch.device("cpu"))


@pytest.fixture(scope="module")
def small(tmp_path_factory, make_store):
    return make_store(tmp_path_factory.mktemp("batches"), size=28, channels=1, train=50, test=8)


@settings(max_examples=50, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 4]),
    each=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    step=st.integers(0, 200),
    z=st.sampled_from(["uniform", "normal"]),
)
def test_ranks_together_see_the_single_process_batch(small, world, each, seed, step, z):
    batch, model = world * each, MODEL.model_copy(update={"z": z})
    alone = Batches(small, ("train",), batch, seed, place(), MODEL).rows(step)
    shared = [Batches(small, ("train",), batch, seed, place(rank, world), MODEL).rows(step) for rank in range(world)]
    assert np.array_equal(np.concatenate(shared), alone)
    drawn = [Batches(small, ("train",), batch, seed, place(rank, world), model).z(step) for rank in range(world)]
    assert np.array_equal(np.concatenate(drawn), batches.noise(z, (batch, 3), seed, step))


def test_several_splits_are_one_after_the_other(small):
    both = batches.Images(small, ("train", "test"))
    rows = np.array([57, 0, 49, 50])
    whole = np.concatenate([small.images("train"), small.images("test")])
    assert both.count == len(whole) == 58
    assert np.array_equal(both.gather(rows), whole[rows])
    assert np.array_equal(both.resident(torch.device("cpu")).numpy(), whole)
    assert np.array_equal(both.labels, np.concatenate([small.labels("train"), small.labels("test")]))


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 50), seed=st.integers(0, 99))
def test_an_epoch_shows_no_image_twice_and_leaves_out_less_than_a_batch(small, batch, seed):
    data = Batches(small, ("train",), batch, seed, place(), MODEL)
    per_epoch = 50 // batch
    seen = np.concatenate([data.rows(step) for step in range(per_epoch)])
    assert len(np.unique(seen)) == len(seen) == per_epoch * batch > 50 - batch
    if batch > 5:
        assert not np.array_equal(data.rows(per_epoch), data.rows(0))  # the next epoch has another order


def test_any_step_is_the_same_whether_reached_or_jumped_to(small):
    stream = Batches(small, ("train",), 8, 1, place(), MODEL).from_step(0)
    walked = [next(stream) for _ in range(9)][8]
    jumped = next(Batches(small, ("train",), 8, 1, place(), MODEL).from_step(8))
    assert all(torch.equal(*pair) for pair in zip(walked, jumped, strict=True))


def test_images_on_the_device_make_the_same_batches(small, monkeypatch):
    """On a GPU; here the device is the CPU, whose memory can't be pinned without one."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    expected = Batches(small, ("train",), 8, 1, place(), MODEL)._streamed(3)
    found = Batches(small, ("train",), 8, 1, place(), MODEL)._resident(3)
    for _ in range(2 * batches.BLOCK):
        assert all(torch.equal(*pair) for pair in zip(next(found), next(expected), strict=True))
    found.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("noise")]


def test_images_and_labels_stay_together_across_shards(tmp_path, make_store, monkeypatch):
    monkeypatch.setattr("dcgan.data.shards.BYTES", 8 * 28 * 28)
    store = make_store(tmp_path, size=28, channels=1, classes=5, train=30)
    assert len(store.shards("train")) == 4
    data = Batches(store, ("train",), 30, 0, place(), MODEL)
    rows = data.rows(0)
    images, labels, z = next(data.from_step(0))
    assert np.array_equal(images.numpy(), store.images("train")[rows])
    assert np.array_equal(labels.numpy(), store.labels("train")[rows])
    assert np.array_equal(z.numpy(), batches.noise("uniform", (30, 3), 0, 0))
    assert np.array_equal(Images(store, ("train",)).resident(torch.device("cpu")).numpy(), store.images("train"))


def test_the_kernel_is_asked_for_the_images_of_a_batch_and_reads_nothing_beside_them(tmp_path, make_store, monkeypatch):
    monkeypatch.setattr("dcgan.data.shards.BYTES", 8 * 64 * 64 * 3)
    store = make_store(tmp_path, size=64, channels=3, train=30)
    images = Images(store, ("train",))
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")  # proc(5); rr: random read advised
    flags = [after.splitlines()[0].split() for before, after in pairwise(mappings) if f"{store.path}/train-0" in before]
    assert len(flags) == len(images.shards) > 1
    assert all("rr" in each for each in flags)
    asked = []

    class Asked:
        def __init__(self, file):
            self.file = file

        def madvise(self, advice, start, length):
            assert (advice, start % mmap.PAGESIZE) == (mmap.MADV_WILLNEED, 0)
            asked.append(self.file.read_bytes()[start : start + length])

    monkeypatch.setattr(images, "_maps", [Asked(Path(shard.filename)) for shard in images.shards])
    for content, image in zip(asked, images.gather(np.arange(30)), strict=False):
        assert image.tobytes() in content
        assert len(content) < image.nbytes + 2 * mmap.PAGESIZE
    assert len(asked) == 30


def test_streams_of_neighbouring_numbers_differ_however_large_these_are():
    for index in (0, 2**53, 2**63, 2**64 - 2):
        first, second = (batches.stream(0, batches.NOISE, number).random(4) for number in (index, index + 1))
        assert (first != second).all()


def test_noise_is_as_published_and_differs_between_steps_and_seeds():
    uniform, normal = (batches.noise(kind, (1000, 100), 0, 0) for kind in ("uniform", "normal"))
    assert uniform.dtype == normal.dtype == np.float32
    assert (uniform.min(), uniform.max()) == pytest.approx((-1, 1), abs=1e-3)
    assert uniform.var() == pytest.approx(1 / 3, rel=0.02)
    assert (normal.mean(), normal.std()) == pytest.approx((0, 1), abs=0.01)
    same = batches.noise("normal", (1000, 100), 0, 0)
    assert np.array_equal(normal, same)
    for seed, step in [(0, 1), (1, 0), (1, 1)]:
        other = batches.noise("normal", (1000, 100), seed, step)
        assert abs(np.corrcoef(normal.ravel(), other.ravel())[0, 1]) < 0.02


def test_pixels_are_scaled_to_minus_one_and_one_only():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    scaled = normalise(pixels)
    np.testing.assert_allclose(scaled.flatten(), np.arange(256) / 127.5 - 1, atol=1e-6)
    assert normalise(pixels.expand(2, 3, 16, 16), torch.channels_last).is_contiguous(memory_format=torch.channels_last)


def test_a_batch_larger_than_the_split_is_refused(small):
    with pytest.raises(ValueError, match=r"batch_size=51 exceeds the 50 images of train"):
        Batches(small, ("train",), 51, 0, place(), MODEL)


def test_a_batch_that_ranks_cannot_share_is_refused(small):
    with pytest.raises(ValueError, match=r"batch_size=8 is not divisible by 3"):
        Batches(small, ("train",), 8, 0, place(0, 3), MODEL)
