"""Saves and loads Encoders and Classifiers: a folder with config.json and model.safetensors."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError

from rrcm.encoder import Classifier, Encoder
from rrcm.errors import UserError

Model = TypeVar("Model", Encoder, Classifier)


def save_pretrained(model: Encoder | Classifier, folder: Path) -> None:
    """Writes the model to `folder`, whole or not at all; an earlier one there is replaced.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # the mixin's card says nothing of ours
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{folder}: cannot save the model: {reason}") from None


def load_pretrained(kind: type[Model], place: str) -> Model:
    """Loads an Encoder or a Classifier in eval mode, from a folder or a Hugging Face name.

    Args:
        kind: Encoder or Classifier.
        place: a folder as `save_pretrained` writes it, or a hub name `owner/model`.

    Raises:
        UserError: nothing there, a corrupt file, or the other kind of model.
    """
    name = kind.__name__
    folder = Path(place)
    if folder.is_dir():
        _check_files(folder, name)
    elif folder.exists() or place.count("/") != 1 or place.startswith((".", "/")):
        raise UserError(f"{place}: no such folder; expected one with a saved {name}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints where it reads from
            model = kind.from_pretrained(place, strict=True)
    except (RuntimeError, TypeError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: is not a saved {name}, or is corrupt: {reason}") from None
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{place}: no such folder, and the hub gave no {name} of that name: {reason}"
        ) from None
    return model.eval()


def _check_files(folder: Path, name: str) -> None:
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise UserError(f"{folder}: has no {file}; expected a folder with a saved {name}")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError:
        raise UserError(f"{folder}/config.json: is not JSON; save the {name} again") from None
    found = "Classifier" if "num_classes" in config else "Encoder"
    if found != name:
        raise UserError(f"{folder}: holds an rrcm {found}, expected a {name}")


def default_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
