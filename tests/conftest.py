"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command line does, before torch

SHARED = Path(os.environ.get("RRCM_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden numbers; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared test data at {SHARED}; set RRCM_SHARED to the folder that has it")
    return SHARED
