"""SigLIP beside open_clip's SigLipLoss, in one process and on ranks: values and every gradient in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.ranks import run_ranks
from rwkv_clip.dist import join_world, leave_world
from rwkv_clip.losses import SigLIP, pairs

theirs = pytest.importorskip("open_clip.loss", reason="open_clip_torch is not installed")


def make_leaves(batch: int, width: int, *texts: int, scale=10.0, bias=-10.0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(batch)
    image = F.normalize(torch.randn(batch, width, generator=g, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(batch, *texts, width, generator=g, dtype=torch.float64), dim=-1)
    return [x.requires_grad_() for x in (image, text, *(torch.tensor(x, dtype=torch.float64) for x in (scale, bias)))]


def assert_same(found, expected, leaves):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    gradients = (torch.autograd.grad(x, leaves) for x in (found, expected))
    for x, y in zip(*gradients):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("batch, width", [(1, 3), (2, 1), (37, 9), (130, 64)])
@pytest.mark.parametrize("scale, bias", [(10.0, -10.0), (1.0, 0.0), (117.3, -12.9), (3.0, 20.0)])
@pytest.mark.parametrize("texts", [(), (1,), (3,)], ids=str)
def test_siglip(batch, width, scale, bias, texts, monkeypatch):
    monkeypatch.setattr(pairs, "CPU_ROWS", 16)
    leaves = make_leaves(batch, width, *texts, scale=scale, bias=bias)
    image, text, *scalars = leaves
    columns = text.unbind(1) if texts else [text]
    expected = torch.stack([theirs.SigLipLoss()(image, one, *scalars) for one in columns]).mean()
    assert_same(SigLIP()(*leaves)[0]["contrastive"], expected, leaves)


class Pair(nn.Module):
    """Two linear towers with what open_clip's models hold."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(5, 6).double(), nn.Linear(7, 6).double()
        self.logit_scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def forward(self, image, text):
        pair = (F.normalize(tower(x), dim=-1) for tower, x in ((self.image, image), (self.text, text)))
        return *pair, self.logit_scale.exp(), self.logit_bias


def work(folder: str, kind: str) -> None:
    world = join_world("cpu")
    pairs.CPU_ROWS = 5
    g = torch.Generator().manual_seed(1)
    own = slice(world.rank * 12 // world.size, (world.rank + 1) * 12 // world.size)
    inputs = (torch.randn(12, n, generator=g, dtype=torch.float64)[own] for n in (5, 7))
    model = Pair()
    found = model(*inputs)
    if kind == "ours":
        loss = SigLIP()(*found)[0]["contrastive"]
    else:
        loss = theirs.SigLipLoss(rank=world.rank, world_size=world.size, dist_impl=kind)(*found)
    loss.backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save({"loss": loss.detach(), **named}, f"{folder}/{kind}{world.rank}")
    leave_world()


@pytest.mark.parametrize("world", [2, 3])
def test_siglip_on_ranks(world, tmp_path):
    """Rank by rank: value and gradients before DDP averages them."""
    for kind in ("ours", "bidir"):
        run_ranks(world, tmp_path, work, str(tmp_path), kind)
    for rank in range(world):
        found, expected = (torch.load(tmp_path / f"{kind}{rank}", weights_only=True) for kind in ("ours", "bidir"))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13, msg=f"{rank} {name}")
