"""Saves and loads Encoders and Classifiers: a folder with config.json and model.safetensors."""

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError

from rrcm.encoder import Classifier, Encoder
from rrcm.errors import UserError
from rrcm.files import fsync, share

MODEL_FILES = {"config.json", "model.safetensors", "README.md"}
Model = TypeVar("Model", Encoder, Classifier)


def save_pretrained(model: Encoder | Classifier, folder: Path) -> None:
    """Writes the model to `folder`, whole or not at all; an earlier model there is replaced.

    Raises:
        UserError: the folder holds other files, cannot be written, or the disk is full.
    """
    folder = folder.absolute()
    check_model_folder(folder)
    draft = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        model.save_pretrained(draft)
        (draft / "README.md").unlink(missing_ok=True)  # the mixin's card says nothing of ours
        for path in (*draft.iterdir(), draft):
            share(path)
            fsync(path)
        if folder.exists():
            # Out of the way by one rename, so that there is no long while without a model.
            old = draft.with_name(draft.name + ".old")
            folder.rename(old)
            draft.rename(folder)
            shutil.rmtree(old)
        else:
            draft.rename(folder)
        fsync(folder.parent)
    except (OSError, SafetensorError) as error:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{folder}: cannot save the model: {reason}") from None


def check_model_folder(folder: Path) -> None:
    """Refuses a place where saving a model would overwrite anything but a model.

    Raises:
        UserError: `folder` is a file, or holds files that are not a model's.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder for the model")
    strangers = {f.name for f in folder.iterdir()} - MODEL_FILES if folder.is_dir() else set()
    if strangers:
        raise UserError(
            f"{folder}: holds other files ({min(strangers)}); name a new folder for the model"
        )


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
    elif place.count("/") != 1 or place.startswith((".", "/", "~")) or folder.parent.exists():
        raise UserError(f"{place}: no such folder; expected one with a saved {name}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints where it reads from
            model = kind.from_pretrained(place, strict=True)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        SafetensorError,
    ) as error:
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
    if not isinstance(config, dict):
        raise UserError(f"{folder}/config.json: is no model's config; save the {name} again")
    found = "Classifier" if "num_classes" in config else "Encoder"
    if found != name:
        raise UserError(f"{folder}: holds an rrcm {found}, expected a {name}")


def default_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
