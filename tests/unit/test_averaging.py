"""Averaged weights: the formula, validation, checkpoints, resume, and how they are opened."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import rwkv_clip
from helpers.tiny import MODEL, make_smaller, make_tiny
from rwkv_clip.base_weights import find_base
from rwkv_clip.checkpoint import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    read_tensors,
    read_weights,
    verify_checkpoint,
)
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.data.retrieval_set import load_retrieval
from rwkv_clip.features import FeatureExtractor
from rwkv_clip.retrieval import evaluate_retrieval
from rwkv_clip.training import loop
from rwkv_clip.training.averaging import Average, make_average
from rwkv_clip.training.faults.signals import Interrupted
from rwkv_clip.training.main import run
from rwkv_clip.training.parallel import Shards
from rwkv_clip.training.settings import OptimizerSettings, Settings

STEPS, DECAY = 6, 0.8


@pytest.fixture(scope="module")
def data(new_folder):
    settings = make_smaller(make_tiny(new_folder("tiny")))
    return settings | {"max_steps": STEPS, "save_every_n_steps": 2, "keep_checkpoints": 9, "resume": "latest"}


@pytest.fixture(scope="module")
def history(data):
    """A run with an average, and the weights before the first step and after each."""
    weights: list[dict[str, Tensor]] = []
    step = loop.Trainer.step

    def recorded(self, batch):
        now = lambda: {key: value.clone() for key, value in self.state.model.state_dict().items()}  # noqa: E731
        if not weights:
            weights.append(now())
        values = step(self, batch)
        weights.append(now())
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "step", recorded)
        folder = run(parse(Settings, data | {"name": "averaged", "ema_decay": DECAY, "val_every_n_steps": 3}))
    return folder, weights


def average_of(weights: list[dict[str, Tensor]], decays: list[float]) -> dict[str, Tensor]:
    """By the formula, in float64."""
    average = {key: value.double() for key, value in weights[0].items()}
    for decay, now in zip(decays, weights[1:]):
        average = {key: decay * average[key] + (1 - decay) * now[key].double() for key in average}
    return average


def test_the_formula(history):
    folder, weights = history
    found = read_tensors(find_checkpoint(folder) / "ema.safetensors")
    expected = average_of(weights, [min(DECAY, (1 + step) / (10 + step)) for step in range(STEPS)])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-6, atol=1e-7)
    assert max(float((found[key] - weights[-1][key]).abs().max()) for key in found) > 1e-4


@pytest.mark.parametrize("changes", [{"ema_warmup": False}, {}])
def test_the_decay_is_a_function_of_the_step(changes):
    average = make_average(
        Shards(nn.Linear(1, 1), nn.Module()), parse(OptimizerSettings, {"ema_decay": 0.99, **changes})
    )
    decays = [average.decay_at(step) for step in (0, 1, 90, 890, 891, 5000)]
    assert decays == pytest.approx([0.99] * 6 if changes else [0.1, 2 / 11, 0.91, 0.99, 0.99, 0.99])
    assert make_average(Shards(nn.Linear(1, 1), nn.Module()), OptimizerSettings()) is None


def test_timm_averages_alike():
    """ModelEmaV3 with its decay fixed, buffers included."""
    from timm.utils import ModelEmaV3

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    average, theirs = Average(Shards(net, nn.Module()), 0.9, warmup=False), ModelEmaV3(net, decay=0.9)
    for step in range(4):
        net(torch.randn(2, 3, 5, 5))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(step, torch.tensor(0.0))
        theirs.update(net, step + 10)  # it copies at first
    found = average.gather(net.state_dict(), keep=True)
    expected = theirs.module.state_dict()
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-6)
    assert found["1.num_batches_tracked"] == 4


def test_frozen_and_shared_parameters():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    net["b"].weight = net["a"].weight
    net["c"].requires_grad_(False)
    average = Average(Shards(net, nn.Module()), 0.5, warmup=False)
    assert set(average.kept) == {"a.weight", "a.bias", "b.bias"}
    before = net["a"].weight.detach().clone()
    with torch.no_grad():
        net["a"].weight.add_(1.0)
    average.update(0, torch.tensor(0.0))
    found = average.gather(net.state_dict(), keep=True)
    assert torch.allclose(found["a.weight"], before + 0.5) and torch.equal(found["a.weight"], found["b.weight"])
    assert torch.equal(found["c.weight"], net["c"].weight) and average.gather({}, keep=False) == {}


def test_constants_of_a_model_are_not_averaged():
    """open_clip's text tower has a mask of -inf that no checkpoint holds."""
    net = nn.Linear(2, 2)
    net.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1), persistent=False)
    average = Average(Shards(net, nn.Module()), 0.5, warmup=False)
    average.update(0, torch.tensor(0.0))
    with average.applied():
        assert torch.equal(net.mask, torch.full((2, 2), float("-inf")).triu(1))
    average.load(average.gather(net.state_dict(), keep=True))
    assert set(average.kept) == {"weight", "bias"}


