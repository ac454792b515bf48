"""The certified-accuracy table of the field: for the terminal, as Markdown, as CSV."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from rrcm.errors import UserError
from rrcm.report.results import (
    Results,
    abstention_rate,
    accuracy_interval,
    average_certified_radius,
    best_sigma_envelope,
    certified_counts,
    check_radii,
    clean_accuracy,
    default_radii,
    high_probability_accuracy,
    number_text,
    same_images,
    sigma_text,
)

LEVEL = 0.95
"""Confidence of the intervals."""


@dataclass(frozen=True)
class _Row:
    """A line of the table, unrounded. R radii; NaN: beyond what n draws can certify."""

    name: str
    kind: Literal["model", "envelope"]
    images: int
    certified: NDArray[np.float64]  # [R] shares in [0, 1]
    low: NDArray[np.float64]  # [R] ends of the confidence interval; NaN also in an envelope
    high: NDArray[np.float64]
    results: Results | None  # None in an envelope


def certified_accuracy_table(results: Sequence[Results], radii: ArrayLike | None = None) -> Table:
    """The certified-accuracy table for the terminal, its legend below it.

    One row a log, logs of one name together, and under several sigmas of one name on the same
    images their best-sigma envelope. Shares are in per cent; radii are rounded down. The column
    clean is left out if no log can fill it.

    Args:
        results: One or more, as `read_results` gives them.
        radii: [R] L2 radii of the columns, on the [0, 1] pixel scale; None: `default_radii`.

    Raises:
        UserError: There are no results, or a radius is negative or not finite.
    """
    grid, rows = _rows(results, radii)
    header, cells = _cells(grid, rows)
    # A terminal has 80 columns, so what repeats is told once: images and n in words, the name of
    # a model in its first row or, if there is one model, above the table.
    names = list(dict.fromkeys(row.name for row in rows))
    title, notes = "Certified accuracy (%) at L2 radius r", _notes(grid, rows)
    if len(names) == 1:
        title += f"\n{_size(rows)}"
    else:
        notes.insert(0, "; ".join(_size([r for r in rows if r.name == name]) for name in names))
    dropped = {"images", "n"} | ({"model"} if len(names) == 1 else set())
    shown = [k for k, column in enumerate(header) if column not in dropped]
    table = Table(
        title=Text(title),
        title_justify="left",
        caption=Text("\n".join(notes)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1 if len(names) == 1 else 0, 0, 0),
        pad_edge=False,
    )
    for k in shown:
        # Folding, not cropping: in a narrow terminal no digit may vanish.
        side: Literal["left", "right"] = "left" if header[k] == "model" else "right"
        table.add_column(header[k], justify=side, overflow="fold")
    told = ""
    for row, values in zip(rows, cells, strict=True):
        name = "" if row.name == told else row.name
        told = row.name
        # Text, as a name may hold what rich takes for markup.
        line = [Text(name if header[k] == "model" else values[k], overflow="fold") for k in shown]
        table.add_row(*line, style="bold" if row.kind == "envelope" else "")
    return table


def certified_accuracy_markdown(results: Sequence[Results], radii: ArrayLike | None = None) -> str:
    """`certified_accuracy_table` as GitHub Markdown, the legend as a list below it.

    Here model, images and n are columns (n only if a log tells it). Arguments and errors as there.
    """
    grid, rows = _rows(results, radii)
    header, cells = _cells(grid, rows)
    lines = [_markdown_row(header), _markdown_row(["---"] + ["--:"] * (len(header) - 1))]
    lines += [_markdown_row(values) for values in cells]
    lines += ["", *(f"- {_escaped(note)}" for note in _notes(grid, rows))]
    return "\n".join(lines) + "\n"


def certified_accuracy_csv(results: Sequence[Results], radii: ArrayLike | None = None) -> str:
    """The table for machines: all digits, shares in [0, 1], and every confidence interval.

    Columns: name, kind ("model" or "envelope"), sigma, images, n0, n, alpha, clean_accuracy, acr,
    abstention_rate, max_radius (that n draws can certify), mean_draws and mean_seconds an image,
    then for each radius certified_R, certified_R_low and certified_R_high (95% Clopper-Pearson),
    certified_R_bound (`high_probability_accuracy`). Empty: unknown, beyond max_radius, or (the ends
    of an envelope) not defined. Arguments and errors as `certified_accuracy_table`.
    """
    grid, rows = _rows(results, radii)
    header = "name kind sigma images n0 n alpha clean_accuracy acr abstention_rate max_radius "
    header += "mean_draws mean_seconds"
    titles = [f"certified_{number_text(r)}" for r in grid]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        header.split()
        + [title + end for title in titles for end in ("", "_low", "_high", "_bound")]
    )
    for row in rows:
        r = row.results
        about: list[object] = [row.name, row.kind]
        if r is None:
            about += ["", row.images] + [""] * 9
        else:
            about += [r.sigma, row.images, *(r.settings.get(key) for key in ("n0", "n", "alpha"))]
            about += [clean_accuracy(r), average_certified_radius(r), abstention_rate(r), r.reach]
            about += [None if r.draws is None else float(r.draws.mean())]
            about += [None if np.isnan(r.seconds).any() else float(r.seconds.mean())]
        bound = np.full(grid.size, np.nan) if r is None else high_probability_accuracy(r, grid)
        bound = np.where(np.isnan(row.certified), np.nan, bound)
        ends = zip(row.certified, row.low, row.high, bound, strict=True)
        numbers = [float(value) for four in ends for value in four]
        writer.writerow(about + ["" if math.isnan(value) else value for value in numbers])
    return out.getvalue()


def by_name(results: Sequence[Results]) -> dict[str, list[Results]]:
    """Results grouped by name, both in the order given."""
    groups: dict[str, list[Results]] = {}
    for r in results:
        groups.setdefault(r.name, []).append(r)
    return groups


def _rows(
    results: Sequence[Results], radii: ArrayLike | None
) -> tuple[NDArray[np.float64], list[_Row]]:
    if not results:
        raise UserError("a table needs at least one set of results; got none")
    grid = default_radii(results) if radii is None else check_radii(radii)
    rows = []
    for name, group in by_name(results).items():
        rows += [_model_row(r, grid) for r in group]
        if len({r.sigma for r in group}) > 1 and same_images(group):
            best = best_sigma_envelope(group, grid)
            best[np.all([np.isnan(row.certified) for row in rows[-len(group) :]], axis=0)] = np.nan
            nothing = np.full(grid.size, np.nan)
            rows.append(_Row(name, "envelope", group[0].images, best, nothing, nothing, None))
    return grid, rows


def _model_row(r: Results, grid: NDArray[np.float64]) -> _Row:
    counts = certified_counts(r, grid)
    intervals = np.array([accuracy_interval(int(k), r.images, LEVEL) for k in counts])
    # A zero beyond reach says nothing about the model: more draws could certify it.
    beyond = (counts == 0) & (grid > (math.inf if r.reach is None else r.reach))
    certified, low, high = (
        np.where(beyond, np.nan, values)
        for values in (counts / r.images, intervals[:, 0], intervals[:, 1])
    )
    return _Row(r.name, "model", r.images, certified, low, high, r)


def _cells(grid: NDArray[np.float64], rows: Sequence[_Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rounded cells; a column that no log can fill is left out."""
    header = ["model", "sigma", "images", "n", "clean", "ACR", "abstain"]
    header += ["r=" + number_text(grid[0]), *(number_text(r) for r in grid[1:])]
    cells = []
    for row in rows:
        r = row.results
        if r is None:
            about = [row.name, "best", str(row.images), "", "", "", ""]
        else:
            clean, n = clean_accuracy(r), r.settings.get("n")
            about = [
                row.name,
                sigma_text(r.sigma),
                str(row.images),
                "?" if n is None else f"{n:,}",
                "?" if clean is None else _percent(clean),
                radius_text(average_certified_radius(r)),
                _percent(abstention_rate(r)),
            ]
        cells.append(about + ["-" if math.isnan(x) else _percent(x) for x in row.certified])
    shown = [
        k
        for k, title in enumerate(header)
        if title not in ("n", "clean") or any(values[k] not in ("?", "") for values in cells)
    ]
    return [header[k] for k in shown], [[values[k] for k in shown] for values in cells]


