"""Certifies a model on a data set: from names on a command line to rows in a journal."""

import hashlib
import importlib.util
import json
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rrcm import data, noise
from rrcm.encoder import Classifier
from rrcm.errors import UserError
from rrcm.pretrained import load_pretrained
from rrcm.progress import progress_bar
from rrcm.smoothing import (
    Part,
    Shard,
    SmoothedClassifier,
    StopRule,
    Team,
    certify_images,
    journal_settings,
    model_fingerprint,
    read_journal,
    select_indices,
)
from rrcm.smoothing.sampler import NoiseName
from rrcm.smoothing.scaleout import JOURNAL
from rrcm.training import resolve_precision


@dataclass(frozen=True)
class Settings:
    """How to certify; the field's protocol is n0 = 100, n = 100,000, alpha = 0.001."""

    n0: int = 100
    """Noise samples that pick the class."""
    n: int = 100_000
    """Further samples that bound its probability."""
    alpha: float = 0.001
    """Probability that a certificate is wrong."""
    stride: int = 1
    """Take every stride-th image of the split."""
    max_images: int | None = None
    """Most images to certify; None for all."""
    batch_size: int | None = None
    """Noisy copies in one forward pass; does not change the noise. None finds one."""
    seed: int = 0
    precision: str = "auto"
    """ "float32", "bfloat16", or "auto" for the faster; recorded in the journal."""
    noise: NoiseName = "gaussian"
    """Or "exact", for a guarantee that holds in floating point too."""
    stop: StopRule | None = None
    """When to stop drawing before n; None draws n."""
    compile: bool = False
    """Run the model through torch.compile."""


def certify(
    model: nn.Module,
    images: data.ImageSet,
    sigma: float,
    out: Path,
    settings: Settings,
    device: torch.device,
    label: str = "certify",
    shard: Shard | None = None,
    team: Team | None = None,
) -> Path:
    """Certifies images of a data set; resumes if `out` holds the same run.

    With a team, the journal is there when rank 0 returns; with a shard, after `merge_folder`.

    Args:
        model: images [B, C, H, W] in [0, 1] plus noise -> logits [B, K].
        images: the data; image i of the journal is image i of this split.
        sigma: noise level on the [0, 1] scale, > 0.
        out: folder of the journal, `out/journal.jsonl`.
        settings: the protocol.
        device: where to run the model.
        label: what the progress bar says.
        shard: certify this share only, into a journal of its own.
        team: the processes to share the images with.

    Returns:
        The journal's path.

    Raises:
        UserError, SmoothingError: bad settings or data, or a folder of another run.
    """
    if isinstance(model, Classifier):
        model = at_sigma(model, sigma)
    precision = _precision(settings.precision, device, out)
    if team:
        precision = team.from_first("precision", precision)  # "auto" measures: one answer for all
    smoothed = SmoothedClassifier(
        model,
        sigma,
        images.num_classes,
        device=device,
        dtype=getattr(torch, precision),
        noise=settings.noise,
        compile=settings.compile,
    )
    indices = select_indices(len(images), settings.stride, max_images=settings.max_images)
    described = journal_settings(
        smoothed,
        data=f"{Path(images.name).name} {images.split} {images.fingerprint}",
        n0=settings.n0,
        n=settings.n,
        alpha=settings.alpha,
        seed=settings.seed,
        stop=settings.stop,
        model=_fingerprint(model),
        indices=indices,
    )

    def image_and_label(index: int) -> tuple[Tensor, int]:
        return data.to_unit(images.image(index)), int(images.labels[index])

    smoothed.predict_clean(image_and_label(indices[0])[0])  # a bad model fails before the journal
    if settings.batch_size is not None and settings.batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {settings.batch_size}")
    with Part(out, described, shard=shard, team=team) as part:
        rows = list(part.journal.done.values())
        right, seen = sum(row["correct"] for row in rows), len(rows)
        with progress_bar(
            label, len(indices), "image", done=part.done, hidden=team is not None and team.rank > 0
        ) as advance:
            for row in certify_images(
                smoothed,
                image_and_label,
                part.todo(),
                part.journal,
                n0=settings.n0,
                n=settings.n,
                alpha=settings.alpha,
                batch_size=settings.batch_size,
                seed=settings.seed,
                stop=settings.stop,
            ):
                part.count_row()
                right, seen = right + row["correct"], seen + 1
                advance(part.done, f"{right / seen:.1%} right")
            part.finish(advance)
    return part.journal.path if shard else out / JOURNAL


def _precision(wanted: str, device: torch.device, out: Path) -> str:
    """The resolved precision; a run that goes on keeps the one it began with."""
    journals = sorted(out.glob("journal*.jsonl")) if wanted == "auto" else []
    if journals:
        return str(read_journal(journals[0])[0].get("dtype", "float32"))
    return resolve_precision(wanted, device)


def _fingerprint(model: nn.Module) -> str:
    """The weights' hash, and for a Classifier one that covers how it computes too."""
    weights = model_fingerprint(model)
    if not isinstance(model, Classifier):
        return weights
    facts = json.dumps([weights, model.encoder.config, model.head_input, model.level])
    return hashlib.sha256(facts.encode()).hexdigest()


def at_sigma(classifier: Classifier, sigma: float) -> Classifier:
    """The classifier, reading its time value at the grid level nearest to `2 * sigma`."""
    classifier.level = noise.nearest_level(noise.level_for_sigma(sigma))
    return classifier


def load_model(place: str) -> nn.Module:
    """A saved Classifier, or what `factory()` of a Python file returns (`FILE.py:factory`).

    Only name files you trust: the file is run.

    Raises:
        UserError: nothing there, no such function, or it does not return a module.
    """
    file, colon, name = place.rpartition(":")
    if not (colon and file.endswith(".py")):
        if place.endswith(".py"):
            raise UserError(f"{place}: name the function that makes the model, {place}:FUNCTION")
        return load_pretrained(Classifier, place)
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    sys.path.insert(0, str(Path(file).resolve().parent))  # as `python FILE.py` would
    try:
        spec.loader.exec_module(module)
        factory = getattr(module, name, None)
        if not callable(factory):
            raise UserError(f"{file}: has no function {name!r} that makes the model")
        model = factory()
    except UserError:
        raise
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())
        raise UserError(
            f"{place}: {type(error).__name__} at {line.filename}:{line.lineno}: {reason}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{place}: returned {type(model).__name__}, expected a torch.nn.Module")
    return model.eval()
