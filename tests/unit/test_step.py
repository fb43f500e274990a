"""A big batch means a big batch (promise P4): accumulated and distributed gradients are those of one batch, drop path
and dropout included."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rwkv_clip
from helpers.ranks import run_ranks
from helpers.tiny import MODEL
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.dist import World, join_world, leave_world
from rwkv_clip.losses import InfoNCE, pairs
from rwkv_clip.training.data.augment import draw_drops
from rwkv_clip.training.deterministic import DeterministicStep
from rwkv_clip.training.gradients import GradientStep, Inputs
from rwkv_clip.training.settings import ParallelSettings
from rwkv_clip.transform import normalize

BATCH = 16
MEAN = torch.full((3,), 0.4)


def build(dtype: torch.dtype, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = rwkv_clip.create_model({**MODEL, "image": {**MODEL["image"], "drop_path": 0.4}})
    with torch.no_grad():  # away from the initial zeros, so that every parameter has a gradient
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.logit_scale.fill_(2.0)
    if dropout:
        model.image_model.ln1 = nn.Sequential(model.image_model.ln1, nn.Dropout(dropout))
    return model.to(dtype).train()


def inputs(model: nn.Module, rows: slice = slice(None)) -> Inputs:
    g = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=g, dtype=torch.uint8)
    text = torch.randint(1, 1000, (BATCH, 8), generator=g)
    drops = draw_drops(0, np.zeros(BATCH, np.int64), np.arange(BATCH), model.drop_branches).astype(np.float32)
    return Inputs(image[rows], text[rows], torch.from_numpy(drops)[:, rows])


def gradients(
    dtype: torch.dtype = torch.float64,
    world: World | None = None,
    loss_scale: float = 1.0,
    **changes,
) -> dict[str, torch.Tensor]:
    world = world or World(0, 1, torch.device("cpu"))
    settings = parse(ParallelSettings, {"precision": "fp32", "batch_size": BATCH, **changes})
    model = build(dtype)
    model.set_grad_checkpointing(settings.grad_checkpointing)
    if settings.torchcompile:
        model.compile(backend="aot_eager")  # the graphs of inductor, without its minutes
    parallel = DistributedDataParallel(model) if world.size > 1 and not settings.deterministic else model
    objective_ = InfoNCE()
    kind = DeterministicStep if settings.deterministic else GradientStep
    step = kind(model, parallel, objective_, settings, world, lambda x: normalize(x, MEAN, MEAN).to(dtype), 0)
    share = BATCH // world.size
    own = inputs(model, slice(world.rank * share, (world.rank + 1) * share))
    computed = step.run(3, own, lambda loss: loss * loss_scale)
    assert computed.features["image"].shape == (share, 32) and computed.losses["contrastive"] > 0
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def one_batch():
    """Gradients of one batch, and that they are what plain autograd says."""
    found = gradients()
    model = build(torch.float64)
    data = inputs(model)
    model.set_drop_numbers(data.drop_numbers)
    image, text, scale = model(normalize(data.image, MEAN, MEAN).double(), data.text)
    InfoNCE()(image, text, scale)[0]["contrastive"].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-15, msg=name)
        assert parameter.grad.abs().max() > 0, name
    return found


def largest_gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest gradient of its parameter."""
    assert found.keys() == expected.keys()
    return max(float((found[k] - g).abs().max() / g.abs().max()) for k, g in expected.items())


WAYS = [
    {"batch_size": 4, "accum_freq": 4},
    {"batch_size": 1, "accum_freq": 16},
    {"batch_size": 4, "accum_freq": 4, "grad_checkpointing": True},
    {"batch_size": 4, "accum_freq": 4, "torchcompile": True},
    {"batch_size": 8, "accum_freq": 2, "torchcompile": True, "grad_checkpointing": True},
    {"deterministic": True, "max_ranks": 4},
    {"deterministic": True, "max_ranks": 8, "batch_size": 4, "accum_freq": 4},
]


@pytest.mark.parametrize("changes", WAYS, ids=str)
def test_accumulation_in_float64(one_batch, changes):
    assert largest_gap(gradients(**changes), one_batch) <= 1e-12


