"""SigLIP in chunks is the plain formula: value, gradients, extreme scores, repeats, and never a matrix of all scores;
its bias belongs to the model, in runs, checkpoints and exports."""

import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F

import rwkv_clip
from helpers.dense_loss import dense_sigmoid_loss, make_keys
from helpers.tiny import MODEL, make_smaller, make_tiny
from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.config import ConfigError, parse, to_dict
from rwkv_clip.dist import World
from rwkv_clip.losses import SigLIP, pairs, siglip
from rwkv_clip.losses.siglip import compare_pairs, sigmoid_loss
from rwkv_clip.models.hugging_face import write_configuration
from rwkv_clip.training.deterministic import DeterministicStep
from rwkv_clip.training.gradients import GradientStep, Inputs
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import ParallelSettings, Settings, load_settings

BATCH, WIDTH = 12, 5
ONE = World(0, 1, torch.device("cpu"))


def features(*texts: int, dtype=torch.float64, scale=10.0, bias=-10.0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (BATCH, WIDTH), (BATCH, *texts, WIDTH)
    pair = [F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1) for shape in shapes]
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (scale, bias)]
    return [x.to(dtype).requires_grad_() for x in (*pair, *scalars)]


def value_and_gradients(loss, leaves, *keys):
    value = loss(*leaves, *keys)
    return [value, *torch.autograd.grad(3 * value, leaves)]  # 3: what comes from above is not always 1


@pytest.mark.parametrize("rows, tile", [(1, 1), (3, 2**16), (5, 30), (12, 24)])
@pytest.mark.parametrize("scale, bias", [(0.0, 0.0), (10.0, -10.0), (112.0, -16.0), (700.0, 100.0)])
@pytest.mark.parametrize("texts", [(), (3,)], ids=str)
@pytest.mark.parametrize("masks", [False, True])
def test_every_chunk_height_is_the_dense_formula(rows, tile, scale, bias, texts, masks, monkeypatch):
    monkeypatch.setattr(pairs, "CPU_ROWS", rows)
    monkeypatch.setattr(siglip, "TILE", tile)
    leaves, keys = features(*texts, scale=scale, bias=bias), make_keys(BATCH, *texts) if masks else ()
    found, expected = (value_and_gradients(loss, leaves, *keys) for loss in (compare_pairs, dense_sigmoid_loss))
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    if masks:
        assert not torch.allclose(compare_pairs(*leaves), found[0]), "the keys hold no repeats"


@pytest.mark.parametrize("first", [0, 3, BATCH])
def test_more_texts_than_images(first):
    """What a rank sees: its own images, everybody's texts."""
    image, _, scale, bias = features(bias=-3.0)
    texts = torch.cat([features()[1], features(2)[1][:, 1]])
    own = F.one_hot(first + torch.arange(BATCH), len(texts)).bool()

    def formula(image, texts, scale, bias):
        logits = scale * image @ texts.T + bias
        return -F.logsigmoid(torch.where(own, logits, -logits)).sum()

    leaves = image, texts.detach().requires_grad_(), scale, bias
    found, expected = (value_and_gradients(loss, leaves) for loss in (lambda *x: sigmoid_loss(*x, first)[0], formula))
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_at_the_beginning_the_loss_is_that_of_unrelated_features():
    """Scores of 0: B - 1 negatives at log(1 + e^-10), a positive at log(1 + e^10)."""
    image = torch.eye(2 * BATCH, dtype=torch.float64)[:BATCH]
    text = torch.eye(2 * BATCH, dtype=torch.float64)[BATCH:]
    scalars = (torch.tensor(math.exp(SigLIP.begins["logit_scale"])), torch.tensor(SigLIP.begins["logit_bias"]))
    losses, report = SigLIP()(image, text, *scalars)
    expected = (BATCH - 1) * math.log1p(math.exp(-10)) + math.log1p(math.exp(10))
    assert losses["contrastive"].item() == pytest.approx(expected, rel=1e-12) and report["logit_bias"] == -10


