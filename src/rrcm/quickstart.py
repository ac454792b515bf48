"""The whole method on scikit-learn's bundled digits, in minutes on two CPU cores."""

from pathlib import Path

import torch
from rich.console import Console

from rrcm import data, report
from rrcm.certify import Settings, certify
from rrcm.config import load_recipe
from rrcm.encoder import Classifier
from rrcm.finetune import finetune
from rrcm.pretrain import pretrain
from rrcm.pretrained import default_device, load_pretrained
from rrcm.smoothing import SmoothedClassifier, read_journal

SIGMAS = (0.25, 0.5, 1.0)
SETTINGS = Settings(n0=100, n=1000, alpha=0.001)
PICTURES = 8


def quickstart(out: Path, seed: int, from_scratch: bool, console: Console) -> None:
    """Pre-trains, fine-tunes, certifies and reports; the same call carries on a stopped run.

    Args:
        out: folder for checkpoints, journals, tables and figures.
        seed: seed of training and certification.
        from_scratch: fine-tune from random weights, under the same fine-tuning budget.
        console: where the last screen goes.

    Raises:
        UserError: `out` holds another run, or cannot be written.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    recipe = load_recipe("digits", [f"seed={seed}"])
    device = default_device()
    encoder = None if from_scratch else str(pretrain(recipe, out / "pretrain", device))
    images = data.load_images(
        recipe.data.source,
        "test",
        image_size=recipe.data.image_size,
        channels=recipe.data.channels,
    )
    classifiers = {}
    for sigma in SIGMAS:
        folder = finetune(recipe, sigma, out / f"finetune-{sigma:g}", device, encoder)
        classifiers[sigma] = load_pretrained(Classifier, str(folder))
    journals = {
        sigma: certify(
            classifier,
            images,
            sigma,
            out / f"certify-{sigma:g}",
            SETTINGS,
            device,
            label=f"certify, sigma {sigma:g}",
        )
        for sigma, classifier in classifiers.items()
    }
    for part in report.write_report(list(journals.values()), out):
        console.print(part)
    _picture_row(images, journals, out)

    best = out / f"finetune-{SIGMAS[0]:g}" / "classifier"
    console.print(
        f"\nWritten to [bold]{out}[/bold]: table.md, table.csv, accuracy_radius.png and .svg, "
        "pictures.png,\na folder for each stage with its checkpoints, log and journal.\n"
        "\nNext:\n"
        f"  rrcm predict {best} IMAGE.png        a class and its certified radius\n"
        f"  rrcm certify {best} --data digits --n 10000 --out runs/more\n"
        "  rrcm pretrain --recipe digits pretrain.steps=3000 --out runs/longer",
        highlight=False,
    )


def _picture_row(images: data.ImageSet, journals: dict[float, Path], out: Path) -> None:
    """A few test images, clean and under each noise, with what the smoothed classifier says."""
    chosen = range(0, len(images), len(images) // PICTURES)[:PICTURES]
    clean = data.to_unit(torch.stack([images.image(i) for i in chosen]))
    generator = torch.Generator().manual_seed(0)
    noisy, verdicts = {}, {}
    for sigma, path in journals.items():
        rows = {row["index"]: row for row in read_journal(path)[1]}
        noisy[sigma] = clean + sigma * torch.randn(clean.shape, generator=generator)
        verdicts[sigma] = [rows[i] for i in chosen]
