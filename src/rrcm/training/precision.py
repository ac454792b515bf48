"""Mixed precision where it pays."""

import time
from functools import cache
from statistics import median

import torch

MIN_GAIN = 1.3
"""bfloat16 must beat float32 by this factor to be chosen."""


def resolve_precision(wanted: str, device: torch.device) -> str:
    """ "float32" or "bfloat16": as wanted, or for "auto" whichever is faster on this device."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if _matmul_gain() >= MIN_GAIN else "float32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of a precision; float32 switches it off."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@cache
def _matmul_gain(size: int = 512, repeats: int = 9) -> float:
    """How many times faster a bfloat16 matrix product is on this CPU (measured, ~20 ms)."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(size, size, dtype=dtype)
        a @ a
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return median(times)

    return seconds(torch.float32) / seconds(torch.bfloat16)
