"""Reads checkpoints of the public rRCM code (jiachenlei/rRCM) into an Encoder."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rrcm.encoder import Encoder
from rrcm.errors import UserError

# Their name of each config entry -> ours.
CONFIG_NAMES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
    "hidden_dim": "projector_hidden",
    "output_dim": "projector_dim",
}

# Their parameter prefixes -> ours; what is not listed keeps its name.
PARAMETER_NAMES = {
    "patch_embed.proj.": "patch_embed.",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.2.",
    "projection_head.": "projector.",
}


def import_reference(checkpoint: Path, config: Path) -> Encoder:
    """Loads a reference checkpoint without executing anything in it.

    Args:
        checkpoint: `nnet.pth`, a state dict saved by torch.
        config: JSON with the sizes under the reference's names (`embed_dim`, `num_heads`, ...).

    Returns:
        An Encoder in eval mode with the checkpoint's weights.

    Raises:
        UserError: a file is missing, unreadable, or does not fit the other.
    """
    settings = _read_config(config)
    state = _read_state(checkpoint)
    try:
        encoder = Encoder(**{ours: settings[theirs] for theirs, ours in CONFIG_NAMES.items()})
    except ValueError as error:
        raise UserError(f"{config}: {error}") from None

    expected = encoder.state_dict()
    found = {_rename(name): value for name, value in state.items()}
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise UserError(
            f"{checkpoint} does not fit {config}: "
            f"missing {missing[:3] or 'nothing'}, not expected {unknown[:3] or 'nothing'}"
        )
    for name, value in found.items():
        if value.shape != expected[name].shape:
            raise UserError(
                f"{checkpoint} does not fit {config}: {name} is {list(value.shape)}, "
                f"the config makes it {list(expected[name].shape)}"
            )
    encoder.load_state_dict(found)
    return encoder.eval()


def _rename(name: str) -> str:
    name = name.removeprefix("module.")
    for theirs, ours in PARAMETER_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _read_config(path: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot read the config: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    missing = [
        name for name in CONFIG_NAMES if not isinstance(settings, dict) or name not in settings
    ]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}")
    for name in CONFIG_NAMES:
        kinds = (int, float) if name == "mlp_ratio" else (int,)
        if not isinstance(settings[name], kinds) or not 0 < settings[name] < 1e6:
            raise UserError(f"{path}: {name} must be a positive number, got {settings[name]!r}")
    return settings


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read the checkpoint: {error.strerror}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # Not torch's own words: they advise to load with code execution allowed.
        raise UserError(
            f"{path} is not a plain torch checkpoint of tensors ({type(error).__name__})"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"{path}: expected a state dict (name -> tensor) as the reference saves it")
    return state
