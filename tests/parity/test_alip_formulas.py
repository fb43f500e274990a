"""ALIP against its formulas (`alip_formulas.py`): three steps of the objective alone, and three of a training run."""

import math

import pytest
import torch
import torch.nn.functional as F

import rwkv_clip
from helpers.alip_formulas import STEPS, ReferenceALIP, features
from rwkv_clip.config import parse
from rwkv_clip.dist import World
from rwkv_clip.losses import ALIP, GateSettings, InfoNCE, pairs
from rwkv_clip.training.data.batch import Batch
from rwkv_clip.training.loop import Trainer
from rwkv_clip.training.settings import Settings, load_settings
from rwkv_clip.training.state import TrainState

ONE = World(0, 1, torch.device("cpu"))
GATES = {  # means that float32 holds exactly
    "released": {},
    "means in the middle": {"init": 0.25, "momentum": 0.5},
    "no memory": {"momentum": 0.0},
    "fixed means": {"init": 0.125, "momentum": 1.0},
    "below everything": {"init": -1.0},
    "other gammas": {"init": 0.375, "momentum": 0.9, "sample_gamma": 0.7, "pair_gamma": 3.5},
    "no gates": {"init": 0.375, "sample_gamma": 0.0},
    "pairs all alike": {"init": 0.375, "pair_gamma": 0.0},
}


def reference(gates: dict) -> ReferenceALIP:
    names = {"sample_gamma": "gamma_s", "pair_gamma": "gamma_p"}
    return ReferenceALIP(**{names.get(key, key): value for key, value in gates.items()})


def close(found, expected, dtype: torch.dtype) -> None:
    rtol, atol = (1e-12, 1e-14) if dtype == torch.float64 else (2e-5, 1e-6)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
@pytest.mark.parametrize("rows", [5, pairs.CPU_ROWS])
def test_three_steps(gates, dtype, rows, monkeypatch):
    monkeypatch.setattr(pairs, "CPU_ROWS", rows)
    ours, theirs = ALIP(GateSettings(**gates)).to(dtype), reference(gates)
    for step in range(STEPS):
        image, raw, caption, scale = leaves = features(step, dtype)
        losses, report = ours(image, torch.stack([raw, caption], 1), scale)
        found = torch.autograd.grad(sum(losses.values()), leaves)
        wanted, log, _ = theirs(*leaves)
        assert list(losses) == list(wanted) and sorted(report) == sorted(log)
        for name, value in wanted.items():
            close(losses[name], value, dtype)
        for gradient, value in zip(found, torch.autograd.grad(sum(wanted.values()), leaves)):
            close(gradient, value, dtype)
        close(ours.mean_similarity.tolist(), theirs.means(), dtype)
        close({name: float(value) for name, value in report.items()}, log, dtype)


def test_the_cases_reach_every_branch():
    """What the comparison above rests on: both sides of both gates, and pair weights on both sides of 1."""
    seen = {}
    for name, gates in GATES.items():
        theirs = reference(gates)
        parts = [theirs(*features(step, torch.float64))[2] for step in range(STEPS)]
        u, pairs = (torch.cat([part[key] for part in parts]) for key in ("u", "Wt")), [p["Wc"] for p in parts]
        (u, Wt), Wc = u, torch.cat(pairs)
        seen[name] = {"low": bool((u < 1).any()), "high": bool((u > 1).any())} | {
            f"{key} {side}": bool(((W > 1) if side == "above" else (W < 1))[u < 1].any())
            for key, W in (("Wt", Wt), ("Wc", Wc))
            for side in ("above", "below")
        }
    assert all(seen["means in the middle"].values()) and all(seen["no memory"].values())
    assert seen["released"]["low"] and not seen["released"]["high"], "means of 1: every sample counts less"
    assert seen["below everything"]["high"]


