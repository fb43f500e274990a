"""SigLIP on 1, 2 and 3 ranks is the dense formula of one process; DDP and FSDP train alike, --deterministic keeps its
bits."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers.dense_loss import dense_sigmoid_loss, make_keys
from helpers.ranks import digest, run_ranks, train_logging_ids
from helpers.tiny import make_smaller, make_tiny
from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.dist import join_world, leave_world
from rwkv_clip.losses import SigLIP, pairs

BATCH, WIDTH = 12, 6


class Pair(nn.Module):
    def __init__(self, texts: int):
        super().__init__()
        torch.manual_seed(0)
        self.texts = texts
        self.image, self.text = nn.Linear(5, WIDTH).double(), nn.Linear(7, max(texts, 1) * WIDTH).double()
        self.logit_scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def forward(self, image, text):
        image, text = self.image(image), self.text(text)
        text = text.unflatten(1, (self.texts, WIDTH)) if self.texts else text
        return *(nn.functional.normalize(x, dim=-1) for x in (image, text)), self.logit_scale.exp(), self.logit_bias


def inputs(texts: int):
    g = torch.Generator().manual_seed(1)
    pair = (torch.randn(BATCH, n, generator=g, dtype=torch.float64) for n in (5, 7))
    return *pair, *make_keys(BATCH, *([texts] if texts else []))


def work(folder: str, texts: int, positives: str) -> None:
    world = join_world("cpu")
    pairs.CPU_ROWS = 5  # chunks that end within a rank's share
    own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    image, text, *keys = (x[own] for x in inputs(texts))
    model = Pair(texts)
    parallel = DistributedDataParallel(model) if world.size > 1 else model
    loss = SigLIP(positives)(*parallel(image, text), *(keys if positives == "mask" else []))[0]["contrastive"]
    loss.backward()
    torch.save({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}, f"{folder}/{world.rank}")
    leave_world()


@pytest.mark.parametrize("texts, positives", [(0, "pairs"), (2, "mask")])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_are_one_process(world, texts, positives, tmp_path):
    run_ranks(world, tmp_path, work, str(tmp_path), texts, positives)
    model, (image, text, *keys) = Pair(texts), inputs(texts)
    expected = dense_sigmoid_loss(*model(image, text), *(keys if positives == "mask" else []))
    expected.backward()
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(world)]
    torch.testing.assert_close(sum(x["loss"] for x in found) / world, expected.detach(), rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        for rank in found:
            torch.testing.assert_close(rank[name], parameter.grad, rtol=1e-12, atol=1e-12, msg=name)


@pytest.fixture(scope="module")
def runs(new_folder):
    """Checkpoint of a run by its ranks and settings."""
    folder = new_folder("siglip")
    base = make_smaller(make_tiny(folder)) | {"objective": "siglip", "positives": "mask", "val_data": None}
    base |= {"max_steps": 3, "lr": 1e-3, "decay": "all"}

    def start(ranks: int, **changes):
        name = f"{ranks} {sorted(changes.items())}"
        (folder / name).mkdir()
        run_ranks(ranks, folder / name, train_logging_ids, {**base, "batch_size": 8 // ranks, "name": name, **changes})
        return find_checkpoint(folder / "logs" / name)

    return start


@pytest.fixture(scope="module")
def one(runs):
    return runs(1)


@pytest.mark.parametrize("changes", [{}, {"parallel": "fsdp"}, {"accum_freq": 2, "batch_size": 2}], ids=str)
def test_two_ranks_do_what_one_does(runs, one, changes):
    found, expected = (
        read_tensors(path / "model.safetensors") | read_tensors(path / "optim.safetensors")
        for path in (runs(2, **changes), one)
    )
    assert found.keys() == expected.keys() and expected["logit_bias/exp_avg"] != 0
    for name, value in expected.items():
        if "exp_avg" in name or name.startswith("logit"):
            gap = float((found[name] - value).abs().max() / max(float(value.abs().max()), 1e-3))
            assert gap < 1e-3, name


def test_deterministic_bits(runs):
    same = {"deterministic": True, "max_ranks": 2}
    assert digest(runs(1, **same)) == digest(runs(2, **same))
