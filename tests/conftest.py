"""Shared fixtures. Tests run single-threaded so that "same bits" means the same everywhere."""

import gc
import os
import socket
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what was imported lives to the end; a collection that walks through it takes 0.2 s


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with reference numbers and real data; absent in a stranger's clone."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared folder beside the repository: reference numbers and real data are not shipped")
    return SHARED


@pytest.fixture
def free_port() -> int:
    """A TCP port on loopback that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
