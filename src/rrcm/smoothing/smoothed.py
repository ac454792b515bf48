"""The smoothed classifier: prediction and certification of Cohen et al. (2019).

Shapes: B batch, C channels, H height, W width, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rrcm.smoothing.bounds import certified_radius, clopper_pearson_lower, top_two_p_value
from rrcm.smoothing.checks import check_alpha, check_count, check_sigma
from rrcm.smoothing.errors import SmoothingError
from rrcm.smoothing.sampler import Stream, base_logits, class_counts

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
    top = max(range(len(selection)), key=selection.__getitem__)
    count = int(estimation[top])
    p_lower = clopper_pearson_lower(count, n, alpha)
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
    ) -> None:
        """Wraps a base classifier; puts it in eval mode, and leaves it so.

        Args:
            model: Base classifier, float32 [B, C, H, W] -> logits [B, K]. Its input is an image
                in [0, 1] plus noise (so values outside [0, 1] occur); it normalises inside.
            sigma: Standard deviation of the noise, on the [0, 1] pixel scale.
            num_classes: K, at least 2.
            device: Where to run; the model is moved there. None: where the model is.
            dtype: torch.float32, or torch.bfloat16 for forward passes under autocast (noise and
                sums stay float32). Another dtype is, strictly, another base classifier.

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
        self.model = model.eval()

    def certify(
        self,
        x: Tensor,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        batch_size: int = 256,
        seed: int = 0,
        index: int = 0,
    ) -> Certificate:
        """Certifies the prediction at `x` in an L2 ball around it.

        With probability at least 1 - alpha over the noise drawn, either the certificate abstains,
        or the smoothed classifier returns its class at every image closer than its radius.

        Args:
            x: Image, floating point [C, H, W], values in [0, 1].
            n0: Number of noisy copies that pick the class.
            n: Number of further noisy copies that bound its probability.
            alpha: Probability of error, between 0 and 1.
            batch_size: Noisy copies in one forward pass; it changes the speed, not the noise.
            seed: Seed of the run.
            index: Number of the image; images of one run need numbers of their own, so that their
                noise is independent.

        Returns:
            The certificate; prediction ABSTAIN and radius 0 if the bound is not above 1/2.

        Raises:
            SmoothingError: An argument is out of its range, or the model's answer is unusable.

        Source: Cohen et al. (2019), CERTIFY in the pseudocode of section 3.2, Proposition 2.
        """
        n0 = check_count("n0", n0, 1)
        n = check_count("n", n, 1)
        alpha = check_alpha(alpha)
        seed = check_count("seed", seed, 0)
        index = check_count("index", index, 0)
        x = self._checked_image(x)
        selection = self._counts(x, n0, batch_size, seed, "selection", index)
        estimation = self._counts(x, n, batch_size, seed, "estimation", index)
        return certificate_from_counts(
            selection, estimation, sigma=self.sigma, alpha=alpha, seed=seed, index=index
        )

    def predict(
        self,
        x: Tensor,
        n: int,
        alpha: float = 0.001,
        batch_size: int = 256,
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
        x = self._checked_image(x)
        counts = self._counts(x, n, batch_size, seed, "prediction", index)
        first, second = sorted(range(self.num_classes), key=counts.__getitem__, reverse=True)[:2]
        sure = top_two_p_value(counts[first], counts[second]) <= alpha
        return first if sure else ABSTAIN

    def predict_clean(self, x: Tensor) -> int:
        """Class the base classifier gives to `x` itself, without noise; nothing is certified.

        Args:
            x: Image, floating point [C, H, W], values in [0, 1].

        Raises:
            SmoothingError: `x` is no such image, or the model's answer is unusable.
        """
        x = self._checked_image(x)
        self.model.eval()
        with torch.inference_mode():
            logits = base_logits(self.model, x.unsqueeze(0), self.num_classes, self.dtype)
            if not bool(torch.isfinite(logits).all()):
                raise SmoothingError("the model gave NaN or infinite logits on an image")
            return int(logits.argmax(dim=1))

    def _counts(
        self, x: Tensor, num_samples: int, batch_size: int, seed: int, stream: Stream, index: int
    ) -> list[int]:
        # Again, as the caller may have trained the model since it was wrapped.
        self.model.eval()
        counts: list[int] = class_counts(
            self.model,
            x,
            self.sigma,
            num_samples,
            num_classes=self.num_classes,
            batch_size=batch_size,
            seed=seed,
            stream=stream,
            index=index,
            dtype=self.dtype,
        ).tolist()
        return counts

    def _checked_image(self, x: Tensor) -> Tensor:
        """`x` in float32 on the device, refused unless it is a float image in [0, 1]."""
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
