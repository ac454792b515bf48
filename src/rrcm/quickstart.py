"""The whole method on scikit-learn's bundled digits, in minutes on two CPU cores."""

from pathlib import Path

import numpy as np
from rich.console import Console

from rrcm import data, report
from rrcm.certify import Settings, certify
from rrcm.config import load_recipe
from rrcm.encoder import Classifier
from rrcm.finetune import finetune
from rrcm.pretrain import load_split, pretrain
from rrcm.pretrained import default_device, load_pretrained
from rrcm.smoothing import read_journal

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
    images = load_split(recipe, "test")
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
            label=f"certify {sigma:g}",
        )
        for sigma, classifier in classifiers.items()
    }
    made = report.write_report(journals.values(), out)
    pictures = _picture_row(images, journals, out)
    console.print(made.table)

    model = out / f"finetune-{SIGMAS[0]:g}" / "classifier"
    written = ", ".join(file.name for file in [*made.files, *pictures])
    console.print(
        f"\nIn [bold]{out}[/bold]: {written}, and a folder for each stage with its model, log, "
        "checkpoints or journal.\n\nNext:\n"
        f"  rrcm certify {model} --data digits --n 10000 --out runs/more-samples\n"
        f"  rrcm predict {model} IMAGE.png --convert\n"
        "  rrcm quickstart --from-scratch --out runs/scratch    what pre-training gives",
        highlight=False,
        soft_wrap=True,
    )


def _picture_row(images: data.ImageSet, journals: dict[float, Path], out: Path) -> list[Path]:
    """A few test images, clean and under each noise, with what the smoothed classifier says."""
    chosen = range(0, len(images), len(images) // PICTURES)[:PICTURES]
    clean = [data.to_unit(images.image(i)).numpy() for i in chosen]
    generator = np.random.default_rng(0)
    noisy, verdicts = {}, {}
    for sigma, path in journals.items():
        rows = {row["index"]: row for row in read_journal(path)[1]}
        noisy[sigma] = [x + sigma * generator.standard_normal(x.shape) for x in clean]
        verdicts[sigma] = [(rows[i]["prediction"], rows[i]["radius"]) for i in chosen]
    labels = [int(images.labels[i]) for i in chosen]
    return report.noise_row_figure(
        clean, noisy, verdicts, labels, images.class_names, out / "pictures"
    )
