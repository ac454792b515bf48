"""The statistics of certification: confidence bounds, radii, p-values. Knows no torch.

Every value that a certificate rests on is rounded to the safe side: a lower bound and a radius
down, an upper bound up.
"""

import math
from decimal import Decimal
from typing import SupportsIndex

from scipy import special

from rrcm.smoothing.checks import check_alpha, check_count, check_hits, check_real, check_sigma
from rrcm.smoothing.errors import SmoothingError

# betaincinv was measured against 40-digit arithmetic (n up to 1e6): its result exceeds the exact
# one by less than 2e-14 relative. The margin is 50 times that; at n = 1e5 it costs under
# 4e-9 sigma of radius.
_BOUND_MARGIN = 1e-12
# ndtri exceeds the exact quantile by less than 5e-16 relative on [1/2, 1), and the product with
# sigma rounds once more.
_RADIUS_MARGIN = 2.0**-49


def clopper_pearson_lower(k: SupportsIndex, n: SupportsIndex, alpha: float) -> float:
    """One-sided lower confidence bound of a probability, from `k` hits in `n` independent draws.

    With probability at least 1 - alpha over the draws, the result does not exceed the probability
    of a hit. It is the alpha-quantile of Beta(k, n - k + 1), rounded down; 0 if k = 0, and
    alpha ** (1 / n) if k = n.

    Args:
        k: Number of hits, 0 <= k <= n.
        n: Number of draws, at least 1.
        alpha: Probability of error, between 0 and 1, both excluded.

    Raises:
        SmoothingError: An argument is out of its range.

    Source: Clopper and Pearson (1934); `LowerConfBound` of Cohen et al. (2019), section 3.2.2.
    """
    hits, draws = check_hits(k, n)
    alpha = check_alpha(alpha)
    if hits == 0:
        return 0.0
    if hits == draws:
        bound = math.pow(alpha, 1.0 / draws)
    else:
        bound = float(special.betaincinv(hits, draws - hits + 1, alpha))
    return bound * (1.0 - _BOUND_MARGIN)


def clopper_pearson_upper(k: SupportsIndex, n: SupportsIndex, alpha: float) -> float:
    """One-sided upper confidence bound of a probability, from `k` hits in `n` independent draws.

    With probability at least 1 - alpha over the draws, the result is not below the probability of
    a hit. It is one minus the lower bound of a miss, rounded up. Arguments and errors as
    `clopper_pearson_lower`.

    Source: Clopper and Pearson (1934).
    """
    hits, draws = check_hits(k, n)
    miss_lower = clopper_pearson_lower(draws - hits, draws, alpha)
    return min(1.0, math.nextafter(1.0 - miss_lower, math.inf))


def clopper_pearson_interval(
    k: SupportsIndex, n: SupportsIndex, alpha: float
) -> tuple[float, float]:
    """Two-sided confidence interval of a probability, from `k` hits in `n` independent draws.

    With probability at least 1 - alpha over the draws, the interval holds the probability of a
    hit; alpha / 2 is spent on each side. Arguments and errors as `clopper_pearson_lower`. For
    certified accuracy: k images certified out of n images drawn.

    Source: Clopper and Pearson (1934).
    """
    half = check_alpha(alpha) / 2.0
    return clopper_pearson_lower(k, n, half), clopper_pearson_upper(k, n, half)


def certified_radius(p_lower: float, sigma: float) -> float:
    """L2 radius in which the smoothed classifier cannot change its mind, rounded down.

    sigma * Phi^-1(p_lower) if p_lower > 1/2, else 0. If the top class has a probability of at
    least p_lower under noise N(0, sigma^2 I), the smoothed classifier returns that class at every
    image whose L2 distance is below the radius.

    Args:
        p_lower: Lower bound of the top class's probability, in [0, 1].
        sigma: Standard deviation of the noise, on the [0, 1] pixel scale; the radius has its unit.

    Raises:
        SmoothingError: An argument is out of its range.

    Source: Cohen et al. (2019), Theorem 1 with the runner-up bounded by 1 - p_lower.
    """
    p_lower = check_real("p_lower", p_lower)
    sigma = check_sigma(sigma)
    if not 0.0 <= p_lower <= 1.0:
        raise SmoothingError(f"p_lower is a probability, so it lies in [0, 1]; got {p_lower}")
    if p_lower <= 0.5:
        return 0.0
    return float(special.ndtri(p_lower)) * sigma * (1.0 - _RADIUS_MARGIN)


def max_radius(n: SupportsIndex, alpha: float, sigma: float) -> float:
    """Largest radius that `n` draws can certify: the one of n hits in n draws.

    0 means that no certificate is possible at this n and alpha. Arguments and errors as
    `clopper_pearson_lower` and `certified_radius`.
    """
    return certified_radius(clopper_pearson_lower(n, n, alpha), sigma)


def format_radius(radius: float, digits: int = 3) -> str:
    """`radius` with `digits` decimals, rounded down, so that float(text) <= radius always holds.

    Args:
        radius: A radius, 0 or more, finite.
        digits: Number of decimals, 0 or more.

    Raises:
        SmoothingError: An argument is out of its range.
    """
    radius = check_real("radius", radius)
    digits = check_count("digits", digits, 0)
    if not 0.0 <= radius < math.inf:
        raise SmoothingError(f"a radius is finite and not negative, got {radius}")
    # The shortest decimal that reads back as `radius`, not its binary expansion: 0.3 stays "0.3".
    text = format(Decimal(repr(radius)), "f")
    whole, _, fraction = text.partition(".")
    return whole if digits == 0 else f"{whole}.{fraction[:digits].ljust(digits, '0')}"


def top_two_p_value(k1: SupportsIndex, k2: SupportsIndex) -> float:
    """P-value of the two-sided binomial test of `k1` hits in `k1 + k2` draws against 1/2.

    Args:
        k1: Count of one of the two most frequent classes, 0 or more.
        k2: Count of the other, 0 or more. The order does not matter.

    Returns:
        The probability, under fair draws, of a split at least as uneven; 1 if both are 0.

    Raises:
        SmoothingError: A count is negative or no whole number.

    Source: `BinomPValue` of Cohen et al. (2019), section 3.2.1; Hung and Fithian (2019).
    """
    first, second = check_count("k1", k1, 0), check_count("k2", k2, 0)
    low, high = min(first, second), max(first, second)
    if low == high:
        return 1.0
    # P(X >= high) for X ~ Binomial(low + high, 1/2); the distribution is symmetric, so twice that.
    return min(1.0, 2.0 * float(special.betainc(high, low + 1, 0.5)))
