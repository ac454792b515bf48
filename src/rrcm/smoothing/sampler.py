"""Noise and counting: what the base classifier answers under Gaussian noise.

The noise of sample j of image i depends only on (seed, stream, i, j): not on the batch size, nor
on which process draws it, nor on where a run was stopped. Samples are drawn in blocks of
`BLOCK_SIZE`, each from a generator of its own, and batches of any size are cut from the sequence
of blocks.

Shapes: B batch, C channels, H height, W width, K classes.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rrcm.smoothing.checks import check_sigma
from rrcm.smoothing.errors import SmoothingError
from rrcm.smoothing.exact import GridNoise, noisy, on_grid

BLOCK_SIZE = 64
"""Samples in a block. It enters every noise value: another size is another random sequence."""

NoiseName = Literal["gaussian", "exact"]
Stream = Literal["selection", "estimation", "prediction"]
"""What the draws are for; streams are independent of one another at the same seed and image."""


def block_key(seed: int, stream: Stream, index: int, block: int) -> bytes:
    """16 bytes that name a block: a cryptographic hash, since Python's differs by process."""
    name = f"{seed}/{stream}/{index}/{block}".encode()
    return hashlib.blake2b(name, digest_size=16).digest()


def noise_block(
    shape: Sequence[int], block: int, *, seed: int, stream: Stream, index: int, device: torch.device
) -> Tensor:
    """Block number `block` of standard normal noise for image `index`: samples 64 b to 64 b + 63.

    On the CPU the values are numpy's Philox stream; on another device they come from torch's
    generator there, so they are equal between runs on the same kind of device (one GPU model),
    and not between a CPU and a GPU.

    Args:
        shape: Shape of one sample, [C, H, W].
        block: Number of the block, from 0.
        seed: Seed of the run, any whole number.
        stream: What the draws are for.
        index: Number of the image.
        device: Where the noise is wanted.

    Returns:
        Noise, float32 [BLOCK_SIZE, C, H, W].
    """
    digest = block_key(seed, stream, index, block)
    if device.type == "cpu":
        # Not torch's CPU generator: it keeps 32 bits of its seed, so two of the 1,563 blocks of
        # one image would be the same noise once in 3,500 images. Philox takes all 128 bits.
        philox = np.random.Philox(key=int.from_bytes(digest, "little"))
        noise = np.random.Generator(philox).standard_normal((BLOCK_SIZE, *shape), dtype=np.float32)
        return torch.from_numpy(noise)
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randn((BLOCK_SIZE, *shape), generator=generator, device=device)


class Noise(Protocol):
    """A kind of noise: how noisy copies of an image are made."""

    @property
    def name(self) -> NoiseName:
        """What the journal calls it."""

    def prepare(self, x: Tensor) -> Tensor:
        """The image [C, H, W] in [0, 1] in the form that `noisy_block` takes."""

    def noisy_block(
        self, prepared: Tensor, block: int, *, seed: int, stream: Stream, index: int
    ) -> Tensor:
        """Copies 64 b to 64 b + 63 of an image, float32 [BLOCK_SIZE, C, H, W]."""

    def mismatch(self, num_values: int) -> float:
        """What `num_values` values of this noise cost of alpha, for not being the ideal."""


class GaussianNoise:
    """x + N(0, sigma^2 I) in float32, as all published codes draw it; no clipping after it.

    Args:
        sigma: Standard deviation, on the [0, 1] pixel scale.
    """

    name: NoiseName = "gaussian"

    def __init__(self, sigma: float) -> None:
        self.sigma = check_sigma(sigma)

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def noisy_block(
        self, prepared: Tensor, block: int, *, seed: int, stream: Stream, index: int
    ) -> Tensor:
        noise = noise_block(
            prepared.shape, block, seed=seed, stream=stream, index=index, device=prepared.device
        )
        return torch.add(prepared, noise, alpha=self.sigma, out=noise)

    def mismatch(self, num_values: int) -> float:
        return 0.0


class ExactNoise:
    """Whole grey levels, added as integers; see `rrcm.smoothing.exact`.

    Args:
        sigma: Standard deviation, on the [0, 1] pixel scale.
    """

    name: NoiseName = "exact"

    def __init__(self, sigma: float) -> None:
        self._grid = GridNoise(sigma)

    def prepare(self, x: Tensor) -> Tensor:
        return on_grid(x)

    def noisy_block(
        self, prepared: Tensor, block: int, *, seed: int, stream: Stream, index: int
    ) -> Tensor:
        key = block_key(seed, stream, index, block)
        levels = self._grid.draw((BLOCK_SIZE, *prepared.shape), key, prepared.device)
        return noisy(prepared, levels)

    def mismatch(self, num_values: int) -> float:
        return self._grid.mismatch(num_values)


NOISES: dict[NoiseName, Callable[[float], Noise]] = {
    "gaussian": GaussianNoise,
    "exact": ExactNoise,
}


class NoisyCopies:
    """The noisy copies of one image and stream, in order, cut to any lengths.

    Joined together, the pieces are the same however they are cut.
    """

    def __init__(self, x: Tensor, noise: Noise, *, seed: int, stream: Stream, index: int) -> None:
        prepared = noise.prepare(x)
        self._draw = partial(noise.noisy_block, prepared, seed=seed, stream=stream, index=index)
        self._blocks = 0
        self._rest = x.new_empty((0, *x.shape))

    def fill(self, out: Tensor) -> None:
        """Writes the next len(out) copies to out, float32 [B, C, H, W]."""
        done = 0
        while done < len(out):
            if not len(self._rest):
                self._rest = self._draw(self._blocks)
                self._blocks += 1
            take = min(len(self._rest), len(out) - done)
            out[done : done + take] = self._rest[:take]
            self._rest = self._rest[take:]
            done += take


def base_logits(model: Callable[[Tensor], Tensor], images: Tensor, num_classes: int) -> Tensor:
    """Logits of the base classifier, with its answer's form checked (not its values).

    Args:
        model: Maps float32 [B, C, H, W] to logits [B, K].
        images: Float32 [B, C, H, W], on the model's device.
        num_classes: K.

    Returns:
        Logits, [B, K].

    Raises:
        SmoothingError: The model fails on the batch, or gives no tensor [B, K].
    """
    try:
        logits = model(images)
    except torch.OutOfMemoryError as error:
        raise SmoothingError(
            f"out of memory with a batch of {len(images)} images: use a smaller batch_size"
        ) from error
    except (RuntimeError, TypeError, ValueError) as error:
        # Mostly an image of a size or depth the model is not made for.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SmoothingError(
            f"the model failed on a batch of shape {list(images.shape)}: {reason}"
        ) from error
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        raise SmoothingError(
            f"the model must return a tensor of logits [batch, classes], got {kind}: wrap it"
        )
    if logits.shape != (len(images), num_classes):
        raise SmoothingError(
            f"the model must return logits of shape {[len(images), num_classes]} "
            f"(batch, num_classes), got {list(logits.shape)}"
        )
    return logits
