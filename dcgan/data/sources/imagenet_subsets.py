"""ImageNet-10 and ImageNet-Dog-15 (Chang et al. 2017, DAC): subsets of ImageNet's training images for clustering.

They have 13,000 and 19,500 images, 1,300 per class. They were never published as files; people who assemble them get
other numbers of images, so the numbers are checked. There is no test split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcgan.config import Data
from dcgan.data.sources import imagenet
from dcgan.data.sources.base import Opened

PER_CLASS = 1_300


@dataclass(frozen=True)
class Subset:
    """A `base.Source` of some of ImageNet's classes."""

    wnids: Sequence[str]

    def signature(self, data: Data) -> Any:
        """The MD5 of ImageNet's tar file, or a hash of the images' names, lengths and times; see `base.Source`."""
        if imagenet.mirrored(data):
            return imagenet.MD5[imagenet.TRAIN]
        return imagenet.state(imagenet.training(imagenet.local(data)), self.wnids)

    def read(self, data: Data, downloads: Path) -> Opened:
        """One split, train, three channels; see `base.Source`.

        data.source: as `imagenet.read` takes it, or a directory with the class directories themselves; other classes
        may be absent. Raises ValueError, giving each class's number of images, unless there are 1,300 of each.
        """
        images = imagenet.training(imagenet.located(data, downloads, [imagenet.TRAIN]))
        found = imagenet.classes(images, self.wnids)
        counts = {wnid: len(found.get(wnid, [])) for wnid in self.wnids}
        if set(counts.values()) != {PER_CLASS}:
            wrong = ", ".join(f"{wnid}: {count}" for wnid, count in counts.items())
            raise ValueError(f"{images}: {data.name} has {PER_CLASS} images of each class; here are {wrong}")
        return imagenet.opened(data, {"train": found})


IMAGENET10 = Subset(
    (
        "n02056570",  # king penguin
        "n02085936",  # Maltese dog
        "n02128757",  # snow leopard
        "n02690373",  # airliner
        "n02692877",  # airship
        "n03095699",  # container ship
        "n04254680",  # soccer ball
        "n04285008",  # sports car
        "n04467665",  # trailer truck
        "n07747607",  # orange
    )
)
IMAGENET_DOG15 = Subset(
    (
        "n02085936",  # Maltese dog
        "n02086646",  # Blenheim spaniel
        "n02088238",  # basset
        "n02091467",  # Norwegian elkhound
        "n02097130",  # giant schnauzer
        "n02099601",  # golden retriever
        "n02101388",  # Brittany spaniel
        "n02101556",  # clumber
        "n02102177",  # Welsh springer spaniel
        "n02105056",  # groenendael
        "n02105412",  # kelpie
        "n02105855",  # Shetland sheepdog
        "n02107142",  # Doberman
        "n02110958",  # pug
        "n02112137",  # chow
    )
)
