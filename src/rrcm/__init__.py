"""Provably robust image classifiers by contrastive denoising and randomized smoothing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rrcm.encoder import Classifier, Encoder
    from rrcm.errors import UserError

__version__ = "0.1.0"
__all__ = ["Classifier", "Encoder", "UserError", "__version__"]

_HOMES = {
    "Classifier": "rrcm.encoder",
    "Encoder": "rrcm.encoder",
    "UserError": "rrcm.errors",
    "noise": "rrcm.noise",
    "objectives": "rrcm.objectives",
    "smoothing": "rrcm.smoothing",
    "training": "rrcm.training",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `rrcm --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rrcm' has no attribute {name!r}")
    module = import_module(_HOMES[name])
    return (
        module
        if name in ("noise", "objectives", "smoothing", "training")
        else getattr(module, name)
    )
