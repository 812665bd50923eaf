"""Logs exported nets as MLflow models: graphs that load without this package. Only `tracking_courier` imports it."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import nn

from dcgan import checkpoint, export, features
from dcgan.models import Generator
from dcgan.run import Run
from dcgan.tracking_ledger import Ledger

EXAMPLES = 2  # torch.export freezes a dimension of size one, so a batch is at least two


def log(client: MlflowClient, run: Run, ledger: Ledger, weights: Path, again: bool) -> None:
    """Log exported weights, `generator.safetensors` or `discriminator.safetensors`, as a model made by the run.

    again: an earlier attempt may have got through; a finished model is kept, an unfinished one is replaced.
    """
    step = int(checkpoint.chosen(run).name)
    name = {"generator": "generator", "discriminator": "feature-extractor"}[weights.stem]
    tags = {"checkpoint": str(step), "fingerprint": run.fingerprint}
    if again and _finished(client, ledger, name, tags):
        return
    model = client.create_logged_model(ledger.experiment_id, name, ledger.run_id, tags, run.experiment.flat())
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / "model"
        card = Model(artifact_path=model.artifact_location, run_id=ledger.run_id, model_id=model.model_id)
        save(*_generator(weights) if weights.stem == "generator" else _extractor(weights), local, card)
        client.log_model_artifacts(model.model_id, str(local))
    client.log_outputs(ledger.run_id, [LoggedModelOutput(model.model_id, step * run.experiment.train.batch_size)])
    client.finalize_logged_model(model.model_id, "READY")


def _generator(weights: Path) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """z (N, z_dim) and, if conditional, labels (N,) -> images (N, C, H, W) in [-1, 1]."""
    net = export.load(weights)
    assert isinstance(net, Generator)
    inputs = {"z": np.zeros((EXAMPLES, net.z_dim), np.float32)}
    return net, inputs | ({"labels": np.zeros(EXAMPLES, np.int64)} if net.labels else {})


def _extractor(weights: Path) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """images (N, C, H, W) in [-1, 1] -> features (N, F)."""
    net = features.load_extractor(weights)
    inner = net.discriminator
    first = inner.convs[0]
    assert isinstance(first, nn.Conv2d)
    channels, size = first.in_channels - inner.labels, inner.side * 2**inner.levels
    return net, {"images": np.zeros((EXAMPLES, channels, size, size), np.float32)}


def _finished(client: MlflowClient, ledger: Ledger, name: str, tags: dict[str, str]) -> bool:
    mine = f"source_run_id = '{ledger.run_id}' AND name = '{name}'"
    found = [m for m in client.search_logged_models([ledger.experiment_id], mine) if tags.items() <= m.tags.items()]
    for model in found:
        if model.status != "READY":
            client.delete_logged_model(model.model_id)
    return any(model.status == "READY" for model in found)


def save(net: nn.Module, inputs: dict[str, np.ndarray], path: Path, card: Model) -> None:
    """Export a net, traced on `inputs` (each (EXAMPLES, ...)) with a free batch size, as an MLflow model directory."""
    import mlflow.pytorch  # takes three seconds

    examples = tuple(inputs.values())
    with torch.no_grad():
        output = net(*map(torch.from_numpy, examples)).numpy()
    names = list(inputs) if len(inputs) > 1 else [None]  # MLflow hands a named input over as a dict, which fails
    schema = Schema([TensorSpec(x.dtype, (-1, *x.shape[1:]), n) for n, x in zip(names, examples, strict=True)])
    signature = ModelSignature(schema, Schema([TensorSpec(output.dtype, (-1, *output.shape[1:]))]))
    mlflow.pytorch.save_model(
        net,
        path,
        mlflow_model=card,
        signature=signature,
        input_example=examples if len(examples) > 1 else examples[0],
        serialization_format="pt2",
        pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"],
    )
