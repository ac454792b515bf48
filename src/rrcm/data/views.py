"""Augmentation, batched, on the device the images are on, with its own draw for every image.

All randomness comes from torch's global generators, so `torch.manual_seed` before a call fixes what
it returns. Images larger than `image_size` may be given: crops are then cut from the whole image.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rrcm.data.names import unknown_name

PretrainViews = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
FinetuneView = Callable[[Tensor], Tensor]
_Made = TypeVar("_Made")

# "affine": small enough for 8x8 digits to keep their class (6 and 9 never meet)
MAX_ANGLE = math.radians(15)
SCALE = (0.85, 1.15)
MAX_SHIFT = 0.125  # of the image's side: one pixel of eight


def to_unit(images: Tensor) -> Tensor:
    """Turn uint8 images 0..255 into float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def pretrain_views(kind: str, image_size: int) -> PretrainViews:
    """Return the function that makes the three views of stage one.

    Args:
        kind: "natural" (photographs: rRCM, Lei et al., ICLR 2025, arXiv 2501.13094, the
            augmentation of MoCo v3) or "affine" (tiny aligned images, such as digits: small
            rotations, scalings and shifts, no flip).
        image_size: height and width of the views.

    Returns:
        f(images float [B, C, H, W] in [0, 1], C = 1 or 3) -> (x, view1, view2), float32
        [B, C, image_size, image_size] in [-1, 1], on the images' device. `x` is weakly augmented,
        the views strongly.

    Raises:
        UserError: unknown kind.
    """
    return functools.partial(_pick(PRETRAIN, "pretrain views", kind), image_size=image_size)


def finetune_view(kind: str, image_size: int) -> FinetuneView:
    """Return the function that augments images in stage two.

    Args:
        kind: "none", "flip", "crop-flip" (random resized crop 0.4-1, then flip) or "affine".
        image_size: height and width of the result.

    Returns:
        f(images float [B, C, H, W] in [0, 1]) -> float32 [B, C, image_size, image_size] in [0, 1],
        on the images' device; noise is for the caller to add.

    Raises:
        UserError: unknown kind.
    """
    return functools.partial(_pick(FINETUNE, "finetune view", kind), image_size=image_size)


def _pick(table: dict[str, _Made], what: str, kind: str) -> _Made:
    if kind not in table:
        raise unknown_name(what, kind, table)
    return table[kind]


@torch.no_grad()
def _natural_views(images: Tensor, image_size: int) -> tuple[Tensor, Tensor, Tensor]:
    weak = _random_flip(_centre(images, image_size))
    view1 = _strong(images, image_size, blur=1.0, solarize=0.0)
    view2 = _strong(images, image_size, blur=0.1, solarize=0.2)
    return _signed(weak), _signed(view1), _signed(view2)


@torch.no_grad()
def _affine_views(images: Tensor, image_size: int) -> tuple[Tensor, Tensor, Tensor]:
    x = _centre(images, image_size)
    # one call for both views: at 8x8 the time is that of starting operations, not of pixels
    view1, view2 = _random_affine(torch.cat([x, x])).chunk(2)
    return _signed(x), _signed(view1), _signed(view2)


@torch.no_grad()
def _unchanged(images: Tensor, image_size: int) -> Tensor:
    return _centre(images, image_size)


@torch.no_grad()
def _flip(images: Tensor, image_size: int) -> Tensor:
    return _random_flip(_centre(images, image_size))


@torch.no_grad()
def _crop_flip(images: Tensor, image_size: int) -> Tensor:
    return _random_flip(_random_resized_crop(images, image_size, min_area=0.4)).clamp(0, 1)


@torch.no_grad()
def _affine(images: Tensor, image_size: int) -> Tensor:
    return _random_affine(_centre(images, image_size)).clamp(0, 1)


PRETRAIN: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "natural": _natural_views,
    "affine": _affine_views,
}
FINETUNE: dict[str, Callable[..., Tensor]] = {
    "none": _unchanged,
    "flip": _flip,
    "crop-flip": _crop_flip,
    "affine": _affine,
}


