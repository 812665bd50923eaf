"""Draws image grids as PNGs with only the standard library and NumPy, so that a bare training machine can."""

import struct
import zlib
from pathlib import Path

import numpy as np

from dcgan import storage

MARGIN = 2  # pixels between the images of a grid


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1], float, to uint8 [0, 255], rounded."""
    return np.clip(np.rint(images * 127.5 + 127.5), 0, 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 (N, C, H, W) to one picture, row by row on white: (H', W') if C is 1, (H', W', 3) if 3."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    picture = np.full((rows * (height + MARGIN) + MARGIN, columns * (width + MARGIN) + MARGIN, channels), 255, np.uint8)
    for index, image in enumerate(images):
        y = MARGIN + (index // columns) * (height + MARGIN)
        x = MARGIN + (index % columns) * (width + MARGIN)
        picture[y : y + height, x : x + width] = image.transpose(1, 2, 0)
    return picture[:, :, 0] if channels == 1 else picture


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write uint8 (H, W) or (H, W, 3) as a PNG (ISO/IEC 15948), whole or not at all."""
    height, width = picture.shape[:2]
    colour = 0 if picture.ndim == 2 else 2  # greyscale, or RGB
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    rows = picture.reshape(height, -1)
    unfiltered = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1).tobytes()  # a filter byte starts each row
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(unfiltered, 6)), (b"IEND", b"")]
    storage.write_bytes(path, b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
