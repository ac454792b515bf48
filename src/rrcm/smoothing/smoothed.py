"""The smoothed classifier: prediction and certification of Cohen et al. (2019).

Shapes: B batch, C channels, H height, W width, K classes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

import torch
from torch import Tensor, nn

from rrcm.smoothing.anytime import AnytimeBound, AnytimeTest, StopRule
from rrcm.smoothing.bounds import certified_radius, clopper_pearson_lower, top_two_p_value
from rrcm.smoothing.checks import check_alpha, check_count, check_sigma
from rrcm.smoothing.engine import (
    Draws,
    Engine,
    FixedDraws,
    Job,
    find_batch_size,
    forward_contexts,
    top_class,
)
from rrcm.smoothing.errors import SmoothingError
from rrcm.smoothing.sampler import NOISES, NoiseName, base_logits

ABSTAIN = -1
"""The prediction of a smoothed classifier that declines to name a class."""


@dataclass(frozen=True)
class Certificate:
    """What is certified of one image, and what the certificate rests on.

    With probability at least 1 - alpha over the noise drawn, either `prediction` is ABSTAIN, or
    the smoothed classifier returns `prediction` at every image closer than `radius` in L2.
    """

    prediction: int
    """Certified class, or ABSTAIN (-1)."""
    radius: float
    """L2 radius on the [0, 1] pixel scale, rounded down; 0 if abstaining."""
    top: int
    """Class picked by the selection draws, also if abstaining."""
    count: int
    """How many of the n estimation draws gave `top`."""
    n0: int
    """Number of selection draws."""
    n: int
    """Number of estimation draws."""
    alpha: float
    """Probability of error of this one certificate."""
    sigma: float
    """Standard deviation of the noise, on the [0, 1] pixel scale."""
    p_lower: float
    """Lower confidence bound of the probability of `top` under noise."""
    seed: int
    """Seed of the run."""
    index: int
    """Number of the image, which enters the noise with the seed."""


def certificate_from_counts(
    selection: Sequence[int],
    estimation: Sequence[int],
    *,
    sigma: float,
    alpha: float,
    seed: int = 0,
    index: int = 0,
    spent: float = 0.0,
    p_lower: float | None = None,
) -> Certificate:
    """The decision of CERTIFY, given the class counts of its two sets of draws.

    The most frequent class of `selection` is bounded from below with its count in `estimation`;
    the two must come from independent draws, or the guarantee is void. With probability at least
    1 - alpha over the estimation draws, the certificate holds.

    Args:
        selection: Class counts of the n0 selection draws, K whole numbers; a tie goes to the
            lowest class.
        estimation: Class counts of the n estimation draws, K whole numbers.
        sigma: Standard deviation of the noise, on the [0, 1] pixel scale.
        alpha: Probability of error, between 0 and 1.
        seed: Recorded in the certificate.
        index: Recorded in the certificate.
        spent: The part of alpha that the noise has used up (`Noise.mismatch`).
        p_lower: Lower bound of the top class's probability where another than Clopper and
            Pearson's is used.

    Raises:
        SmoothingError: An argument is out of its range.

    Source: Cohen et al. (2019), CERTIFY in the pseudocode of section 3.2, Proposition 2.
    """
    if len(selection) != len(estimation) or len(selection) < 2:
        raise SmoothingError(
            "selection and estimation must count the same classes, 2 or more; "
            f"got {len(selection)} and {len(estimation)}"
        )
    alpha, sigma = check_alpha(alpha), check_sigma(sigma)
    n0 = check_count("n0, the sum of selection,", sum(selection), 1)
    n = check_count("n, the sum of estimation,", sum(estimation), 1)
    top = top_class(selection)
    count = int(estimation[top])
    if p_lower is None:
        p_lower = clopper_pearson_lower(count, n, alpha - spent)
    certified = p_lower > 0.5
    return Certificate(
        prediction=top if certified else ABSTAIN,
        radius=certified_radius(p_lower, sigma) if certified else 0.0,
        top=top,
        count=count,
        n0=n0,
        n=n,
        alpha=alpha,
        sigma=sigma,
        p_lower=p_lower,
        seed=seed,
        index=index,
    )


class SmoothedClassifier:
    """The classifier g(x) = the class a base classifier most often gives to x + N(0, sigma^2 I).

    Source: Cohen et al. (2019), equation 1.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: float,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        noise: NoiseName = "gaussian",
        compile: bool = False,
    ) -> None:
        """Wraps a base classifier, which must be in eval mode.

        Args:
            model: Base classifier, float32 [B, C, H, W] -> logits [B, K]. Its input is an image
                in [0, 1] plus noise (so values outside [0, 1] occur); it normalises inside.
            sigma: Standard deviation of the noise, on the [0, 1] pixel scale.
            num_classes: K, at least 2.
            device: Where to run; the model is moved there. None: where the model is.
            dtype: torch.float32, or torch.bfloat16 for forward passes under autocast (noise and
                sums stay float32). Another dtype is, strictly, another base classifier.
            noise: "gaussian", or "exact" for a guarantee that holds in floating point too, for
                images on the 8-bit grid (docs/soundness.md).
            compile: Run the model through torch.compile; every batch then has one shape.

        Raises:
            SmoothingError: An argument is out of its range, or the device cannot be used.
        """
        if not isinstance(model, nn.Module):
            raise SmoothingError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise SmoothingError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        self.sigma = check_sigma(sigma)
        self.num_classes = check_count("num_classes", num_classes, 2)
        self.dtype = dtype
        if device is None:
            self.device = _device_of(model)
        else:
            self.device = _usable_device(device)
            model.to(self.device)
        _check_eval(model)
        self.model = model
        if noise not in NOISES:
            raise SmoothingError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
        self.noise = NOISES[noise](self.sigma)
        self._compile = compile
        self._forward = torch.compile(model, dynamic=False) if compile else model
        self._state: tuple[tuple[int, int], ...] | None = None
        self.batch_size: int | None = None

    def certify(
        self,
        x: Tensor,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        batch_size: int | None = None,
        seed: int = 0,
        index: int = 0,
        stop: StopRule | None = None,
    ) -> Certificate:
        """Certifies the prediction at `x` in an L2 ball around it.

        With probability at least 1 - alpha over the noise drawn, either the certificate abstains,
        or the smoothed classifier returns its class at every image closer than its radius.

        Without `stop` it takes n estimation draws and one Clopper-Pearson bound, as published. With
        it, it draws until the rule's question is settled, and bounds by a confidence sequence,
        which holds at any stopping time (docs/anytime.md).

        Args:
            x: Image, floating point [C, H, W], values in [0, 1].
            n0: Number of noisy copies that pick the class.
            n: Number of further noisy copies that bound its probability; not used with `stop`.
            alpha: Probability of error, between 0 and 1.
            batch_size: Noisy copies in one forward pass; it changes the speed, not the noise. None
                finds one.
            seed: Seed of the run.
            index: Number of the image; images of one run need numbers of their own, so that their
                noise is independent.
            stop: When to stop drawing, and the most draws.

        Returns:
            The certificate; prediction ABSTAIN and radius 0 if the bound is not above 1/2.

        Raises:
            SmoothingError: An argument is out of its range, or the model's answer is unusable.

        Source: Cohen et al. (2019), CERTIFY in the pseudocode of section 3.2, Proposition 2.
        """
        images = [(check_count("index", index, 0), x)]
        return next(self.certify_many(images, n0, n, alpha, batch_size, seed, stop))

    def certify_many(
        self,
        images: Iterable[tuple[int, Tensor]],
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        batch_size: int | None = None,
        seed: int = 0,
        stop: StopRule | None = None,
    ) -> Iterator[Certificate]:
        """Certifies images, sharing batches between them; each certificate as `certify`'s.

        Args:
            images: Pairs of an image's number and the image, all of one shape; read as needed.

        Yields:
            A certificate an image, in order. Each may be wrong with probability alpha.
        """
        n0 = check_count("n0", n0, 1)
        n = check_count("n", n, 1)
        alpha = check_alpha(alpha)
        seed = check_count("seed", seed, 0)
        n_max = stop.n_max if stop else n

        @cache
        def test_of(num_values: int, rule: StopRule) -> AnytimeTest:
            spent = self.noise.mismatch(n_max * num_values)
            return AnytimeTest(self.sigma, alpha - spent, rule)

        def jobs() -> Iterator[Job]:
            for index, x in images:
                checked = self._checked_image(x, index)
                draws: Draws = (
                    AnytimeBound(test_of(checked.numel(), stop)) if stop else FixedDraws(n)
                )
                yield Job(index, checked, n0, draws)

        for job in self._run(jobs(), batch_size, seed):
            yield certificate_from_counts(
                job.selection,
                job.estimation,
                sigma=self.sigma,
                alpha=alpha,
                seed=seed,
                index=job.index,
                spent=self.noise.mismatch(n_max * job.x.numel()),
                p_lower=job.draws.p_lower if isinstance(job.draws, AnytimeBound) else None,
            )

    def predict(
        self,
        x: Tensor,
        n: int,
        alpha: float = 0.001,
        batch_size: int | None = None,
        seed: int = 0,
        index: int = 0,
    ) -> int:
        """Predicts the class of the smoothed classifier at `x`, or abstains.

        With probability at least 1 - alpha over the noise drawn, the result is the class that the
        smoothed classifier returns at `x`, or ABSTAIN (-1). Arguments and errors as `certify`,
        with `n` noisy copies in all.

        Source: Cohen et al. (2019), PREDICT in the pseudocode of section 3.2, Proposition 1.
        """
        n = check_count("n", n, 1)
        alpha = check_alpha(alpha)
        seed = check_count("seed", seed, 0)
        index = check_count("index", index, 0)
        job = Job(index, self._checked_image(x, index), n, first="prediction")
        (job,) = self._run([job], batch_size, seed)
        counts = job.selection
        first, second = sorted(range(self.num_classes), key=counts.__getitem__, reverse=True)[:2]
        spent = self.noise.mismatch(n * job.x.numel())
        sure = top_two_p_value(counts[first], counts[second]) <= alpha - spent
        return first if sure else ABSTAIN

    def predict_clean(self, x: Tensor) -> int:
        """Class the base classifier gives to `x` itself, without noise; nothing is certified.

        Args:
            x: Image, floating point [C, H, W], values in [0, 1].

        Raises:
            SmoothingError: `x` is no such image, or the model's answer is unusable.
        """
        logits = self._logits(self._usable(x).unsqueeze(0))
        if not bool(torch.isfinite(logits).all()):
            raise SmoothingError("the model gave NaN or infinite logits on an image")
        return int(logits.argmax(dim=1))

    def _run(self, jobs: Iterable[Job], batch_size: int | None, seed: int) -> Iterator[Job]:
        """Runs the jobs through the engine, after a look at the model with the first image."""
        waiting = iter(jobs)
        first = next(waiting, None)
        if first is None:
            return
        self._check_model(first.x)
        if batch_size is None:
            self.batch_size = self.batch_size or find_batch_size(self._logits, first.x)
            batch_size = self.batch_size
        engine = Engine(
            self._forward,
            self.noise,
            self.num_classes,
            batch_size=check_count("batch_size", batch_size, 1),
            seed=seed,
            dtype=self.dtype,
            pad=self._compile,
        )
        yield from engine.run(chain([first], waiting))
        self._check_state()

    def _logits(self, images: Tensor) -> Tensor:
        """Logits of the uncompiled model, in the engine's contexts."""
        with forward_contexts(self.device, self.dtype):
            return base_logits(self.model, images, self.num_classes)

    def _check_model(self, x: Tensor) -> None:
        """Refuses a model whose answer is not a function of its input alone."""
        _check_eval(self.model)
        if self._state is not None:
            return
        self._state = _versions(self.model)
        probe = torch.stack([x, 1 - x])
        once, again = self._logits(probe), self._logits(probe)
        self._check_state()
        if not torch.equal(once.nan_to_num(), again.nan_to_num()):
            raise SmoothingError(
                "the model answered differently to two calls on the same images: a certificate "
                "needs a function of the image; remove what draws at random or remembers"
            )

    def _check_state(self) -> None:
        if _versions(self.model) != self._state:
            raise SmoothingError(
                "the model changed its parameters or buffers while it was certified: a certificate "
                "needs a fixed function; freeze what is updated in forward()"
            )

    def _checked_image(self, x: Tensor, index: int) -> Tensor:
        """`x` in float32 on the device, refused unless it is a float image in [0, 1]."""
        try:
            usable = self._usable(x)
            self.noise.prepare(usable)  # refuses what this noise cannot be added to
            return usable
        except SmoothingError as error:
            raise SmoothingError(f"image {index}: {error}") from None

    def _usable(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise SmoothingError(f"an image must be a torch.Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise SmoothingError(
                f"an image must be floating point in [0, 1], got {x.dtype}: "
                "for 8-bit pixels use x.float() / 255"
            )
        if x.dim() != 3 or x.numel() == 0:
            raise SmoothingError(
                f"an image must have shape [channels, height, width], got {list(x.shape)}: "
                "give one image, without a batch dimension"
            )
        low, high = (float(bound) for bound in x.detach().aminmax())
        if not (low >= 0.0 and high <= 1.0):
            if not bool(torch.isfinite(x).all()):
                raise SmoothingError("an image must be finite, got NaN or infinite values")
            raise SmoothingError(
                f"an image must have values in [0, 1], got {low:.4g} to {high:.4g}: "
                "normalise inside the model, not before it"
            )
        return x.detach().to(device=self.device, dtype=torch.float32)


def _check_eval(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise SmoothingError(
            "the model is in train mode, so its answer depends on the batch or on chance: "
            "call model.eval() first"
        )


def _versions(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Which tensors the model holds, and how often each was written to."""
    return tuple((id(t), t._version) for t in (*model.parameters(), *model.buffers()))


def _device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _usable_device(device: torch.device | str) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        # torch tells of a missing CUDA build by an AssertionError.
        reason = str(error).splitlines()[0]
        raise SmoothingError(f"device {str(device)!r} cannot be used here: {reason}") from error
    return chosen
