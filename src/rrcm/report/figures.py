"""Figures: certified accuracy over the radius, and pictures under noise with what is certified.

Every figure is written as PNG and SVG, whole or not at all, and equal input gives equal files.
matplotlib is imported when a figure is made, and only through its object API: no global state, no
display.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rrcm.errors import UserError
from rrcm.files import write_whole
from rrcm.report.results import (
    ABSTAIN,
    Results,
    accuracy_interval,
    best_sigma_envelope,
    certified_accuracy,
    certified_counts,
    sigma_text,
)
from rrcm.report.table import LEVEL, by_name, radius_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pictures: TypeAlias = NDArray[Any] | Sequence[ArrayLike]  # M of them, [H, W] or [C, H, W] each

DPI = 200

# Okabe and Ito's colours, which stay apart for all common kinds of colour blindness; yellow, too
# faint on white, is left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), "-.")
_RIGHT, _WRONG, _ABSTAINED = "#0072B2", "#D55E00", "#6B6B6B"
_INK = "#333333"


def accuracy_radius_figure(
    results: Sequence[Results], path_stem: str | os.PathLike[str], envelope: bool = False
) -> list[Path]:
    """Certified accuracy over the L2 radius: one exact step curve a log, with its 95% band.

    A curve steps down just behind the radius of each image, and is drawn to the largest radius
    certified. The band is the Clopper-Pearson interval at each radius by itself.

    Args:
        results: One or more; a colour stands for a sigma, a dash pattern for a name.
        path_stem: The files without their suffix; ".png" and ".svg" are added.
        envelope: Whether to draw the best of the sigmas too, as a broad grey line. Needs the same
            images at every sigma.

    Returns:
        The two files.

    Raises:
        UserError: There are no results, an envelope is asked for across different images, or a
            file cannot be written.
    """
    if not results:
        raise UserError("a figure needs at least one set of results; got none")
    figure = _new_figure(7.0, 4.2)
    axes = figure.add_subplot()
    names = list(by_name(results))
    sigmas = sorted({r.sigma for r in results}, key=lambda s: (s is None, s or 0.0))
    top = 0.0
    if envelope:
        several = [group for group in by_name(results).values() if len(group) > 1]
        for k, group in enumerate(several):
            radii = np.unique(np.concatenate([_steps(r) for r in group]))
            shares = 100.0 * best_sigma_envelope(group, radii)
            axes.step(
                radii, shares, where="pre", color="#C8C8C8", linewidth=5.0, zorder=1,
                label="best of the sigmas" if k == 0 else None,
            )  # fmt: skip
    for r in results:
        radii = _steps(r)
        colour = _COLOURS[sigmas.index(r.sigma) % len(_COLOURS)]
        dash = _DASHES[names.index(r.name) % len(_DASHES)]
        shares = 100.0 * certified_accuracy(r, radii)
        counts, where = np.unique(certified_counts(r, radii), return_inverse=True)
        ends = 100.0 * np.array([accuracy_interval(int(k), r.images, LEVEL) for k in counts])
        low, high = ends[where].T
        axes.fill_between(
            radii, low, high, step="pre", color=colour, alpha=0.15, linewidth=0, zorder=2
        )
        sigma = f"σ = {sigma_text(r.sigma)}"
        # The last step goes down to the axis: nothing is certified behind it.
        axes.step(
            np.append(radii, radii[-1]), np.append(shares, 0.0), where="pre", color=colour,
            linestyle=dash, linewidth=1.8, zorder=3,
            label=sigma if len(names) == 1 else f"{r.name}, {sigma}",
        )  # fmt: skip
        top = max(top, float(high.max()))
    axes.set_xlim(left=0.0)
    axes.set_ylim(0.0, min(102.0, 10.0 * math.ceil(top / 10.0)))
    axes.set_xlabel("L2 radius r, pixels in [0, 1]")
    axes.set_ylabel("Certified accuracy at r (%)")
    if len(names) == 1:
        axes.set_title(names[0], loc="left", color=_INK)
    axes.legend(frameon=False, loc="best", title=_band_title(results), title_fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    return _save(figure, path_stem)


def noise_row_figure(
    images: Pictures,
    noisy: Mapping[float, Pictures],
    predictions: Mapping[float, Sequence[tuple[int, float]]],
    labels: Sequence[int],
    class_names: Sequence[str],
    path_stem: str | os.PathLike[str],
) -> list[Path]:
    """Test images, clean and under noise, each titled with what the smoothed model certifies.

    Columns are images; rows are the clean image and each sigma in rising order. A title is blue
    with a tick if the prediction is right, orange with a cross if wrong, grey if the model
    abstained.

    Args:
        images: M images [H, W] or [C, H, W] in [0, 1], C = 1 or 3.
        noisy: For each sigma, M images of the same shapes plus noise; clipped for display.
        predictions: For each sigma, M pairs of class (-1: abstained) and certified L2 radius.
        labels: M true classes.
        class_names: K names; a class is a number below K.
        path_stem: The files without their suffix; ".png" and ".svg" are added.

    Returns:
        The two files.

    Raises:
        UserError: The arguments do not fit each other, an image has an unusable shape, or a file
            cannot be written.
    """
    sigmas = sorted(noisy)
    _check_row(images, noisy, predictions, labels, class_names)
    rows, columns = 1 + len(sigmas), len(images)
    figure = _new_figure(1.35 * columns + 0.9, 1.72 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for column, (image, label) in enumerate(zip(images, labels, strict=True)):
        _show(grid[0, column], image, f"image {column}")
        grid[0, column].set_title(_short(class_names[label]), color=_INK, fontsize=10)
        grid[0, column].spines[:].set_color("#BBBBBB")
        for row, sigma in enumerate(sigmas, start=1):
            axes = grid[row, column]
            _show(axes, noisy[sigma][column], f"image {column} at sigma {sigma_text(sigma)}")
            title, colour = _verdict(*predictions[sigma][column], label, class_names)
            axes.set_title(title, color=colour, fontsize=9, linespacing=1.25)
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=1.6)
    for row, text in enumerate(["clean", *(f"σ = {sigma_text(sigma)}" for sigma in sigmas)]):
        grid[row, 0].set_ylabel(
            text, rotation=0, ha="right", va="center", labelpad=8, fontsize=10, color=_INK
        )
    return _save(figure, path_stem)


def _steps(r: Results) -> NDArray[np.float64]:
    """Radii where the curve of `r` has a corner, ascending from 0."""
    return np.unique(np.append(r.radius[r.correct], 0.0))


def _band_title(results: Sequence[Results]) -> str:
    sizes = sorted({r.images for r in results})
    images = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return f"{images} images, {LEVEL:.0%} bands"


def _verdict(
    prediction: int, radius: float, label: int, class_names: Sequence[str]
) -> tuple[str, str]:
    """Title and colour of a noisy picture."""
    if prediction == ABSTAIN:
        return "abstains\n", _ABSTAINED
    mark, colour = ("✓", _RIGHT) if prediction == label else ("✗", _WRONG)
    return f"{_short(class_names[prediction])} {mark}\nradius {radius_text(radius, 2)}", colour


def _short(name: str, longest: int = 13) -> str:
    """`name`, cut to the width of a picture."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _check_row(
    images: Pictures,
    noisy: Mapping[float, Pictures],
    predictions: Mapping[float, Sequence[tuple[int, float]]],
    labels: Sequence[int],
    class_names: Sequence[str],
) -> None:
    if len(images) == 0 or len(labels) != len(images):
        raise UserError(
            f"a row of pictures needs at least one image and a label for each; got {len(images)} "
            f"images and {len(labels)} labels"
        )
    if set(noisy) != set(predictions):
        raise UserError(
            f"noisy images are given at sigma {sorted(noisy)}, predictions at "
            f"{sorted(predictions)}; give both at the same sigmas"
        )
    for sigma in noisy:
        if len(noisy[sigma]) != len(images) or len(predictions[sigma]) != len(images):
            raise UserError(
                f"at sigma {sigma_text(sigma)} there are {len(noisy[sigma])} noisy images and "
                f"{len(predictions[sigma])} predictions for {len(images)} images; give one each"
            )
    classes = [*labels, *(p for pairs in predictions.values() for p, _ in pairs if p != ABSTAIN)]
    for number in classes:
        if not 0 <= number < len(class_names):
            raise UserError(
                f"class {number} has no name: class_names has {len(class_names)}, from class 0 on"
            )


