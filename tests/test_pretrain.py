"""Pre-training's loop against the same steps written out plainly."""

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rrcm.pretrain
from rrcm import data
from rrcm.config import load_recipe
from rrcm.objectives import contrastive_denoising
from rrcm.pretrain import build_encoder, pretrain
from rrcm.training import seed_of

TINY = [
    *("encoder.width=16", "encoder.depth=2", "encoder.heads=2"),
    *("encoder.projector_hidden=16", "encoder.projector_dim=8"),
    *("pretrain.batch_size=32", "pretrain.lr=0.01", "pretrain.warmup_steps=2"),
    "pretrain.precision=float32",
]
CPU = torch.device("cpu")
STEPS = 4
LR = [0.0, 0.005, 0.01, 0.005]  # two steps of warm-up to 0.01, then half a cosine
SCALES = [21, 41, 41, 81]  # METHOD, section 1, at 4 steps
CLIP = 0.05  # far below the gradients' norm, about 1
EMA_START, EMA_END, SHARPNESS = 0.5, 0.9, 2.0
EVAL_EMA = 0.8


def plain_pretraining(recipe):
    """METHOD, sections 1 to 3: the networks after STEPS steps in float32."""
    images = data.load_images("digits", "train", image_size=8, channels=1)
    views = data.pretrain_views("affine", 8)
    torch.manual_seed(seed_of(recipe.seed, "init"))
    online = build_encoder(recipe).train()
    target, average = copy.deepcopy(online), copy.deepcopy(online)
    optimizer = torch.optim.AdamW(online.parameters(), weight_decay=0.1)
    for step in range(STEPS):
        torch.manual_seed(seed_of(recipe.seed, "pretrain", step))
        chosen = data.batch_indices(len(images), 32, step, recipe.seed)
        x, x1, x2 = views(images.batch(chosen)[0] / 255)
        eps = torch.randn_like(x)
        drawn = np.random.default_rng(seed_of(recipe.seed, "index", step))
        index = int(drawn.integers(0, SCALES[step] - 2, endpoint=True))
        contrastive, consistency = contrastive_denoising(
            online, target, x, x1, x2, eps, index, SCALES[step], tau=0.3
        )
        optimizer.zero_grad()
        (contrastive.mean() + consistency.mean()).backward()
        if step >= 2:
            norm = torch.cat([p.grad.flatten() for p in online.parameters()]).norm()
            assert norm > 2 * CLIP
            for parameter in online.parameters():
                parameter.grad *= CLIP / norm
        optimizer.param_groups[0]["lr"] = LR[step]
        optimizer.step()

        e = math.sqrt(step / STEPS * (EMA_END**2 - EMA_START**2) + EMA_START**2)
        c = 2 / (1 + math.exp(-SHARPNESS * (e - EMA_START) / (EMA_END - EMA_START))) - 1
        for network, rate in ((target, c * EMA_END + (1 - c) * EMA_START), (average, EVAL_EMA)):
            for mean, learned in zip(network.parameters(), online.parameters(), strict=True):
                mean.data = rate * mean.data + (1 - rate) * learned.data
    return {"online": online, "target": target, "average": average}


def assert_close(ours, plain):
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=2e-6, msg=name)


def test_four_steps_equal_the_same_steps_written_out(tmp_path):
    changes = [
        *(f"pretrain.steps={STEPS}", f"pretrain.clip={CLIP}", "pretrain.weight_decay=0.1"),
        *(f"pretrain.target_ema_start={EMA_START}", f"pretrain.target_ema_end={EMA_END}"),
        *(f"pretrain.target_ema_sharpness={SHARPNESS}", f"pretrain.eval_ema={EVAL_EMA}"),
        "pretrain.tau=0.3",
    ]
    recipe = load_recipe("digits", [*TINY, *changes])
    saved = load_file(pretrain(recipe, tmp_path, CPU) / "model.safetensors")
    state = load_file(tmp_path / "checkpoints" / f"{STEPS:09d}.safetensors")

    plain = plain_pretraining(recipe)
    for name, network in plain.items():
        weights = dict(network.named_parameters())
        assert_close({key: state[f"{name}.{key}"] for key in weights}, weights)
    # What is saved: the average's weights with the online network's BatchNorm statistics.
    statistics = dict(plain["online"].named_buffers())
    assert_close(saved, {**plain["average"].state_dict(), **statistics})


@pytest.fixture
def indices(monkeypatch):
    """The step indices that pre-training draws, in order."""
    drawn = []

    def recorded(*arguments):
        drawn.append(arguments[6])
        return contrastive_denoising(*arguments)

    monkeypatch.setattr(rrcm.pretrain, "contrastive_denoising", recorded)
    return drawn


def test_every_step_of_the_grid_is_drawn(tmp_path, indices):
    grid = ["pretrain.steps=40", "pretrain.scales_start=4", "pretrain.scales_end=4"]
    pretrain(load_recipe("digits", [*TINY, *grid]), tmp_path, CPU)
    assert len(indices) == 40
    assert set(indices) == {0, 1, 2, 3}  # of 5 levels; each is compared with the next


def test_a_resumed_run_draws_and_computes_the_same(tmp_path, indices):
    steps = ["pretrain.steps=8", "pretrain.checkpoint_every=5"]
    recipe = load_recipe("digits", [*TINY, *steps])
    whole = load_file(pretrain(recipe, tmp_path, CPU) / "model.safetensors")
    (tmp_path / "checkpoints" / "000000008.safetensors").unlink()
    resumed = load_file(pretrain(recipe, tmp_path, CPU) / "model.safetensors")
    assert indices[8:] == indices[5:8]
    assert all(whole[name].equal(resumed[name]) for name in whole)


def test_pretraining_reads_the_training_split_alone(tmp_path, monkeypatch):
    splits = []
    load_images = data.load_images

    def recorded(source, split, **options):
        splits.append(split)
        return load_images(source, split, **options)

    monkeypatch.setattr(data, "load_images", recorded)
    pretrain(load_recipe("digits", [*TINY, "pretrain.steps=3"]), tmp_path, CPU)
    assert splits == ["train"]


def test_a_frozen_patch_embedding_keeps_its_initial_value(tmp_path):
    changes = ["encoder.freeze_patch_embed=true", "pretrain.steps=4", "pretrain.weight_decay=0.1"]
    recipe = load_recipe("digits", [*TINY, *changes])
    saved = load_file(pretrain(recipe, tmp_path, CPU) / "model.safetensors")
    torch.manual_seed(seed_of(recipe.seed, "init"))
    for name, initial in build_encoder(recipe).named_parameters():
        assert saved[name].equal(initial) == name.startswith("patch_embed."), name
