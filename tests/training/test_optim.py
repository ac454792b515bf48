"""Optimiser groups, averages, schedules, precision."""

import pytest
import torch

from rrcm.encoder import Classifier, Encoder
from rrcm.training import layer_groups, lr_scale, seed_of, set_lr, target_ema_rate, update_average
from rrcm.training.precision import resolve_precision


def tiny_classifier():
    encoder = Encoder(
        image_size=8, patch_size=4, in_channels=1, width=8, depth=2, heads=2, projector_hidden=8
    )
    return Classifier(encoder, num_classes=3, sigma=0.25)


def test_layers_are_those_of_the_method():
    classifier = tiny_classifier()
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    scales = {
        names[id(parameter)]: group["scale"]
        for group in layer_groups(classifier, 0.5)
        for parameter in group["params"]
    }
    assert not any("projector" in name for name in scales)
    assert scales["encoder.pos_embed"] == scales["encoder.cls_token"] == 0.5**3
    assert scales["encoder.patch_embed.weight"] == 0.5**3
    assert scales["encoder.blocks.0.norm1.weight"] == 0.5**2
    assert scales["encoder.blocks.1.mlp.2.bias"] == 0.5
    assert scales["encoder.norm.weight"] == scales["head.weight"] == 1.0
    trained = [n for n, _ in classifier.named_parameters() if "projector" not in n]
    assert sorted(scales) == sorted(trained)


def test_a_frozen_head_and_patch_embedding_stay_out():
    classifier = tiny_classifier()
    classifier.encoder.patch_embed.requires_grad_(False)
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    groups = layer_groups(classifier, 0.5, freeze_head=True)
    chosen = {names[id(parameter)] for group in groups for parameter in group["params"]}
    assert not any(name.startswith(("head.", "encoder.patch_embed.")) for name in chosen)
    assert "encoder.pos_embed" in chosen


def test_set_lr_multiplies_by_the_groups_scale():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": parameters[:1], "scale": 0.5}, {"params": parameters[1:]}], lr=1.0
    )
    set_lr(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]


def test_average_moves_by_the_rate():
    average, online = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    wanted = 0.9 * average.weight + 0.1 * online.weight
    update_average(average, online, 0.9)
    torch.testing.assert_close(average.weight, wanted)


def test_lr_scale_edges():
    assert lr_scale(0, warmup=0, total=10) == 1.0
    assert lr_scale(10, warmup=2, total=10) == pytest.approx(0.0)
    assert lr_scale(5, warmup=5, total=5) == 1.0


def test_target_rate_rises_from_start_to_end():
    rates = [target_ema_rate(step, 100) for step in range(101)]
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(0.99)
    assert rates[-1] == pytest.approx(0.9999, abs=1e-6)
    assert target_ema_rate(50, 100, start=0.5, end=0.5) == 0.5


def test_seed_depends_on_every_part():
    seeds = {seed_of(0, "a", 1), seed_of(1, "a", 1), seed_of(0, "b", 1), seed_of(0, "a", 2)}
    assert len(seeds) == 4
    assert seed_of(0, "a", 1) == seed_of(0, "a", 1)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_precision_is_as_asked_or_measured(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve_precision("float32", cpu) == "float32"
    for gain, wanted in ((5.0, "bfloat16"), (0.2, "float32")):
        monkeypatch.setattr("rrcm.training.precision._matmul_gain", lambda gain=gain: gain)
        assert resolve_precision("auto", cpu) == wanted
