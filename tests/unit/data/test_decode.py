"""From image files to stored squares: cropping, resizing, JPEG at reduced scale, and what is refused."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import v2

from dcgan.data.decode import UnreadableError, decode, square


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.sampled_from([28, 32, 64]),
    mode=st.sampled_from(["L", "RGB"]),
)
def test_square_is_torchvisions_crop_and_resize(width: int, height: int, size: int, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    reference = v2.Compose([v2.CenterCrop(min(width, height)), v2.Resize((size, size)), v2.PILToTensor()])
    np.testing.assert_array_equal(square(image, size), reference(image).numpy())


@pytest.mark.parametrize("side", [8, 32, 100, 257])
def test_resizing_is_antialiased(side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    reference = F.interpolate(tensor, (32, 32), mode="bilinear", antialias=True)[0].numpy()
    assert np.abs(square(Image.fromarray(pixels), 32) - reference).max() <= 1, "Pillow rounds after each of two passes"


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def photograph(width: int, height: int) -> Image.Image:
    """Structure at all scales, the finer the fainter: what a JPEG of a photograph is like."""
    generator = np.random.default_rng(0)
    seen = np.zeros((height, width, 3))
    for side, share in ((3, 0.5), (9, 0.25), (27, 0.15), (81, 0.1)):
        noise = Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8))
        seen += share * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray(seen.astype(np.uint8))


@pytest.mark.parametrize(
    ("width", "height", "factor"), [(256, 256, 4), (341, 256, 4), (256, 500, 4), (1024, 768, 8), (160, 128, 2)]
)
def test_a_reduced_jpeg_is_an_average_over_boxes(width: int, height: int, factor: int) -> None:
    raw = encoded(photograph(width, height))
    whole = Image.open(io.BytesIO(raw)).convert("RGB")
    difference = np.abs(decode(raw, 64) - square(whole.reduce(factor), 64).astype(int))
    assert difference.mean() < 1, "half a pixel off its place it would be over 2"
    assert (decode(raw, 64) != square(whole, 64)).any(), "it was decoded whole"


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_less_than_twice_the_size_is_pillows_to_the_bit(mode: str) -> None:
    raw = encoded(photograph(127, 140).convert(mode))
    np.testing.assert_array_equal(decode(raw, 64), square(Image.open(io.BytesIO(raw)).convert("RGB"), 64))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    image = photograph(40, 40).convert(mode)
    raw = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(decode(raw, 32), square(image.convert("RGB"), 32))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_undone_as_pillow_does(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(photograph(40, 40), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(raw, 40, exif=True), expected)


def test_other_tags_that_are_not_as_they_should_be_do_not_matter() -> None:
    """The name of a program as a fraction, which Pillow reads and can't write again."""
    exif = Image.Exif()
    exif[0x0112] = 6
    right = decode(encoded(photograph(40, 40), exif=exif), 32, exif=True)
    tags = [struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHII", 0x0131, 5, 1, 8 + 2 + 2 * 12 + 4)]
    tiff = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(tags) + struct.pack("<III", 0, 1, 3)
    wrong = encoded(photograph(40, 40), exif=b"Exif\0\0" + tiff)
    with pytest.raises(AttributeError):
        ImageOps.exif_transpose(Image.open(io.BytesIO(wrong)))
    np.testing.assert_array_equal(decode(wrong, 32, exif=True), right)


@pytest.mark.parametrize(("kind", "side"), [("PNG", 40), ("JPEG", 40), ("JPEG", 256)])
def test_exif_is_followed_where_asked(kind: str, side: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    raw = encoded(photograph(side, side), kind, exif=exif)
    found = np.rot90(decode(raw, 32), -1, (1, 2)).astype(int)
    assert np.abs(decode(raw, 32, exif=True) - found).mean() < 2, "turned before it is scaled, at full size"


def test_a_jpeg_of_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = encoded(photograph(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(UnreadableError, match="pixels are more than"):  # and nothing else is tried, which would warn
        decode(raw, 32)


def bomb() -> bytes:
    """A PNG header that promises 20,000 x 20,000 pixels."""
    raw = bytearray(encoded(Image.new("RGB", (1, 1)), "PNG"))
    raw[16:24] = (20_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    return bytes(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not a JPEG, PNG"),
        (b"%!PS-Adobe", "not a JPEG, PNG"),
        (encoded(photograph(64, 64))[:900], "[Tt]runcated"),
        (encoded(Image.new("I;16", (9, 9)), "PNG"), "more than 8 bits"),
        (bomb(), "400000000 pixels"),
    ],
    ids=["empty", "postscript", "truncated", "deep", "bomb"],
)
def test_what_is_no_usable_image_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(UnreadableError, match=message):
        decode(raw, 32)


@settings(max_examples=80)
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]))
def test_a_damaged_file_is_decoded_or_refused(data: st.DataObject, kind: str) -> None:
    raw = bytearray(encoded(photograph(48, 40), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UnreadableError):
        assert decode(bytes(raw), 32).shape == (3, 32, 32)
