"""InfoNCE on 2 and 3 gloo ranks equals one process with the whole batch: loss and every gradient, the scale's too."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers.ranks import run_ranks
from rwkv_clip.dist import join_world, leave_world, max_over_ranks
from rwkv_clip.losses import InfoNCE, pairs

BATCH, WIDTH = 12, 6


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(5, WIDTH).double(), nn.Linear(7, WIDTH).double()
        self.logit_scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, image, text, sizes):
        image, text = (nn.functional.normalize(f, dim=-1) for f in (self.image(image), self.text(text)))
        return sizes * image, text, self.logit_scale.exp()


def inputs():
    """Pictures, texts, and uneven lengths of the picture features: the ranks' maxima and sums differ by far."""
    g = torch.Generator().manual_seed(1)
    pair = (torch.randn(BATCH, n, generator=g, dtype=torch.float64) for n in (5, 7))
    return *pair, torch.logspace(-1, 1.5, BATCH, dtype=torch.float64)[:, None]


def gradients(model, *batch):
    loss = InfoNCE()(*model(*batch))[0]["contrastive"]
    loss.backward()
    return loss.detach(), {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}


def work(folder):
    world = join_world("cpu")
    rank, size = world.rank, world.size
    pairs.CPU_ROWS = 5  # chunks that end within a rank's share
    part = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    loss, grads = gradients(DistributedDataParallel(Pair()), *(x[part] for x in inputs()))
    dist.all_reduce(loss)
    flags = max_over_ranks(torch.tensor([rank == size - 1, False], dtype=torch.float32))  # true on one rank, on none
    torch.save({"loss": loss / size, **grads, "flags": flags}, f"{folder}/{rank}")
    leave_world()


@pytest.mark.parametrize("world", [2, 3])
def test_gradients_are_those_of_one_process(world, tmp_path):
    run_ranks(world, tmp_path, work, str(tmp_path))
    loss, expected = gradients(Pair(), *inputs())
    for rank in range(world):
        found = torch.load(tmp_path / str(rank), weights_only=True)
        torch.testing.assert_close(found.pop("loss"), loss, rtol=1e-12, atol=0)
        assert found.pop("flags").tolist() == [1, 0]
        assert found.keys() == expected.keys() and "logit_scale" in expected
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-14, msg=name)


def test_value_against_the_formula():
    image, text, scale = Pair()(*inputs())
    logits = scale * image @ text.T
    rows = torch.stack([logits[i, i] - logits[i].logsumexp(0) for i in range(BATCH)])
    columns = torch.stack([logits[i, i] - logits[:, i].logsumexp(0) for i in range(BATCH)])
    loss = InfoNCE()(image, text, scale)[0]["contrastive"]
    torch.testing.assert_close(loss, -(rows.mean() + columns.mean()) / 2)


def test_half_precision_features_are_compared_in_float32():
    image, text, scale = (x.detach() for x in Pair()(*inputs()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = InfoNCE()(image.bfloat16(), text.bfloat16(), scale.float())[0]["contrastive"]
    exact = InfoNCE()(image.bfloat16().float(), text.bfloat16().float(), scale.float())[0]["contrastive"]
    assert loss.dtype == torch.float32 and torch.equal(loss, exact)
