"""From the bytes of an image file to a stored square: bounded, antialiased, JPEG at reduced scale."""

import io
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # whatever the name says; EPS would start Ghostscript
TRANSFORM = "centre crop of the shorter side, resized with antialiasing (Pillow's bilinear)"
# libjpeg scales by 1/2, 1/4 and 1/8 while it decodes, at a fraction of the cost. What it is asked for stays at least
# this many times the stored size, and Pillow does the rest: docs/results.md says how little pixels differ then.
REDUCED = 2
# What Pillow 13 raises on damaged files of FORMATS, found by flipping bytes; OSError covers truncation.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, TypeError, struct.error, Image.DecompressionBombError)


class UnreadableError(ValueError):
    """The bytes are no image that can be used; the message says why."""


def decode(raw: bytes, size: int, exif: bool = False) -> np.ndarray:
    """The picture in an image file, uint8 (3, size, size), RGB without transparency.

    exif: turn it as its EXIF orientation says. A JPEG much larger than `size` is decoded at a reduced scale.
    Raises UnreadableError for another format, a damaged file, more than 8 bits a channel, or more pixels than
    Pillow's limit (89 million): nothing is decoded then.
    """
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            if image.width * image.height > (limit := Image.MAX_IMAGE_PIXELS or 0):
                raise UnreadableError(f"{image.width} x {image.height} pixels are more than Pillow's limit of {limit}")
            if image.mode[0] in "IF":  # Pillow would clip it to white instead of scaling it
                raise UnreadableError(f"mode {image.mode}: more than 8 bits a channel")
            image.draft("RGB", (REDUCED * size, REDUCED * size))
            turned = ImageOps.exif_transpose(image) if exif else image
            return square(turned if turned.mode == "RGB" else turned.convert("RGB"), size)
    except UnreadableError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError(f"not a {', '.join(FORMATS)} file") from error
    except DAMAGED as error:
        raise UnreadableError(str(error)) from error


def square(image: Image.Image, size: int) -> np.ndarray:
    """uint8 (C, size, size): the centre of the picture, as torchvision's CenterCrop and then Resize give it.

    Pillow widens the filter when it shrinks, which is what antialiasing means.
    """
    side = min(image.size)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels.reshape(size, size, -1).transpose(2, 0, 1))


Decoder = Callable[[bytes, int], np.ndarray]
