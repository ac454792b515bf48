"""Recipes: typed settings read from YAML, changed by `key=value`, refused with a clear line.

A recipe is one YAML file with a section for the data, the encoder and each training stage. Every
field is declared here with its type and unit; an unknown or ill-typed key is refused with its
place and the nearest valid name.
"""

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rrcm.errors import UserError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["auto", "float32", "bfloat16"]


S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A group of settings: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataConfig(Section):
    source: str
    """A bundled set ("digits"), a Hugging Face dataset, a folder, or a parquet file."""
    image_size: Count
    """Pixels a side; images are resized (short side) and centre-cropped to it."""
    channels: Literal[1, 3]
    image_column: str | None = None
    """Column of the images where a table has several; None finds it."""
    label_column: str | None = None
    """Column of the labels where a table has several; None finds it."""


class EncoderConfig(Section):
    patch_size: Count
    width: Count
    depth: Count
    heads: Count
    mlp_ratio: Positive = 4.0
    projector_hidden: Count
    projector_dim: Count = 256
    init: Literal["vit", "moco-v3"] = "vit"
    freeze_patch_embed: bool = False


class PretrainConfig(Section):
    steps: Count
    batch_size: Annotated[int, Field(ge=2)]
    """Images a step; each is also the others' negative."""
    lr: Positive
    """Peak learning rate, as it is (not scaled by the batch)."""
    weight_decay: NonNegative = 0.0
    warmup_steps: Annotated[int, Field(ge=0)]
    clip: Positive = 2.0
    """Largest gradient norm, after the warm-up."""
    views: str
    """How the two strong views are made: "natural" or "affine"."""
    tau: Positive = 0.2
    scales_start: Count = 20
    scales_end: Count = 80
    target_ema_start: Share = 0.99
    target_ema_end: Share = 0.9999
    target_ema_sharpness: Positive = 15.0
    eval_ema: Share = 0.9999
    """Rate of the second average of the online weights: the encoder that is saved."""
    precision: Precision = "auto"
    checkpoint_every: Count = 1000
    """Steps between checkpoints; Ctrl-C and SIGTERM save at once."""
    log_every: Count = 10

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self


