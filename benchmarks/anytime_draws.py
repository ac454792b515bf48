"""How many draws anytime certification needs, against fixed-n CERTIFY and published methods.

    python benchmarks/anytime_draws.py FOLDER [--out benchmarks/results/anytime_draws.json]

FOLDER holds logs of CERTIFY at n = 100,000 and alpha = 0.001, as Cohen et al. (2019) publish
them: columns idx, label, predict, radius, correct, time, and names that end in sigma_S.tsv. The
radius of an image gives, approximately, the probability of its top class; images that abstained
are spread evenly over [0.3, 0.503]. From these probabilities whole runs are simulated. About a
minute on one CPU core.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import special, stats

from rrcm.smoothing import anytime
from rrcm.smoothing.anytime import AnytimeTest, StopRule, next_draws, simulate

ALPHA, N_MAX, N0, STEP = 0.001, 100_000, 100, 0.25
REPEATS = 40
Test = Callable[[np.ndarray, np.ndarray], np.ndarray]  # hits, draws -> certified?


def read_log(path: Path, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the top class of each image, and whether that class is the label."""
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    abstained = np.array([int(row[2]) < 0 for row in rows])
    p_lower = special.ndtr(np.array([float(row[3]) for row in rows]) / sigma)
    low, high = np.full(len(rows), N_MAX / 2), np.full(len(rows), float(N_MAX))
    for _ in range(60):  # the count whose Clopper-Pearson bound is the one of the log
        middle = (low + high) / 2
        below = special.betaincinv(middle, N_MAX - middle + 1, ALPHA) < p_lower
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    p = np.minimum(high / N_MAX, 1 - 5e-6)  # 100,000 hits: say half a miss
    p[abstained] = np.linspace(0.3, 0.503, int(abstained.sum()))
    correct = np.array([row[4] == "1" for row in rows]) & ~abstained
    return p, correct


def radius_grid(sigma: float) -> np.ndarray:
    """0, 0.25, 0.5, ... as far as both fixed n = 100,000 and our last bound can certify."""
    return np.arange(0.0, sigma * special.ndtri((0.2 * ALPHA) ** (1 / N_MAX)), STEP)


# --- Methods, as least counts that certify and greatest counts that give up, at given looks ---


