"""Certificates that hold whenever one stops drawing: as many draws as the question needs.

CERTIFY of Cohen et al. (2019) draws a fixed number of noisy copies. Here they arrive in batches,
and drawing may stop after any of them, for whatever reason; the error probability alpha covers
every stopping time at once. As in CERTIFY, the class must come from separate selection draws.
docs/anytime.md tells why it holds and what it saves. Knows no torch.

    >>> test = AnytimeTest(sigma=0.5, alpha=0.001, rule=StopRule(radii=(0.25, 0.5, 0.75)))
    >>> bound = AnytimeBound(test)
    >>> while not bound.settled:
    ...     draws = bound.next_draws()
    ...     bound.update(count_hits(draws), draws)
    >>> print(bound.radius, bound.draws, bound.reason)
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from rrcm.smoothing.bounds import certified_radius, clopper_pearson_lower
from rrcm.smoothing.checks import check_alpha, check_count, check_hits, check_real, check_sigma
from rrcm.smoothing.errors import SmoothingError

# The bets: alternatives to p0 whose odds of a hit are exp(tilt) times those of p0, with a tenth of
# the wealth each. Small tilts win when p is barely above p0 and draws are many, large ones when it
# is far above; exp(30) stands for "every draw hits". One grid serves every p0, n and alpha: finer,
# coarser or tuned to p0, it changed the mean number of draws by 5 % at most (docs/anytime.md).
_TILTS = np.array([30.0, *(2.0**-i for i in range(-2, 7))])
_LOG_STAKE = -math.log(len(_TILTS))
_ODDS_LOSS = -np.expm1(-_TILTS)  # 1 - exp(-tilt)
# Rounding. The terms of the log wealth that decide at the bound are differences of two numbers not
# above n in size, each a few units in the last place off; so the log threshold is raised by
# 1e-12 + 1e-15 n. The bound of a miss, found so, is then raised by 1e-12 relative, and 1 minus it
# rounded down. Measured against 50-digit arithmetic (n up to 1e6), the result is never above the
# exact bound, and below it by less than 1e-9 of its distance from 1.
_LOG_MARGIN = 1e-12
_LOG_MARGIN_PER_DRAW = 1e-15
_MISS_MARGIN = 1e-12
# Newton's method gains digits quadratically; 6 steps leave less than 1e-9 of the bound's distance
# from 1 unused, and any number of steps is safe.
_NEWTON_STEPS = 6

# The part of alpha kept for one Clopper-Pearson bound at n_max, which is sharper there than any
# bound that also had to hold before.
_FINAL_SHARE = 0.2
# Looks: the first after so many draws, then each time the draws have grown by a tenth.
_FIRST_LOOK = 32
_GROWTH = 10

Floats = NDArray[np.float64]
Reason = Literal["answered", "tolerance", "hopeless", "budget"]


def _misses_upper(misses: Floats, draws: Floats, alpha: float) -> Floats:
    """Upper confidence sequence of the probability of a miss; values of 1 or more say nothing.

    The wealth against "a miss has probability u or more" is the mean over the tilts t of
    exp(-misses * t) / (1 - u * (1 - exp(-t))) ** draws. It is a supermartingale that starts at 1
    under every probability of a miss from u on, so it ever reaches 1 / alpha with probability at
    most alpha. It grows with u; the bound is the u at which it equals 1 / alpha.
    """
    misses, draws = misses[..., None], draws[..., None]
    target = -math.log(alpha) + _LOG_MARGIN + _LOG_MARGIN_PER_DRAW * draws
    # Where one bet alone reaches the target: to the right of the solution.
    alone = -np.expm1((_LOG_STAKE - target - misses * _TILTS) / draws) / _ODDS_LOSS
    upper: Floats = alone.min(axis=-1)
    # The log wealth is convex in u, so Newton's method comes down from the right and never passes
    # the solution: each step is a valid bound. At 1 - 2^-30 or more, there is nothing to refine.
    open_ = upper < 1.0 - 2.0**-30
    u = np.where(open_, upper, 0.5)[..., None]
    for _ in range(_NEWTON_STEPS):
        paid = 1.0 - u * _ODDS_LOSS
        terms = _LOG_STAKE - misses * _TILTS - draws * np.log1p(-u * _ODDS_LOSS)
        peak = terms.max(axis=-1, keepdims=True)
        shares = np.exp(terms - peak)
        total = shares.sum(axis=-1, keepdims=True)
        slope = (shares * draws * _ODDS_LOSS / paid).sum(axis=-1, keepdims=True) / total
        excess = peak + np.log(total) - target
        u = u - np.maximum(excess, 0.0) / slope
    return np.where(open_, u[..., 0], upper)


def _lower(hits: Floats, draws: Floats, alpha: float) -> Floats:
    """`anytime_lower` of arrays, unchecked."""
    misses = _misses_upper(draws - hits, draws, alpha) * (1.0 + _MISS_MARGIN)
    return np.maximum(np.nextafter(1.0 - misses, -1.0), 0.0)


def anytime_lower(k: SupportsIndex, n: SupportsIndex, alpha: float) -> float:
    """Lower confidence bound of a probability that holds at every number of draws at once.

    With probability at least 1 - alpha over an endless sequence of independent draws, for no n is
    the result above the probability of a hit. So one may look after every draw, stop whenever one
    likes, and report the largest bound seen on the way. It is rounded down.

    Args:
        k: Number of hits, 0 <= k <= n.
        n: Number of draws, at least 1; the rounding was verified up to 1e6.
        alpha: Probability of error, between 0 and 1, both excluded.

    Raises:
        SmoothingError: An argument is out of its range.

    Source: a mixture of likelihood ratios with Ville's inequality (Ville, 1939; Robbins, 1970), as
        in betting (Waudby-Smith and Ramdas, 2024); the alternatives are this module's.
    """
    hits, draws = check_hits(k, n)
    return float(_lower(np.array([hits], float), np.array([draws], float), check_alpha(alpha))[0])


def anytime_upper(k: SupportsIndex, n: SupportsIndex, alpha: float) -> float:
    """Upper confidence bound of a probability that holds at every number of draws at once.

    One minus the lower bound of a miss, rounded up. Arguments, errors and source as
    `anytime_lower`.
    """
    hits, draws = check_hits(k, n)
    return min(1.0, math.nextafter(1.0 - anytime_lower(draws - hits, draws, alpha), math.inf))


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When to stop drawing. None of it touches the guarantee; it only decides what draws buy.

    At most one of `radii`, `tolerance` and `relative_tolerance` is given. Drawing stops as soon as
    the question is settled, given the radius certified so far and the radius within reach: what
    the final bound at `n_max` would certify if the rest of the draws went plausibly well.

    Raises:
        SmoothingError: A field is out of its range, or several questions are asked.
    """

    n_max: int = 100_000
    """Largest number of estimation draws, at least 1."""
    radii: tuple[float, ...] = ()
    """Radii to decide, ascending, 0 or more, on the [0, 1] pixel scale; 0 asks for a certificate of
    any radius. Settled when each is certified or out of reach."""
    tolerance: float | None = None
    """Settled when the radius within reach is larger by no more than this, above 0."""
    relative_tolerance: float | None = None
    """Settled when it is larger by no more than this part of itself, between 0 and 1."""
    give_up: float = 0.1
    """How soon to call a radius out of reach, above 0 and at most 1/2; more saves draws and loses
    certificates. After n draws: if a run that were to certify it at n_max would look as bad as
    this one with a probability of at most about give_up * sqrt(n / n_max)."""

    def __post_init__(self) -> None:
        check_count("n_max", self.n_max, 1)
        radii = tuple(check_real("a radius to decide", radius) for radius in self.radii)
        object.__setattr__(self, "radii", radii)
        questions = (self.radii or None, self.tolerance, self.relative_tolerance)
        if sum(question is not None for question in questions) > 1:
            raise SmoothingError("give at most one of radii, tolerance and relative_tolerance")
        if any(not 0.0 <= radius < math.inf for radius in radii):
            raise SmoothingError(f"radii to decide are finite and not negative, got {radii}")
        if any(a >= b for a, b in pairwise(radii)):
            raise SmoothingError(f"radii to decide must ascend without repeats, got {radii}")
        if self.tolerance is not None and not check_real("tolerance", self.tolerance) > 0.0:
            raise SmoothingError(f"tolerance must be above 0, got {self.tolerance}")
        if self.relative_tolerance is not None:
            part = check_real("relative_tolerance", self.relative_tolerance)
            if not 0.0 < part < 1.0:
                raise SmoothingError(
                    f"relative_tolerance must lie between 0 and 1, both excluded, got {part}"
                )
        if not 0.0 < check_real("give_up", self.give_up) <= 0.5:
            raise SmoothingError(f"give_up must be above 0 and at most 0.5, got {self.give_up}")


