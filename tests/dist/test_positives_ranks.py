"""--positives mask on 1, 2 and 3 ranks is the dense formula of one process; --deterministic keeps its bits."""

import json

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers.dense_loss import dense_losses, make_keys
from helpers.ranks import digest, run_ranks, train_logging_ids
from helpers.tiny import make_tiny
from rwkv_clip.checkpoint import find_checkpoint
from rwkv_clip.data.build import build_records
from rwkv_clip.dist import join_world, leave_world
from rwkv_clip.losses import InfoNCE, pairs

BATCH, WIDTH = 12, 6


class Pair(nn.Module):
    def __init__(self, texts: int):
        super().__init__()
        torch.manual_seed(0)
        self.texts = texts
        self.image, self.text = nn.Linear(5, WIDTH).double(), nn.Linear(7, max(texts, 1) * WIDTH).double()
        self.logit_scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, image, text):
        image, text = self.image(image), self.text(text)
        text = text.unflatten(1, (self.texts, WIDTH)) if self.texts else text
        return *(nn.functional.normalize(x, dim=-1) for x in (image, text)), self.logit_scale.exp()


def inputs(texts: int):
    g = torch.Generator().manual_seed(1)
    pair = (torch.randn(BATCH, n, generator=g, dtype=torch.float64) for n in (5, 7))
    images, sentences = make_keys(BATCH, *([texts] if texts else []))
    return *pair, images, sentences


def work(folder: str, texts: int) -> None:
    world = join_world("cpu")
    pairs.CPU_ROWS = 5  # chunks that end within a rank's share
    own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    image, text, *keys = (x[own] for x in inputs(texts))
    model = Pair(texts)
    parallel = DistributedDataParallel(model) if world.size > 1 else model
    loss = InfoNCE("mask")(*parallel(image, text), *keys)[0]["contrastive"]
    loss.backward()
    torch.save({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}, f"{folder}/{world.rank}")
    leave_world()


@pytest.mark.parametrize("texts", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_are_one_process(world, texts, tmp_path):
    run_ranks(world, tmp_path, work, str(tmp_path), texts)
    model, (image, text, *keys) = Pair(texts), inputs(texts)
    of_images, of_texts = dense_losses(*model(image, text), *keys)
    expected = (of_images.mean() + of_texts.mean()) / 2
    expected.backward()
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(world)]
    torch.testing.assert_close(sum(x["loss"] for x in found) / world, expected.detach(), rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        for rank in found:
            torch.testing.assert_close(rank[name], parameter.grad, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("choice", ["one", "all"])
def test_deterministic_runs_have_the_same_bits(tmp_path, choice):
    settings = make_tiny(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    rows = [row | {"image": rows[i % 20]["image"]} for i, row in enumerate(rows)]
    (tmp_path / "repeats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("raw", "synthetic", "generated")
    build_records(str(tmp_path / "repeats.jsonl"), str(tmp_path / "repeats"), texts=names, context=8)
    settings |= {"train_data": str(tmp_path / "repeats"), "val_data": None, "max_steps": 5, "lr": 1e-3}
    settings |= {"positives": "mask", "deterministic": True, "max_ranks": 4, "text_choice": choice}
    found = set()
    for world in (1, 2):
        folder = tmp_path / "logs" / str(world)
        folder.mkdir(parents=True)
        run_ranks(world, folder, train_logging_ids, settings | {"name": str(world), "batch_size": 16 // world})
        found.add(digest(find_checkpoint(folder)))
    assert len(found) == 1
