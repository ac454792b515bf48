"""Train, validation and test: disjoint, and fixed whatever the run's seed.

What a source publishes decides what we carve:

=====================  ============================================================================
source has             we use
=====================  ============================================================================
train, valid., test    all three as they are
train, test            validation: 10% of train (at most 5,000), the rest of train is train
train, validation      test: the published validation; validation: carved from train as above
                       (ImageNet, whose public test set has no labels)
one split              70% train, 10% validation, 20% test; "all" is the whole
=====================  ============================================================================

Carving is stratified by class and pseudo-random within each class. Every part keeps the source's
own order.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from rrcm.data.batches import shuffle_keys
from rrcm.data.names import unknown_name
from rrcm.errors import UserError

SPLITS = ("train", "validation", "test", "all")
SYNONYMS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
MAX_CARVED_VALIDATION = 5000

Labels = npt.NDArray[np.int64]


def check_split(split: str) -> None:
    """Raise UserError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)


def stratified_sample(labels: Labels, count: int, salt: int) -> npt.NDArray[np.bool_]:
    """Choose exactly `count` images, spread evenly over the classes.

    The images are put in order by class, shuffled within each class, and taken at even distances:
    each class gives its share rounded down or up. Classes of one image cannot each give a share;
    then every (N / count)-th class gives its image.

    Args:
        labels: int64 [N].
        count: 0..N.
        salt: names the sample; another salt is another shuffle.

    Returns:
        bool [N] with `count` true values.
    """
    order = np.lexsort((shuffle_keys(len(labels), salt), labels))
    chosen = np.zeros(len(labels), bool)
    chosen[order[(2 * np.arange(count) + 1) * len(labels) // (2 * count)] if count else []] = True
    return chosen


def _carve_validation(labels: Labels) -> npt.NDArray[np.bool_]:
    return stratified_sample(labels, min(MAX_CARVED_VALIDATION, -(-len(labels) // 10)), salt=1)


def choose_split(
    available: Mapping[str, Labels], wanted: str, where: str
) -> tuple[str, npt.NDArray[np.int64], str]:
    """Say which images of which published split make up the split `wanted`.

    Args:
        available: published split -> labels int64 [N]. The names are "train", "validation" and
            "test", except that a single split may have any name.
        wanted: one of SPLITS.
        where: the source's name, for messages.

    Returns:
        (published split, ascending indices int64 into it, one line saying how the split was made)

    Raises:
        UserError: the source has no such split, or too few images to carve it.
    """
    check_split(wanted)
    if len(available) == 1:
        ((source, labels),) = available.items()
        return source, *_carve_three(labels, wanted, where)
    if wanted == "all":
        raise UserError(
            f"{where} has no split 'all': it is for a source of one split, and this one has "
            f"{', '.join(sorted(available))}"
        )
    source, has_train = wanted, "train" in available
    if wanted == "test" and "test" not in available:
        source, note = "validation", "test: the published validation split (no labelled test split)"
    elif has_train and wanted != "test" and not {"validation", "test"} <= set(available):
        return "train", *_carve_two(available["train"], wanted, where)
    else:
        note = f"{wanted}: as published"
    if source not in available:
        raise UserError(
            f"{where} has no {wanted} split and nothing to carve it from: it has "
            f"{', '.join(sorted(available))}"
        )
    return source, np.arange(len(available[source])), note


def _carve_three(labels: Labels, wanted: str, where: str) -> tuple[npt.NDArray[np.int64], str]:
    total = len(labels)
    if wanted == "all":
        return np.arange(total), f"all: the whole of the only split, {total} images"
    if total < 3:
        raise UserError(f"{where} has {total} image(s): carving three splits takes at least 3")
    test = stratified_sample(labels, -(-total // 5), salt=2)
    rest = np.flatnonzero(~test)
    in_validation = stratified_sample(labels[rest], -(-total // 10), salt=1)
    parts = {
        "train": rest[~in_validation],
        "validation": rest[in_validation],
        "test": np.flatnonzero(test),
    }
    share = {"train": 70, "validation": 10, "test": 20}[wanted]
    note = f"{wanted}: {share}% carved from the only split (fixed, stratified by class)"
    return parts[wanted], note


def _carve_two(labels: Labels, wanted: str, where: str) -> tuple[npt.NDArray[np.int64], str]:
    if len(labels) < 2:
        raise UserError(f"{where} has {len(labels)} training image(s): none to spare to validate")
    validation = _carve_validation(labels)
    percent = f"{100 * validation.mean():.3g}%"
    if wanted == "validation":
        note = f"validation: {percent} carved from train (fixed, stratified by class)"
        return np.flatnonzero(validation), note
    return np.flatnonzero(~validation), f"train: without the {percent} carved for validation"
