"""The hot loop: noisy copies of several images packed into full batches, counted on the device.

A job is one image on its way to a certificate. Its copies need not fill a batch: the room left
goes to the next image, so that few selection draws and early stops do not starve the device.
Counts stay on the device and are read once a look at a job; on a GPU only when the next batch is
already under way.

Shapes: B batch, S slots, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from rrcm.smoothing.errors import SmoothingError
from rrcm.smoothing.sampler import Noise, NoisyCopies, Stream, base_logits

MAX_BATCH = 8192
MAX_JOBS = 64
"""Images in flight at most; a killed run loses no more than these."""


class Draws(Protocol):
    """Decides how many estimation draws an image gets; `AnytimeBound` is one."""

    settled: bool
    """Whether no more draws are wanted."""

    def next_draws(self) -> int:
        """Draws until the next look, while not settled."""

    def update(self, hits: int, draws: int) -> bool:
        """Takes note of `draws` further draws, `hits` of which gave the class; `settled`."""


class FixedDraws:
    """n draws and one look, as in Cohen et al. (2019)."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.settled = False

    def next_draws(self) -> int:
        return self.n

    def update(self, hits: int, draws: int) -> bool:
        self.settled = True
        return True


@dataclass(eq=False)
class Job:
    """One image: what is wanted of it, and what was found."""

    index: int
    """Number of the image; it enters the noise."""
    x: Tensor
    """Image, float32 [C, H, W] in [0, 1] on the engine's device."""
    n0: int
    """Draws of the first stream."""
    draws: Draws | None = None
    """Decides on the "estimation" stream, and is told how often it gave the class that is most
    frequent in the first stream; None for no such stream."""
    first: Stream = "selection"
    """The first stream."""
    selection: list[int] = field(default_factory=list)
    """Counts of the first stream, [K], once the job is done."""
    estimation: list[int] = field(default_factory=list)
    """Counts of the "estimation" stream, [K], once the job is done."""


class Engine:
    """Runs jobs through a base classifier.

    Args:
        model: Base classifier in eval mode, float32 [B, C, H, W] -> logits [B, K].
        noise: What is added to an image.
        num_classes: K.
        batch_size: Noisy copies in one forward pass; the counts do not depend on it as far as the
            model's own arithmetic does not.
        seed: Seed of the run.
        dtype: torch.float32, or torch.bfloat16 for a forward pass under autocast. Noise and sums
            are float32 in either case: in bfloat16 they would be those of a far coarser grid.
        pad: Fill every batch to `batch_size`, for models compiled for one shape.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        noise: Noise,
        num_classes: int,
        *,
        batch_size: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        pad: bool = False,
    ) -> None:
        self.model = model
        self.noise = noise
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.seed = seed
        self.dtype = dtype
        self.pad = pad

    def run(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Runs the jobs and yields them in their order, each with its counts.

        Raises:
            SmoothingError: The model fails or answers in another shape, a logit is not finite, or
                images differ in shape.
        """
        waiting = _Waiting(jobs)
        flights: deque[_Flight] = deque()
        desk: _Desk | None = None
        while True:
            if not flights:
                job = waiting.next()
                if job is None:
                    if waiting.failure:
                        raise waiting.failure
                    return
                desk = desk or _Desk(job.x, self.batch_size, self.num_classes)
                flights.append(_Flight(job, desk, self.noise, self.seed))
            assert desk is not None
            # No `yield` inside: the contexts would leak into the caller's code. One context spans
            # many batches, so that autocast casts the weights once.
            with forward_contexts(desk.images.device, self.dtype):
                while not flights[0].done:
                    self._batch(flights, waiting, desk)
            done = flights.popleft()
            desk.free.append(done.slot)
            yield done.job

    def _batch(self, flights: deque[_Flight], waiting: _Waiting, desk: _Desk) -> None:
        """One forward pass, then a look at the jobs whose copies are complete."""
        rows = 0
        segments: list[tuple[int, int]] = []
        completed: list[_Flight] = []
        position = 0
        while rows < self.batch_size:
            if position == len(flights):
                job = waiting.next() if desk.free else None
                if job is None:
                    break
                flights.append(_Flight(job, desk, self.noise, self.seed))
            flight = flights[position]
            position += 1
            if not any(flight.wanted):
                continue
            for part, copies in enumerate(flight.copies):
                take = min(flight.wanted[part], self.batch_size - rows)
                if take:
                    copies.fill(desk.images[rows : rows + take])
                    segments.append((2 * flight.slot + part, take))
                    flight.wanted[part] -= take
                    rows += take
            if not any(flight.wanted):
                completed.append(flight)

        if rows:
            size = self.batch_size if self.pad else rows
            logits = base_logits(self.model, desk.images[:size], self.num_classes)
            desk.count(logits[:rows], segments)
        if completed:
            desk.looks.append((completed, desk.snapshot()))
        # On a GPU the newest look waits until the next batch is under way.
        ahead = int(rows > 0 and desk.images.device.type != "cpu")
        while len(desk.looks) > ahead:
            for flight in desk.looks[0][0]:
                flight.look(desk.looks[0][1])
            desk.looks.popleft()