@pytest.mark.parametrize("device_kind", ["cpu", "other"])
def test_small_losses_keep_their_digits(device_kind):
    """log(1 + e^x) for x of -80 to 80, one score at a time, relatively."""
    for score in (-80.0, -30.0, -16.7, -10.0, -1e-3, 0.0, 1e-3, 10.0, 30.0, 80.0):
        x = torch.full((1, 1), score)
        found = siglip._sum_softplus(x) if device_kind == "cpu" else F.softplus(x, threshold=siglip.LINEAR).sum()
        exact = max(score, 0) + math.log1p(math.exp(-abs(score)))
        assert found.item() == pytest.approx(exact, rel=3e-7), score


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_compared_in_float32(dtype):
    leaves = features(dtype=dtype)
    exact = value_and_gradients(compare_pairs, [x.detach().double().requires_grad_() for x in leaves])
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(compare_pairs, leaves)
    assert found[0].dtype == torch.float32
    for x, y in zip(found, exact):
        torch.testing.assert_close(x.double(), y, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_gradcheck_and_registration(monkeypatch):
    monkeypatch.setattr(pairs, "CPU_ROWS", 5)
    keys = make_keys(BATCH)
    assert torch.autograd.gradcheck(lambda *x: compare_pairs(*x, *keys), features(scale=2.0, bias=-1.0))
    for gradients in (True, False):
        leaves = [x.requires_grad_(gradients) for x in features(dtype=torch.float32)]
        torch.library.opcheck(sigmoid_loss, (*leaves, 0, torch.stack(keys), gradients))


def test_without_gradients_the_value_has_the_same_bits():
    leaves = features(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(compare_pairs(*leaves), compare_pairs(*leaves))
        value = compare_pairs(*leaves)
    assert torch.equal(value, compare_pairs(*leaves).detach())


def test_memory_grows_with_the_batch_only(monkeypatch):
    seen = []
    chunks = siglip.score_chunks
    monkeypatch.setattr(siglip, "score_chunks", lambda *x: (seen.append(y[2].shape) or y for y in chunks(*x)))
    monkeypatch.setattr(pairs, "CHUNK", 3 * BATCH + 1)
    compare_pairs(*features())
    assert seen == [(3, BATCH)] * 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({1: torch.zeros(BATCH, WIDTH + 1)}, "features: images"),
        ({2: torch.ones(2)}, "the scale has 2 elements"),
        ({3: torch.ones(2)}, "the bias has 2 elements"),
        ({3: -10.0}, "bias are not a floating-point tensor"),
    ],
)
def test_misuse(change, message):
    leaves = features()
    for place, value in change.items():
        leaves[place] = value
    with pytest.raises(ValueError, match=message):
        compare_pairs(*leaves)
    with pytest.raises(ValueError, match="sigmoid_loss: first 1 with 12 images"):
        sigmoid_loss(*features(), 1)


# ---- steps -----------------------------------------------------------------------------------------------------------


def build(**more) -> torch.nn.Module:
    torch.manual_seed(0)
    model = rwkv_clip.create_model(MODEL, init_logit_bias=-3.0, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.double().eval()


def normalize(pixels):
    return pixels.double() / 255 - 0.5


@pytest.mark.parametrize("objective", ["pairs", "mask"])
@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 12},
        {"batch_size": 3, "accum_freq": 4},
        {"batch_size": 12, "deterministic": True, "max_ranks": 4},
        {"batch_size": 3, "accum_freq": 4, "deterministic": True, "max_ranks": 4},
    ],
    ids=str,
)
def test_gradients_in_micro_batches(changes, objective):
    g = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=g, dtype=torch.uint8)
    keys = dict(zip(("image_keys", "text_keys"), make_keys(BATCH))) if objective == "mask" else {}
    data, model = Inputs(image, torch.randint(1, 1000, (BATCH, 8), generator=g), None, keys), build()
    found = model(normalize(image), data.text, needs=("image", "text"))
    expected_loss = dense_sigmoid_loss(*(found[name] for name in SigLIP.needs), *keys.values())
    parameters = dict(model.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(expected_loss, list(parameters.values()))))
    settings = parse(ParallelSettings, {"precision": "fp32", **changes})
    kind = DeterministicStep if settings.deterministic else GradientStep
    step = kind(model, model, SigLIP(objective), settings, ONE, normalize, 0)
    computed = step.run(3, data, lambda loss: loss)
    torch.testing.assert_close(computed.losses["contrastive"], expected_loss, rtol=1e-12, atol=0)
    assert float(parameters["logit_bias"].grad.abs()) > 1e-3
    for name, gradient in expected.items():
        assert float((parameters[name].grad - gradient).abs().max()) <= 1e-12, name


# ---- runs ------------------------------------------------------------------------------------------------------------

VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


@pytest.fixture
def data(tmp_path):
    settings = make_smaller(make_tiny(tmp_path))
    changes = {"objective": "siglip", "batch_size": 12, "max_steps": 6, "save_every_n_steps": 3, "lr": 1e-3}
    return settings | {"val_data": None, **changes}


def start(data, **changes):
    return run(parse(Settings, data | changes))


def tensors_of(folder) -> dict[str, torch.Tensor]:
    path = find_checkpoint(folder)
    return {**read_tensors(path / "model.safetensors"), **read_tensors(path / "optim.safetensors")}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def write_model(data, description) -> str:
    path = f"{data['model']}.{len(str(description))}.json"
    with open(path, "w") as file:
        json.dump(description, file)
    return path


@pytest.mark.parametrize("parallel", [{}, {"batch_size": 3, "accum_freq": 4}, {"deterministic": True}], ids=str)
@pytest.mark.parametrize("choice", ["one", "all"])
def test_a_run_begins_as_published_learns_its_bias_and_resumes(data, choice, parallel):
    changes = {"text_choice": choice, "positives": "mask", **parallel}
    whole = start(data, name="whole", **changes)
    first = min((whole / "checkpoints").iterdir())
    found = tensors_of(whole)
    assert first.name == "step-00000003" and found["logit_bias/step"] == 6 and found["logit_bias"] != -10
    assert same(tensors_of(start(data, name="again", resume=str(first), **changes)), found)
    log = json.loads((whole / "log.jsonl").read_text().splitlines()[0])
    assert log["logit_bias"] == pytest.approx(-10, abs=0.01) and log["logit_scale"] == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("towers", ["ours", "open_clip"])
