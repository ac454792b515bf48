"""Stage two: fine-tuning a classifier for one sigma. The loop reads from top to bottom."""

import copy
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rrcm import data, noise
from rrcm.config import FinetuneConfig, Recipe
from rrcm.encoder import Classifier, Encoder
from rrcm.errors import UserError
from rrcm.objectives import consistency_regulariser
from rrcm.pretrain import BOOKKEEPING, build_encoder, load_split
from rrcm.pretrained import load_pretrained, save_pretrained
from rrcm.progress import progress_bar
from rrcm.smoothing import model_fingerprint
from rrcm.training import (
    Interrupted,
    Part,
    RunFolder,
    autocast,
    layer_groups,
    lr_scale,
    resolve_precision,
    seed_of,
    set_lr,
    stop_requests,
)

VALIDATION_LEVELS = (0.0, 0.5, 1.0, 2.0)
MIN_SELECTION_SAMPLES = 1000
"""A small validation set is seen under several noise draws, so that choosing is not luck."""


def finetune(
    recipe: Recipe, sigma: float, out: Path, device: torch.device, encoder_dir: str | None
) -> Path:
    """Fine-tunes encoder and linear head for one sigma; resumes if `out` holds the same run.

    After each epoch the classifier is validated under noise; the one with the best validation
    accuracy at `sigma` is kept. The test split is never read.

    Args:
        recipe: the settings; `recipe.finetune_for(sigma)` is this stage's.
        sigma: noise level on the [0, 1] scale, > 0.
        out: the run's folder.
        device: where to train.
        encoder_dir: a saved Encoder, or None to start from the recipe's random weights.

    Returns:
        The folder of the saved Classifier, `out/classifier`.

    Raises:
        UserError: bad settings or data, an encoder that does not fit the data, a folder of
            another run, or a loss that is not finite.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    if not (sigma > 0 and math.isfinite(sigma)):
        raise UserError(f"sigma must be a positive number, got {sigma}")
    settings = recipe.finetune_for(sigma)
    train, validation = load_split(recipe, "train"), load_split(recipe, "validation")
    augment = data.finetune_view(settings.view, recipe.data.image_size)

    # The model, and an optimiser for each stage.
    torch.manual_seed(seed_of(recipe.seed, "init"))
    encoder = load_pretrained(Encoder, encoder_dir) if encoder_dir else build_encoder(recipe)
    _check_fit(encoder, recipe, encoder_dir, train.num_classes)
    torch.manual_seed(seed_of(recipe.seed, "head"))
    classifier = Classifier(
        encoder, train.num_classes, sigma, settings.head_input, train.class_names
    )
    classifier.to(device).train()
    chosen_one = copy.deepcopy(classifier).eval()  # the best on validation so far
    optimizer = torch.optim.AdamW(
        layer_groups(classifier, settings.layer_decay, settings.freeze_head),
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    head_optimizer = torch.optim.AdamW(
        classifier.head.parameters(), lr=settings.lr, weight_decay=0.0, fused=True
    )
    steps_per_epoch = math.ceil(len(train) / settings.batch_size)
    head_steps = settings.head_epochs * steps_per_epoch
    total_steps = head_steps + settings.epochs * steps_per_epoch
    peak_lr = settings.lr * settings.batch_size / 256

    described = {
        "seed": recipe.seed,
        "sigma": sigma,
        "data": train.fingerprint,
        "encoder": {**encoder.config, "weights": model_fingerprint(encoder)},
        "finetune": settings.model_dump(exclude=BOOKKEEPING),
    }
    with RunFolder(out, "finetune", described) as run:
        parts: dict[str, Part] = {
            "classifier": classifier,
            "optimizer": optimizer,
            "head_optimizer": head_optimizer,
            "best": chosen_one,
        }
        facts = run.restore(parts)
        first, best = facts.get("step", 0), facts.get("best", -1.0)
        precision = facts.get("precision") or resolve_precision(settings.precision, device)

        started = time.perf_counter() - facts.get("seconds", 0.0)
        label = f"fine-tune {sigma:g}"
        with (
            stop_requests() as stop,
            progress_bar(label, total_steps, "step", done=first) as advance,
        ):
            for step in range(first, total_steps):
                # A batch, augmented.
                torch.manual_seed(seed_of(recipe.seed, "finetune", step))
                chosen = data.batch_indices(len(train), settings.batch_size, step, recipe.seed)
                pixels, labels = (part.to(device) for part in train.batch(chosen))
                x = 2.0 * augment(data.to_unit(pixels)) - 1.0

                # The head alone first, if the recipe says so; then encoder and head together.
                if step < head_steps:
                    stage, epoch = head_optimizer, step / steps_per_epoch
                    scale = lr_scale(epoch, 0, settings.head_epochs)
                    with autocast(precision, device):
                        loss = head_loss(classifier, x, labels, settings.eta)
                else:
                    stage, epoch = optimizer, (step - head_steps) / steps_per_epoch
                    scale = lr_scale(epoch, settings.warmup_epochs, settings.epochs)
                    with autocast(precision, device):
                        loss = robust_loss(classifier, x, labels, settings)
                if not torch.isfinite(loss):
                    raise UserError(
                        f"{out}: the fine-tuning loss is {loss.item()} at step {step}; that step "
                        "changed nothing. Lower finetune.lr or raise finetune.warmup_epochs, and "
                        "start in a new folder"
                    )
                set_lr(stage, peak_lr * scale)
                classifier.zero_grad()
                loss.backward()
                learning = [p for group in stage.param_groups for p in group["params"]]
                norm = torch.nn.utils.clip_grad_norm_(learning, settings.clip or float("inf"))
                stage.step()

                # Validate after each epoch; keep the best at this sigma.
                done = step + 1
                entry = {"step": done, "epoch": done / steps_per_epoch}
                if done % steps_per_epoch == 0:
                    accuracies = validate(classifier, validation, sigma, precision, device)
                    entry |= {f"accuracy_{t:g}": value for t, value in accuracies.items()}
                    at_sigma = accuracies[noise.level_for_sigma(sigma)]
                    if done > head_steps and at_sigma >= best:
                        best = at_sigma
                        chosen_one.load_state_dict(classifier.state_dict())
                if len(entry) > 2 or done % settings.log_every == 0:
                    entry |= {
                        "loss": loss.item(),
                        "grad_norm": norm.item(),
                        "lr": peak_lr * scale,
                        "seconds": round(time.perf_counter() - started, 3),
                    }
                    run.log(entry)
                advance(done, f"loss {loss.item():.3f}" + (f"  val {best:.3f}" if best > 0 else ""))
                if done % settings.checkpoint_every == 0 or done == total_steps or stop:
                    spent = time.perf_counter() - started
                    run.save(done, parts, precision=precision, best=best, seconds=spent)
                if stop and done < total_steps:
                    raise Interrupted(f"saved at step {done} of {total_steps} in {out}")
        result = out / "classifier"
        save_pretrained(chosen_one, result)
        if stop:
            raise Interrupted(f"finished, with the classifier in {result}")
        return result


def robust_loss(
    classifier: Classifier, x: Tensor, labels: Tensor, settings: FinetuneConfig
) -> Tensor:
    """Cross-entropy on noisy copies plus the consistency regulariser (rRCM, stage two).

    Args:
        classifier: its sigma gives the noise.
        x: clean images [B, C, H, W] in [-1, 1].
        labels: int64 [B].
        settings: copies, lbd and eta.
    """
    copies = x.repeat(settings.copies, 1, 1, 1)
    noisy = copies + noise.level_for_sigma(classifier.sigma) * torch.randn_like(copies)
    logits = classifier.logits(noisy, classifier.level).float()
    loss = F.cross_entropy(logits, labels.repeat(settings.copies))
    if settings.copies > 1:
        per_copy = logits.chunk(settings.copies)
        loss = loss + consistency_regulariser(per_copy, settings.lbd, settings.eta)
    return loss


def head_loss(classifier: Classifier, x: Tensor, labels: Tensor, eta: float) -> Tensor:
    """Cross-entropy plus eta times the prediction's entropy, on clean images at the least noise.

    Only the head gets a gradient.
    """
    with torch.no_grad():
        features = classifier.head_features(x, noise.SIGMA_MIN)
    logits = classifier.head(features).float()
    return F.cross_entropy(logits, labels) + consistency_regulariser([logits], 0.0, eta)


@torch.no_grad()
def validate(
    classifier: Classifier,
    images: data.ImageSet,
    sigma: float,
    precision: str,
    device: torch.device,
    batch_size: int = 512,
) -> dict[float, float]:
    """Accuracy under noise of levels 0, 0.5, 1, 2 and that of sigma, each read at its own level.

    The noise is the same at every call, so that epochs are compared on equal terms.

    Returns:
        Level on the [-1, 1] scale -> share of right predictions, in [0, 1].
    """
    chosen = noise.level_for_sigma(sigma)
    accuracies = {}
    classifier.eval()
    for t in sorted({*VALIDATION_LEVELS, chosen}):
        draws = max(1, math.ceil(MIN_SELECTION_SAMPLES / len(images))) if t == chosen else 1
        generator = torch.Generator(device).manual_seed(seed_of("validation", t))
        right = torch.zeros((), device=device)
        for indices in torch.arange(len(images)).split(batch_size):
            pixels, labels = (part.to(device) for part in images.batch(indices))
            x = (2.0 * data.to_unit(pixels) - 1.0).repeat(draws, 1, 1, 1)
            eps = torch.randn(x.shape, generator=generator, device=device)
            with autocast(precision, device):
                logits = classifier.logits(x + t * eps, noise.nearest_level(t))
            right += (logits.argmax(1) == labels.repeat(draws)).sum()
        accuracies[t] = right.item() / (len(images) * draws)
    classifier.train()
    return accuracies


def _check_fit(encoder: Encoder, recipe: Recipe, encoder_dir: str | None, num_classes: int) -> None:
    if num_classes < 2:
        raise UserError(f"{recipe.data.source}: has {num_classes} class; a classifier needs two")
    wanted = (recipe.data.image_size, recipe.data.channels)
    if (encoder.image_size, encoder.in_channels) != wanted:
        raise UserError(
            f"{encoder_dir}: the encoder takes {encoder.image_size} pixels and "
            f"{encoder.in_channels} channels, the recipe's data has {wanted[0]} and {wanted[1]}"
        )
