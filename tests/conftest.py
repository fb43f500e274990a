"""Shared fixtures. Tests run single-threaded so that "same bits" means the same everywhere."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with reference numbers and real data; absent in a stranger's clone."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared folder beside the repository: reference numbers and real data are not shipped")
    return SHARED
