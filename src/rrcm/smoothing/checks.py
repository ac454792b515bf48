"""Checks of arguments that several modules of this subpackage share."""

import math
import operator
from typing import SupportsIndex

from rrcm.smoothing.errors import SmoothingError


def check_count(name: str, value: SupportsIndex, minimum: int) -> int:
    """`value` as an int, refused if it is no whole number or below `minimum`."""
    try:
        number = operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise SmoothingError(f"{name} must be a whole number, got {value!r} ({kind})") from None
    if number < minimum:
        raise SmoothingError(f"{name} must be at least {minimum}, got {number}")
    return number


def check_hits(k: SupportsIndex, n: SupportsIndex) -> tuple[int, int]:
    """`k` hits in `n` draws, as ints with 0 <= k <= n and n >= 1."""
    draws = check_count("n", n, 1)
    hits = check_count("k", k, 0)
    if hits > draws:
        raise SmoothingError(f"k counts hits among n draws, so k <= n; got k={hits}, n={draws}")
    return hits, draws


def check_real(name: str, value: float) -> float:
    """`value` as a float, refused if it is no number or NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise SmoothingError(f"{name} must be a number, got {value!r}") from None
    if math.isnan(number):
        raise SmoothingError(f"{name} must be a number, got NaN")
    return number


def check_alpha(alpha: float) -> float:
    """`alpha` as a float strictly between 0 and 1."""
    number = check_real("alpha", alpha)
    if not 0.0 < number < 1.0:
        raise SmoothingError(f"alpha must lie between 0 and 1, both excluded, got {number}")
    return number


def check_sigma(sigma: float) -> float:
    """`sigma` as a positive finite float."""
    number = check_real("sigma", sigma)
    if not 0.0 < number < math.inf:
        raise SmoothingError(
            f"sigma (noise on the [0, 1] pixel scale) must be above 0 and finite, got {number}"
        )
    return number
