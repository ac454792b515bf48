"""The command line: parses, calls, prints. Everything it does is a function elsewhere."""

import os
import signal
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

# Threads that spin long at a barrier starve each other where another process wants the cores: a
# training step of the digits recipe took 800 to 1,200 ms beside one, 280 with this bound, and 75
# either way on idle cores (two cores, GNU OpenMP). Read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

app = typer.Typer(
    name="rrcm",
    help="Provably robust image classifiers: pre-train by contrastive denoising, fine-tune for a "
    "noise level, certify by randomized smoothing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

RecipeName = Annotated[
    str,
    typer.Option("--recipe", "-r", help="A recipe's name, or a YAML file.", metavar="NAME|FILE"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings to change, e.g. pretrain.steps=100 seed=1.", metavar="KEY=VALUE"),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="The run's folder; the same command resumes.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: cuda if there is one.")
]


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: Out = Path("runs/quickstart"),
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Skip pre-training, to see what it gives.")
    ] = False,
) -> None:
    """Pre-train, fine-tune, certify and report on bundled digits: minutes on two CPU cores."""
    from rrcm.quickstart import quickstart as run

    run(out, Console(), overrides or [], from_scratch)


@app.command()
def pretrain(
    recipe: RecipeName,
    out: Out,
    overrides: Overrides = None,
    device: Device = None,
) -> None:
    """Stage one: pre-train an encoder by contrastive denoising."""
    from rrcm.config import load_recipe
    from rrcm.pretrain import pretrain as run

    settings = load_recipe(recipe, overrides)
    print(f"saved the encoder in {run(settings, out, _device(device))}")


@app.command()
def finetune(
    recipe: RecipeName,
    sigma: Annotated[float, typer.Option(help="Noise level on the [0, 1] pixel scale.")],
    out: Out,
    overrides: Overrides = None,
    encoder: Annotated[
        str | None, typer.Option(help="A saved Encoder.", metavar="DIR|HUB_NAME")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Start from random weights instead.")
    ] = False,
    device: Device = None,
) -> None:
    """Stage two: fine-tune a classifier for one sigma."""
    from rrcm.config import load_recipe
    from rrcm.errors import UserError
    from rrcm.finetune import finetune as run

    if (encoder is None) != from_scratch:
        raise UserError("finetune: give either --encoder DIR or --from-scratch")
    settings = load_recipe(recipe, overrides)
    print(f"saved the classifier in {run(settings, sigma, out, _device(device), encoder)}")


@app.command()
def certify(
    model: Annotated[
        str,
        typer.Argument(
            help="A saved Classifier, or FILE.py:factory for any torch module.",
            metavar="MODEL",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(help="A data set's name, a folder, or a parquet file.", metavar="NAME|PATH"),
    ],
    out: Out,
    sigma: Annotated[
        float | None,
        typer.Option(help="Noise level on the [0, 1] scale; default: the Classifier's own."),
    ] = None,
    split: Annotated[
        str, typer.Option(help="train, validation, test, or all of a one-split set.")
    ] = "test",
    n0: Annotated[int, typer.Option(help="Samples that pick the class.")] = 100,
    n: Annotated[int, typer.Option(help="Samples that bound its probability.")] = 100_000,
    alpha: Annotated[float, typer.Option(help="Chance that a certificate is wrong.")] = 0.001,
    stride: Annotated[int, typer.Option(help="Take every stride-th image.")] = 1,
    max_images: Annotated[int | None, typer.Option(help="Most images to certify.")] = None,
    radii: Annotated[
        str | None,
        typer.Option(help="Stop once these radii are settled, e.g. 0.25,0.5; n is the most."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Stop once more draws would raise the radius by less; n is the most."),
    ] = None,
    noise: Annotated[
        Literal["gaussian", "exact"],
        typer.Option(help="exact: sound in floating point too, for 8-bit images."),
    ] = "gaussian",
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Noisy copies in a forward pass; default: found by trying.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Of the model's arithmetic; auto takes the faster."),
    ] = "auto",
    image_size: Annotated[
        int | None, typer.Option(help="Pixels a side, for a FILE.py model.")
    ] = None,
    channels: Annotated[int | None, typer.Option(help="1 or 3, for a FILE.py model.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Where a table has several.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Where a table has several.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Certify part i of k, from 0; then: rrcm merge.", metavar="i/k"),
    ] = None,
    device: Device = None,
) -> None:
    """Certify a model on images by randomized smoothing (Cohen et al. 2019).

    Under torchrun or accelerate launch, the processes share the images.
    """
    from rrcm import certify as engine
    from rrcm.data import load_images
    from rrcm.encoder import Classifier
    from rrcm.errors import UserError
    from rrcm.smoothing import Shard, StopRule, Team

    share = Shard.parse(shard) if shard else None
    module = engine.load_model(model)
    if isinstance(module, Classifier):
        sigma = module.sigma if sigma is None else sigma
        image_size, channels = module.encoder.image_size, module.encoder.in_channels
    if sigma is None or image_size is None or channels is None:
        raise UserError("certify: a FILE.py model needs --sigma, --image-size and --channels")
    chosen = tuple(_numbers("--radii", radii)) if radii else ()
    adaptive = chosen or tolerance is not None
    settings = engine.Settings(
        n0=n0,
        n=n,
        alpha=alpha,
        stride=stride,
        max_images=max_images,
        batch_size=batch_size,
        seed=seed,
        precision=precision,
        noise=noise,
        stop=StopRule(n_max=n, radii=chosen, tolerance=tolerance) if adaptive else None,
        compile=compile,
    )
    images = load_images(
        data,
        split,
        image_size=image_size,
        channels=channels,
        image_column=image_column,
        label_column=label_column,
    )
    if isinstance(module, Classifier) and module.num_classes != images.num_classes:
        raise UserError(
            f"certify: {model} knows {module.num_classes} classes, {data} has {images.num_classes}"
        )
    with Team.from_environment() or nullcontext() as team:
        first = team is None or team.rank == 0
        if first:
            print(f"{data}: {len(images)} images; {images.note}")
        place = _device(device, team is not None)
        path = engine.certify(module, images, sigma, out, settings, place, shard=share, team=team)
    if share:
        print(f"wrote {path}; when all {share.count} shards are done: rrcm merge {out}")
    elif first:
        _print_report([path])


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="The run's folder.", metavar="DIR")],
) -> None:
    """Merge the journals of a run's shards into its journal.jsonl, once all images are done."""
    from rrcm.smoothing import merge_folder

    print(f"merged {merge_folder(run)} images into {run / 'journal.jsonl'}")


