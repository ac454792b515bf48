"""Exact noise: the classifier sees a function of an integer sum, of the probabilities promised."""

import hashlib
import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from rrcm.smoothing.errors import SmoothingError
from rrcm.smoothing.exact import GridNoise, noisy, on_grid
from rrcm.smoothing.smoothed import (
    ABSTAIN,
    Certificate,
    SmoothedClassifier,
    certificate_from_counts,
)

CPU = torch.device("cpu")
QUARTER = GridNoise(0.25)


def key(seed: int = 0, stream: str = "estimation", index: int = 0, block: int = 0) -> bytes:
    """As the sampler keys its blocks."""
    return hashlib.blake2b(f"{seed}/{stream}/{index}/{block}".encode(), digest_size=16).digest()


# What the classifier sees is a function of the integer sum


def all_pairs(limit: int) -> tuple[Tensor, Tensor]:
    """Every pixel [256] and every noise [2 limit + 1, 1] that can be drawn."""
    pixels = torch.arange(256, dtype=torch.uint8)
    return pixels, torch.arange(-limit, limit + 1, dtype=torch.int16)[:, None]


def share_of_sums_that_leak(values: Tensor, pixels: Tensor, noise: Tensor) -> float:
    """Share of the integer sums that have several float values, depending on the pixel."""
    sums = (pixels.int() + noise.int()).flatten().numpy()
    pairs = np.unique(np.stack([sums, values.view(torch.int32).flatten().numpy()]), axis=1)
    return float((np.unique(pairs[0], return_counts=True)[1] > 1).mean())


@pytest.mark.parametrize("sigma", [0.25, 1.0, 2.0])
def test_every_integer_sum_has_one_value(sigma: float) -> None:
    pixels, noise = all_pairs(GridNoise(sigma).limit)
    values = noisy(pixels, noise)
    assert values.dtype == torch.float32
    assert share_of_sums_that_leak(values, pixels, noise) == 0.0
    # The same sums elsewhere in a tensor: vectorised kernels treat its end otherwise.
    assert torch.equal(noisy(pixels[3:], noise), values[:, 3:])
    assert torch.equal(noisy(pixels[7], noise[:, 0]), values[:, 7])


def test_adding_floats_leaks_the_pixel() -> None:
    """The naive sum, and the order of the code that Voracek and Hein released: nearly all leak."""
    pixels, noise = all_pairs(QUARTER.limit)
    naive = noise.float() / 255 + pixels.float() / 255
    assert share_of_sums_that_leak(naive, pixels, noise) > 0.7
    k = 3
    shifted = (noise.int() + 255 * (k + 1)).float()
    released = ((shifted / 255 - k) - 1) + pixels.float() / 255
    assert share_of_sums_that_leak(released, pixels, noise) > 0.9


def test_values_are_those_of_the_clean_image_and_grow_with_the_sum() -> None:
    pixels, noise = all_pairs(QUARTER.limit)
    values = noisy(pixels, noise)
    assert torch.equal(values[QUARTER.limit], pixels.float() / 255)
    assert np.array_equal(values[:, 0].numpy(), noise[:, 0].numpy() / np.float32(255))
    assert bool((values.diff(dim=0) > 0).all())
    assert bool((values.diff(dim=1) > 0).all())


def test_rows_of_several_images_make_one_batch() -> None:
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    noise = QUARTER.draw((5, 3, 4, 4), key(), CPU)
    batch = noisy(images, noise)
    for row in range(5):
        assert torch.equal(batch[row], noisy(images[row], noise[row : row + 1])[0])


def test_a_float_never_gets_into_the_sum() -> None:
    noise = QUARTER.draw((2, 3), key(), CPU)
    with pytest.raises(SmoothingError, match=r"uint8 pixels .* got torch.float32 and torch.int16"):
        noisy(torch.zeros(3), noise)
    with pytest.raises(SmoothingError, match=r"got torch.uint8 and torch.float32"):
        noisy(torch.zeros(3, dtype=torch.uint8), noise.float())


# A classifier that reads rounding residue


class ResidueReader(nn.Module):
    """Class 1 if a value in (-0.25, -0.01) is no multiple of 2^-24, else class 0.

    A float32 image value 128/255 is a multiple of 2^-24, and 127/255 an odd multiple of 2^-25.
    Noise that carries them into that interval lies in (-1, -0.5), where float32 numbers are
    multiples of 2^-24; and the sum is small enough to be stored without rounding. So the sum
    says which of the two it was.
    """

    def forward(self, images: Tensor) -> Tensor:
        watched = (images > -0.25) & (images < -0.01)
        residue = (images * 2.0**24).frac() != 0
        says_one = (watched & residue).flatten(1).any(dim=1)
        return torch.stack([~says_one, says_one], dim=1).float()