class FinetuneConfig(Section):
    epochs: Count
    batch_size: Count
    """Images a step, before each is repeated `copies` times."""
    lr: Positive
    """Peak learning rate for a batch of 256; scaled by batch_size / 256."""
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    """Each layer below the head learns this much slower than the one above."""
    weight_decay: NonNegative = 0.05
    warmup_epochs: NonNegative
    clip: Positive | None = None
    copies: Count = 2
    """m: noisy copies of an image in a step."""
    lbd: NonNegative = 10.0
    """Weight of the KL term of the consistency regulariser."""
    eta: NonNegative = 0.5
    """Weight of its entropy term."""
    view: str = "none"
    """Augmentation before the noise: "none", "flip", "crop-flip" or "affine"."""
    head_input: Literal["norm", "prenorm"]
    """The head reads the class token after ("norm") or before the final LayerNorm."""
    head_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs of a head-only stage before: clean images, read at the least noise."""
    freeze_head: bool = False
    """Leave the head out of the main stage, as the published code does."""
    precision: Precision = "auto"
    checkpoint_every: Count = 1000
    """Steps between checkpoints; Ctrl-C and SIGTERM save at once."""
    log_every: Count = 10
    sigmas: dict[float, dict[str, Any]] = {}
    """For a sigma, the settings above that differ there."""

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} must be below epochs {self.epochs}"
            )
        return self


class Recipe(Section):
    name: str
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig
    encoder: EncoderConfig
    pretrain: PretrainConfig
    finetune: FinetuneConfig

    def finetune_for(self, sigma: float) -> FinetuneConfig:
        """The fine-tuning settings at one sigma, with `sigmas` merged in and emptied."""
        values = self.finetune.model_dump()
        values |= values.pop("sigmas").get(sigma, {})
        return FinetuneConfig.model_validate(values)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a number, as people mean it (YAML 1.1 wants `1.0e-3`)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)
# The resolver above would also take integers; keep them integers by trying that pattern first.
for _first in "-+0123456789":
    _resolvers = _Loader.yaml_implicit_resolvers[_first]
    _resolvers.sort(key=lambda pair: pair[0] != "tag:yaml.org,2002:int")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with rrcm."""
    folder = resources.files("rrcm") / "recipes"
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe by name or from a YAML file, and applies `key=value` overrides.

    Args:
        name_or_path: a name of `recipe_names()`, or a path that ends in .yaml or .yml.
        overrides: such as `["pretrain.steps=10", "seed=1"]`; values are YAML. An override of a
            `finetune` key holds at every sigma.

    Raises:
        UserError: no such recipe, not YAML, or a key or value that does not fit; the line says
            where, and the nearest valid name.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        place = name_or_path
        try:
            text = Path(name_or_path).read_text()
        except OSError as error:
            raise UserError(f"recipe {name_or_path}: cannot read it: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"recipe {name_or_path}: is not a text file") from None
    else:
        place = f"recipe {name_or_path}"
        if name_or_path not in recipe_names():
            raise UserError(
                f"{place}: no such recipe{_did_you_mean(name_or_path, recipe_names())} "
                f"(shipped: {', '.join(recipe_names())}; or a path ending in .yaml)"
            )
        text = (resources.files("rrcm") / "recipes" / f"{name_or_path}.yaml").read_text()
    values = _parse_yaml(text, place)
    if not isinstance(values, dict):
        raise UserError(f"{place}: expected sections such as data, encoder, pretrain, finetune")
    for override in overrides or []:
        _apply(values, override)
    recipe = _validate(Recipe, values, place, prefix="")
    for sigma, changes in recipe.finetune.sigmas.items():
        where = f"finetune.sigmas.{sigma}."
        if "sigmas" in changes:
            raise UserError(f"{place}: {where}sigmas: a sigma cannot hold sigmas of its own")
        merged = recipe.finetune.model_dump() | changes
        _validate(FinetuneConfig, merged, place, prefix=where)
    return recipe


def _parse_yaml(text: str, place: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = str(error).replace("\n", " ")
        raise UserError(f"{place}: not valid YAML: {line}") from None


def _apply(values: dict[Any, Any], override: str) -> None:
    """Sets one `key=value` in the nested values."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: write it as key=value, e.g. pretrain.steps=100")
    path = key.split(".")
    section = values
    for part in path[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise UserError(f"override {override!r}: {part} is a value, not a section")
    section[path[-1]] = _parse_yaml(text, f"override {override!r}")
    if path[0] == "finetune" and len(path) == 2:
        sigmas = values["finetune"].get("sigmas")
        for changes in sigmas.values() if isinstance(sigmas, dict) else []:
            if isinstance(changes, dict):
                changes.pop(path[1], None)


def _validate(section: type[S], values: Any, place: str, prefix: str) -> S:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        keys = [str(part) for part in first["loc"]]
        where = prefix + ".".join(keys)
        if first["type"] == "extra_forbidden":
            valid = _fields_at(section, keys[:-1])
            hint = _did_you_mean(keys[-1], valid) or f"; valid: {', '.join(valid)}"
            raise UserError(f"{place}: {where}: unknown key{hint}") from None
        message = first["msg"].replace("Input should be", "should be")
        if first["type"] == "value_error":
            raise UserError(f"{place}: {where}: {message.removeprefix('Value error, ')}") from None
        if first["type"] == "missing":
            raise UserError(f"{place}: {where}: is missing") from None
        raise UserError(f"{place}: {where}: {message}, got {first['input']!r}") from None


def _fields_at(section: type[Section], keys: list[str]) -> list[str]:
    for key in keys:
        kind = section.model_fields[key].annotation
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            return []
        section = kind
    return list(section.model_fields)


def _did_you_mean(word: str, valid: list[str]) -> str:
    nearest = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