def test_who_reads_a_checkpoint_gets_the_bias(data, towers, tmp_path):
    model = data["model"] if towers == "ours" else write_model(data, VIT)
    folder = start(data, name="run", model=model)
    loaded = rwkv_clip.load_for_inference(folder).model
    bias = tensors_of(folder)["logit_bias"]
    assert torch.equal(loaded.logit_bias.detach(), bias) and len(loaded.state_dict()) > 10
    image, text = torch.randn(2, 3, *loaded.spec.image_size), torch.randint(1, 1000, (2, 8))
    plain = loaded.logit_scale.exp() * loaded.encode_image(image, True) @ loaded.encode_text(text, True).T
    for scores in (loaded.get_logits(image, text)[0], loaded.get_logits(image, text)[1].T):
        torch.testing.assert_close(scores, plain + bias)
    assert torch.equal(loaded(image, text)[3], bias)
    saved = rwkv_clip.save_pretrained(folder, tmp_path / "export")
    again = rwkv_clip.load_for_inference(saved).model
    assert torch.equal(again.logit_bias.detach(), bias)
    if towers == "open_clip":
        import open_clip

        theirs = open_clip.create_model(f"local-dir:{saved}")
        assert torch.equal(theirs.logit_bias.detach(), bias)


def test_a_layout_without_a_bias_is_refused():
    """Chinese-CLIP's, in transformers."""
    model = rwkv_clip.create_model("CN-CLIP-Ti-8", init_logit_bias=-10)
    assert model.logit_bias == -10 and model.spec.init_logit_bias == -10
    with pytest.raises(ConfigError, match="init_logit_bias: ChineseCLIPModel has no bias of scores"):
        write_configuration(model.spec)


def test_weights_without_a_bias_get_one_and_say_so(data, caplog):
    plain = start(data, name="infonce", objective="infonce", max_steps=1)
    scale = tensors_of(plain)["logit_scale"]
    assert "logit_bias" not in tensors_of(plain)
    with caplog.at_level(logging.WARNING):
        folder = start(data, name="tuned", pretrained=str(plain), max_steps=1, lr=1e-9)
    assert "has no logit_bias; it begins with -10" in caplog.text
    found = tensors_of(folder)
    torch.testing.assert_close(found["logit_scale"], scale, rtol=1e-6, atol=0)  # that of the weights
    assert found["logit_bias"].item() == pytest.approx(-10)


def test_a_model_that_says_how_it_begins_is_heard(data):
    model = write_model(data, {**VIT, "init_logit_bias": -4.0, "init_logit_scale": 1.0})
    found = tensors_of(start(data, model=model, name="own", max_steps=1, lr=1e-9))
    assert found["logit_bias"].item() == pytest.approx(-4) and found["logit_scale"].item() == pytest.approx(1)


def test_another_objective_leaves_a_bias_alone(data):
    model = write_model(data, {**VIT, "init_logit_bias": -4.0})
    found = tensors_of(start(data, model=model, name="softmax", objective="infonce", max_steps=2, decay="matrices"))
    assert found["logit_bias"] == -4 and found["logit_bias/step"] == 2


@pytest.mark.parametrize("objective, kept", [("siglip", 112.0), ("infonce", 100.0)])
def test_a_large_scale_is_kept(data, objective, kept):
    model = write_model(data, {**VIT, "init_logit_scale": math.log(112.0)})
    found = tensors_of(start(data, model=model, name=objective, objective=objective, max_steps=1, lr=1e-9))
    assert found["logit_scale"].exp().item() == pytest.approx(kept, rel=1e-5)


def test_resuming_with_the_other_loss_is_refused_unless_allowed(data):
    folder = start(data, name="one", objective="infonce", max_steps=3)
    changes = {"name": "two", "resume": str(folder)}
    with pytest.raises(ConfigError, match="objective: 'infonce' -> 'siglip'"):
        start(data, **changes)
    allowed = ["objective", "model", "max_steps", "total_steps"]
    found = tensors_of(start(data, allow_change=allowed, **changes))
    assert found["logit_bias/step"] == 3


def test_the_shipped_preset(data):
    """On tiny data, as long as it takes to see it: published beginning, loss falls."""
    shipped = load_settings("siglip-flickr8k-small")
    assert shipped.loss.objective == "siglip" and shipped.optimizer.schedule == "onecycle"
    preset = {key: value for key, value in to_dict(shipped).items() if value is not None}
    small = {key: data[key] for key in ("model", "train_data", "logs", "loader", "device", "precision")}
    changes = {"name": "preset", "batch_size": 30, "max_steps": 30, "workers": 0, "log_every_n_steps": 1, "lr": 3e-3}
    folder = run(parse(Settings, preset | small | changes))
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert 9 < losses[0] < 11 and min(losses[-5:]) < losses[0] - 3
