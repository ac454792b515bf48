"""Packing, stopping and kinds of noise, through the whole engine."""

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from rrcm.smoothing import ABSTAIN, SmoothedClassifier, SmoothingError, StopRule
from rrcm.smoothing.engine import MAX_JOBS, Engine, FixedDraws, Job, find_batch_size
from rrcm.smoothing.sampler import GaussianNoise

SIGMA = 0.5


class Brightness(nn.Module):
    """Class 1 where the mean pixel is above 1/2; float64, so exact at every batch size."""

    def forward(self, images: Tensor) -> Tensor:
        score = images.double().flatten(1).cumsum(1)[:, -1] / images[0].numel() - 0.5
        return torch.stack((-score, score), dim=1)


def classifier(**changes) -> SmoothedClassifier:
    return SmoothedClassifier(Brightness().eval(), SIGMA, 2, **changes)


def grey(level: int) -> Tensor:
    return torch.full((1, 4, 4), level / 255)


def exact_radius(level: int) -> float:
    return abs(level / 255 - 0.5) * 4  # the norm of 16 pixels that all move


def images(levels) -> list[tuple[int, Tensor]]:
    return list(enumerate(map(grey, levels)))


LEVELS = [10, 60, 100, 128, 140, 170, 200, 250]


@pytest.mark.parametrize("noise", ["gaussian", "exact"])
@pytest.mark.parametrize("stop", [None, StopRule(n_max=5000, radii=(0.25, 0.75, 1.25))])
def test_certificates_do_not_depend_on_how_images_share_batches(noise, stop):
    results = [
        list(classifier(noise=noise).certify_many(images(LEVELS), 20, 700, 0.001, size, stop=stop))
        for size in (7, 64, 1000)
    ]
    alone = [
        classifier(noise=noise).certify(x, 20, 700, 0.001, 100, index=index, stop=stop)
        for index, x in images(LEVELS)
    ]
    assert results[0] == results[1] == results[2] == alone
    assert [certificate.index for certificate in alone] == list(range(len(LEVELS)))


@pytest.mark.parametrize("noise", ["gaussian", "exact"])
def test_stopping_saves_draws_and_stays_below_the_exact_radius(noise):
    rule = StopRule(n_max=20_000, radii=(0.25, 0.75, 1.25))
    certificates = list(classifier(noise=noise).certify_many(images(LEVELS), 100, stop=rule))
    for level, certificate in zip(LEVELS, certificates, strict=True):
        exact = exact_radius(level)
        assert certificate.radius <= exact
        if certificate.prediction != ABSTAIN:
            assert certificate.prediction == int(level > 127)
        for radius in rule.radii:
            # Questions that are not close are answered rightly.
            if abs(radius - exact) > 0.15:
                assert (certificate.radius >= radius) == (radius < exact)
    assert max(certificate.n for certificate in certificates) <= 20_000
    assert sum(certificate.n for certificate in certificates) < 0.3 * 20_000 * len(LEVELS)


def test_a_rule_that_n_max_cannot_meet_is_refused_with_the_n_that_could():
    with pytest.raises(SmoothingError, match=r"100 draws cannot certify radius 1.5 .*n_max=\d+"):
        classifier().certify(grey(200), stop=StopRule(n_max=100, radii=(1.5,)))


def test_exact_noise_refuses_an_image_off_the_grid():
    with pytest.raises(SmoothingError, match="image 3: "):
        classifier(noise="exact").certify(torch.full((1, 4, 4), 0.3001), 10, 10, index=3)


def test_unknown_noise_is_refused():
    with pytest.raises(SmoothingError, match="one of gaussian, exact"):
        classifier(noise="laplace")


def test_more_images_than_slots_and_every_batch_is_full():
    sizes = []

    def model(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return Brightness()(batch)

    engine = Engine(model, GaussianNoise(SIGMA), 2, batch_size=32, seed=0)
    jobs = (Job(i, grey(i), 3, FixedDraws(4)) for i in range(3 * MAX_JOBS))
    done = list(engine.run(jobs))
    assert [job.index for job in done] == list(range(3 * MAX_JOBS))
    assert all(sum(job.selection) == 3 and sum(job.estimation) == 4 for job in done)
    assert set(sizes[:-1]) == {32}
    assert sum(sizes) == 7 * 3 * MAX_JOBS


def test_padding_keeps_one_shape_and_counts_no_padding():
    sizes = []

    def model(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return Brightness()(batch)

    engine = Engine(model, GaussianNoise(SIGMA), 2, batch_size=50, seed=0, pad=True)
    (job,) = engine.run([Job(0, grey(128), 30, FixedDraws(75))])
    assert sizes == [50, 50, 50]
    assert (sum(job.selection), sum(job.estimation)) == (30, 75)


def test_images_of_different_shapes_are_refused():
    pair = [(0, grey(1)), (1, torch.zeros(1, 5, 5))]
    with pytest.raises(SmoothingError, match=r"image 1 has shape \[1, 5, 5\]"):
        list(classifier().certify_many(pair, 10, 10, batch_size=8))


def test_probability_is_that_of_the_closed_form():
    certificate = classifier().certify(grey(140), 100, 20_000)
    p = stats.norm.cdf(exact_radius(140) / SIGMA)
    assert certificate.count / 20_000 == pytest.approx(p, abs=0.02)


def test_the_batch_size_found_is_one_that_runs_and_is_kept():
    smoothed = classifier()
    smoothed.certify(grey(200), 10, 10)
    assert smoothed.batch_size >= 16
    found = smoothed.batch_size
    smoothed.certify(grey(100), 10, 10)
    assert smoothed.batch_size == found


def test_the_search_for_a_batch_size_stops_at_the_memory():
    def model(batch: Tensor) -> Tensor:
        if len(batch) > 100:
            raise SmoothingError("out of memory")
        return torch.zeros(len(batch), 2)

    assert 16 <= find_batch_size(model, grey(0)) <= 64