class AnytimeTest:
    """Noise level, error probability and stop rule: what the runs of all images share.

    Four fifths of alpha go to `anytime_lower`, one fifth to a Clopper-Pearson bound at exactly
    n_max draws; by the union bound, with probability at least 1 - alpha, no bound of a whole run
    exceeds the probability of a hit.
    """

    def __init__(self, sigma: float, alpha: float, rule: StopRule) -> None:
        """Checks that the rule can be met.

        Args:
            sigma: Standard deviation of the noise, on the [0, 1] pixel scale.
            alpha: Probability of error of one certificate, between 0 and 1.
            rule: When to stop.

        Raises:
            SmoothingError: An argument is out of its range, or no run of n_max draws could
                certify the largest radius.
        """
        self.sigma = check_sigma(sigma)
        self.alpha = check_alpha(alpha)
        self.rule = rule
        self._alpha_final = self.alpha * _FINAL_SHARE
        # Computed so, the two never add up to more than alpha.
        self._alpha_path = (self.alpha - self._alpha_final) * (1.0 - 2.0**-52)
        self._needed = np.array([_probability_for(r, self.sigma) for r in rule.radii])
        self._check_attainable()

    def look(
        self, hits: ArrayLike, draws: SupportsIndex, before: ArrayLike = 0.0
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """Bounds of many runs after the same number of draws, and which of them may stop.

        Args:
            hits: Hits so far of each run, whole numbers from 0 to `draws`.
            draws: Draws so far of every run, 1 to n_max.
            before: Largest bound of each run at its earlier looks.

        Returns:
            The largest lower bound of each run up to now, and whether its question is settled.
        """
        n, n_max = check_count("draws", draws, 1), self.rule.n_max
        if n > n_max:
            raise SmoothingError(f"draws must not exceed n_max={n_max}, got {n}")
        # Runs with the same count share their bounds.
        counts, run = np.unique(np.asarray(hits, dtype=np.float64), return_inverse=True)
        if counts.size and not (counts[0] >= 0 and counts[-1] <= n and (counts % 1 == 0).all()):
            raise SmoothingError(f"hits must be whole numbers from 0 to draws={n}")
        bounds = _lower(counts, np.full_like(counts, n), self._alpha_path)
        if n == n_max:
            bounds = np.maximum(bounds, [self._final(int(count)) for count in counts])
        p_lower = np.maximum(before, bounds[run])
        if n == n_max:
            return p_lower, np.ones(p_lower.shape, dtype=np.bool_)
        return p_lower, self._settled(p_lower, self._within_reach(counts, n)[run])

    def _final(self, hits: int) -> float:
        return clopper_pearson_lower(hits, self.rule.n_max, self._alpha_final)

    def _within_reach(self, hits: Floats, draws: int) -> Floats:
        """The final bound if the rest goes plausibly well. No certificate rests on it."""
        n_max = self.rule.n_max
        # The n draws are a sample without replacement of the n_max. That shrinks the variance of
        # the miss rate as if n were n * scale, so Clopper-Pearson's formula is used with that.
        scale = n_max / (n_max - draws)
        misses = (draws - hits) * scale
        some = np.maximum(misses, 1e-3)
        # Less at early looks: there are many, and few draws are saved in all by a hasty one.
        level = self.rule.give_up * math.sqrt(draws / n_max)
        rate = special.betaincinv(some, draws * scale - some + 1.0, level)
        rate = np.where(misses > 0.0, rate, 0.0)
        total = np.ceil(rate * n_max).clip(draws - hits, n_max - hits)
        # Clopper-Pearson again, with floating-point arrays; all hits need no special case but 0.
        bound = special.betaincinv(
            np.maximum(n_max - total, 1e-3), np.maximum(total, 0.0) + 1.0, self._alpha_final
        )
        return np.asarray(bound, dtype=np.float64)

    def _settled(self, p_lower: Floats, within_reach: Floats) -> NDArray[np.bool_]:
        rule = self.rule
        if rule.radii:
            needed = self._needed
            pending = (p_lower[..., None] < needed) & (needed <= within_reach[..., None])
            return np.logical_not(pending.any(axis=-1))
        reach = self.sigma * special.ndtri(np.maximum(within_reach, 0.5))
        gain = reach - self.sigma * special.ndtri(np.maximum(p_lower, 0.5))
        allowed = 0.0 if rule.tolerance is None else rule.tolerance
        if rule.relative_tolerance is not None:
            return np.asarray(gain <= rule.relative_tolerance * reach)
        return np.asarray(gain <= allowed)

    def _check_attainable(self) -> None:
        n_max = self.rule.n_max
        best = max(self._final(n_max), anytime_lower(n_max, n_max, self._alpha_path))
        needed = float(self._needed[-1]) if self.rule.radii else math.nextafter(0.5, 1.0)
        if best >= needed:
            return
        what = f"radius {self.rule.radii[-1]:g}" if self.rule.radii else "any radius"
        head = (
            f"n_max={n_max} draws cannot certify {what} at alpha={self.alpha:g} "
            f"and sigma={self.sigma:g}"
        )
        # n hits in n draws are bounded by alpha ** (1 / n), less a rounding of 1e-12.
        distance = -math.log(needed) - 2e-12
        if distance <= 0.0:
            raise SmoothingError(f"{head}, nor can any number: it is too many sigma")
        enough = math.ceil(-math.log(self._alpha_final) / distance)
        raise SmoothingError(f"{head}; n_max={enough} could, if every draw hits")


def _probability_for(radius: float, sigma: float) -> float:
    """The least probability, to rounding, whose `certified_radius` is positive and >= `radius`."""
    p = max(float(special.ndtr(radius / sigma)), math.nextafter(0.5, 1.0))
    while p < 1.0 and certified_radius(p, sigma) < radius:
        p = math.nextafter(p, 1.0)
    return p


class AnytimeBound:
    """One image's run: fed with counts as they come, it knows the radius and when to stop.

    With probability at least 1 - alpha over the draws, `radius` exceeds at no time the radius in
    which the smoothed classifier keeps the class counted. The class must not be chosen with the
    draws fed in. Drawing on after `settled` is allowed, up to n_max.
    """

    def __init__(self, test: AnytimeTest) -> None:
        self.test = test
        self.hits = 0
        self.draws = 0
        self.p_lower = 0.0
        """Largest lower bound so far of the probability of the class."""
        self.settled = False

    def update(self, hits: SupportsIndex, draws: SupportsIndex) -> bool:
        """Adds a batch, and looks.

        Args:
            hits: Draws of the batch that gave the class, 0 to `draws`.
            draws: Draws of the batch, at least 1; with those before, at most n_max.

        Returns:
            Whether the question is settled.

        Raises:
            SmoothingError: A count is out of its range.
        """
        more_hits, more = check_hits(hits, draws)
        n = self.draws + more
        p_lower, settled = self.test.look(self.hits + more_hits, n, self.p_lower)
        self.hits, self.draws = self.hits + more_hits, n
        self.p_lower, self.settled = float(p_lower), bool(settled)
        return self.settled

    @property
    def radius(self) -> float:
        """L2 radius certified so far, on the [0, 1] pixel scale, rounded down; 0: abstain."""
        return certified_radius(self.p_lower, self.test.sigma)

    @property
    def reason(self) -> Reason | None:
        """Why to stop; None while the question is open.

        "budget": all n_max draws are used. "hopeless": nothing asked for is certified nor within
        reach. "answered": each radius is certified or out of reach. "tolerance": the rest of the
        budget would add too little.
        """
        rule = self.test.rule
        if not self.settled:
            return None
        if self.draws == rule.n_max:
            return "budget"
        if self.radius < rule.radii[0] if rule.radii else self.radius == 0.0:
            return "hopeless"
        return "answered" if rule.radii else "tolerance"

    def next_draws(self) -> int:
        """How many draws to add before the next look: a tenth of those so far, 32 at first.

        A recommendation; any number is valid. 0 once n_max is reached.
        """
        return next_draws(self.draws, self.test.rule.n_max)


def next_draws(draws: int, n_max: int) -> int:
    """Draws to add to `draws` before the next look, so that n_max is met exactly."""
    return min(max(_FIRST_LOOK, math.ceil(draws / _GROWTH)), n_max - draws)


def simulate(
    test: AnytimeTest, p: ArrayLike, rng: np.random.Generator
) -> tuple[NDArray[np.int64], Floats]:
    """Whole runs with known probabilities, to plan a budget or to check the guarantee.

    Args:
        test: Noise level, error probability and stop rule.
        p: Probability of a hit of each run, one-dimensional.
        rng: Source of the draws.

    Returns:
        Number of draws and final `p_lower` of each run, with looks as `next_draws` sets them.
    """
    chances = np.asarray(p, dtype=np.float64)
    draws = np.zeros(len(chances), dtype=np.int64)
    p_lower = np.zeros(len(chances))
    hits = np.zeros(len(chances), dtype=np.int64)
    running = np.arange(len(chances))
    n = 0
    while len(running):
        more = next_draws(n, test.rule.n_max)
        n += more
        hits[running] += rng.binomial(more, chances[running])
        p_lower[running], settled = test.look(hits[running], n, p_lower[running])
        draws[running] = n
        running = running[~settled]
    return draws, p_lower
