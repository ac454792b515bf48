"""Encoded image -> uint8 pixels of the wanted size and number of channels."""

import io
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rrcm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]


def decode(encoded: bytes | str, image_size: int, channels: int, where: str) -> Pixels:
    """Decode one image file, turn it upright and bring it to the wanted shape.

    The EXIF orientation is honoured. Transparent pixels are laid on white, the page most such
    pictures are drawn for. 16-bit gray is scaled by 255 / 65535. CMYK, palettes and the rest go to
    RGB as Pillow converts them, and RGB to gray by the luma weights of ITU-R 601. For the size see
    `fit`.

    Args:
        encoded: the bytes of an image file, or its path.
        image_size: height and width of the result.
        channels: 1 (gray) or 3 (RGB).
        where: names the image in messages.

    Returns:
        uint8 [channels, image_size, image_size].

    Raises:
        UserError: not an image Pillow can decode, cut short, or of a kind with no fixed value range
            (32-bit float or integer).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as opened:
            image = _to_channels(ImageOps.exif_transpose(opened), channels)
        return fit(image, image_size)
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        # The message of UnidentifiedImageError is the address of a BytesIO: of no use to a reader.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image file" if unknown else f"{error}".partition("\n")[0]
        raise UserError(f"cannot decode {where}: {reason}") from error


def _to_channels(image: "Image", channels: int) -> "Image":
    """Convert any mode of Pillow's to 8-bit "L" or "RGB"."""
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integer pixels have no fixed range; save as 8 or 16 bit")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("float pixels have no fixed range; save as 8 or 16 bit")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image)
    if channels == 1 and image.mode in ("L", "1"):
        return image.convert("L")  # not through RGB: its luma may round a gray value down
    image = image.convert("RGB")
    return image if channels == 3 else image.convert("L")


def fit(image: "Image", image_size: int) -> Pixels:
    """Bring the short side to `image_size` (bicubic, antialiased) and cut out the centre square.

    An image that already has the size keeps its pixels exactly.

    Returns:
        uint8 [1, S, S] for mode "L", [3, S, S] for "RGB", S = image_size.
    """
    from PIL import Image

    short = min(image.size)
    if short != image_size:
        width, height = (max(image_size, round(side * image_size / short)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = ((side - image_size) // 2 for side in image.size)
    image = image.crop((left, top, left + image_size, top + image_size))
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