def test_a_skipped_step_leaves_it_unchanged():
    net = nn.Linear(3, 3)
    average = Average(Shards(net, nn.Module()), 0.5, warmup=True)
    before = {key: value.clone() for key, value in average.kept.items()}
    with torch.no_grad():
        net.weight.add_(1.0)
    average.update(3, torch.tensor(1.0))
    assert all(torch.equal(average.kept[key], before[key]) for key in before)
    average.update(3, torch.tensor(0.0))
    assert not torch.equal(average.kept["weight"], before["weight"])


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_it_is_validated_beside_the_weights(data, history):
    folder, _ = history
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "val_mean_recall" in line]
    assert [line["step"] for line in validated] == [3, STEPS]
    for line in validated:
        names = {key.removeprefix("val_") for key in line if key.startswith("val_") and "ema_" not in key}
        assert {f"val_ema_{name}" for name in names} <= line.keys() and len(names) > 5
    pairs = load_retrieval(data["val_data"])
    for place, prefix in ((str(folder), "val_"), (f"{folder}@ema", "val_ema_")):
        loaded = rwkv_clip.load_for_inference(place)
        extractor = FeatureExtractor.of(loaded, torch.device("cpu"), batch_size=8)
        found = evaluate_retrieval(extractor, pairs).metrics
        assert found["mean_recall"] == validated[-1][f"{prefix}mean_recall"], place
    assert validated[-1]["val_loss"] != validated[-1]["val_ema_loss"]