@pytest.mark.parametrize("changes", WAYS[:3] + WAYS[5:], ids=str)
def test_accumulation_in_float32(changes):
    expected, found = gradients(torch.float32), gradients(torch.float32, **changes)
    largest = max(g.abs().max() for g in expected.values())
    assert max((found[k] - g).abs().max() for k, g in expected.items()) / largest <= 1e-6


def work(folder: str, changes: dict) -> None:
    world = join_world("cpu")
    pairs.CPU_ROWS = 3  # chunks of the loss that end within a rank's share
    torch.save(gradients(world=world, **changes), f"{folder}/rank{world.rank}")
    leave_world()


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 8},
        {"batch_size": 4, "accum_freq": 2},
        {"batch_size": 2, "accum_freq": 4, "grad_checkpointing": True},
        {"batch_size": 4, "accum_freq": 2, "torchcompile": True},
        {"batch_size": 4, "accum_freq": 2, "deterministic": True},
    ],
    ids=str,
)
def test_two_ranks_with_accumulation(one_batch, tmp_path, changes):
    run_ranks(2, tmp_path, work, str(tmp_path), changes, timeout=300)
    for rank in range(2):
        assert largest_gap(torch.load(tmp_path / f"rank{rank}", weights_only=True), one_batch) <= 1e-12


def test_negatives_matter(one_batch):
    """What it would be without them: four batches of four on their own."""
    model = build(torch.float64)
    for part in range(4):
        data = inputs(model, slice(4 * part, 4 * part + 4))
        model.set_drop_numbers(data.drop_numbers)
        image, text, scale = model(normalize(data.image, MEAN, MEAN).double(), data.text)
        (InfoNCE()(image, text, scale)[0]["contrastive"] / 4).backward()
    total = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert largest_gap(total, one_batch) > 0.1


def test_a_scaled_loss_scales_gradients(one_batch):
    scaled = gradients(batch_size=4, accum_freq=4, loss_scale=2.0**12)
    assert largest_gap({k: g / 2.0**12 for k, g in scaled.items()}, one_batch) <= 1e-12


@pytest.mark.parametrize("changes", [{}, {"grad_checkpointing": True}, {"deterministic": True}], ids=str)
def test_the_second_pass_repeats_dropout_and_drop_path(changes):
    """Features of the pass that is differentiated have the bits of those that the objective saw."""
    settings = parse(ParallelSettings, {"precision": "fp32", "batch_size": 4, "accum_freq": 4, **changes})
    model = build(torch.float64, dropout=0.5)
    model.set_grad_checkpointing(settings.grad_checkpointing)
    world = World(0, 1, torch.device("cpu"))
    kind = DeterministicStep if settings.deterministic else GradientStep
    step = kind(model, model, InfoNCE(), settings, world, lambda x: normalize(x, MEAN, MEAN).double(), 0)
    seen, encode = [], step._encode

    def recorded(*arguments):
        output = encode(*arguments)
        seen.append([output[name].detach().clone() for name in ("image", "text")])
        return output

    step._encode = recorded
    step.run(3, inputs(model), lambda loss: loss)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for before, after in zip(first, second):
        assert all(torch.equal(a, b) for a, b in zip(before, after))
    seen.clear()
    step.run(4, inputs(model), lambda loss: loss)
    assert not torch.equal(seen[0][0], first[0][0]), "another step draws other numbers"


def test_memory_is_that_of_a_piece(monkeypatch):
    """With accumulation no two pieces' graphs live at a time."""
    alive, most = [0], [0]

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            alive[0] -= 1
            return grad

    forward = rwkv_clip.RWKVCLIP.forward

    def counted(self, *inputs, **named):
        features = forward(self, *inputs, **named)
        image = features["image"]
        return features | {"image": Counted.apply(image) if image.requires_grad else image}

    monkeypatch.setattr(rwkv_clip.RWKVCLIP, "forward", counted)
    gradients(batch_size=2, accum_freq=8)
    assert most == [1] and alive == [0]


def test_batch_norms_are_refused_where_they_would_depend_on_ranks():
    model = nn.Module()
    model.logit_scale, model.norm = nn.Parameter(torch.zeros(())), nn.BatchNorm1d(3)
    settings = parse(ParallelSettings, {"deterministic": True})
    with pytest.raises(ConfigError, match="batch norms"):
        DeterministicStep(model, model, InfoNCE(), settings, World(0, 1, torch.device("cpu")), lambda x: x, 0)
