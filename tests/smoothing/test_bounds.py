"""Bounds, radii and p-values against closed forms, published figures and direct sums."""

import math
from itertools import pairwise

import pytest
from scipy import stats

from rrcm.smoothing.bounds import (
    certified_radius,
    clopper_pearson_interval,
    clopper_pearson_lower,
    clopper_pearson_upper,
    format_radius,
    max_radius,
    top_two_p_value,
)
from rrcm.smoothing.errors import SmoothingError


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.5])
@pytest.mark.parametrize(("k", "n"), [(1, 10), (7, 10), (55, 100), (990, 1000), (60_000, 100_000)])
def test_the_lower_bound_solves_its_equation(k: int, n: int, alpha: float) -> None:
    """The bound is the p at which k or more hits have probability alpha."""
    bound = clopper_pearson_lower(k, n, alpha)
    assert stats.binom.sf(k - 1, n, bound) == pytest.approx(alpha, rel=1e-6)
    assert bound == pytest.approx(stats.beta.ppf(alpha, k, n - k + 1), rel=1e-11)


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (9, 10), (450, 500)])
def test_the_upper_bound_solves_its_equation(k: int, n: int, alpha: float) -> None:
    bound = clopper_pearson_upper(k, n, alpha)
    assert stats.binom.cdf(k, n, bound) == pytest.approx(alpha, rel=1e-6)


@pytest.mark.parametrize("n", [1, 100, 100_000])
def test_edges(n: int) -> None:
    assert clopper_pearson_lower(0, n, 0.001) == 0.0
    assert clopper_pearson_upper(n, n, 0.001) == 1.0
    all_hits = clopper_pearson_lower(n, n, 0.001)
    assert all_hits == pytest.approx(0.001 ** (1 / n), rel=1e-11)
    assert all_hits < 0.001 ** (1 / n)


def test_the_lower_bound_is_never_above_the_float_quantile() -> None:
    """Rounded down: below what scipy computes, by less than anyone could notice."""
    for k in range(1, 1000, 7):
        raw = float(stats.beta.ppf(0.001, k, 1000 - k + 1))
        bound = clopper_pearson_lower(k, 1000, 0.001)
        assert raw * (1 - 2e-12) < bound < raw


def test_monotonic() -> None:
    by_hits = [clopper_pearson_lower(k, 200, 0.001) for k in range(201)]
    assert all(a < b for a, b in pairwise(by_hits))
    by_alpha = [clopper_pearson_lower(80, 100, alpha) for alpha in (1e-6, 1e-3, 0.05, 0.5)]
    assert by_alpha == sorted(by_alpha)
    by_draws = [clopper_pearson_lower(9 * n, 10 * n, 0.001) for n in (1, 10, 100, 1000)]
    assert by_draws == sorted(by_draws)


def test_interval_spends_half_of_alpha_on_each_side() -> None:
    low, high = clopper_pearson_interval(300, 500, 0.05)
    assert low == clopper_pearson_lower(300, 500, 0.025)
    assert high == clopper_pearson_upper(300, 500, 0.025)
    expected = stats.binomtest(300, 500).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.mark.parametrize(
    ("n", "radius"),
    [(100, 1.5005), (10**3, 2.4633), (10**4, 3.1986), (10**5, 3.8115), (10**6, 4.3468)],
)
def test_largest_radius_of_n_draws(n: int, radius: float) -> None:
    assert max_radius(n, 0.001, 1.0) == pytest.approx(radius, abs=5e-5)
    assert max_radius(n, 0.001, 0.25) == pytest.approx(radius / 4, abs=2e-5)


def test_too_few_draws_certify_nothing() -> None:
    assert max_radius(9, 0.001, 1.0) == 0.0  # 0.001 ** (1 / 9) < 1/2
    assert max_radius(10, 0.001, 1.0) > 0.0


