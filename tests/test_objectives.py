"""The losses against their formulas written out plainly."""

import copy

import pytest
import torch
import torch.nn.functional as F

from rrcm import noise
from rrcm.encoder import Encoder
from rrcm.objectives import consistency_regulariser, contrastive_denoising, info_nce


def test_info_nce_is_cross_entropy_on_cosine_similarities():
    f, g = torch.randn(2, 6, 4)
    wanted = F.cross_entropy(
        F.normalize(f) @ F.normalize(g).T / 0.2, torch.arange(6), reduction="none"
    )
    torch.testing.assert_close(info_nce(f, g, 0.2), wanted)


def test_info_nce_gives_no_gradient_to_the_other_side_and_is_float32():
    f, g = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(f, g, 0.2)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, info_nce(f, g, 0.2))
    loss.sum().backward()
    assert f.grad is not None
    assert g.grad is None


def plain_contrastive_denoising(online, target, x, x1, x2, eps, index, scales, tau):
    """METHOD's formulas with six separate passes."""
    grid = noise.karras_sigmas(scales)

    def at(network, images, t):
        return network(images + t * eps, t.expand(len(images)))

    online1 = online.project(at(online, x1, grid[-1]))
    online2 = online.project(at(online, x2, grid[-1]))
    target1 = target.project(at(target, x1, grid[-1]))
    target2 = target.project(at(target, x2, grid[-1]))
    contrastive = info_nce(online1, target2, tau) + info_nce(online2, target1, tau)
    consistency = info_nce(at(online, x, grid[index]), at(online, x, grid[index + 1]), tau)
    return contrastive, consistency


def test_batched_passes_equal_separate_ones_in_value_and_gradient():
    torch.manual_seed(0)
    encoder = Encoder(
        image_size=8,
        patch_size=4,
        in_channels=1,
        width=16,
        depth=2,
        heads=2,
        projector_hidden=16,
        projector_dim=8,
    ).train()
    views = [torch.rand(8, 1, 8, 8) * 2 - 1 for _ in range(3)]
    eps = torch.randn(8, 1, 8, 8)
    results = []
    for objective in (contrastive_denoising, plain_contrastive_denoising):
        online, target = copy.deepcopy(encoder), copy.deepcopy(encoder)
        losses = objective(online, target, *views, eps, 7, 21, 0.2)
        torch.stack(losses).sum(0).mean().backward()
        gradients = [p.grad for p in online.parameters()]
        statistics = [*online.buffers(), *target.buffers()]
        results.append([*losses, *gradients, *statistics])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("index", [-1, 20])
def test_an_index_off_the_grid_is_refused(index):
    with pytest.raises(ValueError, match=r"is not in 0\.\.19"):
        contrastive_denoising(None, None, *torch.zeros(4, 1, 1, 2, 2), index, 21)


def test_regulariser_is_zero_for_equal_sure_copies_and_grows_with_disagreement():
    sure = torch.tensor([[50.0, 0.0]])
    assert consistency_regulariser([sure, sure], 10, 0.5) == pytest.approx(0.0, abs=1e-6)
    unsure = torch.zeros(1, 2)
    entropy = torch.tensor(2.0).log()
    torch.testing.assert_close(consistency_regulariser([unsure, unsure], 10, 0.5), 0.5 * entropy)
    assert consistency_regulariser([sure, -sure], 10, 0.5) > 10 * entropy / 2


def test_regulariser_gradient_flows_through_the_mean():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def loss(logits):
        p = logits.softmax(-1)
        mean = p.mean(0)
        kl = (mean * (mean.log() - p.log())).sum(-1).mean()
        return 10 * kl + 0.5 * -(mean * mean.log()).sum(-1).mean()

    (wanted,) = torch.autograd.grad(loss(logits), logits)
    (ours,) = torch.autograd.grad(consistency_regulariser(list(logits), 10, 0.5), logits)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
