"""What both training loops share."""

from rrcm.training.schedules import lr_scale, target_ema_rate

__all__ = ["lr_scale", "target_ema_rate"]
