"""A certification run: which images, in which order, resumable at every image."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rrcm.smoothing.anytime import StopRule
from rrcm.smoothing.bounds import format_radius
from rrcm.smoothing.checks import check_alpha, check_count
from rrcm.smoothing.errors import SmoothingError
from rrcm.smoothing.journal import Journal, write_whole
from rrcm.smoothing.smoothed import ABSTAIN, SmoothedClassifier


def select_indices(
    total: int, stride: int = 1, start: int = 0, max_images: int | None = None
) -> range:
    """Which images of a data set to certify: every `stride`-th from `start` on.

    The field's protocol takes 500 images: stride 20 of CIFAR-10's 10,000 test images, stride 100
    of ImageNet's 50,000 (Cohen et al., 2019, section 4). The stride matters where images are
    sorted by class: the first 500 of such a folder are a few classes only.

    Args:
        total: Number of images in the data set.
        stride: Distance between two images, at least 1.
        start: First image, from 0.
        max_images: Most images to certify (a count, not an index); None: no limit.

    Returns:
        Indices, ascending.

    Raises:
        SmoothingError: An argument is out of its range.
    """
    total = check_count("total", total, 1)
    stride = check_count("stride", stride, 1)
    start = check_count("start", start, 0)
    if start >= total:
        raise SmoothingError(f"start is {start}, but the data set ends at index {total - 1}")
    indices = range(start, total, stride)
    return indices if max_images is None else indices[: check_count("max_images", max_images, 1)]


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights: names, shapes, dtypes and bytes of its sorted state_dict.

    Equal weights give equal fingerprints in every process and on every device. The model's code is
    not covered: two models that differ in code alone have one fingerprint.

    Returns:
        64 hexadecimal digits.

    Raises:
        SmoothingError: The state_dict holds something other than tensors.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise SmoothingError(
                f"no fingerprint of the model: {name} in its state_dict is no tensor but {kind}; "
                "pass a name of your own as `model` to journal_settings"
            )
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def journal_settings(
    smoothed: SmoothedClassifier,
    *,
    data: str,
    n0: int,
    n: int,
    alpha: float,
    seed: int,
    stop: StopRule | None = None,
    model: str | None = None,
    versions: Mapping[str, str] | None = None,
    indices: range | None = None,
) -> dict[str, Any]:
    """All that the certificates of a run rest on, for the header of its journal.

    A run goes on only under equal settings. This includes the kind of device and the versions of
    the software: each row would hold its guarantee regardless, but the header would no longer tell
    how to draw it again. The batch size is not among them, as the noise does not depend on it.

    Args:
        smoothed: The classifier to certify.
        data: Name of the data set and its split.
        n0: Number of selection draws.
        n: Number of estimation draws; not used with `stop`.
        alpha: Probability of error of one certificate.
        seed: Seed of the run.
        stop: When to stop drawing; None draws n.
        model: Name of the model; None: its `model_fingerprint`.
        versions: Versions of the software; None: those of rrcm, torch, numpy and scipy here.
        indices: The images of the run, as `select_indices` gives them, which several processes
            can then share (`Part`); None: not recorded.

    Returns:
        A mapping that JSON can hold.

    Raises:
        SmoothingError: An argument is out of its range.
    """
    if versions is None:
        versions = {name: _version(name) for name in ("rrcm", "torch", "numpy", "scipy")}
    return {
        "model": model_fingerprint(smoothed.model) if model is None else model,
        "data": data,
        "indices": _selection(indices),
        "num_classes": smoothed.num_classes,
        "sigma": smoothed.sigma,
        "n0": check_count("n0", n0, 1),
        "n": stop.n_max if stop else check_count("n", n, 1),
        "alpha": check_alpha(alpha),
        "seed": check_count("seed", seed, 0),
        "dtype": str(smoothed.dtype).removeprefix("torch."),
        "device": smoothed.device.type,
        "noise": smoothed.noise.name,
        "bound": "anytime" if stop else "clopper-pearson",
        "stop": _json_of(stop),
        "versions": dict(versions),
    }


def certify_images(
    smoothed: SmoothedClassifier,
    images: Callable[[int], tuple[Tensor, int]],
    indices: Iterable[int],
    journal: Journal,
    *,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    batch_size: int | None = None,
    seed: int = 0,
    stop: StopRule | None = None,
) -> Iterator[dict[str, Any]]:
    """Certifies images, each row on the disk before it is yielded.

    Images that the journal has are skipped, so the same call goes on where a killed run stopped,
    and the rows are those of an uninterrupted run but for "seconds".

    Args:
        smoothed: The classifier to certify.
        images: Gives the image [C, H, W] in [0, 1] and the label at an index.
        indices: Which images, in which order.
        journal: Where the rows go, opened with the `journal_settings` of this run.
        n0: Number of selection draws.
        n: Number of estimation draws; not used with `stop`.
        alpha: Probability of error of one certificate: of 1,000 rows, about 1 may be wrong at
            alpha = 0.001.
        batch_size: Noisy copies in one forward pass, of several images if need be; None finds it.
        seed: Seed of the run.
        stop: When to stop drawing; None draws n.

    Yields:
        A row: index, label, prediction (-1 = abstained), radius (0 if abstained), correct (1 if
        prediction == label, else 0), top, count, n (estimation draws), p_lower, clean_prediction
        (of the base classifier, without noise), seconds (since the row before).

    Raises:
        SmoothingError: An argument is out of its range or not what the journal's header says, an
            image or a label is unusable (the message names the image), or the disk is full.
    """
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)
    here = journal_settings(
        smoothed, data="", n0=n0, n=n, alpha=alpha, seed=seed, stop=stop, model="", versions={}
    )
    for name in ("sigma", "n0", "n", "alpha", "seed", "noise", "bound", "stop"):
        if journal.settings.get(name, here[name]) != here[name]:
            raise SmoothingError(
                f"{journal.path} was opened for {name}={journal.settings[name]}, "
                f"but the call says {name}={here[name]}"
            )
    options = (n0, n, alpha, batch_size, seed, stop)
    return _certify_rows(smoothed, images, indices, journal, options)


def _certify_rows(
    smoothed: SmoothedClassifier,
    images: Callable[[int], tuple[Tensor, int]],
    indices: Iterable[int],
    journal: Journal,
    options: tuple[Any, ...],
) -> Iterator[dict[str, Any]]:
    under_way: dict[int, tuple[Tensor, int]] = {}

    def open_images() -> Iterator[tuple[int, Tensor]]:
        for index in indices:
            if index in journal.done:
                continue
            x, label = images(index)
            label = check_count(f"the label of image {index}", label, 0)
            if label >= smoothed.num_classes:
                raise SmoothingError(
                    f"image {index} has label {label}, but the classifier has classes 0 to "
                    f"{smoothed.num_classes - 1}"
                )
            under_way[index] = x, label
            yield index, x

    started = time.perf_counter()
    for certificate in smoothed.certify_many(open_images(), *options):
        x, label = under_way.pop(certificate.index)
        prediction = certificate.prediction
        row = {
            "index": certificate.index,
            "label": label,
            "prediction": prediction,
            "radius": certificate.radius,
            "correct": int(prediction == label and prediction != ABSTAIN),
            "top": certificate.top,
            "count": certificate.count,
            "n": certificate.n,
            "p_lower": certificate.p_lower,
            "clean_prediction": smoothed.predict_clean(x),
            "seconds": round(time.perf_counter() - started, 6),
        }
        started = time.perf_counter()
        journal.append(row)
        yield row


def write_cohen_tsv(
    rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str], digits: int = 4
) -> None:
    """Writes rows in the format of Cohen et al.'s published logs, which their tools read.

    Tab-separated columns idx, label, predict, radius, correct, time (seconds), sorted by index.
    The file appears whole or not at all.

    Args:
        rows: Rows as `certify_images` yields and `read_journal` returns them.
        path: The file to write.
        digits: Decimals of the radius, which is rounded down.

    Raises:
        SmoothingError: A row lacks a column, or the file cannot be written.
    """
    lines = ["idx\tlabel\tpredict\tradius\tcorrect\ttime"]
    try:
        for row in sorted(rows, key=lambda row: int(row["index"])):
            radius = format_radius(row["radius"], digits)
            lines.append(
                f"{row['index']}\t{row['label']}\t{row['prediction']}\t{radius}"
                f"\t{row['correct']}\t{row['seconds']:.1f}"
            )
    except KeyError as error:
        raise SmoothingError(f"a row lacks the column {error}: give rows of a journal") from None
    write_whole(Path(path), ("\n".join(lines) + "\n").encode())


def _json_of(stop: StopRule | None) -> dict[str, Any] | None:
    """The rule as JSON gives it back."""
    return asdict(stop) | {"radii": list(stop.radii)} if stop else None


def _selection(indices: range | None) -> dict[str, int] | None:
    """Equal for ranges of equal elements."""
    if indices is None:
        return None
    first = indices[0] if indices else 0
    step = indices.step if len(indices) > 1 else 1
    return {"start": first, "step": step, "count": len(indices)}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