@app.command()
def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Folders of certification runs, journals, or Cohen-format .tsv logs."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write tables and figures here.")
    ] = None,
    radii: Annotated[
        str | None, typer.Option(help="Radii of the table, e.g. 0,0.25,0.5; default: a grid.")
    ] = None,
) -> None:
    """Print the certified-accuracy table; with --out, write tables and figures."""
    _print_report(results, out, _numbers("--radii", radii) if radii else None)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="A saved Classifier.", metavar="MODEL")],
    images: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE...")],
    n0: Annotated[int, typer.Option(help="Samples that pick the class.")] = 100,
    n: Annotated[int, typer.Option(help="Samples that bound its probability.")] = 10_000,
    alpha: Annotated[float, typer.Option(help="Chance that a radius is wrong.")] = 0.001,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    convert: Annotated[
        bool, typer.Option("--convert", help="Resize, crop and recolour images that do not fit.")
    ] = False,
    device: Device = None,
) -> None:
    """Name the class of image files, with the L2 radius inside which no attack changes it."""
    from rrcm.predict import predict_files

    for line in predict_files(model, images, n0, n, alpha, seed, convert, _device(device)):
        print(line)


@app.command()
def import_reference(
    checkpoint: Annotated[Path, typer.Argument(help="nnet.pth of the public rRCM code.")],
    config: Annotated[Path, typer.Option(help="JSON with the network's sizes.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the Encoder.")],
) -> None:
    """Convert a checkpoint of the public rRCM code into an Encoder."""
    from rrcm.pretrained import save_pretrained
    from rrcm.reference import import_reference as run

    save_pretrained(run(checkpoint, config), out)
    print(f"saved the encoder in {out}")


def _numbers(option: str, text: str) -> list[float]:
    from rrcm.errors import UserError

    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: write numbers with commas, e.g. 0.25,0.5") from None


def _print_report(
    results: list[Path], out: Path | None = None, radii: list[float] | None = None
) -> None:
    from rrcm.report import write_report

    made = write_report(results, out, radii)
    Console().print(made.table)
    for file in made.files:
        print(f"wrote {file}")


def _device(name: str | None, in_team: bool = False) -> Any:
    """The device to use; in a team, each process of a machine takes a GPU of its own."""
    import torch

    from rrcm.errors import UserError
    from rrcm.pretrained import default_device

    try:
        device = default_device() if name is None else torch.device(name)
        if in_team and device.type == "cuda" and device.index is None:
            local = int(os.environ.get("LOCAL_RANK", "0"))
            device = torch.device("cuda", local % max(torch.cuda.device_count(), 1))
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"--device {name}: {reason}") from None
    return device


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM; not KeyboardInterrupt, which typer would end without a word."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise _Stopped


def main() -> None:
    """Runs the command line: exit code 2 and one line for a user's mistake, 130 if stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    warnings.showwarning = lambda message, *rest: print(f"warning: {message}", file=sys.stderr)
    try:
        app()
    except _Stopped:
        print("stopped; run the same command to carry on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from rrcm.errors import UserError
        from rrcm.smoothing import SmoothingError
        from rrcm.training import Interrupted

        if isinstance(error, Interrupted):
            print(f"stopped: {error}; run the same command to carry on", file=sys.stderr)
            sys.exit(130)
        if isinstance(error, UserError | SmoothingError):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