def blur_kernel_size(image_size: int) -> int:
    """Width of the Gaussian blur's kernel: a tenth of the side, odd, at least 3.

    SimCLR's rule (Chen et al., ICML 2020, appendix A): 23 pixels at 224, 3 at 32 and 8. Sigma is in
    pixels at every size, so at 224 the kernel holds all of the Gaussian and at 32 it cuts it short,
    which keeps the blur of a small image mild.
    """
    return max(3, 2 * (image_size // 20) + 1)


def _strong(images: Tensor, image_size: int, blur: float, solarize: float) -> Tensor:
    """A strong view: crop, colour jitter, grayscale, blur, solarize, flip. Float [0, 1]."""
    jitter, grayscale, gaussian_blur = _colour_operations(image_size, blur)
    view = _random_resized_crop(images, image_size, min_area=0.08).clamp(0, 1)
    view = grayscale(jitter(view)) if view.shape[1] == 3 else _jitter_gray(view)
    view = gaussian_blur(view)
    if solarize:
        inverted = torch.where(view >= 0.5, 1 - view, view)
        view = torch.where(_coin(view, solarize), inverted, view)
    return _random_flip(view)


@functools.cache
def _colour_operations(image_size: int, blur: float) -> tuple[FinetuneView, ...]:
    import kornia.augmentation as K

    size = blur_kernel_size(image_size)
    return (
        K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((size, size), (0.1, 2.0), p=blur),
    )


def _jitter_gray(images: Tensor) -> Tensor:
    """Colour jitter of one channel: saturation, hue and grayscale have nothing to change."""
    brightness = _uniform(images, 0.6, 1.4).view(-1, 1, 1, 1)
    contrast = _uniform(images, 0.6, 1.4).view(-1, 1, 1, 1)
    changed = (images * brightness).clamp(0, 1)
    mean = changed.mean(dim=(1, 2, 3), keepdim=True)
    changed = (mean + (changed - mean) * contrast).clamp(0, 1)
    return torch.where(_coin(images, 0.8), changed, images)


def _random_resized_crop(images: Tensor, image_size: int, min_area: float) -> Tensor:
    """Cut a box of `min_area`..1 of the area and of 3/4..4/3 aspect, and resize it (bilinear)."""
    images = images.to(torch.float32)
    height, width = images.shape[2:]
    area = _uniform(images, min_area, 1.0) * height * width
    aspect = _uniform(images, math.log(3 / 4), math.log(4 / 3)).exp()
    # A box that sticks out is cut to the image, where torchvision would draw it anew.
    box_w = ((area * aspect).sqrt() / width).clamp(max=1)
    box_h = ((area / aspect).sqrt() / height).clamp(max=1)
    shift_x = _uniform(images, -1.0, 1.0) * (1 - box_w)
    shift_y = _uniform(images, -1.0, 1.0) * (1 - box_h)
    zero = torch.zeros_like(box_w)
    theta = torch.stack([box_w, zero, shift_x, zero, box_h, shift_y], 1).view(-1, 2, 3)
    return _resample(images, theta, image_size, padding="border")


def _random_affine(images: Tensor) -> Tensor:
    """Turn, scale and shift every image a little; what comes in from outside is zero."""
    draws = torch.rand(4, len(images), device=images.device) * 2 - 1
    angle = draws[0] * MAX_ANGLE
    # The grid says where each result pixel comes from: to magnify is to read from nearer by.
    zoom = 1 / (sum(SCALE) / 2 + draws[1] * (SCALE[1] - SCALE[0]) / 2)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    shift_x, shift_y = draws[2:] * (2 * MAX_SHIFT)  # the grid goes from -1 to 1
    # The shift is applied to the result, so it is turned and scaled with it on the way back.
    theta = torch.stack(
        [cos, -sin, cos * shift_x - sin * shift_y, sin, cos, sin * shift_x + cos * shift_y], 1
    )
    return _resample(images, theta.view(-1, 2, 3), images.shape[-1], padding="zeros")


def _resample(images: Tensor, theta: Tensor, image_size: int, padding: str) -> Tensor:
    grid = F.affine_grid(
        theta, [len(images), images.shape[1], image_size, image_size], align_corners=False
    )
    return F.grid_sample(images, grid, "bilinear", padding, align_corners=False)


def _centre(images: Tensor, image_size: int) -> Tensor:
    """Bring the short side to image_size (bicubic, antialiased), cut the centre; [0, 1]."""
    images = images.to(torch.float32)
    height, width = images.shape[2:]
    short = min(height, width)
    if short != image_size:
        height, width = (max(image_size, round(s * image_size / short)) for s in (height, width))
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (height - image_size) // 2, (width - image_size) // 2
    return images[..., top : top + image_size, left : left + image_size]


def _random_flip(images: Tensor) -> Tensor:
    return torch.where(_coin(images, 0.5), images.flip(-1), images)


def _coin(images: Tensor, p: float) -> Tensor:
    """bool [B, 1, 1, 1], each true with probability p."""
    return torch.rand(len(images), 1, 1, 1, device=images.device) < p


def _uniform(images: Tensor, low: float, high: float) -> Tensor:
    """float32 [B], each drawn uniformly from low..high."""
    return torch.rand(len(images), device=images.device) * (high - low) + low


def _signed(images: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], the scale the noise levels are stated on."""
    return images.mul(2).sub_(1).clamp_(-1, 1)