def test_the_weights_are_those_of_a_run_without(data, history):
    folder, _ = history
    plain = run(parse(Settings, data | {"name": "plain", "val_data": None}))
    one, other = find_checkpoint(folder), find_checkpoint(plain)
    for name in ("model.safetensors", "optim.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert not (other / "ema.safetensors").exists()


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_has_the_same_average(data, history, stop):
    folder, _ = history
    begun = folder / "checkpoints" / f"step-{stop:08}"
    again = run(
        parse(Settings, data | {"name": f"from {stop}", "ema_decay": DECAY, "val_data": None, "resume": str(begun)})
    )
    one, other = find_checkpoint(folder), find_checkpoint(again)
    assert (one / "ema.safetensors").read_bytes() == (other / "ema.safetensors").read_bytes()


def test_it_may_begin_and_end_in_a_resumed_run(data, history):
    """Allowed by name: from the weights as they are, and it is dropped."""
    folder, _ = history
    plain = run(
        parse(
            Settings,
            data | {"name": "later", "val_data": None, "max_steps": 4, "schedule": "constant", "cycle_beta1": False},
        )
    )
    settings = data | {"val_data": None, "max_steps": 4, "schedule": "constant", "cycle_beta1": False}
    settings |= {"resume": str(plain / "checkpoints" / "step-00000002"), "ema_decay": DECAY, "ema_warmup": False}
    with pytest.raises(ConfigError, match=r"ema_decay: None -> 0\.8"):
        run(parse(Settings, settings | {"name": "refused"}))
    allowed = {"allow_change": ["ema_decay", "ema_warmup"]}
    begun = find_checkpoint(run(parse(Settings, settings | {"name": "begins", **allowed})))
    raw = [read_weights(path) for path in list_checkpoints(plain)]
    gap = max(float((read_tensors(begun / "ema.safetensors")[key] - raw[0][key]).abs().max()) for key in raw[0])
    whole = max(float((raw[1][key] - raw[0][key]).abs().max()) for key in raw[0])
    assert 0 < gap < whole, "between the weights it began with and the last"
    ended = run(
        parse(
            Settings,
            data
            | {
                "name": "ends",
                "val_data": None,
                "resume": str(folder / "checkpoints" / "step-00000004"),
                "allow_change": ["ema_decay"],
            },
        )
    )
    assert not (find_checkpoint(ended) / "ema.safetensors").exists()


def test_an_interrupted_validation_gives_the_weights_back(history):
    net = nn.Linear(2, 2)
    average = Average(Shards(net, nn.Module()), 0.5, warmup=False)
    with torch.no_grad():
        net.weight.add_(1.0)
    bits, kept = net.weight.clone(), average.kept["weight"].clone()
    seen = []

    def validate() -> dict[str, float]:
        seen.append(net.weight.clone())
        if len(seen) == 2:
            raise Interrupted
        return {"a": 1.0}

    with pytest.raises(Interrupted):
        average.validated(validate, lambda: 0)()
    assert torch.equal(seen[0], bits) and torch.equal(seen[1], kept)
    assert torch.equal(net.weight, bits) and torch.equal(average.kept["weight"], kept)


@pytest.mark.parametrize("main", [True, False])
def test_a_signal_in_the_first_half_ends_it_on_every_rank(main):
    """The main rank is interrupted, another one only helps to gather the weights: neither begins the second half."""
    average, calls = Average(Shards(nn.Linear(2, 2), nn.Module()), 0.5, warmup=False), []

    def validate() -> dict[str, float]:
        calls.append("validate")
        if main:
            raise Interrupted
        return {}

    def agree() -> int:
        calls.append("agree")
        return 15

    with pytest.raises(Interrupted):
        average.validated(validate, agree)()
    assert calls == ["validate", "agree"]


# ---- files -----------------------------------------------------------------------------------------------------------


def test_how_it_is_opened(data, history):
    """PATH@ema for a run or a checkpoint, or the file itself; without it, the weights."""
    folder, weights = history
    newest = find_checkpoint(folder)
    averaged = read_tensors(newest / "ema.safetensors")
    for place in (f"{folder}@ema", f"{newest}@ema", newest / "ema.safetensors"):
        assert find_checkpoint(place) == newest / "ema.safetensors"
        loaded = rwkv_clip.load_for_inference(place)
        assert loaded.name == "model"
        for model in (loaded.model, rwkv_clip.create_model(data["model"], pretrained=place)):
            assert all(torch.equal(value, averaged[key]) for key, value in model.state_dict().items())
    model = rwkv_clip.create_model(f"{folder}@ema")
    assert all(torch.equal(value, averaged[key]) for key, value in model.state_dict().items())
    assert rwkv_clip.get_tokenizer(f"{folder}@ema").context == loaded.tokenizer.context
    assert find_base(f"{folder}@ema").path.name == "ema.safetensors"
    raw = rwkv_clip.load_for_inference(folder)
    assert all(torch.equal(value, weights[-1][key]) for key, value in raw.model.state_dict().items())
    assert raw.digest != loaded.digest, "stored features are not mixed up"


def test_open_clips_models_take_it_too(tmp_path):
    description = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1},
    }
    one, other = rwkv_clip.create_model(description), rwkv_clip.create_model(description)
    from rwkv_clip.checkpoint import save_checkpoint

    facts = {"samples_seen": 1, "model": "x", "spec": one.spec.to_json()}
    save_checkpoint(tmp_path, 1, one.state_dict(), {}, facts, 2, other.state_dict())
    loaded = rwkv_clip.create_model(description, pretrained=f"{tmp_path}@ema")
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.fixture
def copied(history, tmp_path):
    shutil.copytree(find_checkpoint(history[0]), tmp_path / "run" / "checkpoints" / "step-00000006")
    return tmp_path / "run" / "checkpoints" / "step-00000006"


def test_damage_is_seen(copied):
    file = copied / "ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: damaged \(differs from MANIFEST"):
        verify_checkpoint(copied)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: damaged"):
        find_checkpoint(file)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: missing"):
        verify_checkpoint(copied)


def test_a_manifest_without_it_is_damaged(copied):
    manifest = json.loads((copied / "MANIFEST.json").read_text())
    del manifest["files"]["ema.safetensors"]
    (copied / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="damaged; it has to list"):
        find_checkpoint(copied / "ema.safetensors")


def test_a_run_without_it_says_so(tmp_path):
    net = rwkv_clip.create_model(MODEL)
    from rwkv_clip.checkpoint import save_checkpoint

    save_checkpoint(tmp_path, 1, net.state_dict(), {}, {"samples_seen": 1}, 2)
    with pytest.raises(CheckpointError, match=r"holds no averaged weights .*--ema-decay"):
        find_checkpoint(f"{tmp_path}@ema")


def test_the_evaluation_command_takes_it(data, history):
    command = [sys.executable, "-m", "rwkv_clip.eval.main", "retrieval", "--checkpoint", f"{history[0]}@ema"]
    command += ["--data", data["val_data"], "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    line = json.loads((history[0] / "log.jsonl").read_text().splitlines()[-1])
    shown = f"{line['val_ema_text_to_image_R@5']:.3f}"
    assert shown in done.stdout or f"{100 * line['val_ema_text_to_image_R@5']:.1f}" in done.stdout, done.stdout


def test_adapters_have_no_average():
    with pytest.raises(ConfigError, match="ema_decay: averages are of whole models"):
        parse(Settings, {"ema_decay": 0.99, "lora_rank": 4})
