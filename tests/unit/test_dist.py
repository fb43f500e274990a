import errno
import fcntl
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from rwkv_clip.dist import _agree_on_name, gather, join_world, mean_over_ranks
from rwkv_clip.files import hold


def test_one_process_is_a_world(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join_world("cpu")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    x = torch.ones(3, requires_grad=True)
    assert gather(x) is x
    assert mean_over_ranks({"a": torch.tensor(2.0), "b": 1e-3}, world.device) == {"a": 2.0, "b": 1e-3}


def test_absent_device_is_named():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: 'cuda' cannot be used here"):
            join_world("cuda")


def test_each_start_on_a_store_has_a_name_of_its_own():
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        starts = [list(pool.map(lambda rank: _agree_on_name(store, rank, 3), range(3))) for _ in range(3)]
    assert all(len(set(names)) == 1 for names in starts) and len({names[0] for names in starts}) == 3


def test_a_file_system_without_locks_is_a_warning(monkeypatch, tmp_path, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with hold(tmp_path / "run.lock", "run", "wait"):
        pass
    assert "cannot be locked" in caplog.text