@pytest.mark.parametrize("p", [0.500001, 0.6, 0.98, 0.99999])
@pytest.mark.parametrize("sigma", [0.12, 0.25, 1.0])
def test_radius_is_rounded_down(p: float, sigma: float) -> None:
    exact = sigma * float(stats.norm.ppf(p))
    radius = certified_radius(p, sigma)
    assert exact * (1 - 1e-14) < radius < exact


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5])
def test_no_radius_at_or_below_one_half(p: float) -> None:
    assert certified_radius(p, 0.5) == 0.0


@pytest.mark.parametrize(
    ("radius", "digits", "text"),
    [
        (0.6899999, 3, "0.689"),
        (0.9999, 2, "0.99"),
        (0.3, 1, "0.3"),
        (0.3, 4, "0.3000"),
        (2.5, 0, "2"),
        (1e-7, 3, "0.000"),
        (0.0, 3, "0.000"),
    ],
)
def test_format_radius_rounds_down(radius: float, digits: int, text: str) -> None:
    assert format_radius(radius, digits) == text


def test_printed_radius_never_exceeds_the_radius() -> None:
    for p in (0.5 + 0.4999 * i / 997 for i in range(1, 997)):
        radius = certified_radius(p, 0.25)
        assert radius - 1e-4 < float(format_radius(radius, 4)) <= radius


@pytest.mark.parametrize(("k1", "k2"), [(5, 5), (6, 4), (10, 0), (60, 40), (4, 6), (5030, 4970)])
def test_p_value_of_the_top_two(k1: int, k2: int) -> None:
    expected = stats.binomtest(k1, k1 + k2, 0.5).pvalue
    assert top_two_p_value(k1, k2) == pytest.approx(expected, rel=1e-9)


def test_p_value_without_draws_is_one() -> None:
    assert top_two_p_value(0, 0) == 1.0


@pytest.mark.parametrize("bound", [clopper_pearson_lower, clopper_pearson_upper])
@pytest.mark.parametrize(
    ("k", "n", "alpha", "message"),
    [
        (0, 0, 0.1, "n must be at least 1, got 0"),
        (-1, 10, 0.1, "k must be at least 0, got -1"),
        (11, 10, 0.1, "k=11, n=10"),
        (1.5, 10, 0.1, "k must be a whole number, got 1.5"),
        (1, 1e5, 0.1, "n must be a whole number"),
        (1, 10, 0.0, "alpha must lie between 0 and 1"),
        (1, 10, 1.0, "alpha must lie between 0 and 1"),
        (1, 10, math.nan, "alpha must be a number, got NaN"),
        (1, 10, "a", "alpha must be a number, got 'a'"),
    ],
)
def test_bad_input_of_a_bound(bound, k, n, alpha, message) -> None:
    with pytest.raises(SmoothingError, match=message):
        bound(k, n, alpha)


@pytest.mark.parametrize(
    ("p", "sigma", "message"),
    [
        (0.9, 0.0, "sigma .* above 0"),
        (0.9, -1.0, "sigma .* above 0"),
        (0.9, math.inf, "sigma .* finite"),
        (0.9, math.nan, "sigma must be a number, got NaN"),
        (1.1, 1.0, "p_lower is a probability"),
        (-0.1, 1.0, "p_lower is a probability"),
        (math.nan, 1.0, "p_lower must be a number, got NaN"),
    ],
)
def test_bad_input_of_a_radius(p: float, sigma: float, message: str) -> None:
    with pytest.raises(SmoothingError, match=message):
        certified_radius(p, sigma)


@pytest.mark.parametrize(
    ("radius", "digits"), [(-0.1, 3), (math.inf, 3), (math.nan, 3), (1.0, -1), (1.0, 1.5)]
)
def test_bad_input_of_format_radius(radius, digits) -> None:
    with pytest.raises(SmoothingError):
        format_radius(radius, digits)


def test_bad_counts_of_the_top_two() -> None:
    with pytest.raises(SmoothingError, match="k2 must be at least 0"):
        top_two_p_value(3, -1)
