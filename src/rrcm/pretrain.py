"""Stage one: contrastive denoising. The loop reads from top to bottom."""

import copy
import time
from pathlib import Path

import numpy as np
import torch

from rrcm import data, noise
from rrcm.config import Recipe
from rrcm.encoder import Encoder
from rrcm.errors import UserError
from rrcm.objectives import contrastive_denoising
from rrcm.pretrained import save_pretrained
from rrcm.progress import progress_bar
from rrcm.training import (
    Interrupted,
    Part,
    RunFolder,
    autocast,
    lr_scale,
    resolve_precision,
    seed_of,
    set_lr,
    stop_requests,
    target_ema_rate,
    update_average,
)

# Settings that change when things are written, not what is computed; they may differ on resume.
BOOKKEEPING = {"checkpoint_every", "log_every"}


def pretrain(recipe: Recipe, out: Path, device: torch.device) -> Path:
    """Pre-trains the recipe's encoder; resumes if `out` holds the same run.

    Everything random in a step depends only on (seed, step), so a resumed run computes what an
    uninterrupted one would.

    Args:
        recipe: the settings; `recipe.pretrain` is this stage's.
        out: the run's folder.
        device: where to train.

    Returns:
        The folder of the saved Encoder (the evaluation average), `out/encoder`.

    Raises:
        UserError: bad settings or data, a folder of another run, or a loss that is not finite.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    settings = recipe.pretrain
    images = load_split(recipe, "train")
    if settings.batch_size > len(images):
        raise UserError(
            f"pretrain.batch_size is {settings.batch_size}, but {images.name} has "
            f"{len(images)} training images: an image cannot be its own negative"
        )
    make_views = data.pretrain_views(settings.views, recipe.data.image_size)

    # Models: the online network learns, the target and the evaluation copy follow it.
    torch.manual_seed(seed_of(recipe.seed, "init"))
    online = build_encoder(recipe).to(device).train()
    target = copy.deepcopy(online).requires_grad_(False)
    average = copy.deepcopy(online).requires_grad_(False)
    trainable = [p for p in online.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
    )

    # The run's folder, and where it stands.
    described = {
        "seed": recipe.seed,
        "data": images.fingerprint,
        "encoder": recipe.encoder.model_dump(),
        "pretrain": settings.model_dump(exclude=BOOKKEEPING),
    }
    with RunFolder(out, "pretrain", described) as run:
        parts: dict[str, Part] = {
            "online": online,
            "target": target,
            "average": average,
            "optimizer": optimizer,
        }
        facts = run.restore(parts)
        first = facts.get("step", 0)
        precision = facts.get("precision") or resolve_precision(settings.precision, device)

        started = time.perf_counter() - facts.get("seconds", 0.0)
        with (
            stop_requests() as stop,
            progress_bar("pre-train", settings.steps, "step", done=first) as advance,
        ):
            for step in range(first, settings.steps):
                set_lr(
                    optimizer, settings.lr * lr_scale(step, settings.warmup_steps, settings.steps)
                )

                # A batch, its three views, and one noise tensor for them all.
                torch.manual_seed(seed_of(recipe.seed, "pretrain", step))
                chosen = data.batch_indices(len(images), settings.batch_size, step, recipe.seed)
                pixels = data.to_unit(images.batch(chosen)[0].to(device))
                x, view1, view2 = make_views(pixels)
                eps = torch.randn_like(x)

                # One step of the noise grid for the whole batch.
                scales = noise.num_scales(
                    step, settings.steps, settings.scales_start, settings.scales_end
                )
                index = int(
                    np.random.default_rng(seed_of(recipe.seed, "index", step)).integers(scales - 1)
                )

                with autocast(precision, device):
                    contrastive, consistency = contrastive_denoising(
                        online, target, x, view1, view2, eps, index, scales, settings.tau
                    )
                loss = (contrastive + consistency).mean()
                if not torch.isfinite(loss):
                    raise UserError(
                        f"{out}: the pre-training loss is {loss.item()} at step {step}; that step "
                        "changed nothing. Lower pretrain.lr or raise pretrain.warmup_steps, and "
                        "start in a new folder"
                    )
                optimizer.zero_grad()
                loss.backward()
                limit = settings.clip if step >= settings.warmup_steps else float("inf")
                norm = torch.nn.utils.clip_grad_norm_(trainable, limit)
                optimizer.step()

                rate = target_ema_rate(
                    step,
                    settings.steps,
                    settings.target_ema_start,
                    settings.target_ema_end,
                    settings.target_ema_sharpness,
                )
                update_average(target, online, rate)
                update_average(average, online, settings.eval_ema)

                done = step + 1
                if done % settings.log_every == 0 or done == settings.steps:
                    run.log(
                        {
                            "step": done,
                            "loss": loss.item(),
                            "contrastive": contrastive.mean().item(),
                            "consistency": consistency.mean().item(),
                            "grad_norm": norm.item(),
                            "lr": optimizer.param_groups[0]["lr"],
                            "num_scales": scales,
                            "seconds": round(time.perf_counter() - started, 3),
                        }
                    )
                advance(done, f"loss {loss.item():.3f}")
                if done % settings.checkpoint_every == 0 or done == settings.steps or stop:
                    spent = time.perf_counter() - started
                    run.save(done, parts, precision=precision, seconds=spent)
                if stop and done < settings.steps:
                    raise Interrupted(f"saved at step {done} of {settings.steps} in {out}")

        result = out / "encoder"
        for buffer, learned in zip(average.buffers(), online.buffers(), strict=True):
            buffer.copy_(learned)
        save_pretrained(average, result)
        if stop:
            raise Interrupted(f"finished, with the encoder in {result}")
        return result


def load_split(recipe: Recipe, split: str) -> data.ImageSet:
    """One split of the recipe's data."""
    return data.load_images(
        recipe.data.source,
        split,
        image_size=recipe.data.image_size,
        channels=recipe.data.channels,
        image_column=recipe.data.image_column,
        label_column=recipe.data.label_column,
    )


def build_encoder(recipe: Recipe) -> Encoder:
    """The recipe's encoder with random weights.

    Raises:
        UserError: sizes that do not fit together.
    """
    try:
        return Encoder(
            image_size=recipe.data.image_size,
            in_channels=recipe.data.channels,
            **recipe.encoder.model_dump(),
        )
    except ValueError as error:
        raise UserError(f"recipe {recipe.name}: {error}") from None
