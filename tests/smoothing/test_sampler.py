"""Noise and counts depend on (seed, stream, image, sample) and on nothing else."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from counting import class_counts, noise_batches
from scipy import stats
from torch import Tensor, nn

from rrcm.smoothing.errors import SmoothingError
from rrcm.smoothing.sampler import BLOCK_SIZE, Stream, noise_block

CPU = torch.device("cpu")
SHAPE = (3, 4, 5)


class PixelSum(nn.Module):
    """Class by the sum of the pixels, in float64 sample by sample: exact at every batch size."""

    def forward(self, images: Tensor) -> Tensor:
        total = images.double().flatten(1).cumsum(dim=1)[:, -1:] / 4
        centres = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
        return -((total - centres) ** 2)


def count(
    num_samples: int = 500,
    batch_size: int = 64,
    seed: int = 0,
    stream: Stream = "estimation",
    index: int = 0,
    sigma: float = 0.5,
) -> list[int]:
    counts = class_counts(
        PixelSum(),
        torch.zeros(SHAPE),
        sigma,
        num_samples,
        num_classes=4,
        batch_size=batch_size,
        seed=seed,
        stream=stream,
        index=index,
    )
    assert sum(counts) == num_samples
    return counts


def draw(num_samples: int, batch_size: int, seed: int = 0, index: int = 0) -> Tensor:
    parts = noise_batches(
        SHAPE, num_samples, batch_size, CPU, seed=seed, stream="estimation", index=index
    )
    return torch.cat(parts)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 65, 500, 1000])
def test_noise_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    noise = draw(500, batch_size)
    assert noise.shape == (500, *SHAPE)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, draw(500, 128))


def test_more_samples_continue_the_sequence() -> None:
    assert torch.equal(draw(500, 64)[:130], draw(130, 50))


def test_a_block_can_be_drawn_alone() -> None:
    block = noise_block(SHAPE, 3, seed=0, stream="estimation", index=0, device=CPU)
    assert torch.equal(block, draw(500, 64)[3 * BLOCK_SIZE : 4 * BLOCK_SIZE])


def test_noise_is_the_same_in_another_process() -> None:
    """Python's own hash() of strings would fail here."""
    code = (
        "import torch; from rrcm.smoothing.sampler import noise_block;"
        "print(noise_block((2,), 1, seed=5, stream='selection', index=9,"
        " device=torch.device('cpu')).sum().item())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = noise_block((2,), 1, seed=5, stream="selection", index=9, device=CPU).sum().item()
    assert float(out.stdout) == here


def test_noise_of_the_first_block_is_pinned() -> None:
    """Stored journals can be drawn again only while this sequence stays as it is."""
    noise = noise_block((1,), 0, seed=0, stream="estimation", index=0, device=CPU)
    assert noise[:4, 0].tolist() == pytest.approx(
        [0.0615611, -1.7312262, -0.4048472, 0.6914819], abs=1e-6
    )


def test_noise_is_standard_normal_and_independent_between_blocks_and_images() -> None:
    """Moments, tails and correlations over neighbouring blocks, images and streams."""
    blocks = [
        noise_block((400,), block, seed=seed, stream=stream, index=index, device=CPU).flatten()
        for block in (0, 1, 2)
        for seed in (0, 1)
        for stream in ("selection", "estimation", "prediction")
        for index in (0, 1)
    ]
    noise = torch.stack(blocks).double().numpy()
    assert stats.kstest(noise.flatten()[:200_000], "norm").pvalue > 1e-4
    size = noise.shape[1]
    correlations = np.corrcoef(noise)[np.triu_indices(len(noise), k=1)]
    assert np.abs(correlations).max() < 6 / np.sqrt(size)
    tail = int((np.abs(noise) > 4).sum())
    expected = noise.size * 2 * stats.norm.sf(4)
    assert abs(tail - expected) < 6 * np.sqrt(expected)


def test_blocks_of_a_long_run_are_all_different() -> None:
    """A generator that keeps 32 bits of its seed repeats blocks in a run of 500 images."""
    firsts = {
        noise_block((1,), block, seed=0, stream="estimation", index=0, device=CPU)[:3]
        .numpy()
        .tobytes()
        for block in range(3000)
    }
    assert len(firsts) == 3000


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_counts_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    assert count(batch_size=batch_size) == count(batch_size=64)


def test_counts_depend_on_seed_image_and_stream() -> None:
    base = count()
    assert count() == base
    assert count(seed=1) != base
    assert count(index=1) != base
    assert count(stream="selection") != base
    assert count(stream="prediction") != base


def test_sigma_is_the_standard_deviation_of_the_noise() -> None:
    """The sum of 60 pixels has deviation sigma * sqrt(60); compare the share of each class."""
    sigma = 0.25
    observed = np.array(count(num_samples=20_000, sigma=sigma)) / 20_000
    edges = stats.norm.cdf(np.array([-0.5, 0.5, 1.5]), scale=sigma * np.sqrt(60) / 4)
    expected = np.diff(edges, prepend=0.0, append=1.0)
    assert np.abs(observed - expected).max() < 5 * np.sqrt(0.25 / 20_000)


class Answer(nn.Module):
    """Gives whatever `make` gives, to try out bad answers."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, images: Tensor):
        return self.make(images)


def counts_of(model: nn.Module, **changes) -> list[int]:
    settings = {"num_classes": 3, "batch_size": 64, "seed": 0, "stream": "estimation", "index": 4}
    return class_counts(model, torch.zeros(SHAPE), 0.5, 100, **(settings | changes))


def test_one_broken_logit_among_many_is_found() -> None:
    def make(images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 3)
        logits[-1, 1] = float("nan")
        return logits

    with pytest.raises(SmoothingError, match=r"NaN or infinite logits on 2 of 100 .* image 4"):
        counts_of(Answer(make))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: torch.full((len(x), 3), float("inf")), "on 100 of 100 noisy copies"),
        (lambda x: torch.zeros(len(x), 5), r"shape \[64, 3\] .* got \[64, 5\]"),
        (lambda x: torch.zeros(len(x)), r"got \[64\]"),
        (lambda x: torch.zeros(len(x), 3, 1), r"got \[64, 3, 1\]"),
        (lambda x: (torch.zeros(len(x), 3),), "tensor of logits .* got tuple"),
    ],
)
def test_bad_answers_of_a_model(make, message: str) -> None:
    with pytest.raises(SmoothingError, match=message):
        counts_of(Answer(make))


def test_a_model_made_for_another_size_is_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(7, 3))
    with pytest.raises(SmoothingError, match=r"failed on a batch of shape \[64, 3, 4, 5\]"):
        counts_of(model)


def test_out_of_memory_names_the_mend() -> None:
    def make(images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SmoothingError, match="64 images: use a smaller batch_size"):
        counts_of(Answer(make))


def test_bfloat16_runs_under_autocast_and_keeps_the_noise_in_float32() -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    linear = nn.Linear(60, 3)

    def make(images: Tensor) -> Tensor:
        logits: Tensor = linear(images.flatten(1))
        seen.append((images.dtype, logits.dtype))
        return logits

    counts_of(Answer(make), dtype=torch.bfloat16)
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    seen.clear()
    counts_of(Answer(make))
    assert set(seen) == {(torch.float32, torch.float32)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_on_a_gpu_does_not_depend_on_the_batch_size() -> None:
    def draw_there(batch_size: int) -> Tensor:
        device = torch.device("cuda")
        batches = noise_batches(
            SHAPE, 300, batch_size, device, seed=0, stream="estimation", index=0
        )
        return torch.cat(batches)

    assert draw_there(7).is_cuda
    assert torch.equal(draw_there(7), draw_there(256))
