"""From the bytes of an image file to a stored square: bounded, antialiased, JPEG at reduced scale."""

import io
import struct

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
            whole = image.size
            image.draft("RGB", (REDUCED * size, REDUCED * size))
            scale = round(whole[0] / image.width)  # 1, 2, 4 or 8; libjpeg rounds the last pixel up
            turned = ImageOps.exif_transpose(image) if exif else image
            if (turned.width < turned.height) != (whole[0] < whole[1]):
                whole = whole[::-1]
            rgb = turned if turned.mode == "RGB" else turned.convert("RGB")
            return square(rgb, size) if scale == 1 else _reduced_square(rgb, size, whole, scale)
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
    return _planes(image)


def _reduced_square(image: Image.Image, size: int, whole: tuple[int, int], scale: int) -> np.ndarray:
    """`square` of an image of `whole` pixels that was decoded at 1 / `scale`: the same stretch of it, to a fraction."""
    side = min(whole)
    left, top = round((whole[0] - side) / 2), round((whole[1] - side) / 2)
    box = (left / scale, top / scale, (left + side) / scale, (top + side) / scale)
    return _planes(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _planes(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))