def _show(axes: "Axes", image: ArrayLike, what: str) -> None:
    pixels = np.asarray(image, dtype=np.float64)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
        pixels = pixels[0] if pixels.shape[0] == 1 else np.moveaxis(pixels, 0, -1)
    elif pixels.ndim != 2:
        raise UserError(
            f"{what} has the shape {pixels.shape}; it is [H, W], [1, H, W] or [3, H, W]"
        )
    axes.imshow(pixels.clip(0.0, 1.0), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _new_figure(width: float, height: float) -> "Figure":
    """A figure of that many inches, apart from pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path_stem: str | os.PathLike[str]) -> list[Path]:
    import matplotlib

    stem = Path(path_stem)
    # Neither a date nor a random salt: a figure made again is the same file.
    kinds: dict[str, dict[str, str | None]] = {"png": {"Software": None}, "svg": {"Date": None}}
    files = []
    with matplotlib.rc_context({"svg.hashsalt": "rrcm"}):
        for kind, about in kinds.items():
            data = io.BytesIO()
            figure.savefig(data, format=kind, dpi=DPI, metadata=about)
            # Not with_suffix: a stem such as "accuracy_0.25" has a dot of its own.
            files.append(write_whole(stem.with_name(f"{stem.name}.{kind}"), data.getvalue()))
    return files
