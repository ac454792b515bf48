"""Where images come from, which of them a step sees, and how they are augmented."""

from rrcm.data.batches import batch_indices
from rrcm.data.decode import decode
from rrcm.data.sources import ImageSet, from_pixels, load_images
from rrcm.data.views import finetune_view, pretrain_views, to_unit

__all__ = [
    "ImageSet",
    "batch_indices",
    "decode",
    "finetune_view",
    "from_pixels",
    "load_images",
    "pretrain_views",
    "to_unit",
]
