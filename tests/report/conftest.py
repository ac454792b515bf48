"""Logs made by hand, small enough to compute every number on paper."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SETTINGS = {"sigma": 0.25, "n0": 100, "n": 1000, "alpha": 0.001, "model": "abc", "data": "toy"}

# index, label, prediction, radius, clean prediction: three of five are right, with the radii 0.25
# (a tie at r = 0.25), 0.5 and 0.125; one is wrong with a large radius, one abstains.
TOY = [(0, 3, 3, 0.25, 3), (20, 1, 1, 0.5, 1), (40, 7, 2, 0.55, 7), (60, 0, -1, 0.0, 0),
       (80, 5, 5, 0.125, 4)]  # fmt: skip


@pytest.fixture
def toy_rows() -> list[dict[str, Any]]:
    """The rows of the toy journal, to be altered at will."""
    return [
        {"index": index, "label": label, "prediction": prediction, "radius": radius,
         "correct": int(prediction == label), "top": 0, "count": 0, "p_lower": 0.0,
         "clean_prediction": clean, "seconds": 0.5}
        for index, label, prediction, radius, clean in TOY
    ]  # fmt: skip


@pytest.fixture
def journal(tmp_path: Path, toy_rows: list[dict[str, Any]]) -> Callable[..., Path]:
    """Writes a journal to tmp_path/FOLDER/journal.jsonl and returns the folder."""

    def write(
        folder: str = "run", rows: list[dict[str, Any]] | None = None, **settings: Any
    ) -> Path:
        path = tmp_path / folder / "journal.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"rrcm_journal": 1, "settings": {**SETTINGS, **settings}}
        lines = [header, *(toy_rows if rows is None else rows)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path.parent

    return write


@pytest.fixture
def tsv(tmp_path: Path) -> Callable[..., Path]:
    """Writes a Cohen-format log of the lines given, blanks for tabs; returns its path."""

    def write(*lines: str, name: str = "toy_sigma_0.25.tsv", header: str | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        first = "idx label predict radius correct time" if header is None else header
        path.write_text("".join(line.replace(" ", "\t") + "\n" for line in [first, *lines]))
        return path

    return write
