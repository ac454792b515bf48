import io

import numpy as np
import pytest
from PIL import Image

from rrcm.data.decode import decode
from rrcm.errors import UserError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colours(data, size=2, channels=3):
    """The top left pixel."""
    return decode(data, size, channels, "here")[:, 0, 0].tolist()


def test_an_image_of_the_right_size_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels))
    assert np.array_equal(decode(data, 6, 3, "here"), pixels.transpose(2, 0, 1))


def test_gray_keeps_its_values_in_both_numbers_of_channels():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = encoded(Image.fromarray(pixels))
    assert np.array_equal(decode(data, 16, 1, "here"), pixels[None])
    assert np.array_equal(decode(data, 16, 3, "here"), np.stack([pixels] * 3))


def test_colour_to_gray_by_luma():
    assert colours(encoded(Image.new("RGB", (2, 2), (255, 0, 0))), channels=1) == [76]


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (Image.new("RGBA", (2, 2), (200, 0, 0, 255)), [200, 0, 0]),
        (Image.new("RGBA", (2, 2), (200, 0, 0, 0)), [255, 255, 255]),
        (Image.new("LA", (2, 2), (0, 0)), [255, 255, 255]),
        (Image.new("1", (2, 2), 1), [255, 255, 255]),
        (Image.new("RGB", (2, 2), (10, 20, 30)).convert("P"), None),
    ],
    ids=["opaque", "transparent", "gray-transparent", "bilevel", "palette"],
)
def test_modes(image, wanted):
    assert colours(encoded(image)) == (wanted or list(image.convert("RGB").getpixel((0, 0))))


def test_transparent_palette_is_laid_on_white():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([9, 9, 9, 80, 80, 80])
    assert colours(encoded(image, transparency=0)) == [255, 255, 255]


@pytest.mark.parametrize(("value", "wanted"), [(0, 0), (32768, 128), (65535, 255), (257, 1)])
def test_16_bit_gray_is_scaled(value, wanted):
    data = encoded(Image.fromarray(np.full((2, 2), value, np.uint16)))
    assert colours(data, channels=1) == [wanted]
    assert colours(data) == [wanted] * 3


def test_cmyk():
    red, green, _ = colours(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red > 240
    assert green < 15


def test_the_exif_orientation_is_honoured():
    image = Image.new("RGB", (4, 4), "black")
    image.putpixel((3, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by 90 degrees: the top right goes to the top left
    assert colours(encoded(image, exif=exif), size=4) == [255, 255, 255]
    assert colours(encoded(image), size=4) == [0, 0, 0]


@pytest.mark.parametrize("shape", [(40, 20), (20, 40)])
def test_other_sizes_are_resized_by_the_short_side_and_centre_cropped(shape):
    pixels = np.zeros((*shape, 3), np.uint8)
    height, width = shape
    pixels[height // 2 - 10 : height // 2 + 10, width // 2 - 10 : width // 2 + 10] = 200
    found = decode(encoded(Image.fromarray(pixels)), 10, 3, "here")
    assert found.shape == (3, 10, 10)
    assert (abs(found[:, 1:-1, 1:-1].astype(int) - 200) < 4).all()  # bicubic overshoots


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    found = decode(encoded(Image.fromarray(stripes)), 8, 1, "here")
    assert (abs(found.astype(int) - 127) < 20).all()


@pytest.mark.parametrize("size", [1, 7, 33, 100])
def test_any_shape_gives_the_size_asked_for(size):
    for shape in ((3, 1), (33, 100), (101, 67)):
        data = encoded(Image.fromarray(np.zeros(shape, np.uint8)))
        assert decode(data, size, 3, "here").shape == (3, size, size)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image file"),
        (b"hello", "not an image file"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:500], "truncated"),
        (encoded(Image.new("F", (2, 2), 0.5), "TIFF"), "float pixels"),
        (encoded(Image.new("I", (2, 2), 70_000), "TIFF"), "32-bit integer"),
    ],
    ids=["empty", "text", "cut short", "float", "int32"],
)
def test_what_cannot_be_decoded_is_named(data, reason):
    with pytest.raises(UserError, match=reason) as caught:
        decode(data, 8, 3, "row 3 of toy, train")
    assert "cannot decode row 3 of toy, train: " in str(caught.value)
    assert "\n" not in str(caught.value)