SHAPE = (3, 8, 8)
SIGMA = 0.5
HERE = torch.full(SHAPE, 128, dtype=torch.uint8)
THERE = torch.full(SHAPE, 127, dtype=torch.uint8)
DISTANCE = math.sqrt(math.prod(SHAPE)) / 255


def exact_counts(
    model: nn.Module, pixels: Tensor, num_blocks: int, stream: str, index: int
) -> list[int]:
    grid = GridNoise(SIGMA)
    counts = torch.zeros(2, dtype=torch.int64)
    for block in range(num_blocks):
        noise = grid.draw((64, *SHAPE), key(stream=stream, index=index, block=block), CPU)
        counts += torch.bincount(model(noisy(pixels, noise)).argmax(1), minlength=2)
    return counts.tolist()


def exact_certificate(pixels: Tensor, index: int) -> Certificate:
    model = ResidueReader()
    return certificate_from_counts(
        exact_counts(model, pixels, 2, "selection", index),
        exact_counts(model, pixels, 160, "estimation", index),
        sigma=SIGMA,
        alpha=0.001 - GridNoise(SIGMA).mismatch(160 * 64 * HERE.numel()),
    )


def test_gaussian_noise_in_floats_gives_a_false_certificate() -> None:
    smoothed = SmoothedClassifier(ResidueReader().eval(), SIGMA, num_classes=2)
    here = smoothed.certify(HERE.float() / 255, n=10_000, index=0)
    there = smoothed.certify(THERE.float() / 255, n=10_000, index=1)
    assert here.prediction == 0
    assert here.count == 10_000
    assert here.radius > 1.5
    # The smoothed classifier certifiably gives another class well inside that radius.
    assert DISTANCE < 0.06
    assert there.prediction == 1
    assert there.count == 10_000


def test_exact_noise_gives_no_false_certificate_to_the_same_classifier() -> None:
    here, there = exact_certificate(HERE, 0), exact_certificate(THERE, 1)
    assert here.radius > DISTANCE
    assert here.prediction == there.prediction != ABSTAIN


READERS = {
    "lowest stored bit": lambda x: x.view(torch.int32) & 1 == 1,
    "second stored bit": lambda x: x.view(torch.int32) >> 1 & 1 == 1,
    "residue": lambda x: (x > -0.25) & (x < -0.01) & ((x * 2.0**24).frac() != 0),
    "finer residue": lambda x: (x * 2.0**26).frac() != 0,
    "brightness": lambda x: x,
}
"""What a classifier may read of every pixel."""


def distance_seen(read, noisy_copies) -> float:
    """How far a classifier by the mean of `read` over the pixels sees HERE and THERE apart.

    Noise of deviation sigma allows |Phi^-1(p) - Phi^-1(p')| <= distance / sigma for the
    probabilities p, p' of a class at two images (Cohen et al., 2019, the lemma of Neyman and
    Pearson), whatever is read.
    """
    here, there = (
        read(noisy_copies(pixels, index)).double().flatten(1).mean(1)
        for index, pixels in enumerate((HERE, THERE))
    )
    # Fresh noise, so that the threshold is a constant for the two compared.
    threshold = read(noisy_copies(HERE, 2)).double().flatten(1).mean(1).median()
    # A tie counts one half: votes of few levels have no threshold that halves them.
    shares = [
        ((s > threshold).double().mean() + (s >= threshold).double().mean()) / 2
        for s in (here, there)
    ]
    return abs(float(stats.norm.ppf(shares[0]) - stats.norm.ppf(shares[1])))


def exact_copies(pixels: Tensor, index: int) -> Tensor:
    return noisy(pixels, GridNoise(SIGMA).draw((10_000, *SHAPE), key(index=index), CPU))


def float_copies(pixels: Tensor, index: int) -> Tensor:
    noise = np.random.default_rng(index).standard_normal((10_000, *SHAPE), dtype=np.float32)
    return torch.add(pixels.float() / 255, torch.from_numpy(noise), alpha=SIGMA)


# Five standard deviations of the estimate at p near 1/2.
SLACK = 5 * math.sqrt(2 * 0.25 / 10_000) / stats.norm.pdf(0)


