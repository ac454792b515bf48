import hashlib

import numpy as np
import pytest

from rrcm.data import load_images
from rrcm.data.splits import choose_split, stratified_sample
from rrcm.errors import UserError

PARTS = ("train", "validation", "test")


def sha(values):
    return hashlib.sha256(np.asarray(values, "<i8").tobytes()).hexdigest()[:16]


def labels_of(*counts):
    """counts[k] images of class k, in mixed order."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(0).permutation(labels)


def indices(available, wanted):
    return choose_split(available, wanted, "toy")[1]


# The splits of the published figures: these must never change.
DIGITS = {
    "train": (1257, "a39178ee2e46cd5a", "3d79f730b24a6de5ff0d403efdfb2032"),
    "validation": (180, "e447cfa9170ee87e", "94197f99e752b1b66661b8f0d59d5336"),
    "test": (360, "2c096400cf29ea19", "c3b389b5d9fe03c0f1687f528fc6efab"),
}


@pytest.mark.parametrize("split", PARTS)
def test_digits_splits_are_pinned(split):
    digits = load_images("digits", split, image_size=8, channels=1)
    count, labels, fingerprint = DIGITS[split]
    assert len(digits) == count
    assert sha(digits.labels.numpy()) == labels
    assert digits.fingerprint == fingerprint


def test_digits_splits_are_disjoint_and_cover_the_whole():
    def rows(split):
        digits = load_images("digits", split, image_size=8, channels=1)
        return [image.numpy().tobytes() for image in digits.batch(range(len(digits)))[0]]

    assert sorted(row for part in PARTS for row in rows(part)) == sorted(rows("all"))


@pytest.mark.parametrize("counts", [(100, 100, 100), (7, 90, 33), (1,) * 40, (3,), (1, 500)])
def test_carving_one_split(counts):
    labels = labels_of(*counts)
    parts = {part: indices({"whatever": labels}, part) for part in PARTS}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(labels)))
    assert len(parts["test"]) == -(-len(labels) // 5)
    assert len(parts["validation"]) == -(-len(labels) // 10)
    for part, chosen in parts.items():
        assert (np.diff(chosen) > 0).all(), f"{part} is not in the source's order"
        share = len(chosen) / len(labels)
        for label, count in enumerate(counts):
            assert abs((labels[chosen] == label).sum() - share * count) < 2, (part, label)
    assert len(indices({"whatever": labels}, "all")) == len(labels)


def test_classes_of_one_image_are_spread_over_the_list_of_classes():
    chosen = indices({"train": np.arange(1000)}, "test")
    assert np.diff(chosen).max() == 5


def test_a_sample_is_shuffled_within_the_class():
    chosen = np.flatnonzero(stratified_sample(np.zeros(1000, np.int64), 100, salt=1))
    assert len(chosen) == 100
    assert len(set(np.diff(chosen))) > 10
    other = np.flatnonzero(stratified_sample(np.zeros(1000, np.int64), 100, salt=2))
    assert not np.array_equal(chosen, other)


def test_train_and_test_give_a_validation_split_from_train():
    source = {"train": labels_of(50, 150), "test": labels_of(5, 5)}
    train, validation = indices(source, "train"), indices(source, "validation")
    assert sorted([*train, *validation]) == list(range(200))
    assert np.bincount(source["train"][validation]).tolist() == [5, 15]
    assert choose_split(source, "validation", "toy")[0] == "train"
    assert choose_split(source, "validation", "toy")[2].startswith("validation: 10% carved")
    assert choose_split(source, "test", "toy")[0] == "test"
    assert len(indices(source, "test")) == 10


def test_a_carved_validation_split_is_at_most_5000():
    source = {"train": labels_of(40_000, 40_000), "test": labels_of(5)}
    assert len(indices(source, "validation")) == 5000
    assert len(indices(source, "train")) == 75_000


def test_train_and_validation_make_the_published_validation_the_test_split():
    source = {"train": labels_of(50, 150), "validation": labels_of(4, 4)}
    assert choose_split(source, "test", "toy")[0] == "validation"
    assert len(indices(source, "test")) == 8
    assert choose_split(source, "validation", "toy")[0] == "train"
    assert not set(indices(source, "train")) & set(indices(source, "validation"))


def test_three_published_splits_are_left_alone():
    source = {part: labels_of(n) for n, part in enumerate(PARTS, 4)}
    for n, part in enumerate(PARTS, 4):
        assert choose_split(source, part, "toy")[0] == part
        assert len(indices(source, part)) == n


def test_carving_is_the_same_everywhere_and_for_ever():
    assert sha(indices({"x": np.arange(100) % 3}, "test")) == "50d1b115a86c8c65"
    two = {"train": np.arange(1000) % 7, "test": np.arange(1)}
    assert sha(indices(two, "validation")) == "be347951a8df8078"


@pytest.mark.parametrize(
    ("available", "wanted", "message"),
    [
        ({"train": labels_of(9), "test": labels_of(9)}, "all", "toy has no split 'all'"),
        ({"validation": labels_of(9), "test": labels_of(9)}, "train", "nothing to carve it from"),
        ({"train": labels_of(9)}, "trian", "unknown split 'trian': did you mean 'train'"),
        ({"train": labels_of(2)}, "test", "toy has 2 image"),
        ({"train": labels_of(1), "test": labels_of(1)}, "train", "none to spare"),
    ],
)
def test_impossible_splits_are_refused_in_one_line(available, wanted, message):
    with pytest.raises(UserError, match=message) as caught:
        choose_split(available, wanted, "toy")
    assert "\n" not in str(caught.value)
