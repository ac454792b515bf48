"""The smoothed classifier on base classifiers whose exact radius is known."""

import math

import pytest
import torch
from counting import class_counts
from scipy import stats
from torch import Tensor, nn

from rrcm.smoothing import ABSTAIN, SmoothedClassifier, SmoothingError, certificate_from_counts
from rrcm.smoothing.bounds import (
    certified_radius,
    clopper_pearson_lower,
    max_radius,
    top_two_p_value,
)


class Halfspace(nn.Module):
    """Class 1 where w.x + b > 0, else class 0: its smoothed version is the same halfspace."""

    def __init__(self, w: Tensor, b: float) -> None:
        super().__init__()
        self.w = nn.Parameter(w)
        self.b = b

    def forward(self, images: Tensor) -> Tensor:
        score = (images * self.w).flatten(1).sum(dim=1) + self.b
        return torch.stack((-score, score), dim=1)

    def distance(self, x: Tensor) -> float:
        """Signed distance of `x` from the boundary, in L2: the exact radius, if positive."""
        w, image = self.w.detach().double(), x.double()
        return float(((w * image).sum() + self.b) / w.norm())


def halfspace(shape: tuple[int, int, int], seed: int, distance: float) -> tuple[Halfspace, Tensor]:
    """A random halfspace and an image at a given signed distance from its boundary."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    x = torch.rand(shape, generator=generator)
    b = float(distance * w.double().norm() - (w.double() * x.double()).sum())
    return Halfspace(w, b), x


ZEROS = torch.zeros(1, 2, 2)


def simple(model: object = None, **changes) -> SmoothedClassifier:
    model = Halfspace(torch.ones(1, 2, 2), 0.5) if model is None else model
    if isinstance(model, nn.Module):
        model.eval()
    return SmoothedClassifier(model, **({"sigma": 0.25, "num_classes": 2} | changes))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 4), (3, 8, 8)])
@pytest.mark.parametrize("sigma", [0.12, 0.5])
@pytest.mark.parametrize("in_sigmas", [-1.0, 0.4, 1.5])
def test_radius_of_a_halfspace(shape, sigma: float, in_sigmas: float) -> None:
    """Never above the exact distance beyond the share of alpha, and close below it."""
    model, x = halfspace(shape, seed=3, distance=in_sigmas * sigma)
    exact = abs(model.distance(x))
    smoothed = SmoothedClassifier(model.eval(), sigma, 2)
    certificates = [smoothed.certify(x, 400, 2000, batch_size=512, seed=seed) for seed in range(10)]
    above = sum(certificate.radius > exact for certificate in certificates)
    assert above <= 1  # 2 of 10 at alpha = 0.001 would happen in under 1 of 20,000 tests
    side = int(in_sigmas > 0)
    assert all(certificate.top == side for certificate in certificates)
    # The bound of the expected count is what a certificate should get, give or take.
    p = float(stats.norm.cdf(exact / sigma))
    typical = certified_radius(clopper_pearson_lower(round(2000 * p), 2000, 0.001), sigma)
    mean = sum(certificate.radius for certificate in certificates) / 10
    assert mean == pytest.approx(typical, abs=0.05 * sigma)


def test_radius_approaches_the_exact_one_from_below() -> None:
    model, x = halfspace((1, 2, 2), seed=5, distance=0.5)
    smoothed = SmoothedClassifier(model.eval(), 0.5, 2)
    radii = [smoothed.certify(x, 100, n, batch_size=2048).radius for n in (100, 1000, 100_000)]
    assert radii == sorted(radii)
    assert 0.485 < radii[-1] < model.distance(x)


def test_all_hits_give_the_largest_radius() -> None:
    certificate = simple(model=Halfspace(torch.ones(1, 2, 2), 100.0)).certify(ZEROS, 10, 1000)
    assert certificate.count == 1000
    assert certificate.radius == max_radius(1000, 0.001, 0.25)


def test_a_certificate_names_what_it_rests_on() -> None:
    smoothed = simple()
    certificate = smoothed.certify(ZEROS, 20, 500, alpha=0.01, seed=3, index=40)
    assert (certificate.n0, certificate.n, certificate.alpha) == (20, 500, 0.01)
    assert (certificate.sigma, certificate.seed, certificate.index) == (0.25, 3, 40)
    assert certificate.p_lower == clopper_pearson_lower(certificate.count, 500, 0.01)
    assert certificate.radius == certified_radius(certificate.p_lower, 0.25)
    assert certificate.prediction == certificate.top == 1


def test_certify_is_repeatable_and_seeded_by_image() -> None:
    smoothed = simple()
    first = smoothed.certify(ZEROS, 20, 500, batch_size=7)
    assert smoothed.certify(ZEROS, 20, 500, batch_size=500) == first
    assert smoothed.certify(ZEROS, 20, 500, seed=1).count != first.count
    assert smoothed.certify(ZEROS, 20, 500, index=1).count != first.count


def test_selection_and_estimation_use_other_noise() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.clone())
            return torch.zeros(len(images), 2)

    simple(model=Spy()).certify(ZEROS, 64, 64, batch_size=64)
    *_, selection, estimation = seen  # the model is probed before
    assert not torch.isclose(selection, estimation).any()


def test_certify_abstains_on_the_boundary() -> None:
    certificate = simple(model=Halfspace(torch.ones(1, 2, 2), 0.0)).certify(ZEROS, 20, 1000)
    assert certificate.prediction == ABSTAIN == -1
    assert certificate.radius == 0.0
    assert certificate.p_lower <= 0.5
    assert certificate.top in (0, 1)
    assert 400 < certificate.count < 600


def test_decision_from_counts() -> None:
    certificate = certificate_from_counts([1, 8, 1], [0, 990, 10], sigma=0.5, alpha=0.001)
    assert (certificate.prediction, certificate.top, certificate.count) == (1, 1, 990)
    assert (certificate.n0, certificate.n) == (10, 1000)
    # The selection picks the class, even if the estimation then prefers another one.
    swayed = certificate_from_counts([1, 8, 1], [990, 10, 0], sigma=0.5, alpha=0.001)
    assert (swayed.prediction, swayed.top, swayed.count, swayed.radius) == (ABSTAIN, 1, 10, 0.0)


@pytest.mark.parametrize(
    ("selection", "estimation", "message"),
    [
        ([1, 2], [1, 2, 3], "same classes, 2 or more; got 2 and 3"),
        ([1], [1], "got 1 and 1"),
        ([0, 0], [1, 2], "n0, the sum of selection, must be at least 1"),
        ([1, 0], [0, 0], "n, the sum of estimation, must be at least 1"),
        ([1, 0], [-1, 4], "k must be at least 0"),
    ],
)
def test_bad_counts(selection, estimation, message: str) -> None:
    with pytest.raises(SmoothingError, match=message):
        certificate_from_counts(selection, estimation, sigma=0.5, alpha=0.001)


def test_predict_names_a_clear_class_and_abstains_on_the_boundary() -> None:
    assert simple().predict(ZEROS, 200) == 1
    assert simple(model=Halfspace(torch.ones(1, 2, 2), -0.5)).predict(ZEROS, 200) == 0
    on_boundary = simple(model=Halfspace(torch.ones(1, 2, 2), 0.0))
    answers = [on_boundary.predict(ZEROS, 200, alpha=0.05, seed=seed) for seed in range(60)]
    # A guess on the boundary has probability alpha at most: 3 of 60 expected, 12 very unlikely.
    assert sum(answer != ABSTAIN for answer in answers) < 12


def test_predict_abstains_just_where_the_p_value_exceeds_alpha() -> None:
    smoothed = simple(model=Halfspace(torch.ones(1, 2, 2), 0.125))
    counts = class_counts(
        smoothed.model,
        ZEROS,
        0.25,
        200,
        num_classes=2,
        batch_size=64,
        seed=0,
        stream="prediction",
        index=0,
    )
    p_value = top_two_p_value(*counts)
    assert 1e-6 < p_value < 0.5
    assert smoothed.predict(ZEROS, 200, alpha=p_value * 1.001) == counts.index(max(counts))
    assert smoothed.predict(ZEROS, 200, alpha=p_value * 0.999) == ABSTAIN


def test_predict_compares_the_top_two_of_many_classes() -> None:
    class TwoOfFive(nn.Module):
        """Classes 2 and 4 share the noise evenly; the other three never occur."""

        def forward(self, images: Tensor) -> Tensor:
            logits = torch.zeros(len(images), 5)
            score = images.flatten(1).sum(dim=1)
            logits[:, 2], logits[:, 4] = 10 + score, 10 - score
            return logits

    assert simple(model=TwoOfFive(), num_classes=5).predict(ZEROS, 300) == ABSTAIN


def test_predict_clean_adds_no_noise() -> None:
    smoothed = simple(model=Halfspace(torch.ones(1, 2, 2), 1e-6), sigma=5.0)
    assert all(smoothed.predict_clean(ZEROS) == 1 for _ in range(20))


def test_a_model_in_train_mode_is_refused() -> None:
    model = nn.Sequential(nn.Dropout(0.9), Halfspace(torch.ones(1, 2, 2), 100.0))
    with pytest.raises(SmoothingError, match=r"in train mode.* call model\.eval\(\) first"):
        SmoothedClassifier(model.train(), 0.25, 2)
    smoothed = simple(model=model)
    model[0].train()  # someone trains on, then certifies again
    with pytest.raises(SmoothingError, match="in train mode"):
        smoothed.certify(ZEROS, 10, 100)


def test_a_model_that_answers_at_random_is_refused() -> None:
    class Dice(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.rand(len(images), 2)

    with pytest.raises(SmoothingError, match="answered differently to two calls"):
        simple(model=Dice().eval()).certify(ZEROS, 10, 100)


def test_a_model_that_changes_its_state_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            return torch.zeros(len(images), 2)

    with pytest.raises(SmoothingError, match="changed its parameters or buffers"):
        simple(model=Counter().eval()).certify(ZEROS, 10, 100)


def test_no_gradient_is_kept_and_the_image_is_left_alone() -> None:
    x = torch.full((1, 2, 2), 0.5, requires_grad=True)
    simple().certify(x, 10, 100)
    assert x.grad is None
    assert torch.equal(x.detach(), torch.full((1, 2, 2), 0.5))


def test_other_float_images_are_taken() -> None:
    expected = simple().certify(ZEROS, 10, 100)
    assert simple().certify(ZEROS.double(), 10, 100) == expected
    assert simple(device="cpu").certify(ZEROS.half(), 10, 100) == expected


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 2, 2, dtype=torch.uint8), "for 8-bit pixels use x.float\\(\\) / 255"),
        (torch.zeros(1, 1, 2, 2), r"got \[1, 1, 2, 2\]: give one image"),
        (torch.zeros(2, 2), r"\[channels, height, width\], got \[2, 2\]"),
        (torch.zeros(1, 0, 2), r"got \[1, 0, 2\]"),
        (torch.full((1, 2, 2), math.nan), "must be finite"),
        (torch.full((1, 2, 2), math.inf), "must be finite"),
        (torch.tensor([[[0.0, 255.0]]]), "values in \\[0, 1\\], got 0 to 255"),
        (torch.tensor([[[-1.0, 1.0]]]), "got -1 to 1: normalise inside the model"),
        ([[[0.0]]], "must be a torch.Tensor, got list"),
    ],
)
def test_bad_images(x, message: str) -> None:
    for call in (simple().certify, simple().predict_clean, lambda x: simple().predict(x, 10)):
        with pytest.raises(SmoothingError, match=message):
            call(x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n0": 0}, "n0 must be at least 1, got 0"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"n": 1e5}, "n must be a whole number, got 100000.0"),
        ({"alpha": 0.0}, "alpha must lie between"),
        ({"alpha": 1.0}, "alpha must lie between"),
        ({"alpha": math.nan}, "alpha must be a number, got NaN"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"index": -1}, "index must be at least 0"),
    ],
)
def test_bad_arguments(changes, message: str) -> None:
    with pytest.raises(SmoothingError, match=message):
        simple().certify(ZEROS, **({"n0": 10, "n": 10} | changes))
    if "n0" not in changes:
        with pytest.raises(SmoothingError, match=message):
            simple().predict(ZEROS, **({"n": 10} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": 0.0}, "sigma .* must be above 0"),
        ({"sigma": -0.5}, "sigma .* must be above 0"),
        ({"sigma": math.nan}, "sigma must be a number, got NaN"),
        ({"sigma": math.inf}, "sigma .* finite"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"dtype": torch.float16}, "torch.float32 or torch.bfloat16, got torch.float16"),
        ({"model": lambda x: x}, "must be a torch.nn.Module, got function"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used here"),
    ],
)
def test_bad_construction(changes, message: str) -> None:
    with pytest.raises(SmoothingError, match=message):
        simple(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a missing GPU")
def test_a_missing_gpu_is_told_in_one_line() -> None:
    with pytest.raises(SmoothingError, match="device 'cuda' cannot be used here") as caught:
        simple(device="cuda")
    assert "\n" not in str(caught.value)