@pytest.mark.parametrize("name", READERS)
def test_exact_noise_tells_two_images_apart_no_better_than_the_theorem_allows(name: str) -> None:
    assert distance_seen(READERS[name], exact_copies) < DISTANCE / SIGMA + SLACK


def test_what_the_test_above_can_see() -> None:
    """Float noise breaks the limit by far; and brightness, the best legal reader, comes near it."""
    assert distance_seen(READERS["residue"], float_copies) > 10 * (DISTANCE / SIGMA + SLACK)
    assert distance_seen(READERS["brightness"], exact_copies) > DISTANCE / SIGMA - SLACK > 0


# Distribution


@pytest.mark.parametrize("sigma", [1 / 255, 0.12, 0.25, 1.0])
def test_thresholds_are_the_nearest_integers_to_the_exact_ones(sigma: float) -> None:
    """Against 40-digit arithmetic; and the promised bound holds and is not empty."""
    grid = GridNoise(sigma)
    thresholds = [int(t) for t in grid._thresholds[CPU]]
    assert len(thresholds) == 2 * grid.limit
    assert thresholds == sorted(thresholds)
    with mpmath.workdps(40):
        scale = 255 * mpmath.mpf(sigma)
        exact = [
            2**63 * mpmath.ncdf((j + mpmath.mpf(1) / 2) / scale)
            for j in range(-grid.limit, grid.limit)
        ]
        gaps = [abs(t - e) for t, e in zip(thresholds, exact, strict=True)]
        assert max(gaps) < mpmath.mpf("0.5000001")
        beyond = 2**64 * mpmath.ncdf(-(grid.limit + mpmath.mpf(1) / 2) / scale)
        total = float((sum(gaps) + beyond) / 2**63)
    assert 0.2 * grid.mismatch(1) < total < grid.mismatch(1)
    assert grid.mismatch(1000) == pytest.approx(1000 * grid.mismatch(1))


@pytest.mark.parametrize("sigma", [0.12, 1.0])
def test_noise_is_symmetric(sigma: float) -> None:
    thresholds = GridNoise(sigma)._thresholds[CPU]
    assert bool((thresholds + thresholds.flip(0) == torch.iinfo(torch.int64).min).all())


class Words:
    """Stands for a Philox whose draws are the given ones."""

    def __init__(self, *draws: np.ndarray) -> None:
        self.draws = list(draws)

    def random_raw(self, size: int) -> np.ndarray:
        draw = self.draws.pop(0)
        assert len(draw) == size
        return draw


def test_draws_at_the_thresholds_fall_on_the_right_side() -> None:
    """The lookup by high bits and the full comparison together, at the edge of every value."""
    cut = 60  # beyond it, thresholds of neighbouring values coincide
    thresholds = QUARTER._thresholds[CPU].numpy()[cut:-cut]
    uniform = np.stack([thresholds - 1, thresholds], axis=1).flatten()
    # Four draws share a word of high bits.
    words = (uniform >> 47).astype("<u2").view("<u8")
    low = (uniform & (2**47 - 1)).astype(np.uint64) << np.uint64(17)
    noise = QUARTER._draw_numpy((len(uniform),), Words(words, low))
    below = cut - QUARTER.limit + np.arange(len(thresholds))
    assert noise.tolist() == np.stack([below, below + 1], axis=1).flatten().tolist()


def numpy_draw(grid: GridNoise, size: int) -> Tensor:
    return grid.draw((size,), key(), CPU)


def torch_draw(grid: GridNoise, size: int) -> Tensor:
    """What another device runs, on the CPU's generator."""
    return grid._draw_torch((size,), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("draw", [numpy_draw, torch_draw])
@pytest.mark.parametrize("sigma", [1 / 255, 0.12, 0.25, 1.0])
def test_noise_has_the_probabilities_of_the_rounded_gaussian(draw, sigma: float) -> None:
    size = 4_000_000 if draw is numpy_draw else 1_000_000
    grid = GridNoise(sigma)
    noise = draw(grid, size)
    assert noise.dtype == torch.int16
    assert int(noise.abs().max()) <= grid.limit
    counts = np.bincount(noise.numpy() + np.int16(grid.limit), minlength=2 * grid.limit + 1)
    j = np.arange(-grid.limit, grid.limit + 1)
    expected = size * (
        stats.norm.sf((j - 0.5) / (255 * sigma)) - stats.norm.sf((j + 0.5) / (255 * sigma))
    )
    inner = expected > 25
    observed = np.append(counts[inner], counts[~inner].sum())
    assert (
        stats.chisquare(observed, np.append(expected[inner], size - expected[inner].sum())).pvalue
        > 1e-4
    )
    values = noise.double().numpy() / 255
    deviation = math.sqrt(sigma**2 + 1 / (12 * 255**2))  # Sheppard: rounding adds 1/12
    assert abs(values.mean()) < 5 * deviation / math.sqrt(size)
    if sigma > 1 / 255:
        assert values.std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * size))
    for far in (3.5, 4.5):
        share = 2 * stats.norm.sf((math.ceil(far * 255 * sigma) - 0.5) / (255 * sigma))
        tail = int((np.abs(noise.numpy()) >= math.ceil(far * 255 * sigma)).sum())
        assert abs(tail - size * share) < 5 * math.sqrt(size * share) + 1


