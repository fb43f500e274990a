"""SigLIP and distillation beside open_clip's SigLipLoss and DistillClipLoss, in one process and on ranks: values and
every gradient in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.ranks import run_ranks
from rwkv_clip.dist import join_world, leave_world
from rwkv_clip.losses import InfoNCE, SigLIP, pairs
from rwkv_clip.losses.distill import Distilled

theirs = pytest.importorskip("open_clip.loss", reason="open_clip_torch is not installed")


def make_leaves(batch: int, width: int, *texts: int, scale=10.0, bias=-10.0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(batch)
    image = F.normalize(torch.randn(batch, width, generator=g, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(batch, *texts, width, generator=g, dtype=torch.float64), dim=-1)
    return [x.requires_grad_() for x in (image, text, *(torch.tensor(x, dtype=torch.float64) for x in (scale, bias)))]


def assert_same(found, expected, leaves):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    gradients = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (found, expected))
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


class Known:
    """A teacher whose features are given."""

    recalls, sources = (), {}

    def __init__(self, scale: float):
        self.scale = scale


@pytest.mark.parametrize("batch, width, wide", [(1, 3, 2), (2, 1, 5), (37, 9, 4), (130, 64, 96)])
@pytest.mark.parametrize("scale, taught", [(10.0, 100.0), (1.0, 0.5), (100.0, 14.3)])
@pytest.mark.parametrize("texts", [(), (3,)], ids=str)
def test_distillation(batch, width, wide, scale, taught, texts, monkeypatch):
    monkeypatch.setattr(pairs, "CPU_ROWS", 16)
    leaves, (image, text, *_) = make_leaves(batch, width, *texts, scale=scale)[:3], make_leaves(batch, wide, *texts)
    losses, _ = Distilled(InfoNCE(), Known(taught))(
        **dict(zip(("image", "text", "logit_scale"), leaves)), teacher_image=image, teacher_text=text
    )
    columns = zip(leaves[1].unbind(1), text.unbind(1)) if texts else [(leaves[1], text)]
    parts = [theirs.DistillClipLoss()(leaves[0], own, leaves[2], image, other, taught) for own, other in columns]
    for i, name in enumerate(("contrastive", "distill")):
        assert_same(losses[name], torch.stack([part[i] for part in parts]).mean(), leaves)
    assert torch.autograd.grad(losses["distill"], (image, text), allow_unused=True) == (None, None), "a teacher learns"


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
    image, text, scale, _ = found
    taught = [F.normalize(torch.randn(12, 4, generator=g, dtype=torch.float64), dim=-1)[own] for _ in range(2)]
    if kind == "ours":
        loss = SigLIP()(*found)[0]["contrastive"]
    elif kind == "our distillation":
        named = {"image": image, "text": text, "logit_scale": scale}
        losses, _ = Distilled(InfoNCE(), Known(50.0))(**named, teacher_image=taught[0], teacher_text=taught[1])
        loss = sum(losses.values())
    elif kind == "their distillation":
        whole = theirs.DistillClipLoss(True, True, rank=world.rank, world_size=world.size)
        loss = sum(whole(image, text, scale, *taught, 50.0))
    else:
        loss = theirs.SigLipLoss(rank=world.rank, world_size=world.size, dist_impl=kind)(*found)
    loss.backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    torch.save({"loss": loss.detach(), **named}, f"{folder}/{kind}{world.rank}")
    leave_world()


@pytest.mark.parametrize("world", [2, 3])
def test_distillation_on_ranks(world, tmp_path):
    """The means over ranks: theirs scores own texts against all images, too, where ours sends column sums."""
    means = []
    for kind in ("our distillation", "their distillation"):
        run_ranks(world, tmp_path, work, str(tmp_path), kind)
        found = [torch.load(tmp_path / f"{kind}{rank}", weights_only=True) for rank in range(world)]
        means.append({name: sum(x[name] for x in found) / world for name in found[0] if name != "logit_bias"})
    for name, value in means[1].items():
        torch.testing.assert_close(means[0][name], value, rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("world", [2, 3])
def test_siglip_on_ranks(world, tmp_path):
    """Rank by rank: value and gradients before DDP averages them."""
    for kind in ("ours", "bidir"):
        run_ranks(world, tmp_path, work, str(tmp_path), kind)
    for rank in range(world):
        found, expected = (torch.load(tmp_path / f"{kind}{rank}", weights_only=True) for kind in ("ours", "bidir"))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13, msg=f"{rank} {name}")