@contextmanager
def forward_contexts(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """What a forward pass of a certificate runs in: no gradients, and autocast for bfloat16."""
    bfloat16 = dtype == torch.bfloat16
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        yield


class _Waiting:
    """The jobs to come. One that cannot be had fails only after those before it are done."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._jobs = iter(jobs)
        self.failure: Exception | None = None

    def next(self) -> Job | None:
        if self.failure:
            return None
        try:
            return next(self._jobs, None)
        except Exception as error:
            self.failure = error
            return None


class _Desk:
    """What lives on the device: the batch, and two rows of counts for each of S slots."""

    def __init__(self, like: Tensor, batch_size: int, num_classes: int) -> None:
        device = like.device
        self.images = torch.empty((batch_size, *like.shape), device=device)
        self.counts = torch.zeros((2 * MAX_JOBS, num_classes), dtype=torch.int64, device=device)
        self.broken = torch.zeros(2 * MAX_JOBS, dtype=torch.int64, device=device)
        self.ones = torch.ones(batch_size, dtype=torch.int64, device=device)
        self.free = list(range(MAX_JOBS))[::-1]
        self.looks: deque[tuple[list[_Flight], _Snapshot]] = deque()

    def count(self, logits: Tensor, segments: list[tuple[int, int]]) -> None:
        """Adds the classes of a batch to the counts of the rows they belong to; no waiting."""
        rows, sizes = torch.tensor(segments, device=logits.device).T
        owner = torch.repeat_interleave(rows, sizes, output_size=len(logits))
        ones = self.ones[: len(logits)]
        cells = owner * self.counts.shape[1] + logits.argmax(dim=1)
        self.counts.view(-1).index_add_(0, cells, ones)
        self.broken.index_add_(0, owner, (~torch.isfinite(logits).all(dim=1)).long())

    def snapshot(self) -> _Snapshot:
        return _Snapshot(self.counts, self.broken)


class _Snapshot:
    """The counts as they are now, on their way to the host."""

    def __init__(self, counts: Tensor, broken: Tensor) -> None:
        on_gpu = counts.device.type == "cuda"
        self._tensors = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu).copy_(
                tensor, non_blocking=on_gpu
            )
            for tensor in (counts, broken)
        ]
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            # Of the counts' device, which need not be the current one.
            self._arrived.record(torch.cuda.current_stream(counts.device))

    def read(self, slot: int) -> tuple[list[int], list[int], int]:
        """(counts of the first stream, counts of the second, unusable copies) of a slot."""
        if self._arrived is not None:
            self._arrived.synchronize()
        counts, broken = self._tensors
        first, second = counts[2 * slot : 2 * slot + 2].tolist()
        return first, second, int(broken[2 * slot : 2 * slot + 2].sum())


class _Flight:
    """A job under way: its slot, its two sequences of copies, and how many are still wanted."""

    def __init__(self, job: Job, desk: _Desk, noise: Noise, seed: int) -> None:
        if job.x.shape != desk.images.shape[1:]:
            raise SmoothingError(
                f"image {job.index} has shape {list(job.x.shape)}, those before it "
                f"{list(desk.images.shape[1:])}: bring them to one shape"
            )
        self.job = job
        self.slot = desk.free.pop()
        self.done = False
        self.copies = [
            NoisyCopies(job.x, noise, seed=seed, stream=stream, index=job.index)
            for stream in (job.first, "estimation")
        ]
        self.wanted = [job.n0, job.draws.next_draws() if job.draws else 0]
        desk.counts[2 * self.slot : 2 * self.slot + 2] = 0
        desk.broken[2 * self.slot : 2 * self.slot + 2] = 0

    def look(self, snapshot: _Snapshot) -> None:
        """Reads the counts and asks the rule for more draws, or is done."""
        job = self.job
        job.selection, estimation, broken = snapshot.read(self.slot)
        if broken:
            drawn = sum(job.selection) + sum(estimation)
            raise SmoothingError(
                f"the model gave NaN or infinite logits on {broken} of {drawn} noisy copies of "
                f"image {job.index}; no certificate can rest on them"
            )
        before, job.estimation = job.estimation or [0] * len(estimation), estimation
        if job.draws:
            top = top_class(job.selection)
            hits = estimation[top] - before[top]
            if not job.draws.update(hits, sum(estimation) - sum(before)):
                self.wanted[1] = job.draws.next_draws()
        self.done = not any(self.wanted)


def find_batch_size(logits: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """The batch size with the most copies a second, found by trying.

    Doubles from 16 until a doubling gains less than 3%, a pass takes over 2 s (which bounds the
    memory on a CPU), or a pass takes more than a third of a GPU's memory. The answer changes the
    speed, not the noise.

    Args:
        logits: The forward pass as the engine runs it, [B, C, H, W] -> [B, K].
        x: An image [C, H, W].
    """
    best, best_rate = 16, 0.0
    size = 16
    while size <= MAX_BATCH:
        images = x.expand(size, *x.shape).contiguous()
        try:
            seconds = _seconds(logits, images)
        except SmoothingError:
            if not best_rate:
                raise
            break
        if size / seconds < 1.03 * best_rate:
            break
        best, best_rate = size, size / seconds
        if seconds > 2.0 or _memory_share(x.device) > 1 / 3:
            break
        size *= 2
    return best


def _seconds(logits: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """The better of two passes, after one that allocates and picks kernels."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        # .sum() to the host waits for a GPU.
        logits(images).sum().item()
        times.append(time.perf_counter() - started)
        if times[-1] > 2.0:
            break
    return min(times)


def _memory_share(device: torch.device) -> float:
    """The largest share of a GPU's memory that was taken so far; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    return torch.cuda.max_memory_allocated(device) / torch.cuda.mem_get_info(device)[1]


def top_class(counts: Sequence[int]) -> int:
    """The most frequent class; of tied ones the lowest."""
    return max(range(len(counts)), key=counts.__getitem__)
