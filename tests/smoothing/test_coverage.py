"""The guarantee itself: radii above the truth are no more frequent than alpha.

Class counts are simulated; the decision on them is the one that `certify` uses. The same check
must refuse a bound that is wrong, or it would prove nothing.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from scipy import stats

from rrcm.smoothing import ABSTAIN, Certificate, certificate_from_counts
from rrcm.smoothing.bounds import certified_radius, clopper_pearson_lower

RUNS = 20_000
SIGMA = 0.5


@cache
def decide(selection: tuple[int, ...], estimation: tuple[int, ...], alpha: float) -> Certificate:
    return certificate_from_counts(selection, estimation, sigma=SIGMA, alpha=alpha)


def allowed(alpha: float) -> int:
    """A number of errors that a correct procedure exceeds once in a million tests."""
    return int(stats.binom.isf(1e-6, RUNS, alpha))


def true_radius(p: float) -> float:
    return SIGMA * float(stats.norm.ppf(p))


def count_errors(p: float, n: int, alpha: float, radius_of: Callable[[int], float]) -> int:
    """How many of RUNS simulated certifications claim more than the true radius."""
    hits = np.random.default_rng(7).binomial(n, p, RUNS)
    values, times = np.unique(hits, return_counts=True)
    truth = true_radius(p)
    return sum(int(t) for k, t in zip(values, times, strict=True) if radius_of(int(k)) > truth)


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("n", [1000, 100_000])
@pytest.mark.parametrize("p", [0.501, 0.6, 0.9, 0.99, 1 - 1e-5])
def test_radii_exceed_the_truth_no_more_often_than_alpha(p: float, n: int, alpha: float) -> None:
    def radius(k: int) -> float:
        return decide((100, 0), (k, n - k), alpha).radius

    errors = count_errors(p, n, alpha, radius)
    assert errors <= allowed(alpha)
    if p < 0.95:  # near 1 the counts are so coarse that the bound is far from tight
        assert errors >= stats.binom.ppf(1e-6, RUNS, alpha / 2)  # nor is the bound needlessly loose


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("p", [0.501, 0.6, 0.9, 0.99])
def test_the_check_refuses_the_plug_in_bound(p: float, alpha: float) -> None:
    n = 1000

    def plug_in(k: int) -> float:
        return certified_radius(k / n, SIGMA)

    assert count_errors(p, n, alpha, plug_in) > allowed(alpha)


def test_the_check_refuses_a_bound_at_twice_alpha() -> None:
    """Sharp enough to notice a two-sided interval's limit taken for a one-sided one's."""
    n, alpha = 10_000, 0.05

    def loose(k: int) -> float:
        return certified_radius(clopper_pearson_lower(k, n, 2 * alpha), SIGMA)

    assert count_errors(0.9, n, alpha, loose) > allowed(alpha)


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize(
    "probabilities", [(0.34, 0.33, 0.33), (0.52, 0.48, 0.0), (0.45, 0.40, 0.15), (0.8, 0.15, 0.05)]
)
def test_wrong_selections_are_covered(probabilities: tuple[float, ...], alpha: float) -> None:
    """With few selection draws the picked class is often wrong; the promise must still hold."""
    rng = np.random.default_rng(11)
    selections = rng.multinomial(5, probabilities, RUNS).tolist()
    estimations = rng.multinomial(500, probabilities, RUNS).tolist()
    errors = wrong_tops = 0
    for selection, estimation in zip(selections, estimations, strict=True):
        certificate = decide(tuple(selection), tuple(estimation), alpha)
        wrong_tops += certificate.top != 0
        if certificate.prediction == ABSTAIN:
            assert certificate.radius == 0.0
            continue
        p = probabilities[certificate.prediction]
        errors += p <= 0.5 or certificate.radius > true_radius(p)
    if max(probabilities) < 0.6:
        assert wrong_tops > RUNS / 10
    assert errors <= allowed(alpha)


def test_reusing_the_selection_draws_breaks_the_promise() -> None:
    """Why there are two sets of draws: picking and bounding on one set is caught here."""
    rng = np.random.default_rng(13)
    alpha, errors = 0.05, 0
    for counts in rng.multinomial(500, (0.5, 0.5), RUNS).tolist():
        errors += decide(tuple(counts), tuple(counts), alpha).prediction != ABSTAIN
    assert errors > allowed(alpha)


def test_the_simulated_truth_is_the_radius_of_the_probability() -> None:
    assert math.isclose(true_radius(0.98), 0.5 * 2.0537489, rel_tol=1e-6)
