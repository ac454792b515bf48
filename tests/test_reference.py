"""Parity with the published code, on a checkpoint and numbers computed by it."""

import copy
import json

import numpy as np
import pytest
import torch

from rrcm import noise
from rrcm.errors import UserError
from rrcm.objectives import consistency_regulariser, contrastive_denoising
from rrcm.reference import import_reference
from rrcm.training import lr_scale, target_ema_rate


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "golden" / "reference-tiny"


@pytest.fixture(scope="module")
def expected(folder):
    return {
        name: torch.as_tensor(value) for name, value in np.load(folder / "expected.npz").items()
    }


@pytest.fixture
def encoder(folder):
    return import_reference(folder / "nnet.pth", folder / "config.json")


def assert_close(actual, wanted):
    torch.testing.assert_close(
        torch.as_tensor(actual), wanted, rtol=1e-4, atol=1e-6, check_dtype=False
    )


def losses(encoder, expected, index):
    """Per-sample losses in train mode, the target's parameters scaled by 0.97."""
    online = encoder.train()
    target = copy.deepcopy(online)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(0.97)
    views = (expected[name] for name in ("x0", "x1", "x2", "eps"))
    return contrastive_denoising(online, target, *views, index=index, num_scales=21, tau=0.2)


def test_features_and_projections(encoder, expected):
    with torch.no_grad():
        features = encoder(expected["x"], expected["t"])
        assert_close(features, expected["eval_features"])
        assert_close(encoder.project(features), expected["eval_projection"])


@pytest.mark.parametrize("index", [0, 5, 13, 19])
def test_per_sample_losses(encoder, expected, index):
    contrastive, consistency = losses(encoder, expected, index)
    assert_close(contrastive, expected[f"contrastive_{index}"])
    assert_close(consistency, expected[f"consistency_{index}"])


def test_loss_and_gradients(encoder, expected):
    contrastive, consistency = losses(encoder, expected, index=5)
    loss = (contrastive + consistency).mean()
    loss.backward()
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert_close(loss.detach(), expected["loss_5"])
    assert_close(norm, expected["grad_norm_5"])
    assert_close(encoder.patch_embed.weight.grad, expected["grad_patch_embed_5"])


@pytest.mark.parametrize("sharpness", [10, 15])
def test_ema_schedule(expected, sharpness):
    total = int(expected["schedule_steps"].max())
    rates = [
        target_ema_rate(int(step), total, sharpness=sharpness)
        for step in expected["schedule_steps"]
    ]
    assert_close(1 - torch.tensor(rates), 1 - expected[f"schedule_ema_A{sharpness}"])


def test_scale_schedule(expected):
    total = int(expected["schedule_steps"].max())
    scales = [noise.num_scales(int(step), total) for step in expected["schedule_steps"]]
    assert scales == expected["schedule_scales"].tolist()


@pytest.mark.parametrize("n", [21, 41, 81])
def test_sigma_grid(expected, n):
    torch.testing.assert_close(noise.karras_sigmas(n), expected[f"sigmas_{n}"], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("lbd", [10, 20])
def test_finetuning_regulariser(expected, lbd):
    value = consistency_regulariser(expected["ft_logits"], lbd=lbd, eta=0.5)
    assert_close(value, expected[f"ft_consistency_lbd{lbd}_eta05"])


def test_learning_rate(expected):
    scales = [lr_scale(float(step), warmup=10, total=100) for step in expected["lr_steps"]]
    assert_close(torch.tensor(scales, dtype=torch.float64), expected["lr_scale"])


def test_config_that_does_not_fit_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    wider = tmp_path / "config.json"
    wider.write_text(json.dumps(config | {"embed_dim": 48}))
    with pytest.raises(UserError, match="does not fit"):
        import_reference(folder / "nnet.pth", wider)


def test_config_with_a_wrong_type_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    wrong = tmp_path / "config.json"
    wrong.write_text(json.dumps(config | {"depth": "two"}))
    with pytest.raises(UserError, match="depth must be a positive number, got 'two'"):
        import_reference(folder / "nnet.pth", wrong)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
def test_corrupt_checkpoint_is_refused(folder, tmp_path, content):
    corrupt = tmp_path / "nnet.pth"
    corrupt.write_bytes(content)
    with pytest.raises(UserError, match=r"nnet\.pth"):
        import_reference(corrupt, folder / "config.json")


def test_missing_checkpoint_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="cannot read the checkpoint: No such file"):
        import_reference(tmp_path / "nnet.pth", folder / "config.json")