def least_hits(certifies: Test, looks: np.ndarray) -> np.ndarray:
    """Smallest number of hits that certifies at each look; more than the draws if none does."""
    low, high = np.full(len(looks), -1), looks + 1
    while (high - low > 1).any():
        middle = np.minimum((low + high) // 2, looks)
        yes, unsure = certifies(middle.astype(float), looks.astype(float)), high - low > 1
        high, low = np.where(unsure & yes, middle, high), np.where(unsure & ~yes, middle, low)
    return high


def clopper_pearson(p0: float, alpha: float | np.ndarray) -> Test:
    return lambda k, n: (k > 0) & (special.betainc(np.maximum(k, 1), n - k + 1, p0) <= alpha)


def jeffreys(p0: float, alpha: float) -> Test:
    """Krichevsky-Trofimov betting: Beta(1/2, 1/2) mixture over p0, one side taken."""

    def certifies(k: np.ndarray, n: np.ndarray) -> np.ndarray:
        wealth = special.betaln(k + 0.5, n - k + 0.5) - special.betaln(0.5, 0.5)
        wealth -= special.xlogy(k, p0) + special.xlog1py(n - k, -p0)
        return (wealth >= -np.log(alpha)) & (k > p0 * n)

    return certifies


def tilts(p0: float, alpha: float, grid: np.ndarray) -> Test:
    """Mixture of alternatives with odds exp(tilt) times those of p0, equally weighted."""

    def certifies(k: np.ndarray, n: np.ndarray) -> np.ndarray:
        terms = np.outer(k - n, grid) - np.outer(n, np.log1p((1 - p0) * np.expm1(-grid)))
        return special.logsumexp(terms, axis=1) - np.log(len(grid)) >= -np.log(alpha)

    return certifies


def tuned_tilts(p0: float) -> np.ndarray:
    """Ten tilts from the smallest that 100,000 draws can tell from p0 on, for this p0 alone."""
    return np.geomspace(np.sqrt(14 / (N_MAX * p0 * (1 - p0))), 12, 10)


def mirrored(test: Callable[[float, float], Test], p1: float, beta: float, looks: np.ndarray):
    """Fewest hits that are NOT evidence, at level beta, of p < p1."""
    return looks - least_hits(test(1 - p1, beta), looks) + 1


def out_of_reach(least: int, looks: np.ndarray, give_up: float) -> np.ndarray:
    """Fewest hits with which the product still deems `least` hits at n_max within reach."""
    test = AnytimeTest(1.0, ALPHA, StopRule(n_max=N_MAX, give_up=give_up))
    needed = test._final(least)
    keep = [
        least_hits(lambda k, n, d=int(d): test._within_reach(k, d) >= needed, np.array([d]))[0]
        for d in looks[:-1]
    ]
    return np.array([*keep, N_MAX + 1])


Bounds = tuple[np.ndarray, np.ndarray, np.ndarray]  # looks, certify from, give up below


def our_looks() -> np.ndarray:
    looks = [0]
    while more := next_draws(looks[-1], N_MAX):
        looks.append(looks[-1] + more)
    return np.array(looks[1:])


def variant(
    p0: float, mixture: Callable[[float, float], Test], final_share: float, give_up: float | None
) -> Bounds:
    """Our procedure with its parts exchanged; give_up None: an upper sequence at level 0.05."""
    looks = our_looks()
    up = least_hits(mixture(p0, ALPHA * (1 - final_share)), looks)
    if final_share:
        last = least_hits(clopper_pearson(p0, ALPHA * final_share), looks[-1:])[0]
        up[-1] = min(up[-1], last)
    if give_up is None:
        return looks, up, mirrored(mixture, up[-1] / N_MAX, 0.05, looks)
    if up[-1] > N_MAX:  # this mixture cannot certify the radius
        return looks, up, looks + 1
    return looks, up, out_of_reach(int(up[-1]), looks, give_up)


def betting(p0: float) -> Bounds:
    """Voracek (2024): Jeffreys wealth on each side; its threshold at alpha, not twice alpha."""
    looks = our_looks()
    return looks, least_hits(jeffreys(p0, ALPHA), looks), mirrored(jeffreys, p0, ALPHA, looks)


def union_bound(p0: float) -> Bounds:
    """Voracek (2024): looks at 1.1^k, the k-th at level 5 alpha / ((k + 4)(k + 5))."""
    looks = np.unique(np.ceil(1.1 ** np.arange(11, 121)).astype(int))
    looks = np.append(looks[looks < N_MAX], N_MAX)
    k = np.arange(1, len(looks) + 1)
    level = 5 * ALPHA / ((k + 4) * (k + 5))
    up = least_hits(clopper_pearson(p0, level), looks)
    return looks, up, looks - least_hits(clopper_pearson(1 - p0, level), looks) + 1


def stages(p0: float) -> Bounds:
    """Horvath et al. (2022): 1000, 10,000, 125,000 fresh draws, alpha / 3, giving up at 0.0001."""
    sizes = np.array([1000, 10_000, 125_000])
    up = least_hits(clopper_pearson(p0, ALPHA / 3), sizes)
    return sizes, up, sizes - least_hits(clopper_pearson(1 - p0, 1e-4 / 2), sizes) + 1


# --- Simulation ---


def play(
    p: np.ndarray, bounds: list[Bounds], rng: np.random.Generator, fresh: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draws until each radius is decided, and whether it is certified: [runs, radii] each.

    A radius counts as certified only with all smaller ones, so that one error covers the list.
    `fresh`: the draws of earlier looks are thrown away (and n0 new ones pick the class).
    """
    looks = bounds[0][0]
    up, keep = np.array([b[1] for b in bounds]), np.array([b[2] for b in bounds])
    draws, certified = np.zeros((len(p), len(up)), int), np.zeros((len(p), len(up)), bool)
    open_, hits, spent = np.ones((len(p), len(up)), bool), np.zeros(len(p), int), 0
    for i, n in enumerate(looks):
        new = int(n) if fresh or i == 0 else int(n - looks[i - 1])
        spent += new + (N0 if fresh and i else 0)
        run = open_.any(axis=1)
        counts = rng.binomial(new, p[run])
        hits[run] = counts if fresh else hits[run] + counts
        passed = np.zeros_like(open_)
        passed[run] = open_[run] & (hits[run, None] >= up[:, i])
        certified |= passed
        over = passed | (hits[:, None] < keep[:, i])
        draws[open_] = spent
        open_ &= ~over
    return draws, np.logical_and.accumulate(certified, axis=1)


def fixed_certified(p: np.ndarray, radii: np.ndarray, sigma: float) -> np.ndarray:
    """Chance that CERTIFY with n = 100,000 certifies each radius: [images, radii]."""
    least = [
        least_hits(clopper_pearson(float(p0), ALPHA), np.array([N_MAX]))[0]
        for p0 in special.ndtr(radii / sigma)
    ]
    return stats.binom.sf(np.array(least) - 1, N_MAX, p[:, None])


def oracle(p: np.ndarray, radii: np.ndarray, sigma: float, power: float = 0.9) -> np.ndarray:
    """Draws of one Clopper-Pearson test that knows p: [images, radii].

    The least n <= 100,000, up to 1 %, with which it certifies the radius with probability
    `power`; 0 if there is none, as it would not even try.
    """
    sizes = np.unique(np.geomspace(10, N_MAX, 925).astype(int))
    draws = np.zeros((len(p), len(radii)))
    for j, p0 in enumerate(special.ndtr(radii / sigma)):
        least = least_hits(clopper_pearson(float(p0), ALPHA), sizes)
        enough = stats.binom.sf(least - 1, sizes, p[:, None]) >= power
        draws[:, j] = np.where(enough.any(axis=1), sizes[enough.argmax(axis=1)], 0)
    return draws


def input_specific(p: np.ndarray, sigma: float, loss: float, rng: np.random.Generator):
    """Chen et al. (2022): n chosen from 100 pilot draws so that at most `loss` of radius is lost.

    With fresh draws for the final bound, as its guarantee needs.
    """
    grid = np.arange(0.5, 1.0005, 0.001).clip(max=1.0)
    sizes = np.unique(np.geomspace(10, N_MAX, 400).astype(int))
    hits = np.floor(grid[:, None] * sizes)
    lower = special.betaincinv(np.maximum(hits, 1), sizes - hits + 1, ALPHA)
    radii = sigma * special.ndtri(np.maximum(lower, 0.5))
    enough = radii >= radii[:, -1:] - loss
    table = np.where(radii[:, -1] > loss, sizes[enough.argmax(axis=1)], 0)
    pilot = rng.binomial(N0, p)
    low = special.betaincinv(np.maximum(pilot, 1e-3), N0 - pilot + 1, ALPHA / 2)
    high = 1 - special.betaincinv(np.maximum(N0 - pilot, 1e-3), pilot + 1, ALPHA / 2)
    high = np.where(pilot == N0, 1.0, high)
    index = [np.rint((x.clip(0.5, 1.0) - 0.5) * 1000).astype(int) for x in (low, high)]
    draws = np.maximum(table[index[0]], table[index[1]])
    n = np.maximum(draws, 1)
    k = rng.binomial(n, p)
    bound = special.betaincinv(np.maximum(k, 1), n - k + 1, ALPHA)
    return draws, np.where(draws > 0, bound, 0.0)


# --- Report ---


def factor(draws: np.ndarray) -> float:
    return (N_MAX + N0) / (float(draws.mean()) + N0)


def row(name: str, draws: np.ndarray, certified: np.ndarray, correct: np.ndarray, ref: np.ndarray):
    """Summary of one method; draws [runs, radii], certified [runs, radii]."""
    lost = ref - 100 * (certified & correct[:, None]).mean(axis=0)
    whole = draws.max(axis=1)
    return {
        "method": name,
        "mean_draws": round(float(whole.mean())),
        "standard_error": round(float(whole.std() / np.sqrt(len(whole)))),
        "factor": round(factor(whole), 1),
        "factor_one_radius": round(factor(draws), 1),
        "points_lost_at_most": round(float(lost.max()), 2),
        "points_lost_mean": round(float(lost.mean()), 2),
    }


def ours(p: np.ndarray, sigma: float, radii: np.ndarray, rule: dict, rng: np.random.Generator):
    """The product itself, on the whole list."""
    rule = StopRule(n_max=N_MAX, **({"radii": tuple(radii)} | rule))
    draws, p_lower = simulate(AnytimeTest(sigma, ALPHA, rule), p, rng)
    needed = np.array([anytime._probability_for(float(r), sigma) for r in radii])
    return draws, p_lower, p_lower[:, None] >= needed


def report(sigma: float, p: np.ndarray, correct: np.ndarray) -> dict:
    radii = radius_grid(sigma)
    thresholds = [float(p0) for p0 in special.ndtr(radii / sigma)]
    ref = 100 * (fixed_certified(p, radii, sigma) * correct[:, None]).mean(axis=0)
    runs, right = np.repeat(p, REPEATS), np.repeat(correct, REPEATS)

    def grid_tilts(ratio: float) -> np.ndarray:
        return np.append(30.0, 4.0 / ratio ** np.arange(1 + np.log(256) / np.log(ratio)))

    def mix(grid: np.ndarray) -> Callable[[float, float], Test]:
        return lambda p0, alpha: tilts(p0, alpha, grid)

    ten = mix(anytime._TILTS)

    def tuned(p0: float, alpha: float) -> Test:
        return tilts(p0, alpha, tuned_tilts(p0))

    decide = []
    parts = [
        ("rrcm", ten, 0.2, 0.1),
        ("rrcm, give_up 0.05", ten, 0.2, 0.05),
        ("rrcm, give_up 0.2", ten, 0.2, 0.2),
        ("rrcm, upper sequence at 0.05 instead of give_up", ten, 0.2, None),
        ("rrcm, no final bound", ten, 0.0, 0.1),
        ("rrcm, half of alpha for the final bound", ten, 0.5, 0.1),
        ("rrcm, Jeffreys mixture", jeffreys, 0.2, 0.1),
        ("rrcm, tilts of ratio 1.5", mix(grid_tilts(1.5)), 0.2, 0.1),
        ("rrcm, tilts of ratio 3", mix(grid_tilts(3.0)), 0.2, 0.1),
        ("rrcm, tilts tuned to each radius", tuned, 0.2, 0.1),
    ]
    for name, mixture, share, give_up in parts:
        bounds = [variant(p0, mixture, share, give_up) for p0 in thresholds]
        decide.append(row(name, *play(runs, bounds, np.random.default_rng(1)), right, ref))
    peers = [("stages", stages), ("betting", betting), ("union bound", union_bound)]
    for name, method in peers:
        bounds = [method(p0) for p0 in thresholds]
        played = play(runs, bounds, np.random.default_rng(1), fresh=method is stages)
        decide.append(row(f"peer: {name}", *played, right, ref))
    limit = oracle(p, radii, sigma)
    decide.append(row("limit: knows p", limit, limit > 0, correct, ref))

    draws, _, certified = ours(runs, sigma, radii, {}, np.random.default_rng(2))
    product = row("rrcm, by the product", draws[:, None], certified, right, ref)
    del product["factor_one_radius"]

    least = np.rint(np.repeat(p, REPEATS) * N_MAX)
    fixed = special.betaincinv(least, np.maximum(N_MAX - least, 0) + 1, ALPHA)
    acr = float((sigma * special.ndtri(np.maximum(fixed, 0.5)) * right).mean())
    tolerance = []
    questions = [{"tolerance": t} for t in (0.02, 0.05, 0.1)]
    questions += [{"relative_tolerance": t} for t in (0.05, 0.1, 0.2)]
    for question in questions:
        rule = {"radii": ()} | question
        draws, p_lower, certified = ours(runs, sigma, radii, rule, np.random.default_rng(3))
        tolerance.append(radius_row("rrcm", question, draws, p_lower, sigma, right, acr))
    for loss in (0.02, 0.05, 0.1):
        draws, p_lower = input_specific(runs, sigma, loss, np.random.default_rng(3))
        name = "peer: input-specific"
        tolerance.append(radius_row(name, {"tolerance": loss}, draws, p_lower, sigma, right, acr))
    return {
        "sigma": sigma,
        "images": len(p),
        "radii": [float(r) for r in radii],
        "certified_accuracy_fixed": [round(float(x), 1) for x in ref],
        "decide_all_radii": [*decide, product],
        "average_certified_radius_fixed": round(acr, 4),
        "radius_up_to_a_tolerance": tolerance,
    }


def radius_row(name, question, draws, p_lower, sigma, right, acr) -> dict:
    got = float((sigma * special.ndtri(np.maximum(p_lower, 0.5)) * right).mean())
    return {
        "method": name,
        **question,
        "mean_draws": round(float(draws.mean())),
        "factor": round(factor(draws), 1),
        "average_certified_radius": round(got, 4),
        "lost": round(acr - got, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of CERTIFY logs, *sigma_S.tsv")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    results = []
    for path in sorted(arguments.folder.glob("*.tsv")):
        found = re.search(r"sigma_([0-9.]+)\.tsv$", path.name)
        if found is None:
            raise SystemExit(f"{path.name}: a log's name must end in sigma_S.tsv")
        sigma = float(found.group(1))
        results.append(report(sigma, *read_log(path, sigma)))
        for part in ("decide_all_radii", "radius_up_to_a_tolerance"):
            print(f"sigma {sigma}: {part}")
            for line in results[-1][part]:
                print("   ", "  ".join(f"{key} {value}" for key, value in line.items()))
    settings = {"alpha": ALPHA, "n_max": N_MAX, "n0": N0, "runs_per_image": REPEATS}
    if arguments.out:
        text = json.dumps({"settings": settings, "results": results}, indent=1)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
