"""What both training loops share: schedules, optimiser groups, precision, the run's folder."""

from rrcm.training.checkpoint import Part
from rrcm.training.optim import layer_groups, seed_of, set_lr, update_average
from rrcm.training.precision import autocast, resolve_precision
from rrcm.training.run import Interrupted, RunFolder, stop_requests
from rrcm.training.schedules import lr_scale, target_ema_rate

__all__ = [
    "Interrupted",
    "Part",
    "RunFolder",
    "autocast",
    "layer_groups",
    "lr_scale",
    "resolve_precision",
    "seed_of",
    "set_lr",
    "stop_requests",
    "target_ema_rate",
    "update_average",
]
