"""The whole method on scikit-learn's bundled digits, in minutes on two CPU cores."""

from collections.abc import Sequence
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
FROM_SCRATCH = ("finetune.lr=12e-3",)
"""Random weights do better with a higher rate than pre-trained ones (both chosen on validation)."""
PICTURES = 8


def quickstart(
    out: Path,
    console: Console,
    overrides: Sequence[str] = (),
    from_scratch: bool = False,
    settings: Settings = SETTINGS,
) -> None:
    """Pre-trains, fine-tunes, certifies and reports; the same call carries on a stopped run.

    Args:
        out: folder for checkpoints, journals, tables and figures.
        console: where the last screen goes.
        overrides: changes to the digits recipe, such as "seed=1".
        from_scratch: fine-tune from random weights, under the same fine-tuning budget.
        settings: how to certify.

    Raises:
        UserError: a bad override, or `out` holds another run or cannot be written.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    name = "from-scratch" if from_scratch else "pre-trained"
    recipe = load_recipe("digits", [*(FROM_SCRATCH if from_scratch else ()), *overrides])
    device = default_device()
    encoder = None if from_scratch else str(pretrain(recipe, out / "pretrain", device))
    models = {
        sigma: finetune(recipe, sigma, out / f"finetune-{sigma:g}", device, encoder)
        for sigma in SIGMAS
    }
    images = load_split(recipe, "test")
    journals = {
        sigma: certify(
            load_pretrained(Classifier, str(model)),
            images,
            sigma,
            out / "certify" / f"{name}-{sigma:g}",
            settings,
            device,
            label=f"certify {sigma:g}",
        )
        for sigma, model in models.items()
    }
    made = report.write_report(journals.values(), out)
    pictures = _picture_row(images, journals, out / "pictures")
    console.print(made.table)

    model = models[SIGMAS[0]]
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


def _picture_row(images: data.ImageSet, journals: dict[float, Path], stem: Path) -> list[Path]:
    """A few test images, clean and under each noise, with what the smoothed classifier says."""
    certified = {
        sigma: {row["index"]: row for row in read_journal(path)[1]}
        for sigma, path in journals.items()
    }
    indices = list(certified[SIGMAS[0]])
    chosen = indices[:: max(1, len(indices) // PICTURES)][:PICTURES]
    clean = [data.to_unit(images.image(i)).numpy() for i in chosen]
    generator = np.random.default_rng(0)
    noisy = {s: [x + s * generator.standard_normal(x.shape) for x in clean] for s in journals}
    verdicts = {
        sigma: [(rows[i]["prediction"], rows[i]["radius"]) for i in chosen]
        for sigma, rows in certified.items()
    }
    labels = [int(images.labels[i]) for i in chosen]
    return report.noise_row_figure(clean, noisy, verdicts, labels, images.class_names, stem)
