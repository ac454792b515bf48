import pytest
import torch

from rrcm.data import batch_indices


def stream(num_images, batch_size, steps, seed=0):
    return torch.cat([batch_indices(num_images, batch_size, k, seed) for k in range(steps)])


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 25])
def test_every_epoch_holds_every_image_once(batch_size):
    images = stream(10, batch_size, 100)[:100]
    for epoch in images.view(10, 10):
        assert epoch.sort().values.tolist() == list(range(10))


def test_epochs_and_seeds_differ():
    first, second = stream(50, 10, 10).view(2, 50)
    assert not torch.equal(first, second)
    assert not torch.equal(first, stream(50, 10, 5, seed=1))


def test_a_step_does_not_depend_on_the_calls_before_it():
    in_order = [batch_indices(23, 8, k, seed=3) for k in range(12)]
    for step in (11, 0, 5, 11):
        assert torch.equal(batch_indices(23, 8, step, seed=3), in_order[step])


def test_a_step_does_not_read_or_move_the_global_generators():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batch_indices(17, 5, 2, seed=9)
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_size_does_not_change_the_stream():
    assert torch.equal(stream(13, 39, 2), stream(13, 6, 13))


PINNED = [5, 4, 3, 2, 6, 0, 8, 7, 6, 3, 0, 1]


def test_the_order_is_the_same_everywhere_and_for_ever():
    # A resumed run relies on it. Change these numbers only together with the checkpoint version.
    assert batch_indices(10, 12, 1, seed=7).tolist() == PINNED
    assert batch_indices(10, 12, 1, seed=-7).tolist() != PINNED


def test_shuffles_are_uniform():
    # Where image 0 lands over 2,000 epochs: each of 5 places about 400 times (sd 18).
    places = stream(5, 5, 2000).view(2000, 5).eq(0).sum(0)
    assert places.min() > 310
    assert places.max() < 490


@pytest.mark.parametrize("arguments", [(0, 1, 0), (5, 0, 0), (5, 1, -1)])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="at least"):
        batch_indices(*arguments, seed=0)
