"""Shared fixtures. Tests run single-threaded so that "same bits" means the same everywhere."""

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from helpers import ranks
from helpers.tiers import is_slow

torch.set_num_threads(1)

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"
# .pytest.ini's `pythonpath` is for this process; the processes that tests start import `helpers` by the environment's
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out what helpers/tiers.py lists")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        seen: set[str] = set()
        slow = {item for item in items if is_slow(f"{item.path.relative_to(TESTS)}::{item.name}", seen)}
        config.hook.pytest_deselected(items=list(slow))
        items[:] = [item for item in items if item not in slow]


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what was imported lives to the end; a collection that walks through it takes 0.2 s


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with reference numbers and real data; absent in a stranger's clone."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared folder beside the repository: reference numbers and real data are not shipped")
    return SHARED


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Makes folders that the tests of a file share. They go when the file is done: a small run's checkpoints take
    gigabytes together."""
    made: list[Path] = []

    def make(name: str) -> Path:
        made.append(tmp_path_factory.mktemp(name))
        return made[-1]

    yield make
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)  # a process that was left behind may still write


@pytest.fixture(scope="session")
def _copied_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("modules")


@pytest.fixture
def transformers(_copied_code: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The library, with a folder of the tests for the code that it copies, and reads again as long as the process
    lives."""
    library = pytest.importorskip("transformers", reason="pip install -e '.[captioners]'")
    monkeypatch.setattr(library.dynamic_module_utils, "HF_MODULES_CACHE", str(_copied_code))
    return library


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """A command that a test runs in this process may end by ignoring signals, and what is ignored is so in each process
    that later tests start."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def free_port() -> int:
    """A TCP port on loopback that nobody uses at the moment."""
    return ranks.free_port()
