"""Which layer's features cluster best: python tests/benchmarks/clustering_by_layer.py RUN

The published figures do not say of which layers they are. RUN is the directory of a trained run whose features were
extracted (`dcgan extract`). Each layer alone and all together, as they are and with each image's features scaled to
length 1; of the scored checkpoint and of the same net before training. A minute or two each on 2 cores.
"""

import argparse
from pathlib import Path

import numpy as np

from dcgan import checkpoint, feature_banks, features
from dcgan.evaluate import clustering
from dcgan.run import Run


def unit(x: np.ndarray) -> np.ndarray:
    """(N, F), each row of length 1."""
    x = x.astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = Run.open(parser.parse_args().run)
    store, settings = run.scored_store(), run.experiment.evaluate
    step = int(checkpoint.chosen(run).name)
    _, discriminator, _ = checkpoint.load_nets(checkpoint.chosen(run))
    ends = np.cumsum([0, *(channels * features.POOL**2 for channels in discriminator.channels)])
    layers = {f"layer {i + 1}": slice(*ends[i : i + 2]) for i in range(len(ends) - 1)} | {"all layers": slice(None)}
    labels = np.concatenate([store.groups(split) for split in store.clustered])
    print("net            features     scaled      NMI     ARI  accuracy")
    for source, at in (("discriminator", step), ("random_init", 0)):
        bank = np.concatenate([feature_banks.read_bank(run, source, at, split) for split in store.clustered])
        for name, columns in layers.items():
            for scaled, change in (("as is", np.asarray), ("length 1", unit)):
                x = change(bank[:, columns])
                found = clustering.score(x, labels, x[:0], labels[:0], settings)
                values = "  ".join(f"{found[f'clustering/{metric}']:.4f}" for metric in ("nmi", "ari", "accuracy"))
                print(f"{source:14} {name:12} {scaled:9}  {values}", flush=True)


if __name__ == "__main__":
    main()
