"""Noise levels."""

import pytest
import torch

from rrcm import noise


def test_grid_runs_from_the_noisiest_to_the_least():
    grid = noise.karras_sigmas(21)
    assert grid[0] == pytest.approx(80.0)
    assert grid[-1] == pytest.approx(0.002)
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize("arguments", [(1,), (5, 0.0), (5, 2.0, 1.0)])
def test_bad_grids_are_refused(arguments):
    with pytest.raises(ValueError, match="karras_sigmas"):
        noise.karras_sigmas(*arguments)


def test_curriculum_doubles_and_stops():
    scales = [noise.num_scales(step, 1000) for step in range(1000)]
    assert sorted(set(scales)) == [21, 41, 81]
    assert scales == sorted(scales)


def test_input_scale_gives_unit_variance():
    t = torch.tensor([0.002, 0.5, 80.0])
    torch.testing.assert_close(noise.input_scale(t), 1 / (t**2 + 0.25).sqrt())
    torch.testing.assert_close(noise.time_value(t), 250 * t.log())


def test_sigma_is_half_the_level():
    assert noise.level_for_sigma(0.25) == 0.5
    assert noise.nearest_level(0.0) == pytest.approx(0.002)
    assert noise.nearest_level(0.5) == pytest.approx(0.5, rel=0.1)
