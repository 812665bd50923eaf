"""Decodes an image file to a stored square: bounded in size, antialiased, JPEG at reduced scale."""

import io
import struct

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # whatever the name says; EPS would start Ghostscript
TRANSFORM = "centre crop of the shorter side, resized with antialiasing (Pillow's bilinear; JPEG scaled while decoded)"
# What Pillow 13 raises on damaged files of FORMATS, found by flipping bytes; OSError covers truncation.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, TypeError, struct.error, Image.DecompressionBombError)


JPEG = b"\xff\xd8"  # how one begins
ORIENTED, SEGMENT = (b"Exif\0\0", b"tiff:Orientation"), 2**16  # what tells an orientation, in one of the first segments
UPRIGHT = {  # what undoes EXIF's orientation 2 to 8
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class UnreadableError(ValueError):
    """The bytes are not a usable image; the message says why."""


def decode(raw: bytes, size: int, exif: bool = False) -> np.ndarray:
    """The picture in an image file, uint8 (3, size, size), RGB without transparency.

    exif: apply its EXIF orientation. A JPEG of twice the size or more is scaled by eighths while it is decoded, down to
    the smallest scale that is still large enough: `_jpeg` says what that does to the pixels. One with EXIF that is to
    be applied is decoded at full size.
    Raises UnreadableError for another format, a damaged file, grey of more than 8 bits, or more pixels than
    Pillow's limit (89 million), in which case nothing is decoded.
    """
    oriented = exif and any(raw.find(mark, 0, SEGMENT) >= 0 for mark in ORIENTED)
    if raw.startswith(JPEG) and not oriented and (planes := _jpeg(raw, size)) is not None:
        return planes
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            _require_bounded(image.width, image.height)
            if image.mode[0] in "IF":  # Pillow would clip it to white instead of scaling it
                raise UnreadableError(f"mode {image.mode}: more than 8 bits a channel")
            turned = _upright(image) if exif else image
            return square(turned if turned.mode == "RGB" else turned.convert("RGB"), size)
    except UnreadableError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError(f"not a {', '.join(FORMATS)} file") from error
    except DAMAGED as error:
        raise UnreadableError(str(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its metadata say, if they can be read; other tags than the orientation don't matter."""
    image.load()  # which turns a TIFF, and removes its tag
    try:
        number = image.getexif().get(ExifTags.Base.Orientation)
    except (*DAMAGED, LookupError, AttributeError):
        return image
    return image.transpose(UPRIGHT[number]) if number in UPRIGHT else image


def _require_bounded(width: int, height: int) -> None:
    if width * height > (limit := Image.MAX_IMAGE_PIXELS or 0):
        raise UnreadableError(f"{width} x {height} pixels are more than Pillow's limit of {limit}")


def _jpeg(raw: bytes, size: int) -> np.ndarray | None:
    """A JPEG decoded at a reduced scale by libjpeg-turbo, or None if it can't be: Pillow decodes it then, or says why.

    Decoding fewer coefficients averages pixels over boxes. From 256 to 64 pixels that differs from Pillow's bilinear
    filter by 1.6 of 255 levels on average; Pillow's bilinear differs from its Lanczos by 2.2 (`bench_ingest.py
    --exactness`). At full scale the pixels are Pillow's own, bit for bit.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(raw)
        _require_bounded(width, height)
        if colours not in ("Gray", "YCbCr", "RGB"):
            return None
        scaled = min(height, width) >= 2 * size  # from half scale down it costs less than full scale
        pixels = simplejpeg.decode_jpeg(raw, "RGB", min_height=scaled * size, min_width=scaled * size)
    except UnreadableError:
        raise
    except ValueError:  # a kind it does not know, or damage that libjpeg warns of
        return None
    if not scaled:
        return square(Image.fromarray(pixels), size)
    return _reduced_square(pixels, size, (width, height), round(8 * pixels.shape[1] / width) / 8)


def square(image: Image.Image, size: int) -> np.ndarray:
    """uint8 (C, size, size): the centre of the picture, as torchvision's CenterCrop and then Resize give it.

    Pillow widens the filter when it shrinks an image, which is antialiasing.
    """
    side = min(image.size)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return _planes(image)


def _reduced_square(pixels: np.ndarray, size: int, whole: tuple[int, int], scale: float) -> np.ndarray:
    """`square` of an image of `whole` pixels that was decoded at a scale: the same region, to a fraction of a pixel.

    Where no resizing is needed, to the nearest pixel: it is off by half a pixel at most.
    """
    side = min(whole)
    left, top = ((edge - side) / 2 * scale for edge in whole)
    if min(pixels.shape[:2]) == size:
        x, y = min(round(left), pixels.shape[1] - size), min(round(top), pixels.shape[0] - size)
        return pixels[y : y + size, x : x + size].transpose(2, 0, 1)
    image = Image.fromarray(pixels)
    box = (left, top, min(left + side * scale, image.width), min(top + side * scale, image.height))
    return _planes(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _planes(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))
