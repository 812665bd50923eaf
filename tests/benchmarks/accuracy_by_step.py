"""What features are worth along the training: python tests/benchmarks/accuracy_by_step.py RUN [--every N]

RUN is the directory of a run trained with `train.keep` large enough that its checkpoints are still there. Of each one,
by the step: the sliced Wasserstein distance by which the pipeline chooses, and the L2-SVM's accuracy with 10,000 labels
on held-out training images and on test. Three minutes each on 2 cores.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from dcgan import checkpoint, features, storage
from dcgan.data.batches import Images
from dcgan.evaluate import svm
from dcgan.features import Extractor
from dcgan.run import Run

LABELS = 10_000


@torch.no_grad()
def extracted(extractor: Extractor, images: Images) -> np.ndarray:
    """All layers of all images, float16 (N, F)."""
    rows, device = np.arange(images.count), next(extractor.parameters()).device
    parts = [extractor(batch).half().cpu().numpy() for batch in features.batched(images, rows, device)]
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--every", type=int, default=1, help="score only steps divisible by this")
    chosen = parser.parse_args()
    run = Run.open(chosen.run)
    store, scored, device = run.store(), run.scored_store(), features.device_of(run)
    settings = run.experiment.evaluate.model_copy(update={"labels": LABELS})
    print("  step  distance  held out    test")
    for step in checkpoint.steps(run):
        if step % chosen.every:
            continue
        directory = run.checkpoints / str(step)
        distance = json.loads((directory / storage.MANIFEST).read_text())["swd"]
        _, discriminator, _ = checkpoint.load_nets(directory)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as the pipeline extracts them
            features.calibrate(discriminator, store, device)
            extractor = Extractor(discriminator).eval().to(device)
            found = {split: extracted(extractor, Images(scored, (split,))) for split in scored.scored}
        parts = {split: (x, scored.labels(split)) for split, x in found.items()}
        found = svm.score(*parts["train"], *parts["test"], settings, parts.get("validation"))
        values = [found[f"svm/{name}"] for name in ("validation_accuracy", "accuracy")]
        print(f"{step:6} {distance:9.4f} {values[0]:9.4f} {values[1]:7.4f}", flush=True)


if __name__ == "__main__":
    main()
