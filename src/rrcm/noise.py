"""Noise levels: everything about `t`, and how it relates to the `sigma` of a certificate.

Images live in [-1, 1] inside the model and a noise level `t` is a standard deviation on that
scale. Certification speaks of `sigma` on the [0, 1] pixel scale, so `t = 2 * sigma`.
"""

import math

import torch
from torch import Tensor

SIGMA_MIN = 0.002
SIGMA_MAX = 80.0
RHO = 7.0
SIGMA_DATA = 0.5

EVAL_SCALES = 81
"""Levels of the grid on which fine-tuning and certification look up their time value."""


def karras_sigmas(
    n: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """The Karras grid of noise levels, noisiest first.

    Source: Karras et al. 2022 (arXiv 2206.00364), Equation 5.

    Args:
        n: number of levels, at least 2.
        sigma_min: the last level, > 0.
        sigma_max: the first level, > sigma_min.
        rho: curvature; larger puts more levels near sigma_min.

    Returns:
        float32 tensor [n], strictly decreasing, on the [-1, 1] scale.

    Raises:
        ValueError: n < 2, or the levels are not 0 < sigma_min < sigma_max.
    """
    if n < 2:
        raise ValueError(f"karras_sigmas: n must be at least 2, got {n}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"karras_sigmas: need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}"
        )
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    grid: Tensor = (high + ramp * (low - high)) ** rho
    return grid.float()


def num_scales(step: int, total_steps: int, start: int = 20, end: int = 80) -> int:
    """Levels of the grid at a training step: a curriculum that doubles from start to end, plus 1.

    Source: Song & Dhariwal 2023 (arXiv 2310.14189), Section 3.4, with `ceil` where the paper has
    `floor`, as the published rRCM code has it.

    Args:
        step: the training step, from 0.
        total_steps: steps of the whole training, at least 1.
        start: levels (less one) at step 0.
        end: the most levels (less one).

    Returns:
        The number of levels, for `karras_sigmas`.
    """
    doublings = math.log2(math.ceil(end / start) + 1)
    steps_per_doubling = math.ceil(total_steps / doublings)
    levels: int = start * 2 ** math.ceil(step / steps_per_doubling)
    return min(levels, end) + 1


def input_scale(t: Tensor) -> Tensor:
    """`c_in(t) = 1 / sqrt(t^2 + 0.25)`: brings an image with noise of level t to unit variance.

    Source: Karras et al. 2022, Table 1, with sigma_data = 0.5.
    """
    return torch.rsqrt(t**2 + SIGMA_DATA**2)


def time_value(t: Tensor) -> Tensor:
    """`250 ln t`, the value whose sinusoidal embedding becomes the time token."""
    return 250.0 * torch.log(t)


def level_for_sigma(sigma: float) -> float:
    """The noise level on the [-1, 1] scale of Gaussian noise `sigma` on the [0, 1] scale."""
    return 2.0 * sigma


def nearest_level(t: float, n: int = EVAL_SCALES) -> float:
    """The level of the n-level Karras grid nearest to t (both on the [-1, 1] scale)."""
    grid = karras_sigmas(n)
    return float(grid[(grid - t).abs().argmin()])
