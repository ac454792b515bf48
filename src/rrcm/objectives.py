"""The losses, as pure functions of tensors.

Shapes: B batch, C channels, H = W image size, D features, K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rrcm import noise as levels
from rrcm.encoder import Encoder


def info_nce(f: Tensor, g: Tensor, tau: float) -> Tensor:
    """Per-sample InfoNCE of f [B, D] against g [B, D]; positives share a row. Returns [B].

    Both are L2-normalised and the arithmetic is float32; g gets no gradient.
    Source: van den Oord et al. 2018 (arXiv 1807.03748), Equation 4, at temperature tau.
    """
    with torch.autocast(f.device.type, enabled=False):
        f = F.normalize(f.float(), dim=1)
        g = F.normalize(g.detach().float(), dim=1)
        logits = f @ g.T / tau
        return logits.logsumexp(dim=1) - logits.diagonal()


def contrastive_denoising(
    online: Encoder,
    target: Encoder,
    x: Tensor,
    view1: Tensor,
    view2: Tensor,
    noise: Tensor,
    index: int,
    num_scales: int,
    tau: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """The two terms of rRCM's pre-training loss; their sum's mean is what is minimised.

    The contrastive term compares projections of two strongly augmented views at the least noise
    with the target network's. The consistency term compares the online encoder's features at
    neighbouring noise levels of one image, `t[index]` and the less noisy `t[index + 1]`.
    One noise tensor is shared by all views of an image.

    Source: Lei et al. 2025 (arXiv 2501.13094), Section 4, as its public code computes it.

    Args:
        online: the network that is trained.
        target: its moving average; gets no gradient.
        x: images [B, C, H, W] in [-1, 1], weakly augmented.
        view1: strongly augmented images [B, C, H, W] in [-1, 1].
        view2: the same, drawn independently.
        noise: standard normal [B, C, H, W].
        index: step of the grid, in 0..num_scales - 2; one for the whole batch.
        num_scales: levels of the Karras grid.
        tau: temperature.

    Returns:
        (contrastive [B], consistency [B]), float32.

    Raises:
        ValueError: index outside 0..num_scales - 2.
    """
    if not 0 <= index <= num_scales - 2:
        raise ValueError(f"contrastive_denoising: index {index} is not in 0..{num_scales - 2}")
    batch = x.shape[0]
    grid = levels.karras_sigmas(num_scales).to(x.device)
    t_noisy, t_less, t_least = grid[index], grid[index + 1], grid[-1]
    noisy1, noisy2 = view1 + t_least * noise, view2 + t_least * noise

    # No layer of the encoder looks across images, so views share a pass; the projector's BatchNorm
    # does, so there each view goes alone.
    features1, features2, features = online(
        torch.cat([noisy1, noisy2, x + t_noisy * noise]),
        torch.cat([t_least.expand(2 * batch), t_noisy.expand(batch)]),
    ).split(batch)
    with torch.no_grad():
        less_noisy = online(x + t_less * noise, t_less.expand(batch))
        target1, target2 = target(torch.cat([noisy1, noisy2]), t_least.expand(2 * batch)).split(
            batch
        )
        target1, target2 = target.project(target1), target.project(target2)

    contrastive = info_nce(online.project(features1), target2, tau)
    contrastive = contrastive + info_nce(online.project(features2), target1, tau)
    consistency = info_nce(features, less_noisy, tau)
    return contrastive, consistency


def consistency_regulariser(logits: Sequence[Tensor], lbd: float, eta: float) -> Tensor:
    """Pulls the predictions on noisy copies of an image together, and makes them confident.

    `lbd * mean_i KL(p_bar || p_i) + eta * H(p_bar)`, with p_i the softmax of copy i and p_bar
    their mean, averaged over the batch; gradients flow through p_bar.

    Source: Jeong & Shin 2020 (arXiv 2006.04062), Equation 8.

    Args:
        logits: m tensors [B, K], one a noisy copy.
        lbd: weight of the KL term.
        eta: weight of the entropy term.

    Returns:
        A float32 scalar.
    """
    log_p = torch.stack([F.log_softmax(copy.float(), dim=1) for copy in logits])  # [m, B, K]
    p_bar = log_p.exp().mean(dim=0)
    log_p_bar = p_bar.clamp_min(1e-20).log()
    kl = (p_bar * (log_p_bar - log_p)).sum(dim=2).mean(dim=0)
    entropy = -(p_bar * log_p_bar).sum(dim=1)
    return (lbd * kl + eta * entropy).mean()
