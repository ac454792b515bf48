"""Training state on disk: one safetensors file a checkpoint, written whole or not at all."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rrcm.errors import UserError
from rrcm.files import fsync, share

Part = nn.Module | torch.optim.Optimizer


def save_checkpoint(path: Path, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> None:
    """Writes the state of modules and optimisers, and JSON-able facts, atomically.

    Raises:
        UserError: the folder cannot be written or the disk is full; no half file is left.
    """
    tensors = {
        f"{name}.{key}": value.detach().contiguous()
        for name, part in parts.items()
        for key, value in _tensors(part).items()
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"meta": json.dumps(meta)})
        share(temporary)
        fsync(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path}: cannot write the checkpoint: {reason}") from None


def load_checkpoint(path: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Restores the parts in place and returns the facts saved with them.

    Raises:
        UserError: the file is missing, torn, or holds other tensors than the parts have.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta: dict[str, Any] = json.loads(file.metadata()["meta"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a readable checkpoint: {error}") from None
    for name, part in parts.items():
        own = {
            key.removeprefix(f"{name}."): value
            for key, value in tensors.items()
            if key.startswith(f"{name}.")
        }
        try:
            _restore(part, own)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: does not fit this run's {name}: {reason}") from None
    return meta


def _tensors(part: Part) -> dict[str, Tensor]:
    if isinstance(part, nn.Module):
        return part.state_dict()
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, state in part.state_dict()["state"].items()
        for key, value in state.items()
    }


def _restore(part: Part, tensors: dict[str, Tensor]) -> None:
    if isinstance(part, nn.Module):
        part.load_state_dict(tensors)
        return
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
