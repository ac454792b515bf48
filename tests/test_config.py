"""Recipes: what loads, what is refused, and with which words."""

import pytest

from rrcm.config import load_recipe, recipe_names
from rrcm.errors import UserError


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    for sigma in (0.25, 0.5, 1.0):
        recipe.finetune_for(sigma)


def test_the_published_cifar_settings():
    recipe = load_recipe("cifar10-b")
    assert (recipe.pretrain.steps, recipe.pretrain.batch_size, recipe.pretrain.lr) == (
        300_000,
        2048,
        1e-4,
    )
    quarter, one = recipe.finetune_for(0.25), recipe.finetune_for(1.0)
    assert (quarter.lbd, quarter.layer_decay) == (10.0, 0.75)
    assert (one.lbd, one.layer_decay) == (20.0, 0.65)


def test_overrides_are_typed_yaml():
    recipe = load_recipe("digits", ["pretrain.lr=1e-4", "pretrain.steps=700", "seed=3"])
    assert (recipe.pretrain.lr, recipe.pretrain.steps, recipe.seed) == (1e-4, 700, 3)


def test_an_override_holds_at_every_sigma():
    recipe = load_recipe("digits", ["finetune.lbd=3"])
    assert {recipe.finetune_for(sigma).lbd for sigma in (0.25, 0.5, 1.0)} == {3.0}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pretrain.stpes=3", "pretrain.stpes: unknown key; did you mean 'steps'"),
        ("foo=1", "foo: unknown key; valid: name, seed, data"),
        ("pretrain.steps=many", "pretrain.steps: should be a valid integer, got 'many'"),
        ("pretrain.steps=1.5", "pretrain.steps: should be a valid integer, got 1.5"),
        ("pretrain.steps=true", "pretrain.steps: should be a valid integer, got True"),
        ("pretrain.lr=-1", "pretrain.lr: should be greater than 0, got -1"),
        ("pretrain.lr=.nan", "pretrain.lr: should be a finite number"),
        ("data.channels=2", "data.channels: should be 1 or 3, got 2"),
        ("pretrain=3", "pretrain: "),
        ("pretrain.steps.x=3", "steps is a value, not a section"),
        ("pretrain.steps", "write it as key=value"),
        ("finetune.sigmas={0.5: {lbda: 2}}", "finetune.sigmas.0.5.lbda: unknown key; did you"),
        ("pretrain.steps=[", "not valid YAML"),
    ],
)
def test_bad_overrides_are_refused_with_their_place(override, words):
    with pytest.raises(UserError) as refusal:
        load_recipe("digits", [override])
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load_recipe("digit")


def test_missing_file_and_missing_key(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_recipe(str(tmp_path / "none.yaml"))
    partial = tmp_path / "partial.yaml"
    partial.write_text("name: x\n")
    with pytest.raises(UserError, match="data: is missing"):
        load_recipe(str(partial))