# The key


def test_noise_depends_on_seed_stream_image_and_block() -> None:
    keys = [
        key(seed, stream, index, block)
        for seed in (0, 1)
        for stream in ("selection", "estimation", "prediction")
        for index in (0, 1)
        for block in (0, 1)
    ]
    draws = torch.stack([QUARTER.draw((64, 3, 8), k, CPU).flatten() for k in keys])
    assert torch.equal(draws[7], QUARTER.draw((64, 3, 8), keys[7], CPU).flatten())
    assert torch.equal(draws[7], GridNoise(0.25).draw((64, 3, 8), keys[7], CPU).flatten())
    correlations = np.corrcoef(draws.double().numpy())[np.triu_indices(len(draws), k=1)]
    assert np.abs(correlations).max() < 6 / math.sqrt(draws.shape[1])


def test_noise_of_the_first_block_is_pinned() -> None:
    """Stored journals can be drawn again only while this sequence stays as it is."""
    noise = QUARTER.draw((64, 3, 8, 8), key(), CPU)
    assert noise.shape == (64, 3, 8, 8)
    assert noise.flatten()[:8].tolist() == [34, -113, 55, 16, 8, -42, 141, -8]
    digest = hashlib.blake2b(noise.numpy().astype("<i2").tobytes(), digest_size=8).hexdigest()
    assert digest == "2b1148264358fbc4"


def test_odd_sizes_are_drawn_in_full() -> None:
    for size in (1, 2, 3, 5, 7):
        assert QUARTER.draw((size,), key(), CPU).shape == (size,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_sums_have_the_same_values() -> None:
    device = torch.device("cuda")
    pixels, noise = all_pairs(QUARTER.limit)
    assert torch.equal(noisy(pixels.to(device), noise.to(device)).cpu(), noisy(pixels, noise))
    drawn = QUARTER.draw((4_000_000,), key(), device)
    assert torch.equal(drawn, QUARTER.draw((4_000_000,), key(), device))
    drawn = drawn.cpu().double() / 255
    assert float(drawn.std()) == pytest.approx(0.25, rel=2e-3)
    assert abs(float(drawn.mean())) < 5 * 0.25 / 2000


# Images on the grid


def test_every_grey_level_comes_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    for image in (pixels.float() / 255, pixels.float() * (1 / 255), pixels.double() / 255):
        assert torch.equal(on_grid(image), pixels)


@pytest.mark.parametrize(
    "value", [0.5, 100.01 / 255, 1.004, 256 / 255, -1 / 255, math.nan, math.inf]
)
def test_an_image_off_the_grid_is_refused(value: float) -> None:
    image = torch.zeros(3, 4, 4)
    image[1, 2, 3] = image[2, 3, 3] = value
    with pytest.raises(SmoothingError, match=r"at \[1, 2, 3\]: round first") as caught:
        on_grid(image)
    assert "\n" not in str(caught.value)


def test_the_mend_that_is_told_works() -> None:
    x = torch.rand(3, 9, 9)
    with pytest.raises(SmoothingError):
        on_grid(x)
    rounded = (x * 255).round() / 255
    assert torch.equal(on_grid(rounded).float() / 255, rounded)
    with pytest.raises(SmoothingError, match=r"x.float\(\) / 255"):
        on_grid(torch.ones(3, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize("sigma", [0.0, -0.25, 0.0039, 10.1, math.inf, math.nan])
def test_sigma_out_of_range_is_refused(sigma: float) -> None:
    with pytest.raises(SmoothingError, match="sigma") as caught:
        GridNoise(sigma)
    assert "\n" not in str(caught.value)


def test_the_largest_sigma_fits_into_16_bits() -> None:
    """At sigma = 10 the thresholds take seconds; the limit grows in proportion."""
    limit = math.ceil(GridNoise(1.0).limit * 10.1)
    assert limit + 255 < 2**15
