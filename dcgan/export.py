"""Nets as safetensors files with all that is needed to build them again: weights, settings, shape of the images."""

import json
from pathlib import Path

from torch import nn

from dcgan import models, storage
from dcgan.config import Model
from dcgan.data.store import Store
from dcgan.models import Discriminator, Generator
from dcgan.run import Run

DISCRIMINATOR, GENERATOR = "discriminator.safetensors", "generator.safetensors"


def write(file: Path, net: Generator | Discriminator, run: Run, store: Store) -> None:
    """Write a net of a run, trained on the images of `store`; the file appears whole or not at all."""
    from safetensors.torch import save

    shape = {"channels": store.channels, "classes": len(store.classes), "size": store.size}
    metadata = {"model": run.experiment.model.model_dump_json(), "images": json.dumps(shape)}
    weights = {key: value.contiguous().cpu() for key, value in net.state_dict().items()}
    storage.write_bytes(file, save(weights, metadata))


def load(file: Path) -> nn.Module:
    """The net in an exported `generator.safetensors` or `discriminator.safetensors`, on the CPU in eval mode."""
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        metadata = weights.metadata()
        state = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118  not a dict
    shape = json.loads(metadata["images"])
    model = Model.model_validate_json(metadata["model"])
    generator, discriminator = models.build(model, shape["channels"], shape["classes"], shape["size"], seed=0)
    net = generator if file.name == GENERATOR else discriminator
    net.load_state_dict(state)
    return net.eval()