def _size(rows: Sequence[_Row]) -> str:
    """The model of `rows`, how many images, how many draws: "digits, 297 images, n = 1,000"."""
    draws = [r.results.settings.get("n") for r in rows if r.results is not None]
    known = [f"{n:,}" for n in dict.fromkeys(draws) if n is not None]
    images = " / ".join(dict.fromkeys(f"{r.images:,}" for r in rows))
    return f"{rows[0].name}, {images} images" + (f", n = {' / '.join(known)}" if known else "")


def _notes(grid: NDArray[np.float64], rows: Sequence[_Row]) -> list[str]:
    """The legend, a sentence or two a line."""
    models = [(row, row.results) for row in rows if row.results is not None]
    notes = [
        "Share of images predicted right and certified to an L2 radius of r or more "
        "(pixels in [0, 1])."
    ]
    clean = any(r.clean_prediction is not None for _, r in models)
    notes.append(
        ("clean: accuracy of the base classifier without noise, in %. " if clean else "")
        + "ACR: average certified radius, rounded down. abstain: share of images, in %."
    )
    alphas = sorted({r.settings["alpha"] for _, r in models if "alpha" in r.settings})
    if alphas:
        values = ", ".join(number_text(alpha) for alpha in alphas)
        notes.append(f"Each certificate may be wrong with a probability of up to {values}.")
    # Rounded, so that of k and N - k images, equally wide, the first is told on any machine.
    widths = [
        (round(row.high[k] - row.low[k], 9), row, r, k)
        for row, r in models
        for k in range(grid.size)
    ]
    _, row, r, k = max(widths, key=lambda item: -1.0 if math.isnan(item[0]) else item[0])
    if not math.isnan(row.low[k]):
        low, high = math.floor(1000 * row.low[k]) / 10, math.ceil(1000 * row.high[k]) / 10
        notes.append(
            f"{LEVEL:.0%} confidence over the choice of images (Clopper-Pearson), at its widest: "
            f"{low:.1f} to {high:.1f} (sigma {sigma_text(r.sigma)}, r = {number_text(grid[k])}); "
            "the CSV has all."
        )
    means = [
        f"{r.draws.mean():,.0f} at sigma {sigma_text(r.sigma)}"
        for _, r in models
        if r.draws is not None and r.settings.get("stop")
    ]
    if means:
        notes.append(f"Draws an image, on average: {', '.join(means)}.")
    short = {
        f"{radius_text(r.reach)} at sigma {sigma_text(r.sigma)} and n = {r.settings['n']:,}": None
        for row, r in models
        if r.reach is not None and np.isnan(row.certified).any()
    }
    if short:
        notes.append(
            f"'-': beyond the largest radius that n draws can certify: {'; '.join(short)}."
        )
    if any(r.sigma is None for _, r in models):
        notes.append("'?': the log does not say (a file name such as sigma_0.25.tsv would).")
    if any(row.kind == "envelope" for row in rows):
        notes.append("best: at each r the best of the sigmas above it, chosen on these images.")
    if not same_images([r for _, r in models]):
        notes.append(
            "Not all rows rest on the same images, so they do not compare; "
            "there is no row of the best sigma across different images."
        )
    return notes


def radius_text(radius: float, digits: int = 3) -> str:
    """A radius with `digits` decimals, rounded down."""
    from rrcm.smoothing.bounds import format_radius  # its package imports torch

    return format_radius(radius, digits)


def _percent(share: float) -> str:
    return f"{100.0 * share:.1f}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _markdown_row(values: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(value) for value in values) + " |"
