"""Optimiser groups, moving averages, and the seed of a step."""

import hashlib

import torch
from torch import nn

from rrcm.encoder import Classifier


def layer_groups(
    classifier: Classifier, layer_decay: float, freeze_head: bool = False
) -> list[dict[str, object]]:
    """Parameter groups with a `scale` each, for layer-wise learning rates.

    Layer 0 is the tokens, positions and patch embedding, block i is layer i + 1, the rest is
    layer depth + 1; a layer's scale is `layer_decay ** (depth + 1 - layer)` (rRCM, fine-tuning).
    The projector, which a classifier does not use, is left out.

    Args:
        classifier: the model that is fine-tuned.
        layer_decay: in (0, 1]; 1 gives every layer the same rate.
        freeze_head: leave the head out as well.
    """
    last = len(classifier.encoder.blocks) + 1
    layers: dict[int, list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        if not parameter.requires_grad or name.startswith("encoder.projector."):
            continue
        if freeze_head and name.startswith("head."):
            continue
        layers.setdefault(_layer(name, last), []).append(parameter)
    return [
        {"params": parameters, "scale": layer_decay ** (last - layer)}
        for layer, parameters in sorted(layers.items())
    ]


def _layer(name: str, last: int) -> int:
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    if name.startswith(("encoder.patch_embed.", "encoder.cls_token", "encoder.pos_embed")):
        return 0
    return last


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets every group's learning rate to lr times the group's `scale` (1 if it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


@torch.no_grad()
def update_average(average: nn.Module, online: nn.Module, rate: float) -> None:
    """`average = rate * average + (1 - rate) * online` over the parameters."""
    torch._foreach_lerp_(list(average.parameters()), list(online.parameters()), 1.0 - rate)


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on all parts, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
