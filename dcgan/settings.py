"""The sections of an experiment: every setting, its default, meaning and bounds. `experiment.py` combines them."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

DataSet = Literal[
    "digits",
    "mnist",
    "cifar10",
    "cifar100",
    "svhn",
    "stl10",
    "celeba",
    "lfw",
    "lsun",
    "imagenet",
    "imagenet32",
    "imagenet10",
    "imagenet_dog15",
    "tiny_imagenet",
    "folder",
]
Protocol = Literal["svm", "svm_few_labels", "clustering", "knn"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


class Section(BaseModel):
    """A frozen group of settings that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts True as 1, so `model.hidden=true` would be a layer one unit wide."""
        items = value if isinstance(value, list | tuple) else [value]
        if bool in map(type, items) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("input should be a number, a word or a list, not true or false")
        return value


class Data(Section):
    """Which images, from where, at which size."""

    name: DataSet = Field(description="the data set")
    size: Literal[28, 32, 64, 96, 128] = Field(
        description="pixels per side: a centre crop of the shorter side, resized with antialiasing"
    )
    source: str | None = Field(
        None,
        description="a directory with the published files, or an http(s):// or s3:// address that mirrors them, "
        "instead of the data set's own site; for `folder`, the tree of images, one subdirectory per class",
    )
    offline: bool = Field(False, description="download nothing: use what is there, or report what is missing")
    category: str = Field("bedroom", description="`lsun`: the category, such as bedroom or church_outdoor")
    extra: bool = Field(False, description="`svhn`: train on the 531,131 extra images, too")
    test_fraction: float = Field(
        0.1, gt=0, lt=1, description="`folder`, `lfw`, `digits`: fraction of images held out to test, by content hash"
    )
    unreadable: Literal["refuse", "skip"] = Field(
        "refuse", description="an image file that can't be decoded stops ingestion (refuse), or is skipped and listed"
    )
    deduplicate: bool = Field(
        False, description="remove near-duplicates from the training images, as the paper does for LSUN (section 3.1)"
    )
    home: Path | None = Field(None, description="where everything is written; DCGAN_HOME if unset, else ./var")
    remote: str | None = Field(
        None, description="an s3:// address that keeps stores and runs; the home is then a copy of what is used here"
    )
    cache_gb: float = Field(
        100, gt=0, description="with `remote`: gigabytes of image stores kept in the home; the longest unused go first"
    )

    @field_validator("source")
    @classmethod
    def _absolute_source(cls, source: str | None) -> str | None:
        return _absolute_or_address(source)

    @field_validator("remote")
    @classmethod
    def _in_s3(cls, remote: str | None) -> str | None:
        if remote is not None and not re.fullmatch(r"s3://[^/]+(/.*)?", remote):
            raise ValueError("input should be s3://bucket or s3://bucket/prefix")
        return remote and remote.rstrip("/")

    @field_validator("home")
    @classmethod
    def _absolute_home(cls, home: Path | None) -> Path | None:
        return home and _absolute(str(home))


class Model(Section):
    """Both networks. The defaults are the paper's 64-pixel pair (section 3)."""

    kernel: Literal[3, 4, 5] = Field(
        5,
        description="5: the paper's stride-2 5x5; 4: the 4x4 of pytorch/examples; "
        "3: the deep 3x3 ImageNet pair, alternating strides 1 and 2",
    )
    width: int = Field(128, ge=1, le=2048, description="channels of the discriminator's first layer; doubles per level")
    z_dim: int = Field(100, ge=1, le=4096, description="length of z")
    z: Literal["uniform", "normal"] = Field("uniform", description="z ~ U(-1, 1) as in the paper, or N(0, 1)")
    conditional: bool = Field(
        False, description="join the one-hot label to every layer's input, as the MNIST code does"
    )
    hidden: int = Field(
        0, ge=0, le=8192, description="width of a fully connected layer in both nets; 0: none; MNIST 1024"
    )
    affine: bool = Field(True, description="BatchNorm has gamma and beta; the MNIST code has none")
    spectral_norm: bool = Field(False, description="spectral normalisation in the discriminator (Miyato et al., 2018)")


