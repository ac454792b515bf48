"""The report of one or several certification runs: what `rrcm report` prints and writes."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from numpy.typing import ArrayLike
from rich.table import Table

from rrcm.files import write_whole
from rrcm.report.figures import accuracy_radius_figure
from rrcm.report.results import Results, read_results
from rrcm.report.table import (
    certified_accuracy_csv,
    certified_accuracy_markdown,
    certified_accuracy_table,
)


@dataclass(frozen=True, eq=False)
class Report:
    """What `write_report` made."""

    results: list[Results]
    """What was read, sorted by sigma."""
    table: Table
    """The certified-accuracy table, for a rich console."""
    files: list[Path]
    """What was written; empty without a folder to write to."""


def write_report(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    radii: ArrayLike | None = None,
) -> Report:
    """Reads results and tells them as a table, and in a folder as table and figure files.

    Args:
        paths: Journals, Cohen-format logs, or folders of them, as for `read_results`.
        out: Folder for table.md, table.csv, accuracy_radius.png and accuracy_radius.svg, created
            if need be; None: nothing is written.
        radii: [R] L2 radii of the table, on the [0, 1] pixel scale; None: `default_radii`.

    Returns:
        The table to print, the results and the files.

    Raises:
        UserError: A log cannot be read or is malformed, a radius is unusable, or a file cannot be
            written.
    """
    results = read_results(paths)
    table = certified_accuracy_table(results, radii)
    files = []
    if out is not None:
        markdown = certified_accuracy_markdown(results, radii)
        files.append(write_whole(Path(out) / "table.md", markdown.encode()))
        values = certified_accuracy_csv(results, radii)
        files.append(write_whole(Path(out) / "table.csv", values.encode()))
        files += accuracy_radius_figure(results, Path(out) / "accuracy_radius")
    return Report(results, table, files)
