import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real image sets that lies beside the repository on the developers' machines."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("RRCM_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"no real image sets at {folder} (set RRCM_SHARED)")
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In place of the user's cache of Hugging Face datasets."""
    return tmp_path_factory.mktemp("datasets-cache")
