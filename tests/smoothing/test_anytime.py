"""Anytime bounds: against 35-digit arithmetic, by exact recursion, and by a million runs."""

import math
from collections.abc import Callable
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from scipy import special, stats

from rrcm.smoothing import anytime
from rrcm.smoothing.anytime import (
    AnytimeBound,
    AnytimeTest,
    StopRule,
    anytime_lower,
    anytime_upper,
    next_draws,
    simulate,
)
from rrcm.smoothing.bounds import certified_radius, clopper_pearson_lower, max_radius
from rrcm.smoothing.errors import SmoothingError

SIGMA = 0.25
PROBABILITIES = [0.4999, 0.5, 0.5001, 0.6, 0.8413, 0.9, 0.99, 0.999, 1 - 1e-5]
RUNS = 15_000  # of each case below; 9 probabilities, 2 alphas and 4 rules make 1,080,000
RULES = {
    "radii": StopRule(n_max=3000, radii=(0.0, 0.1, 0.25, 0.4, 0.5)),
    "tolerance": StopRule(n_max=3000, tolerance=0.02),
    "relative": StopRule(n_max=3000, relative_tolerance=0.1, give_up=0.2),
    "budget": StopRule(n_max=3000, give_up=1e-9),
}


# --- The bound of one (k, n) ---


def exact_bound(k: int, n: int, alpha: float) -> mpmath.mpf:
    """The p at which the mean likelihood ratio of ten alternatives equals 1 / alpha."""
    with mpmath.workdps(35):
        tilts = [mpmath.mpf(30)] + [mpmath.mpf(2) ** i for i in range(2, -7, -1)]
        odds = [mpmath.exp(tilt) for tilt in tilts]

        def settled(p: mpmath.mpf) -> bool:
            alternatives = [o * p / (1 - p + o * p) for o in odds]
            ratios = [
                mpmath.exp(k * mpmath.log(q / p) + (n - k) * mpmath.log((1 - q) / (1 - p)))
                for q in alternatives
            ]
            return sum(ratios) / len(ratios) >= 1 / mpmath.mpf(alpha)

        low, high = mpmath.mpf(0), mpmath.mpf(1)
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if settled(middle) else (low, middle)
        return low


