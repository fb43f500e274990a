"""--positives mask is the plain formula with the scores of repeats left out, in chunks, micro-batches and runs."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rwkv_clip
from helpers.dense_loss import dense_losses, make_keys
from helpers.tiny import MODEL, make_smaller, make_tiny
from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.data.build import build_records
from rwkv_clip.data.records import RecordSet
from rwkv_clip.dist import World
from rwkv_clip.files import hash_bytes
from rwkv_clip.losses import InfoNCE, LossSettings, pairs
from rwkv_clip.losses.pairs import contrastive_losses, pair_losses
from rwkv_clip.training.data import make_loader
from rwkv_clip.training.data.augment import hash_rows
from rwkv_clip.training.data.batch import Plan
from rwkv_clip.training.deterministic import DeterministicStep
from rwkv_clip.training.gradients import GradientStep, Inputs
from rwkv_clip.training.main import read_command_line, run
from rwkv_clip.training.settings import DataSettings, ParallelSettings, Settings

BATCH, WIDTH = 12, 5
ONE = World(0, 1, torch.device("cpu"))


def features(*texts: int, dtype=torch.float64, scale=14.0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (BATCH, WIDTH), (BATCH, *texts, WIDTH)
    pair = (F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1) for shape in shapes)
    return [x.to(dtype).requires_grad_() for x in (*pair, torch.tensor(scale, dtype=torch.float64))]


def weigh(losses) -> torch.Tensor:
    """A weight of its own for every loss."""
    return sum((torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) * x).sum() for x in losses)


@pytest.mark.parametrize("rows", [1, 3, 5, 12])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("texts", [(), (3,)], ids=str)
def test_every_chunk_height_is_the_dense_formula(rows, scale, texts, monkeypatch):
    monkeypatch.setattr(pairs, "CPU_ROWS", rows)
    leaves, keys = features(*texts, scale=scale), make_keys(BATCH, *texts)
    found, expected = contrastive_losses(*leaves, *keys), dense_losses(*leaves, *keys)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
    for x, y in zip(torch.autograd.grad(weigh(found), leaves), torch.autograd.grad(weigh(expected), leaves)):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    plain = contrastive_losses(*leaves)
    assert not torch.allclose(plain[0], found[0]), "the keys hold no repeats"


@pytest.mark.parametrize("which", [0, 1])
def test_one_kind_of_keys_alone(which):
    leaves, keys = features(), [None, None]
    keys[which] = make_keys(BATCH)[which]
    for x, y in zip(contrastive_losses(*leaves, *keys), dense_losses(*leaves, *keys)):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_repeats_the_bits_are_those_of_pairs(dtype):
    leaves, distinct = features(dtype=dtype), torch.arange(BATCH)
    for keys in ((distinct, distinct), (distinct, None)):
        found, plain = contrastive_losses(*leaves, *keys), contrastive_losses(*leaves)
        assert all(map(torch.equal, found, plain))
        gradients = (torch.autograd.grad(weigh(x), leaves) for x in (found, plain))
        assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("rows", [1, 5, 512])
def test_a_batch_of_one_picture_has_no_negatives(rows, monkeypatch):
    monkeypatch.setattr(pairs, "CPU_ROWS", rows)
    leaves = features()
    found = contrastive_losses(*leaves, torch.zeros(BATCH, dtype=torch.int64), torch.arange(BATCH))
    assert not any(x.any() for x in found)
    assert not any(gradient.any() for gradient in torch.autograd.grad(weigh(found), leaves))


def test_gradcheck_and_registration(monkeypatch):
    monkeypatch.setattr(pairs, "CPU_ROWS", 5)
    keys = make_keys(BATCH)
    assert torch.autograd.gradcheck(lambda *x: contrastive_losses(*x, *keys), features(scale=2.0))
    torch.library.opcheck(pair_losses, (*features(dtype=torch.float32), 0, torch.stack(keys)))


@pytest.mark.parametrize("bad", [torch.zeros(BATCH - 1, dtype=torch.int64), torch.zeros(BATCH)], ids=str)
def test_keys_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match=r"text_keys: .* should be int64 \(12, 1\) on cpu"):
        contrastive_losses(*features(), text_keys=bad)
    with pytest.raises(ValueError, match=r"pair_losses: keys"):
        pair_losses(*features(), 0, bad[None])


# ---- steps -----------------------------------------------------------------------------------------------------------


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    model = rwkv_clip.create_model(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.logit_scale.fill_(2.0)
    return model.double().eval()


def batch_of(rows: slice = slice(None)) -> Inputs:
    g = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=g, dtype=torch.uint8)
    text = torch.randint(1, 1000, (BATCH, 8), generator=g)
    keys = dict(zip(("image_keys", "text_keys"), (keys[rows] for keys in make_keys(BATCH))))
    return Inputs(image[rows], text[rows], None, keys)


def normalize(pixels):
    return pixels.double() / 255 - 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 12},
        {"batch_size": 3, "accum_freq": 4},
        {"batch_size": 1, "accum_freq": 12},
        {"batch_size": 12, "deterministic": True, "max_ranks": 4},
        {"batch_size": 3, "accum_freq": 4, "deterministic": True, "max_ranks": 4},
    ],
    ids=str,
)
def test_gradients_in_micro_batches(changes):
    model, data = build(), batch_of()
    found = model(normalize(data.image), data.text, needs=("image", "text"))
    of_images, of_texts = dense_losses(found["image"], found["text"], found["logit_scale"], *data.facts.values())
    expected_loss = (of_images.mean() + of_texts.mean()) / 2
    parameters = dict(model.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(expected_loss, list(parameters.values()))))

    settings = parse(ParallelSettings, {"precision": "fp32", **changes})
    kind = DeterministicStep if settings.deterministic else GradientStep
    step = kind(model, model, InfoNCE("mask"), settings, ONE, normalize, 0)
    computed = step.run(3, data, lambda loss: loss)
    torch.testing.assert_close(computed.losses["contrastive"], expected_loss, rtol=1e-12, atol=0)
    for name, gradient in expected.items():
        # Gradients that cancel (a bias before a norm) are rounding alone, so all are compared with the largest.
        assert float((parameters[name].grad - gradient).abs().max()) <= 1e-12, name


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Records of 60 pictures, of which every third is there twice, and whose texts are five sentences."""
    settings = make_smaller(make_tiny(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    rows = [{"image": row["image"], "raw": row["raw"], "synthetic": row["synthetic"]} for row in rows]
    rows += [row | {"raw": f"again {i}"} for i, row in enumerate(rows[::3])]
    (tmp_path / "repeats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_records(str(tmp_path / "repeats.jsonl"), str(tmp_path / "repeats"), texts=("raw", "synthetic"), context=8)
    plain = {"val_data": None, "batch_size": 16, "max_steps": 6, "save_every_n_steps": 3, "lr": 1e-3}
    return settings | plain | {"train_data": str(tmp_path / "repeats")}


def tensors_of(folder) -> dict[str, torch.Tensor]:
    path = find_checkpoint(folder)
    return {**read_tensors(path / "model.safetensors"), **read_tensors(path / "optim.safetensors")}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("choice", ["one", "all"])
@pytest.mark.parametrize("parallel", [{}, {"batch_size": 4, "accum_freq": 4}, {"deterministic": True}], ids=str)
def test_a_run_masks_and_resumes(data, choice, parallel):
    settings = data | {"positives": "mask", "text_choice": choice} | parallel
    whole = run(parse(Settings, settings | {"name": "whole"}))
    first = min((whole / "checkpoints").iterdir())
    resumed = run(parse(Settings, settings | {"name": "again", "resume": str(first)}))
    assert first.name == "step-00000003" and same(tensors_of(resumed), tensors_of(whole))
    pairs_alone = run(parse(Settings, settings | {"name": "pairs", "positives": "pairs"}))
    assert not same(tensors_of(pairs_alone), tensors_of(whole))
    masked, plain = (json.loads((path / "log.jsonl").read_text().splitlines()[0]) for path in (whole, pairs_alone))
    assert masked["loss"] < plain["loss"], "fewer negatives"


def test_without_repeats_a_run_has_the_bits_of_pairs(data, tmp_path):
    settings = data | {"train_data": str(tmp_path / "train"), "text_choice": "first", "max_steps": 3, "batch_size": 16}
    found = [tensors_of(run(parse(Settings, settings | {"name": x, "positives": x}))) for x in ("pairs", "mask")]
    assert same(*found)


def test_alip_refuses_in_words():
    with pytest.raises(ConfigError, match="positives: mask needs objective infonce or siglip, not alip, which weighs"):
        read_command_line(["--train-data", "x", "--objective", "alip", "--positives", "mask"])
    assert not parse(LossSettings, {"positives": "mask"}).problems()


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_keys_of_texts():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 21128, (500, 52))
    near = np.concatenate([rows, np.where(np.arange(52) == 3, rows + 1, rows)])
    for column in (0, 51):  # two places exchanged
        swapped = rows.copy()
        swapped[:, [7, column]] = swapped[:, [column, 7]]
        near = np.concatenate([near, swapped])
    keys = hash_rows(near)
    assert keys.dtype == np.int64 and keys.min() >= 0 and keys.max() > 2**61
    assert len(np.unique(keys)) == len(np.unique(near, axis=0)) == 2000
    assert (hash_rows(rows.reshape(100, 5, 52)) == keys[:500].reshape(100, 5)).all()
    assert (hash_rows(rows.astype(np.int32)) == keys[:500]).all()
    assert len(set(hash_rows(np.eye(64, dtype=np.int64)).tolist())) == 64


@pytest.mark.parametrize("workers", [0, 2])
def test_keys_of_images_are_of_their_bytes(data, workers):
    records = RecordSet(data["train_data"])
    settings = DataSettings(workers=workers, loader="torch")
    plan = Plan(global_batch=40, steps=2, rank=0, world=1)
    loader = make_loader(records, plan, 32, settings, keys=True)
    batches = list(loader)
    for batch in batches:
        assert batch.image_keys.tolist() == [hash_bytes(records.sample(i)[0]) for i in batch.ids.tolist()]
    assert len({key for batch in batches for key in batch.image_keys.tolist()}) == 60
    blank = [
        make_loader(records, Plan(global_batch=8, steps=1, rank=r, world=2), 32, settings, keys=True).blank()
        for r in (0, 1)
    ]
    assert len(set(torch.cat([batch.image_keys for batch in blank]).tolist())) == 8
    assert next(iter(make_loader(records, plan, 32, settings))).image_keys is None
