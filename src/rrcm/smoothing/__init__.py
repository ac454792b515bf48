"""Certification of any module that maps images to logits, by randomized smoothing.

A base classifier is asked about many copies of an image under Gaussian noise; from how often it
gives its favourite class follows an L2 radius in which the smoothed classifier provably does not
change its answer (Cohen et al., 2019). The base classifier takes float images [B, C, H, W] in
[0, 1] plus noise, and normalises them inside.

    >>> import torch
    >>> from rrcm.smoothing import ABSTAIN, SmoothedClassifier
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    >>> smoothed = SmoothedClassifier(model, sigma=0.25, num_classes=10)
    >>> certificate = smoothed.certify(torch.rand(3, 8, 8), n0=100, n=1000, alpha=0.001)
    >>> if certificate.prediction != ABSTAIN:
    ...     print(certificate.prediction, certificate.radius)

`certify_images` runs over a data set and writes a `Journal` that a killed run goes on with; `Part`
lets several processes share one run.
"""

from rrcm.smoothing.anytime import StopRule
from rrcm.smoothing.bounds import (
    certified_radius,
    clopper_pearson_interval,
    clopper_pearson_lower,
    clopper_pearson_upper,
    format_radius,
    max_radius,
    top_two_p_value,
)
from rrcm.smoothing.errors import SmoothingError
from rrcm.smoothing.journal import Journal, read_journal
from rrcm.smoothing.protocol import (
    certify_images,
    journal_settings,
    model_fingerprint,
    select_indices,
    write_cohen_tsv,
)
from rrcm.smoothing.scaleout import Part, Shard, Team, merge_folder, merge_journals
from rrcm.smoothing.smoothed import (
    ABSTAIN,
    Certificate,
    SmoothedClassifier,
    certificate_from_counts,
)

__all__ = [
    "ABSTAIN",
    "Certificate",
    "Journal",
    "Part",
    "Shard",
    "SmoothedClassifier",
    "SmoothingError",
    "StopRule",
    "Team",
    "certificate_from_counts",
    "certified_radius",
    "certify_images",
    "clopper_pearson_interval",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "format_radius",
    "journal_settings",
    "max_radius",
    "merge_folder",
    "merge_journals",
    "model_fingerprint",
    "read_journal",
    "select_indices",
    "top_two_p_value",
    "write_cohen_tsv",
]