@pytest.mark.parametrize("alpha", [1e-6, 0.001, 0.05])
@pytest.mark.parametrize("n", [1, 14, 1000, 100_000, 1_000_000])
def test_the_bound_is_just_below_the_exact_one(n: int, alpha: float) -> None:
    for misses in sorted({0, 1, 3, n // 1000, n // 10, n // 2, n - 1, n} & set(range(n + 1))):
        exact = exact_bound(n - misses, n, alpha)
        bound = anytime_lower(n - misses, n, alpha)
        assert bound <= exact
        assert bound == 0.0 or exact - bound <= 1e-9 * (1 - exact)


def test_the_upper_bound_mirrors_the_lower_one() -> None:
    for k, n in [(0, 10), (3, 10), (10, 10), (700, 1000)]:
        mirrored = 1.0 - anytime_lower(n - k, n, 0.01)
        assert anytime_upper(k, n, 0.01) == pytest.approx(mirrored, abs=1e-15)
        assert anytime_lower(k, n, 0.01) < k / n + 1e-12 <= anytime_upper(k, n, 0.01) + 1e-12
    assert anytime_upper(10, 10, 0.01) == 1.0
    assert anytime_lower(0, 10, 0.01) == 0.0


def test_monotonic() -> None:
    by_hits = [anytime_lower(k, 200, 0.001) for k in range(201)]
    assert all(a <= b for a, b in pairwise(by_hits))
    assert all(a < b for a, b in pairwise(b for b in by_hits if b > 0.1))
    by_draws = [anytime_lower(9 * n, 10 * n, 0.001) for n in (1, 10, 100, 1000, 10_000)]
    assert by_draws == sorted(by_draws)
    by_alpha = [anytime_lower(80, 100, alpha) for alpha in (1e-6, 1e-3, 0.05, 0.5)]
    assert by_alpha == sorted(by_alpha)


@pytest.mark.parametrize(("k", "n"), [(10, 10), (60, 100), (9_900, 10_000)])
def test_never_above_what_a_fixed_number_of_draws_gives(k: int, n: int) -> None:
    assert anytime_lower(k, n, 0.001) < clopper_pearson_lower(k, n, 0.001)


@pytest.mark.parametrize(
    ("p0", "fixed", "jeffreys"),
    [(0.8413447, 40, 55), (0.9772499, 301, 459), (0.9986501, 5114, 8904)],
)
def test_fewer_draws_than_the_jeffreys_mixture(p0: float, fixed: int, jeffreys: int) -> None:
    """Draws, all hits, that decide p > Phi(1), Phi(2), Phi(3) at alpha = 0.001."""

    def jeffreys_wealth(n: int) -> float:
        log_mixture = special.betaln(n + 0.5, 0.5) - special.betaln(0.5, 0.5)
        return float(log_mixture - n * math.log(p0))

    goal = math.log(1000)
    assert jeffreys_wealth(jeffreys) >= goal > jeffreys_wealth(jeffreys - 1)
    assert clopper_pearson_lower(fixed, fixed, 0.001) > p0
    ours = next(n for n in range(fixed, jeffreys) if anytime_lower(n, n, 0.001) > p0)
    assert ours <= 0.9 * jeffreys


# --- The guarantee, exactly ---


def crossing_probability(p: float, n_max: int, bound_alpha: float) -> float:
    """Chance that the bound, looked at after every one of n_max draws, ever exceeds p."""
    n = np.arange(1.0, n_max + 1)
    # The least count whose bound exceeds p, for every n at once.
    low, high = np.full(n_max, -1.0), n + 1
    while (high - low > 1).any():
        middle = np.minimum(np.floor((low + high) / 2), n)
        above = anytime._lower(middle, n, bound_alpha) > p
        unsure = high - low > 1
        high = np.where(unsure & above, middle, high)
        low = np.where(unsure & ~above, middle, low)
    still, crossed = np.ones(1), 0.0
    for first in high.astype(int):
        after = np.append(still * (1 - p), 0.0) + np.append(0.0, still * p)
        crossed += float(after[first:].sum())
        still = after[:first]
    return crossed


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_looking_after_every_draw_errs_with_less_than_alpha(p: float) -> None:
    error = crossing_probability(p, 3000, 0.05)
    assert 0.025 < error <= 0.05  # valid, and not needlessly loose


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_twice_alpha_is_caught(p: float) -> None:
    assert crossing_probability(p, 3000, 0.1) > 0.05


def error_of_all_looks(test: AnytimeTest, p: float) -> float:
    """Chance that a run that never stops early ever holds a bound above p; no rule errs more."""
    n_max = test.rule.n_max
    still, wrong, n = np.ones(1), 0.0, 0
    while n < n_max:
        more = next_draws(n, n_max)
        n += more
        still = np.convolve(still, stats.binom.pmf(np.arange(more + 1), more, p))
        p_lower, _ = test.look(np.arange(n + 1), n)
        wrong += float(still[p_lower > p].sum())
        still[p_lower > p] = 0.0
    return wrong


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("p", PROBABILITIES)
def test_no_stopping_rule_errs_with_more_than_alpha(p: float, alpha: float) -> None:
    assert error_of_all_looks(AnytimeTest(SIGMA, alpha, StopRule(n_max=3000)), p) <= alpha


def test_the_budget_of_a_real_run() -> None:
    error = error_of_all_looks(AnytimeTest(SIGMA, 0.05, StopRule(n_max=12_000)), 0.6)
    assert 0.01 < error <= 0.05


# --- The guarantee, by a million whole certifications ---


def errors_of_runs(test: AnytimeTest, p: float, rng: np.random.Generator) -> int:
    """How many of RUNS simulated certifications claim more than the true radius."""
    _, p_lower = simulate(test, np.full(RUNS, p), rng)
    truth = test.sigma * max(0.0, float(special.ndtri(p)))
    values, times = np.unique(p_lower, return_counts=True)
    claims = [certified_radius(float(value), test.sigma) for value in values]
    return sum(int(t) for claim, t in zip(claims, times, strict=True) if claim > truth)


def allowed(alpha: float) -> int:
    """A number of errors that a correct procedure exceeds once in a million tests."""
    return int(stats.binom.isf(1e-6, RUNS, alpha))


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("mode", RULES)
def test_radii_exceed_the_truth_no_more_often_than_alpha(mode: str, alpha: float) -> None:
    rng = np.random.default_rng(20)
    test = AnytimeTest(SIGMA, alpha, RULES[mode])
    for p in PROBABILITIES:
        assert errors_of_runs(test, p, rng) <= allowed(alpha), p


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("mode", RULES)
def test_the_check_refuses_peeking_at_a_fixed_bound(
    mode: str, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clopper-Pearson at full alpha at each look."""

    def peek(hits: np.ndarray, draws: np.ndarray, alpha: float) -> np.ndarray:
        some = np.maximum(hits, 1)
        return np.where(hits > 0, special.betaincinv(some, draws - some + 1, alpha), 0.0)

    monkeypatch.setattr(anytime, "_lower", peek)
    rng = np.random.default_rng(21)
    test = AnytimeTest(SIGMA, alpha, RULES[mode])
    errors = [errors_of_runs(test, p, rng) for p in (0.5001, 0.9)]
    assert max(errors) > allowed(alpha)


# --- What the runs decide ---


def test_radii_are_decided_as_the_truth_has_it() -> None:
    """Radii well below the true one are certified, those above are not, with few draws."""
    radii = (0.0, 0.25, 0.5, 0.75, 1.0)
    test = AnytimeTest(0.5, 0.001, StopRule(radii=radii))
    p = float(special.ndtr(0.62 / 0.5))
    draws, p_lower = simulate(test, np.full(2000, p), np.random.default_rng(1))
    claims = np.array([certified_radius(float(bound), 0.5) for bound in p_lower])
    assert np.mean(claims >= 0.5) > 0.97
    assert np.mean(claims >= 0.75) == 0.0
    assert draws.mean() < 4000


def test_a_certified_radius_of_the_list_is_reached_by_the_radius_reported() -> None:
    """No gap by rounding between "r is certified" and `radius >= r`."""
    for radius in (0.1, 0.25, 0.3, 0.7, 0.75):
        needed = anytime._probability_for(radius, SIGMA)
        assert certified_radius(needed, SIGMA) >= radius
        assert certified_radius(needed * (1 - 1e-14), SIGMA) < radius
    assert anytime._probability_for(0.0, SIGMA) > 0.5


@pytest.mark.parametrize(("field", "value"), [("tolerance", 0.02), ("relative_tolerance", 0.1)])
def test_a_tolerance_loses_about_what_it_says(field: str, value: float) -> None:
    test = AnytimeTest(0.5, 0.001, StopRule(n_max=20_000, **{field: value}))
    full = AnytimeTest(0.5, 0.001, StopRule(n_max=20_000, give_up=1e-9))
    for p in (0.6, 0.9, 0.99):
        draws, p_lower = simulate(test, np.full(400, p), np.random.default_rng(2))
        _, p_full = simulate(full, np.full(400, p), np.random.default_rng(3))
        mean = 0.5 * special.ndtri(np.maximum(p_lower, 0.5)).mean()
        mean_full = 0.5 * special.ndtri(np.maximum(p_full, 0.5)).mean()
        loss = value if field == "tolerance" else value * mean_full
        assert mean_full - mean <= loss
        assert draws.mean() < 20_000


def test_abstention_is_early_and_never_certifies() -> None:
    test = AnytimeTest(SIGMA, 0.001, StopRule(n_max=100_000, tolerance=0.01))
    bound = AnytimeBound(test)
    while not bound.settled:
        more = bound.next_draws()
        bound.update(more // 4, more)
    assert (bound.reason, bound.radius) == ("hopeless", 0.0)
    assert bound.draws < 500
    draws, p_lower = simulate(test, np.full(5000, 0.45), np.random.default_rng(4))
    assert draws.max() < 100_000
    assert p_lower.max() <= 0.5


@pytest.mark.parametrize(("distance", "loss"), [(4.5, 0.13), (8.0, 0.03), (16.0, 0.005)])
def test_giving_up_costs_few_certificates(distance: float, loss: float) -> None:
    """Against drawing the whole budget: something at the edge of what it can, little beyond."""
    needed, n_max = float(special.ndtr(1.0)), 20_000
    p = needed + distance * math.sqrt(needed * (1 - needed) / n_max)
    test = AnytimeTest(SIGMA, 0.001, StopRule(n_max=n_max, radii=(SIGMA,)))
    _, p_lower = simulate(test, np.full(4000, p), np.random.default_rng(5))
    least = next(k for k in range(n_max) if clopper_pearson_lower(k, n_max, 0.0002) >= needed)
    whole_budget = stats.binom.sf(least - 1, n_max, p)
    assert np.mean(p_lower >= needed) > whole_budget - loss


# --- A run ---


def test_the_bound_is_the_running_maximum_and_batches_do_not_matter() -> None:
    test = AnytimeTest(SIGMA, 0.001, StopRule(n_max=10_000))
    bound, best, seen = AnytimeBound(test), 0.0, 0.0
    for hits, draws in [(100, 100), (7, 50), (0, 30), (900, 900), (1, 1)]:
        bound.update(hits, draws)
        best = max(best, anytime_lower(bound.hits, bound.draws, 0.0008 * (1 - 2.0**-50)))
        assert bound.p_lower >= seen
        assert bound.p_lower == pytest.approx(best, abs=1e-12)
        seen = bound.p_lower
    assert (bound.hits, bound.draws) == (1008, 1081)
    assert bound.radius == certified_radius(bound.p_lower, SIGMA)
    at_once = AnytimeBound(test)
    at_once.update(1008, 1081)
    assert at_once.p_lower <= bound.p_lower


def test_the_last_draw_brings_the_sharper_bound() -> None:
    test = AnytimeTest(SIGMA, 0.001, StopRule(n_max=1000))
    bound = AnytimeBound(test)
    bound.update(899, 999)
    before = bound.p_lower
    assert not bound.settled
    assert bound.reason is None
    assert bound.update(1, 1)
    assert bound.reason == "budget"
    assert bound.p_lower == clopper_pearson_lower(900, 1000, 0.001 * 0.2) > before
    assert bound.next_draws() == 0


def test_the_parts_of_alpha_do_not_exceed_it() -> None:
    for alpha in (1e-9, 0.001, 0.05, 0.3, 0.7):
        test = AnytimeTest(SIGMA, alpha, StopRule())
        assert test._alpha_path + test._alpha_final <= alpha
        assert test._alpha_path + test._alpha_final > alpha * (1 - 1e-14)


@pytest.mark.parametrize(
    ("rule", "hits", "reason"),
    [
        (StopRule(radii=(0.25,)), 1000, "answered"),
        (StopRule(radii=(0.25,)), 400, "hopeless"),
        (StopRule(radii=(0.0, 0.5)), 700, "answered"),
        (StopRule(tolerance=0.3), 950, "tolerance"),
        (StopRule(relative_tolerance=0.5), 950, "tolerance"),
        (StopRule(tolerance=0.01), 400, "hopeless"),
        (StopRule(tolerance=0.01), 950, None),
        (StopRule(), 1000, None),
        (StopRule(n_max=1000), 1000, "budget"),
    ],
)
def test_reasons(rule: StopRule, hits: int, reason: str | None) -> None:
    bound = AnytimeBound(AnytimeTest(SIGMA, 0.001, rule))
    assert bound.update(hits, 1000) is (reason is not None)
    assert bound.reason == reason


def test_looks_meet_the_budget_exactly() -> None:
    n, looks = 0, 0
    while more := next_draws(n, 100_000):
        n, looks = n + more, looks + 1
    assert n == 100_000
    assert looks == 71


# --- Bad input ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_max": 0}, "n_max must be at least 1, got 0"),
        ({"n_max": 1e5}, "n_max must be a whole number"),
        ({"radii": (-0.1, 0.2)}, "finite and not negative"),
        ({"radii": (0.1, math.inf)}, "finite and not negative"),
        ({"radii": (0.1, math.nan)}, "must be a number, got NaN"),
        ({"radii": (0.5, 0.25)}, "must ascend without repeats"),
        ({"radii": (0.25, 0.25)}, "must ascend without repeats"),
        ({"tolerance": 0.0}, "tolerance must be above 0, got 0"),
        ({"tolerance": -0.1}, "tolerance must be above 0"),
        ({"relative_tolerance": 1.0}, "relative_tolerance must lie between 0 and 1"),
        ({"give_up": 0.0}, "give_up must be above 0"),
        ({"give_up": 0.6}, "give_up must be above 0 and at most 0.5"),
        ({"radii": (0.1,), "tolerance": 0.1}, "at most one of"),
        ({"tolerance": 0.1, "relative_tolerance": 0.1}, "at most one of"),
    ],
)
def test_bad_rules(fields: dict, message: str) -> None:
    with pytest.raises(SmoothingError, match=message):
        StopRule(**fields)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.0, 1.0), (1.0, 1.0), (math.nan, 1.0), (0.1, 0.0)])
def test_bad_alpha_or_sigma(alpha: float, sigma: float) -> None:
    with pytest.raises(SmoothingError, match="alpha|sigma"):
        AnytimeTest(sigma, alpha, StopRule())


@pytest.mark.parametrize(("radius", "n_max"), [(0.75, 1000), (0.95, 20_000), (0.25, 20)])
def test_radii_beyond_the_budget_name_one_that_suffices(radius: float, n_max: int) -> None:
    with pytest.raises(SmoothingError, match=r"n_max=\d+ could") as caught:
        AnytimeTest(SIGMA, 0.001, StopRule(n_max=n_max, radii=(0.1, radius)))
    assert "\n" not in str(caught.value)
    enough = int(str(caught.value).split("n_max=")[2].split()[0])
    test = AnytimeTest(SIGMA, 0.001, StopRule(n_max=enough, radii=(0.1, radius)))
    bound = AnytimeBound(test)
    bound.update(enough, enough)
    assert bound.radius >= radius
    with pytest.raises(SmoothingError):
        AnytimeTest(SIGMA, 0.001, StopRule(n_max=enough - 1, radii=(0.1, radius)))


def test_budgets_that_certify_nothing_are_refused() -> None:
    with pytest.raises(SmoothingError, match="cannot certify any radius .* n_max=13 could"):
        AnytimeTest(SIGMA, 0.001, StopRule(n_max=5, tolerance=0.1))
    with pytest.raises(SmoothingError, match="nor can any number"):
        AnytimeTest(SIGMA, 0.001, StopRule(radii=(20.0,)))


def test_the_largest_radius_is_that_of_the_last_fifth_of_alpha() -> None:
    AnytimeTest(SIGMA, 0.001, StopRule(radii=(max_radius(100_000, 0.001 * 0.2, SIGMA),)))


@pytest.mark.parametrize(
    ("hits", "draws", "message"),
    [
        (5, 4, "k=5, n=4"),
        (-1, 4, "k must be at least 0"),
        (0, 0, "n must be at least 1"),
        (50, 101, "draws must not exceed n_max=100"),
    ],
)
def test_bad_counts(hits: int, draws: int, message: str) -> None:
    bound = AnytimeBound(AnytimeTest(SIGMA, 0.001, StopRule(n_max=100)))
    with pytest.raises(SmoothingError, match=message):
        bound.update(hits, draws)
    assert (bound.hits, bound.draws, bound.p_lower) == (0, 0, 0.0)


@pytest.mark.parametrize("hits", [[3, 11], [-1, 3], [1.5], [math.nan]])
def test_bad_hits_of_many_runs(hits: list[float]) -> None:
    with pytest.raises(SmoothingError, match="hits must be whole numbers from 0 to draws=10"):
        AnytimeTest(SIGMA, 0.001, StopRule(n_max=100)).look(hits, 10)


@pytest.mark.parametrize("bound", [anytime_lower, anytime_upper])
@pytest.mark.parametrize(
    ("k", "n", "alpha"), [(0, 0, 0.1), (-1, 10, 0.1), (11, 10, 0.1), (1, 10, 0.0), (1, 10, 1.0)]
)
def test_bad_input_of_a_bound(
    bound: Callable[[int, int, float], float], k: int, n: int, alpha: float
) -> None:
    with pytest.raises(SmoothingError):
        bound(k, n, alpha)
