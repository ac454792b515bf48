"""Encoder and Classifier: shapes, time, initial values, saving."""

import pytest
import torch

from rrcm import noise
from rrcm.encoder import Classifier, Encoder, attend, sinusoidal_embedding
from rrcm.errors import UserError
from rrcm.pretrained import load_pretrained, save_pretrained

SMALL = {
    "image_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "projector_hidden": 12,
    "projector_dim": 6,
}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder(**SMALL).eval()


def test_shapes(encoder):
    features = encoder(torch.randn(5, 1, 8, 8), torch.ones(5))
    assert features.shape == (5, 16)
    assert encoder.project(features).shape == (5, 6)


def test_the_level_of_each_image_is_its_own(encoder):
    x = torch.randn(2, 1, 8, 8)
    both = encoder(x, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(both[:1], encoder(x[:1], torch.tensor([0.5])))
    torch.testing.assert_close(both[1:], encoder(x[1:], torch.tensor([2.0])))
    assert not torch.allclose(both[1:], encoder(x[1:], torch.tensor([0.5])), atol=1e-3)


def test_the_last_block_computes_the_class_token_it_would_among_all(encoder):
    tokens = torch.randn(3, 6, 16)
    block = encoder.blocks[-1]
    torch.testing.assert_close(block(tokens, first_only=True), block(tokens)[:, :1])


def test_cpu_attention_is_torchs():
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attend(q, k, v), wanted)


def test_bfloat16_stays_near_float32(encoder):
    x, t = torch.randn(16, 1, 8, 8), torch.full((16,), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(x, t)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, encoder(x, t), rtol=0.05, atol=0.05)


def test_time_embedding_has_cosines_first():
    embedding = sinusoidal_embedding(torch.tensor([0.0, 1.0]), 4)
    torch.testing.assert_close(embedding[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    wanted = torch.tensor([1.0, 0.01])
    torch.testing.assert_close(embedding[1], torch.cat([wanted.cos(), wanted.sin()]))


def test_moco_init_and_frozen_patch_embedding():
    encoder = Encoder(**SMALL, init="moco-v3", freeze_patch_embed=True)
    assert not any(p.requires_grad for p in encoder.patch_embed.parameters())
    qkv, width = encoder.blocks[0].attn.qkv.weight, 16
    bound = (6 / (2 * width)) ** 0.5
    assert 0.9 * bound < qkv.abs().max() <= bound
    patch_bound = (6 / (4 * 4 + width)) ** 0.5
    assert 0.8 * patch_bound < encoder.patch_embed.weight.abs().max() <= patch_bound


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": 3}, "not a multiple of patch_size 3"),
        ({"heads": 3}, "a multiple of heads 3"),
        ({"depth": 0}, "sizes must be at least 1"),
        ({"init": "kaiming"}, "init must be"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Encoder(**{**SMALL, **change})


def test_an_image_of_another_size_is_refused(encoder):
    with pytest.raises(ValueError, match=r"takes x \[2, 1, 8, 8\].*got x \[2, 3, 8, 8\]"):
        encoder(torch.randn(2, 3, 8, 8), torch.ones(2))
    with pytest.raises(ValueError, match=r"and t \[2\]"):
        encoder(torch.randn(2, 1, 8, 8), torch.ones(1))


def test_classifier_normalises_inside_and_reads_the_nearest_level(encoder):
    classifier = Classifier(encoder, num_classes=3, sigma=0.25, head_input="prenorm").eval()
    torch.nn.init.normal_(classifier.head.weight)
    grid = noise.karras_sigmas(81)
    level = float(grid[(grid - 0.5).abs().argmin()])
    assert classifier.level == level
    x = torch.rand(2, 1, 8, 8)
    token = encoder.class_token(2 * x - 1, torch.full((2,), level))
    torch.testing.assert_close(classifier(x), classifier.head(token))
    classifier.head_input = "norm"
    torch.testing.assert_close(classifier(x), classifier.head(encoder.norm(token)))


def test_a_fresh_classifier_predicts_uniformly(encoder):
    logits = Classifier(encoder, num_classes=3, sigma=0.25)(torch.rand(4, 1, 8, 8))
    assert logits.abs().max() < 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sigma": 0.0}, "sigma must be a positive number"),
        ({"sigma": float("nan")}, "sigma must be a positive number"),
        ({"num_classes": 1}, "at least 2"),
        ({"class_names": ["a"]}, "1 class names for 3 classes"),
        ({"head_input": "mean"}, "head_input must be"),
    ],
)
def test_bad_classifiers_are_refused(encoder, change, words):
    with pytest.raises(ValueError, match=words):
        Classifier(encoder, **{"num_classes": 3, "sigma": 0.25, **change})


def test_saved_models_come_back_equal(encoder, tmp_path):
    x, t = torch.rand(2, 1, 8, 8), torch.ones(2)
    save_pretrained(encoder, tmp_path / "encoder")
    again = load_pretrained(Encoder, str(tmp_path / "encoder"))
    torch.testing.assert_close(again(x, t), encoder(x, t), rtol=0, atol=0)

    classifier = Classifier(encoder, 3, 0.5, "prenorm", ["a", "b", "c"])
    save_pretrained(classifier, tmp_path / "classifier")
    loaded = load_pretrained(Classifier, str(tmp_path / "classifier"))
    torch.testing.assert_close(loaded(x), classifier(x), rtol=0, atol=0)
    assert (loaded.sigma, loaded.head_input, loaded.class_names) == (
        0.5,
        "prenorm",
        ("a", "b", "c"),
    )


def test_a_broken_or_missing_model_is_one_clear_line(encoder, tmp_path):
    with pytest.raises(UserError, match="no such folder; expected one with a saved Encoder"):
        load_pretrained(Encoder, str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_pretrained(Encoder, str(tmp_path / "empty"))
    save_pretrained(encoder, tmp_path / "encoder")
    with pytest.raises(UserError, match="holds an rrcm Encoder, expected a Classifier"):
        load_pretrained(Classifier, str(tmp_path / "encoder"))
    weights = tmp_path / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(UserError, match="is not a saved Encoder, or is corrupt"):
        load_pretrained(Encoder, str(tmp_path / "encoder"))


def test_a_model_lacking_weights_is_refused(encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    save_pretrained(encoder, tmp_path / "encoder")
    weights = tmp_path / "encoder" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["norm.weight"]
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"norm\.weight"):
        load_pretrained(Encoder, str(tmp_path / "encoder"))


def test_saving_where_nothing_can_be_written(encoder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot save the model"):
        save_pretrained(encoder, tmp_path / "file" / "encoder")
