"""Noise for which the theorem holds in floating point too: everything is a whole number.

In floats, x + noise is rounded, and the low bits of the result tell something about x; a
classifier that reads them gets certificates that are false. Here the image is made of 8-bit grey
levels p, the noise is a Gaussian rounded to whole grey levels J, they are added as integers, and
the sum is made a float once. What the classifier sees is a function of p + J, and p + J is the
real Gaussian sum p + N(0, (255 sigma)^2) rounded, so Cohen's theorem applies to the letter. The
whole argument is in docs/soundness.md.

Source: Voracek and Hein (ICLR 2023), "Sound Randomized Smoothing in Floating-Point Arithmetics".

Shapes: B batch, C channels, H height, W width.
"""

from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext

import numpy as np
import torch
from torch import Tensor

from rrcm.smoothing.checks import check_sigma
from rrcm.smoothing.errors import SmoothingError

_BITS = 63  # of a uniform draw: the most that a signed 64-bit integer holds
_HIGH_BITS = 16  # of them, those that settle nearly every draw on the CPU
_LOW_BITS = _BITS - _HIGH_BITS
_UNSETTLED = np.iinfo(np.int16).min
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
_MAX_SIGMA = 10.0  # the largest noise is 9.2 sigma: 23,154 grey levels, and int16 holds 32,767
# Of a grey level. Float32 roads to p / 255 (p / 255, p * (1 / 255)) differ by 3e-5 of one.
_GRID_TOLERANCE = 2.0**-12