class Train(Section):
    """How the nets are trained. The defaults are the paper's (section 4)."""

    steps: int = Field(ge=1, description="batches of real images to train on")
    batch_size: int = Field(128, ge=2, description="images per step over all workers, which take equal shares")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Adam's learning rate, for both nets")
    decay: float = Field(
        0.0, ge=0, le=1, description="final fraction of the steps, over which the learning rate falls linearly to 0"
    )
    beta1: float = Field(0.5, ge=0, lt=1, description="Adam's beta1, the momentum term")
    weight_decay: float = Field(0.0, ge=0, le=1, description="L2 term added to the gradient; the original code: 1e-5")
    update: Literal["both", "alternate"] = Field(
        "both", description="each batch updates both nets, or the nets take turns as in the original code"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="one-sided: real images have the target 1 - this")
    ema: float = Field(0.0, ge=0, lt=1, description="per-step decay of the generator's moving average; 0: none")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="bfloat16: autocast, weights stay float32; auto: bfloat16 if the processor computes in it"
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = Field(
        "auto",
        description="order of values in memory; auto: channels_last on CPUs and with bfloat16",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the weights, the order of images, and z")
    log_every: int = Field(50, ge=1, description="steps between lines of metrics.jsonl")
    sample_every: int = Field(500, ge=1, description="steps between sample grids")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints, each scored for `best`")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, in addition to the best")


class Compute(Section):
    """Where training runs. None of it is part of a run's identity."""

    workers: int = Field(
        1, ge=0, description="Ray processes for training, and for extraction if 2 or more; 0: no Ray, nor to decode"
    )
    cpus: int | None = Field(
        None, ge=1, description="CPUs of each worker, for a cluster shared with others; null: an equal share of all"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if Ray, or this process, has it")
    graph: bool = Field(
        True, description="on CUDA, record the step once as a graph and replay it, so that no launch waits for Python"
    )
    max_failures: int = Field(3, ge=0, description="times Ray restarts the workers from the newest checkpoint")


class Evaluate(Section):
    """What is scored, and how. Every choice is made on a split of the training set."""

    checkpoint: Literal["best", "latest"] = Field(
        "best", description="best by the sliced Wasserstein distance, or newest"
    )
    images: DataSet | None = Field(
        None, description="score the features on this data set's images, at data.size, instead of on those trained on"
    )
    images_source: str | None = Field(None, description="where `evaluate.images` come from, as data.source")
    protocols: tuple[Protocol, ...] = Field(PROTOCOLS, description="the protocols to run, see dcgan/evaluate/")
    labels: int = Field(0, ge=0, description="training labels for `svm` and `knn`; 0: all")
    labels_per_class: int = Field(100, ge=1, description="`svm_few_labels`: labels per class in each draw")
    draws: int = Field(10, ge=2, description="`svm_few_labels`: random draws, for mean and standard deviation")
    standardise: bool = Field(
        True, description="standardise features (mean 0, variance 1 over train) before SVMs; SVHN's code does not"
    )
    c_grid: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-5, 1e-4, 1e-3, 1e-2), description="SVM penalties tried on the validation images, else a fifth of the labels"
    )
    restarts: int = Field(10, ge=1, description="`clustering`: k-means restarts; that of lowest inertia is scored")
    neighbours: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 5, 15), description="`knn`: neighbours tried on the validation images, else a fifth of the labels"
    )
    inception: str | None = Field(
        None, description="file with torch-fidelity's InceptionV3 weights; without it, image quality is not measured"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of splits, draws and centroids")

    @field_validator("inception")
    @classmethod
    def _absolute_file(cls, file: str | None) -> str | None:
        return file and str(_absolute(file))

    @field_validator("images_source")
    @classmethod
    def _absolute_source(cls, source: str | None) -> str | None:
        return _absolute_or_address(source)

    @field_validator("protocols", "c_grid", "neighbours")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values or len(set(values)) < len(values):
            raise ValueError("input should have at least one value, and each once")
        return values


def _absolute_or_address(source: str | None) -> str | None:
    """A path made absolute: it then means the same in a worker that was started in another directory."""
    if source is None or source.startswith(("http://", "https://", "s3://")):
        return source
    if "://" in source:
        raise ValueError("input should be a directory, or an http(s):// or s3:// address")
    return str(_absolute(source))


def _absolute(path: str) -> Path:
    return Path(os.path.expanduser(path)).absolute()