def equal_similarity(pairs: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample whose texts have the cosine 1/2 exactly; its image has `pairs` with either."""
    raw, caption = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0], [0.5, 0.5, 0.5, -0.5, 0]], dtype=dtype)
    image = pairs * raw + math.sqrt(1 - pairs**2) * torch.eye(5, dtype=dtype)[4]
    return image[None], torch.stack([raw, caption])[None]


@pytest.mark.parametrize("gates", [{"init": 0.5, "momentum": 1.0}, {"momentum": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_texts_that_agree_as_much_as_on_average(gates, dtype):
    """S == H exactly: u is 1, the gates are open, whatever the image says."""
    ours, theirs = ALIP(GateSettings(**gates)).to(dtype), reference(gates)
    image, text = equal_similarity(0.9, dtype)
    _, report = ours(image, text, torch.tensor(3.0, dtype=dtype))
    assert theirs(image, text[:, 0], text[:, 1], 3.0)[2]["u"].item() == 1
    assert [report[f"weight_{name}_mean"].item() for name in ("text", "raw", "caption")] == [1, 1, 1]
    ours.mean_similarity[0] += 1e-3  # and a little above it they close
    weights = ours.weigh(ours.similarities(image, text))
    assert weights[0] < 1 and (gates["momentum"] == 0 or (weights[1] != 1).all())


def test_closed_gates_are_infonce():
    """sample_gamma 0 opens them: the sum of two plain losses."""
    image, raw, caption, scale = features(0, torch.float64)
    losses, _ = ALIP(GateSettings(sample_gamma=0.0))(image, torch.stack([raw, caption], 1), scale)
    for name, text in (("raw_loss", raw), ("caption_loss", caption)):
        plain = InfoNCE()(image, text, scale)[0]["contrastive"]
        torch.testing.assert_close(losses[name], plain, rtol=1e-12, atol=0)


def test_the_means_forget_slowly():
    """The figures of the specification: mean similarity 0.3, means of 1 at first; the loss warms up by itself."""
    ours, theirs = ALIP(), []
    text = torch.tensor([[[1.0, 0.0], [0.3, math.sqrt(1 - 0.09)]]])
    for _ in range(500):
        ours(torch.ones(1, 2), text, torch.tensor(1.0))
        theirs.append(ours.mean_similarity[0].item())
    assert [theirs[step - 1] for step in (1, 100, 300, 500)] == pytest.approx([0.993, 0.556, 0.334, 0.305], abs=5e-4)


RWKV = {
    "image": {"image_size": [16, 16], "patch": 8, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
    "text": {"context": 8, "vocab": 60, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
}
VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 2, "layers": 1},
}


def batches():
    g = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        image = torch.randint(0, 256, (8, 3, 16, 16), generator=g, dtype=torch.uint8)
        text = torch.randint(1, 59, (8, 3, 8), generator=g)
        text[..., -1] = 59  # open_clip reads the place of the largest token
        text[::2, 1] = text[::2, 0]  # half of the samples have two texts that agree
        yield Batch(image, text, torch.arange(8), torch.zeros(8, dtype=torch.long), 0)


def train_by_hand(model: torch.nn.Module, gates: dict) -> tuple[list[dict], ReferenceALIP]:
    """The published recipe written down once more: AdamW with decay on all, torch's one-cycle, clipping, clamping."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.2, foreach=False
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=20, pct_start=0.1)
    alip, logged = reference(gates), []
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    for batch in batches():
        x = F.normalize(model.encode_image(((batch.image / 255 - mean) / std).double()), dim=-1)
        t, c = (F.normalize(model.encode_text(batch.text[:, view]), dim=-1) for view in (0, 1))
        losses, report, inside = alip(x, t, c, model.logit_scale.exp())
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        logged.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"]})
        logged[-1] |= {name: value.item() for name, value in losses.items()} | report
        assert 0 < (inside["u"] < 1).sum() < 8, "both branches"
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
    return logged, alip


@pytest.mark.parametrize("spec", [RWKV, VIT], ids=["RWKV", "ViT"])
def test_training_run(spec):
    """In float64, where nothing but a mistake is larger than the tolerance (AdamW turns mere rounding into steps)."""
    gates = {"init": 0.375, "momentum": 0.8}
    changes = {"objective": "alip", "text_choice": "all", "texts": 2, "gates": gates, "batch_size": 8, "max_steps": 20}
    changes |= {"precision": "fp32", "lr": 3e-3, "device": "cpu", "model": "x", "epochs": 1}
    settings = parse(Settings, changes, base=load_settings("alip-b32-yfcc15m"))
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(rwkv_clip.create_model(spec).double().train())
    with torch.no_grad():
        for model in models:
            model.logit_scale.fill_(5.0)  # so that the clamp matters
    trainer = Trainer(TrainState(models[0], ALIP(settings.loss.gates).double(), settings, ONE, 80))
    trainer.gradients.normalize = lambda image: trainer.normalize(image).double()
    found = [{key: float(value) for key, value in trainer.step(batch).items()} for batch in batches()]
    expected, alip = train_by_hand(models[1], gates)
    for ours, theirs in zip(found, expected):
        assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-6)
    assert trainer.state.objective.mean_similarity.tolist() == pytest.approx(alip.means(), rel=1e-6)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7, msg=name)
