"""What the tests of the sampler and of the smoothed classifier share."""

from collections.abc import Callable

import torch
from torch import Tensor

from rrcm.smoothing.engine import Engine, Job
from rrcm.smoothing.sampler import GaussianNoise, NoisyCopies, Stream


def class_counts(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    sigma: float,
    num_samples: int,
    *,
    num_classes: int,
    batch_size: int,
    seed: int,
    stream: Stream,
    index: int,
    dtype: torch.dtype = torch.float32,
) -> list[int]:
    """Counts of one stream of one image."""
    engine = Engine(
        model, GaussianNoise(sigma), num_classes, batch_size=batch_size, seed=seed, dtype=dtype
    )
    (job,) = engine.run([Job(index, x, num_samples, first=stream)])
    return job.selection


def noise_batches(
    shape: tuple[int, ...], num_samples: int, batch_size: int, device: torch.device, **key
) -> list[Tensor]:
    """Standard normal noise of one stream, cut in pieces."""
    copies = NoisyCopies(torch.zeros(shape, device=device), GaussianNoise(1.0), **key)
    pieces = []
    for start in range(0, num_samples, batch_size):
        size = min(batch_size, num_samples - start)
        pieces.append(torch.empty((size, *shape), device=device))
        copies.fill(pieces[-1])
    return pieces
