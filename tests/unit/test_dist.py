import pytest
import torch

from rwkv_clip.dist import autocast_dtype, gather, join_world, mean_over_ranks


def test_one_process_is_a_world(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join_world("cpu")
    assert (world.rank, world.size, world.is_lead) == (0, 1, True)
    x = torch.ones(3, requires_grad=True)
    assert gather(x) is x
    assert mean_over_ranks({"a": torch.tensor(2.0), "b": 1e-3}, world.device) == {"a": 2.0, "b": 1e-3}


def test_absent_device_is_named():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: 'cuda' cannot be used here"):
            join_world("cuda")


def test_precision_names():
    device = torch.device("cpu")
    assert autocast_dtype("fp32", device) is None
    assert autocast_dtype("bf16", device) == torch.bfloat16
    assert autocast_dtype("auto", device) in (None, torch.bfloat16)
