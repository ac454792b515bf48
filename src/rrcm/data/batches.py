"""Which images a training step sees: a pure function of (seed, step); a resume needs no state."""

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64 bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shuffle_keys(count: int, *seeds: int) -> npt.NDArray[np.uint64]:
    """Return `count` distinct pseudo-random 64-bit keys; sorting by them is a shuffle.

    Integer arithmetic alone, so the order is the same on every machine and with every version of
    numpy and torch, which `torch.randperm` does not promise. `seeds` may be any integers.
    """
    state = np.zeros(1, np.uint64)
    for seed in seeds:
        state = _mix(state + np.uint64((seed * _GOLDEN + _GOLDEN) & _MASK))
    return _mix(state + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))


@functools.lru_cache(maxsize=2)
def _epoch_order(num_images: int, epoch: int, seed: int) -> Tensor:
    return torch.from_numpy(np.argsort(shuffle_keys(num_images, seed, epoch)))


def batch_indices(num_images: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Return the images of training step `step`, counted from 0.

    Each epoch is a fresh shuffle of all images, given by (seed, epoch) alone. The epochs follow one
    another as one stream and step k takes places k * batch_size to (k + 1) * batch_size of it: no
    image is dropped at an epoch's end, and a batch may hold the end of one epoch and the beginning
    of the next (or several epochs, where batch_size > num_images).

    Args:
        num_images: size of the set, at least 1.
        batch_size: images a step over all processes, at least 1.
        step: 0, 1, 2, ...
        seed: any integer.

    Returns:
        int64 [batch_size], values 0..num_images-1, on the CPU.

    Raises:
        ValueError: a count below 1 or a negative step.
    """
    if num_images < 1 or batch_size < 1 or step < 0:
        raise ValueError(
            "num_images and batch_size must be at least 1 and step at least 0, "
            f"got {num_images}, {batch_size}, {step}"
        )
    parts = []
    place, end = step * batch_size, (step + 1) * batch_size
    while place < end:
        epoch, start = divmod(place, num_images)
        stop = min(num_images, start + end - place)
        parts.append(_epoch_order(num_images, epoch, seed)[start:stop])
        place += stop - start
    return torch.cat(parts)
