"""Noise and counting: what the base classifier answers under Gaussian noise.

The noise of sample j of image i depends only on (seed, stream, i, j): not on the batch size, nor
on which process draws it, nor on where a run was stopped. Samples are drawn in blocks of
`BLOCK_SIZE`, each from a generator of its own, and batches of any size are cut from the sequence
of blocks.

Shapes: B batch, C channels, H height, W width, K classes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from rrcm.smoothing.checks import check_count, check_sigma
from rrcm.smoothing.errors import SmoothingError

BLOCK_SIZE = 64
"""Samples in a block. It enters every noise value: another size is another random sequence."""

Stream = Literal["selection", "estimation", "prediction"]
"""What the draws are for; streams are independent of one another at the same seed and image."""


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
    # A cryptographic hash, since Python's own hash() differs between processes.
    name = f"{seed}/{stream}/{index}/{block}".encode()
    digest = hashlib.blake2b(name, digest_size=16).digest()
    if device.type == "cpu":
        # Not torch's CPU generator: it keeps 32 bits of its seed, so two of the 1,563 blocks of
        # one image would be the same noise once in 3,500 images. Philox takes all 128 bits.
        philox = np.random.Philox(key=int.from_bytes(digest, "little"))
        noise = np.random.Generator(philox).standard_normal((BLOCK_SIZE, *shape), dtype=np.float32)
        return torch.from_numpy(noise)
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randn((BLOCK_SIZE, *shape), generator=generator, device=device)


def noise_batches(
    shape: Sequence[int],
    num_samples: int,
    batch_size: int,
    *,
    seed: int,
    stream: Stream,
    index: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """The first `num_samples` samples of a stream, in order, in batches of `batch_size`.

    Arguments as `noise_block`. Joined together, the batches are the same for every batch size.

    Yields:
        Standard normal noise, float32 [B, C, H, W]; the last batch may be smaller.
    """
    joined = torch.empty((0, *shape), device=device)
    block = 0
    for start in range(0, num_samples, batch_size):
        size = min(batch_size, num_samples - start)
        parts = [joined]
        have = len(joined)
        while have < size:
            parts.append(
                noise_block(shape, block, seed=seed, stream=stream, index=index, device=device)
            )
            have += BLOCK_SIZE
            block += 1
        parts = [part for part in parts if len(part)]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        yield joined[:size]
        joined = joined[size:]


def base_logits(model: nn.Module, images: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Logits of the base classifier, with its answer's form checked (not its values).

    Args:
        model: Maps float32 [B, C, H, W] to logits [B, K].
        images: Float32 [B, C, H, W], on the model's device.
        num_classes: K.
        dtype: torch.float32, or torch.bfloat16 to run under autocast.

    Returns:
        Logits, [B, K].

    Raises:
        SmoothingError: The model fails on the batch, or gives no tensor [B, K].
    """
    try:
        with torch.autocast(
            images.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16
        ):
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


def class_counts(
    model: nn.Module,
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
) -> Tensor:
    """How often the base classifier gives each class to `x` under Gaussian noise.

    `SampleUnderNoise` of Cohen et al. (2019), section 3.2. The counts do not depend on
    `batch_size` as far as the model's own arithmetic does not: some matrix kernels round otherwise
    at another batch size, which can turn a sample whose two top logits are almost equal.

    Args:
        model: Base classifier in eval mode, float32 [B, C, H, W] -> logits [B, K].
        x: Image, float32 [C, H, W] with values in [0, 1], on the model's device.
        sigma: Standard deviation of the noise, on the [0, 1] pixel scale. No clipping after it.
        num_samples: Number of noisy copies, at least 1.
        num_classes: K.
        batch_size: Noisy copies in one forward pass.
        seed: Seed of the run.
        stream: What the draws are for.
        index: Number of the image; it enters the noise.
        dtype: torch.float32, or torch.bfloat16 for a forward pass under autocast. The noise and
            its sum with the image are float32 in either case.

    Returns:
        Counts, int64 [K] on the CPU; they sum to `num_samples`. A tie of logits goes to one class
        of the tied ones, as torch's argmax does.

    Raises:
        SmoothingError: An argument is out of its range, the model fails or answers in another
            shape, or a logit is NaN or infinite.
    """
    sigma = check_sigma(sigma)
    num_samples = check_count("num_samples", num_samples, 1)
    batch_size = check_count("batch_size", batch_size, 1)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=x.device)
    num_broken = torch.zeros((), dtype=torch.int64, device=x.device)
    with torch.inference_mode():
        for noise in noise_batches(
            x.shape,
            num_samples,
            batch_size,
            seed=seed,
            stream=stream,
            index=index,
            device=x.device,
        ):
            logits = base_logits(model, torch.add(x, noise, alpha=sigma), num_classes, dtype)
            counts += torch.bincount(logits.argmax(dim=1), minlength=num_classes)
            num_broken += (~torch.isfinite(logits).all(dim=1)).sum()
        # The only wait for the device: reading a value in the loop would stall it at each batch.
        broken = int(num_broken)
    if broken:
        raise SmoothingError(
            f"the model gave NaN or infinite logits on {broken} of {num_samples} noisy copies "
            f"of image {index}; no certificate can rest on them"
        )
    return counts.cpu()