class GridNoise:
    """The Gaussian N(0, (255 sigma)^2) rounded to whole grey levels, drawn from uniform integers.

    P(j) = Phi((2 j + 1) / (510 sigma)) - Phi((2 j - 1) / (510 sigma)) for every whole j. A draw is
    a uniform 63-bit integer compared with thresholds 2^63 Phi((2 j + 1) / (510 sigma)), each
    rounded to the nearest integer; `mismatch` bounds what that rounding does.

    Source: Voracek and Hein (2023); the thresholds and the way to draw are our own.
    """

    def __init__(self, sigma: float) -> None:
        """Computes the thresholds: 0.1 s at sigma = 0.25, in proportion to sigma.

        Args:
            sigma: Standard deviation of the noise on the [0, 1] pixel scale, 1/255 to 10.

        Raises:
            SmoothingError: sigma is out of its range.
        """
        self.sigma = check_sigma(sigma)
        if not 1 / 255 <= self.sigma <= _MAX_SIGMA:
            raise SmoothingError(
                'noise="exact" needs a sigma from 1/255 (one grey level) to '
                f"{_MAX_SIGMA:g}, got {self.sigma}"
            )
        tails = _upper_tails(self.sigma)
        self.limit = len(tails)
        """Largest noise that can be drawn, in grey levels: about 9.2 * 255 * sigma."""
        thresholds = np.array(tails[::-1] + [2**_BITS - tail for tail in tails], dtype=np.int64)
        self._thresholds = {torch.device("cpu"): torch.from_numpy(thresholds)}

        first = np.arange(2**_HIGH_BITS, dtype=np.int64) << _LOW_BITS
        lowest = np.searchsorted(thresholds, first, side="right")
        highest = np.searchsorted(thresholds, first + (2**_LOW_BITS - 1), side="right")
        # The noise that follows from the high bits of a draw alone, where one does.
        self._by_high_bits = np.where(lowest == highest, lowest - self.limit, _UNSETTLED).astype(
            np.int16
        )

    def mismatch(self, num_values: int) -> float:
        """Bound on the probability that any of `num_values` values is not the ideal one.

        A draw and a draw from the exact probabilities can be made from the same real uniform
        number; then they differ only if it falls between an exact threshold and its rounding.
        Each such gap is at most 2^-64 wide; beyond the largest noise lie 2^-64 on each side.

        A procedure that errs with probability at most a under ideal noise errs with at most
        a + mismatch(values it draws) under this one: certify n copies of an image of d values
        with alpha - mismatch(n * d). For CIFAR-10, n = 1e5 and sigma = 0.25 it is 2e-8.
        """
        # One gap more than there are: it covers the 1e-40 by which a threshold may be off before
        # it is rounded, and the rounding of this product.
        return num_values * (2 * self.limit + 3) * 2.0**-64

    def draw(self, shape: Sequence[int], key: bytes, device: torch.device) -> Tensor:
        """Draws noise that depends on `key`, `shape` and sigma alone.

        As in the sampler, CPU values come from numpy's Philox, and on every machine they are the
        same; on another device they come from torch's generator there, so they are equal between
        runs on one GPU model, and not between a CPU and a GPU.

        Args:
            shape: Any shape, as [BLOCK_SIZE, C, H, W].
            key: 16 bytes, a hash of what the draw is for.
            device: Where the noise is wanted.

        Returns:
            Noise in grey levels, int16 of that shape, from -limit to limit.
        """
        if device.type == "cpu":
            return self._draw_numpy(shape, np.random.Philox(key=int.from_bytes(key, "little")))
        generator = torch.Generator(device).manual_seed(int.from_bytes(key[:8], "little"))
        return self._draw_torch(shape, generator)

    def _draw_numpy(self, shape: Sequence[int], philox: np.random.Philox) -> Tensor:
        """Draws the high bits of all values, then the low bits of the few that need them."""
        size = int(np.prod(shape))
        # random_raw, not a Generator's methods: numpy may change their streams, never this one.
        words = philox.random_raw(-(-size // 4)).astype("<u8", copy=False)
        high = words.view("<u2")[:size]
        noise = self._by_high_bits.take(high)
        unsettled = np.flatnonzero(noise == _UNSETTLED)
        low = philox.random_raw(len(unsettled)) >> np.uint64(64 - _LOW_BITS)
        uniform = (high[unsettled].astype(np.int64) << _LOW_BITS) | low.astype(np.int64)
        thresholds = self._thresholds[torch.device("cpu")].numpy()
        noise[unsettled] = np.searchsorted(thresholds, uniform, side="right") - self.limit
        return torch.from_numpy(noise.reshape(shape))

    def _draw_torch(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draws all bits of all values at once; without a wait for the device."""
        device = generator.device
        if device not in self._thresholds:
            self._thresholds[device] = self._thresholds[torch.device("cpu")].to(device)
        # random_ without bounds is uniform on the 2^63 non-negative numbers of int64.
        uniform = torch.empty(tuple(shape), dtype=torch.int64, device=device)
        uniform.random_(generator=generator)
        passed = torch.bucketize(uniform, self._thresholds[device], out_int32=True, right=True)
        return (passed - self.limit).to(torch.int16)


def noisy(pixels: Tensor, noise: Tensor) -> Tensor:
    """Noisy images as the classifier sees them: the integer sum, made a float once.

    Each value depends on pixel + noise alone, and grows with it; without noise it is the float32
    image pixels / 255. There is no clipping: `GridNoise` draws nothing beyond its limit.

    Args:
        pixels: Grey levels, uint8 [C, H, W], or [B, C, H, W] with an image for each noise.
        noise: Grey levels, int16 [B, C, H, W], from `GridNoise.draw`.

    Returns:
        (pixels + noise) / 255, float32 [B, C, H, W].
    """
    if pixels.dtype != torch.uint8 or noise.dtype != torch.int16:
        # A float here would let the low bits leak again, and nothing would show it.
        raise SmoothingError(
            f"noisy adds uint8 pixels and int16 noise, got {pixels.dtype} and {noise.dtype}"
        )
    sums = (noise + pixels).to(torch.float32)
    # Divided by a tensor: dividing by a number, CUDA multiplies by its rounded reciprocal, which
    # is a function of the sum too, but not the same one as on the CPU.
    return sums.div_(torch.full((), 255.0, device=sums.device))


def on_grid(x: Tensor) -> Tensor:
    """The grey levels of an image that is stored in 8 bits; inverse of pixels / 255.

    Args:
        x: Image, float32 of any shape ([C, H, W]), values p / 255 with p = 0..255, up to the
            rounding of float32.

    Returns:
        Grey levels, uint8, in the shape of `x`.

    Raises:
        SmoothingError: A value is off the grid or outside [0, 1].
    """
    if not x.is_floating_point():
        raise SmoothingError(
            f"an image must be floating point in [0, 1], got {x.dtype}: "
            "for 8-bit pixels use x.float() / 255"
        )
    scaled = x.detach().to(torch.float32) * 255.0
    levels = scaled.round()
    # Written so that NaN is off the grid.
    good = ((scaled - levels).abs() <= _GRID_TOLERANCE) & (levels >= 0.0) & (levels <= 255.0)
    if not bool(good.all()):
        place = (~good).nonzero()[0].tolist()
        raise SmoothingError(
            'noise="exact" takes 8-bit images only (multiples of 1/255 in [0, 1]), got '
            f"{float(x[tuple(place)]):.7g} at {place}: round first, x = (x * 255).round() / 255"
        )
    return levels.to(torch.uint8)


def _upper_tails(sigma: float) -> list[int]:
    """2^63 P(noise > j) for j = 0, 1, ..., to the nearest integer, until that is 0.

    In decimal arithmetic of 60 digits, which is the same on every machine: float64 has 53 bits
    near 1/2, and its erfc is another one in each library.

    P(noise > j) = 1/2 - phi(z) (z + z^3/3 + z^5/(3*5) + z^7/(3*5*7) + ...), z = (2j+1)/(510 sigma):
    all terms are positive, so no digits cancel inside the series; z stays below 9.3. What is left
    out and what is rounded stays below 1e-40.

    Source: Abramowitz and Stegun, 26.2.11.
    """
    tails: list[int] = []
    with localcontext(Context(prec=60, rounding=ROUND_HALF_EVEN)):
        step = 1 / (510 * Decimal(sigma))
        root = (2 * _PI).sqrt()
        while True:
            z = (2 * len(tails) + 1) * step
            square = z * z
            term, odd = z, 1
            total = term
            while term > Decimal("1e-45"):
                odd += 2
                term *= square / odd
                total += term
            tail = Decimal("0.5") - total * (-square / 2).exp() / root
            scaled = int((tail * 2**_BITS).to_integral_value())
            if scaled == 0:
                return tails
            tails.append(scaled)
