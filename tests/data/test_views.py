import pytest
import torch

from rrcm.data import finetune_view, pretrain_views, to_unit
from rrcm.data.views import _random_affine, _random_resized_crop, blur_kernel_size
from rrcm.errors import UserError

PRETRAIN = [("natural", 3, 32), ("natural", 1, 28), ("affine", 1, 8), ("affine", 3, 16)]
FINETUNE = ["none", "flip", "crop-flip", "affine"]


def images(count, channels, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, size, size, generator=generator)


def three(kind, x, size, seed):
    torch.manual_seed(seed)
    return pretrain_views(kind, size)(x)


@pytest.mark.parametrize(("kind", "channels", "size"), PRETRAIN)
def test_three_views_of_the_right_shape_and_range(kind, channels, size):
    x = images(64, channels, size)
    before = x.clone()
    for view in three(kind, x, size, seed=0):
        assert view.shape == (64, channels, size, size)
        assert view.dtype == torch.float32
        assert view.min() >= -1
        assert view.max() <= 1
        assert view.min() < -0.5, "the range is [-1, 1], not [0, 1]"
        assert view.max() > 0.5
    assert torch.equal(x, before)


@pytest.mark.parametrize(("kind", "channels", "size"), PRETRAIN)
def test_the_global_seed_decides(kind, channels, size):
    x = images(16, channels, size)
    first, again, other = (three(kind, x, size, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(first[2], other[2])


@pytest.mark.parametrize(("kind", "channels", "size"), PRETRAIN)
def test_every_image_and_view_has_its_own_draw(kind, channels, size):
    x = images(1, channels, size).expand(32, -1, -1, -1)
    _, view1, view2 = three(kind, x, size, seed=0)
    for view in (view1, view2):
        assert len({tuple(image.flatten().tolist()) for image in view}) == 32
    assert (view1 - view2).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_natural_x_is_the_image_or_its_mirror_image():
    x = images(400, 3, 8)
    weak = three("natural", x, 8, seed=0)[0]
    same = torch.isclose(weak, 2 * x - 1).all(dim=(1, 2, 3))
    mirrored = torch.isclose(weak, 2 * x.flip(-1) - 1).all(dim=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < same.sum() < 250


def test_natural_colour_operations_come_as_often_as_they_should():
    # Flat colours: crop, flip and blur leave them alone, so what is left is colour.
    colour = torch.tensor([0.7, 0.4, 0.2]).view(1, 3, 1, 1)
    _, view1, view2 = three("natural", colour.expand(2000, 3, 16, 16), 16, seed=0)
    for view in (view1, view2):
        pixel = (view[:, :, 8, 8] + 1) / 2
        gray = (pixel.amax(1) - pixel.amin(1)) < 1e-3
        assert abs(gray.float().mean() - 0.2) < 0.04
    kept = torch.isclose(view1[:, :, 8, 8], 2 * colour.view(1, 3) - 1, atol=1e-4).all(1)
    assert abs(kept.float().mean() - 0.2 * 0.8) < 0.04  # neither jittered nor gray


def test_natural_solarizes_a_fifth_of_view_2_only():
    # White stays near white under jitter (0.6 at the least) and goes to 0.4 or below, solarized.
    _, view1, view2 = three("natural", torch.ones(2000, 1, 8, 8), 8, seed=0)
    dark1, dark2 = ((view[:, 0, 4, 4] < 0).float().mean() for view in (view1, view2))
    assert dark1 == 0
    assert abs(dark2 - 0.2) < 0.04


def test_natural_blurs_every_view_1_and_a_tenth_of_view_2():
    # Neighbouring pixels of noise differ less once blurred, whatever the crop.
    x = images(600, 1, 64)
    _, view1, view2 = three("natural", x, 64, seed=0)
    rough1, rough2 = ((v.diff(dim=-1).abs().mean()).item() for v in (view1, view2))
    assert rough1 < 0.8 * rough2


def test_gray_images_stay_inside_one_channel():
    _, view1, _ = three("natural", images(8, 1, 32), 32, seed=0)
    assert view1.shape[1] == 1
    assert view1.std() > 0.05


def test_crops_are_cut_from_the_whole_of_a_larger_image():
    x = torch.zeros(256, 1, 32, 48)
    x[..., :4] = 1  # at the left, outside the centre square
    weak, view1, _ = three("natural", x, 16, seed=0)
    assert weak.shape == view1.shape == (256, 1, 16, 16)
    assert weak.max() < -0.95
    assert (view1.amax(dim=(1, 2, 3)) > 0).any()


def test_crop_covers_areas_from_the_smallest_to_the_whole():
    # A ramp from 0 to 1 shows how wide each crop is.
    ramp = torch.linspace(0, 1, 64).expand(2000, 1, 64, 64)
    torch.manual_seed(0)
    wide = _random_resized_crop(ramp, 64, 0.08)
    tall = _random_resized_crop(ramp.mT, 64, 0.08)
    for view, axis in ((wide, -1), (tall, -2)):
        share = view.amax(dim=axis).mean(dim=(1, 2)) - view.amin(dim=axis).mean(dim=(1, 2))
        assert share.max() > 0.98
        assert 0.2 < share.min() < 0.3  # sqrt(0.08 * 3 / 4) = 0.245
        assert view.max() <= 1


def test_affine_x_is_the_image():
    x = images(8, 1, 8)
    assert torch.allclose(three("affine", x, 8, seed=0)[0], 2 * x - 1)


def test_affine_moves_a_point_no_further_than_promised():
    size = 64
    x = torch.zeros(2000, 1, size, size)
    x[..., size // 2 - 8 : size // 2 + 8, size // 2 - 8 : size // 2 + 8] = 1
    torch.manual_seed(0)
    moved = _random_affine(x)
    grid = torch.arange(size) - (size - 1) / 2
    mass = moved.sum(dim=(1, 2, 3))
    shift_x = (moved.sum(dim=(1, 2)) * grid).sum(1) / mass
    shift_y = (moved.sum(dim=(1, 3)) * grid).sum(1) / mass
    for shift in (shift_x, shift_y):
        assert 7 < shift.abs().max() < 8.3  # an eighth of 64
        assert abs(shift.mean()) < 0.5
    area = mass / 16**2
    assert area.min() == pytest.approx(0.85**2, abs=0.03)
    assert area.max() == pytest.approx(1.15**2, abs=0.03)


def test_affine_turns_by_15_degrees_at_most():
    x = torch.zeros(2000, 1, 65, 65)
    x[..., 32, 12:53] = 1  # a level line
    torch.manual_seed(0)
    moved = _random_affine(x)
    rows = torch.arange(65.0)
    heights = (moved * rows.view(1, 1, -1, 1)).sum(2) / moved.sum(2).clamp(min=1e-6)
    slope = (heights[:, 0, 40] - heights[:, 0, 24]) / 16
    degrees = slope.atan().rad2deg()
    assert 13 < degrees.max() < 17
    assert -17 < degrees.min() < -13


def test_affine_fills_with_zero():
    torch.manual_seed(0)
    assert _random_affine(torch.ones(100, 1, 8, 8)).min() == 0


@pytest.mark.parametrize("kind", FINETUNE)
@pytest.mark.parametrize("channels", [1, 3])
def test_finetune_views(kind, channels):
    x, view = images(64, channels, 16), finetune_view(kind, 16)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(view(x))
    first, again, other = results
    assert first.shape == x.shape
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (kind == "none")
    assert torch.equal(first, x) == (kind == "none")


def test_finetune_flip_mirrors_about_half():
    x = images(400, 1, 6)
    torch.manual_seed(0)
    same = (finetune_view("flip", 6)(x) == x).all(dim=(1, 2, 3))
    assert 150 < same.sum() < 250


def test_finetune_crops_are_mild():
    ramp = torch.linspace(0, 1, 64).expand(2000, 1, 64, 64)
    torch.manual_seed(0)
    view = finetune_view("crop-flip", 64)(ramp)
    share = (view.amax(dim=-1) - view.amin(dim=-1)).mean(dim=(1, 2))
    assert 0.53 < share.min() < 0.6  # sqrt(0.4 * 3 / 4) = 0.548


@pytest.mark.parametrize("kind", FINETUNE)
def test_finetune_views_bring_images_to_size(kind):
    assert finetune_view(kind, 16)(images(4, 3, 20)).shape == (4, 3, 16, 16)


def test_to_unit():
    unit = to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert unit.dtype == torch.float32
    assert torch.allclose(unit, torch.tensor([0.0, 0.2, 1.0]))


def test_blur_kernel_is_odd_and_grows_with_the_image():
    sizes = [blur_kernel_size(size) for size in (8, 32, 64, 224)]
    assert sizes == [3, 3, 7, 23]


def test_unknown_kinds_name_the_nearest():
    with pytest.raises(UserError, match="unknown pretrain views 'afine': did you mean 'affine'"):
        pretrain_views("afine", 8)
    with pytest.raises(UserError, match="unknown finetune view 'flop': did you mean 'flip'"):
        finetune_view("flop", 8)
