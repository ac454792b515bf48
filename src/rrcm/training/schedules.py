"""Schedules: the learning rate and the target network's moving average."""

import math


def lr_scale(progress: float, warmup: float, total: float) -> float:
    """Share of the base learning rate: linear warm-up, then a half cosine that ends at 0.

    Args:
        progress: where training stands, from 0, in the unit of `total` (steps or epochs).
        warmup: length of the warm-up; 0 for none.
        total: length of the training.

    Returns:
        A value in [0, 1].
    """
    if progress < warmup:
        return progress / warmup
    if total <= warmup:
        return 1.0
    done = min((progress - warmup) / (total - warmup), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * done))


def target_ema_rate(
    step: int,
    total_steps: int,
    start: float = 0.99,
    end: float = 0.9999,
    sharpness: float = 15.0,
) -> float:
    """Rate of the target network's moving average at a step: a sigmoid-like rise of start to end.

    Source: rRCM's public code; 15 is its sharpness for CIFAR-10, 10 for ImageNet.

    Args:
        step: the training step, from 0 to total_steps.
        total_steps: steps of the whole training.
        start: the rate at step 0.
        end: the rate at the last step.
        sharpness: how early the rise comes.
    """
    if end == start:
        return start
    raw = math.sqrt(step / total_steps * (end**2 - start**2) + start**2)
    rise = 2.0 / (1.0 + math.exp(-sharpness * (raw - start) / (end - start))) - 1.0
    return rise * end + (1.0 - rise) * start
