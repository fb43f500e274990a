"""ALIP in a training run: which texts reach the towers, what is refused, what a resumption restores, what is logged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import rwkv_clip
from helpers.ranks import digest
from helpers.tiny import BATCH, make_smaller, make_tiny
from rwkv_clip.checkpoint import CheckpointError, find_checkpoint, read_tensors
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.data.build import build_records
from rwkv_clip.dist import World
from rwkv_clip.losses import ALIP, GateSettings, InfoNCE, make_objective
from rwkv_clip.training import checkpointing
from rwkv_clip.training.data.batch import Batch
from rwkv_clip.training.main import read_command_line, run
from rwkv_clip.training.settings import Settings, load_settings
from rwkv_clip.training.state import TrainState
from rwkv_clip.training.trainer import Trainer

STEPS = 8
METHOD = {"objective": "alip", "text_choice": "all", "texts": 2, "gates": {"init": 0.5, "momentum": 0.75}}
MEANS = "objective/mean_similarity"
NAMES = ("text", "raw", "caption")
VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Half of such a short run's time."""
    monkeypatch.setattr("rwkv_clip.training.main.plot_training", lambda folder: None)


@pytest.fixture(scope="module")
def data(new_folder):
    folder = new_folder("tiny")
    made = make_smaller(make_tiny(folder))
    lines = (folder / "all.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[:BATCH]))
    for texts in (("raw",), ("raw", "synthetic")):
        build_records(str(folder / "few.jsonl"), str(folder / f"texts{len(texts)}"), texts=texts, context=8, workers=1)
    quiet = {"val_data": None, "max_steps": STEPS, "save_every_n_steps": 1, "keep_checkpoints": 99, "lr": 3e-3}
    return made | quiet


@pytest.fixture(scope="module")
def whole(data):
    """An uninterrupted run of METHOD with a checkpoint after every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rwkv_clip.training.main.plot_training", lambda folder: None)
        return run(parse(Settings, data | METHOD | {"name": "whole"}))


def logged(folder: Path) -> list[dict[str, float]]:
    timed = {"samples_per_second", "wait_share", "eta_seconds", "seconds", "peak_memory_mb", "skipped"}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def means_of(folder: Path, step: int | None = None) -> torch.Tensor:
    path = folder / "checkpoints" / f"step-{step:08d}" if step else find_checkpoint(folder)
    return read_tensors(path / "optim.safetensors")[MEANS]


def branch_off(data: dict, whole: Path, name: str, step: int, **changes) -> Path:
    """A run that goes on, perhaps otherwise, from what `whole` was after `step`."""
    folder = whole.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "log.jsonl", folder)
    kept = f"checkpoints/step-{step:08d}"
    shutil.copytree(whole / kept, folder / kept)
    return run(parse(Settings, data | {"name": name, "resume": "latest", "save_every_n_steps": 99} | changes))


# ---- views ---------------------------------------------------------------------------------------------------------


def make_trainer(data: dict, model=None, **changes) -> Trainer:
    settings = parse(Settings, data | changes)
    torch.manual_seed(0)
    model = rwkv_clip.create_model(model or settings.model.model, drop_path=None if model else 0.0)
    objective = make_objective(settings.loss)
    return Trainer(TrainState(model, objective, settings, World(0, 1, torch.device("cpu")), 60))


def make_batch(step: int = 0) -> Batch:
    """Three texts an image; the first token says whose text it is, and which."""
    g = torch.Generator().manual_seed(step)
    text = torch.randint(1, 1000, (BATCH, 3, 8), generator=g)
    text[..., 0] = 1 + torch.arange(3 * BATCH).view(BATCH, 3)
    image = torch.randint(0, 256, (BATCH, 3, 16, 16), generator=g, dtype=torch.uint8)
    return Batch(image, text, torch.arange(BATCH) + BATCH * step, torch.zeros(BATCH, dtype=torch.long), 0)


@pytest.mark.parametrize("texts", [1, 2, 3, None])
@pytest.mark.parametrize("choice", ["one", "first", "all"])
def test_texts_that_the_tower_sees(data, choice, texts):
    """And that it sees all of them at once."""
    trainer, seen = make_trainer(data, text_choice=choice, texts=texts), []
    trainer.state.model.text_model.register_forward_pre_hook(lambda tower, arguments: seen.append(arguments[0]))
    batch, used = make_batch(), texts or 3
    trainer.step(batch)
    (text,) = seen
    if choice == "one":
        chosen = [row.tolist().index(first) for row, first in zip(batch.text[:, :, 0], text[:, 0].tolist())]
        assert set(chosen) <= set(range(used)) and (used == 1 or len(set(chosen)) > 1)
        expected = batch.text[torch.arange(BATCH), chosen]
    else:
        expected = batch.text[:, 0] if choice == "first" else batch.text[:, :used].flatten(0, 1)
    assert torch.equal(text, expected)


@pytest.mark.parametrize("model", [None, VIT], ids=["RWKV", "ViT"])
def test_one_call_of_the_text_tower_a_piece(data, model):
    seen, changes = [], {**METHOD, "batch_size": BATCH // 2, "accum_freq": 2}
    trainer = make_trainer(data, model, **changes)
    tower = trainer.state.model.token_embedding if model else trainer.state.model.text_model
    tower.register_forward_pre_hook(lambda tower, arguments: seen.append(arguments[0]))
    batch = make_batch()
    trainer.step(batch)
    pieces = batch.text[:, :2].unflatten(0, (2, -1)).flatten(1, 2)
    assert [torch.equal(text, piece) for text, piece in zip(seen, [*pieces, *pieces])] == [True] * 4 and len(seen) == 4


def test_infonce_of_all_views_is_the_mean():
    torch.manual_seed(0)
    leaves = [F.normalize(torch.randn(*shape, 4).double(), dim=-1) for shape in ((6,), (6, 3))]
    leaves = [x.requires_grad_() for x in (*leaves, torch.tensor(7.0).double())]
    image, text, scale = leaves
    infonce = InfoNCE()
    found = infonce(*leaves)[0]["contrastive"]
    single = torch.stack([infonce(image, text[:, view], scale)[0]["contrastive"] for view in range(3)])
    assert single.std() > 0.01
    torch.testing.assert_close(found, single.mean(), rtol=1e-14, atol=0)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(single.mean(), leaves)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"text_choice": "one"},
            ["objective: alip compares 2 texts", "--text-choice one", "give it 1", "--text-choice all --texts 2"],
        ),
        (
            {"text_choice": "first"},
            ["objective: alip compares 2 texts", "--text-choice first", "--text-choice all --texts 2"],
        ),
        ({"texts": 1}, ["objective: alip compares 2 texts", "texts raw give it 1", "--text-choice all --texts 2"]),
        ({"texts": None}, ["objective: alip", "raw, synthetic, generated give it 3", "--text-choice all --texts 2"]),
        ({"texts": 3}, ["objective: alip", "raw, synthetic, generated give it 3", "--text-choice all --texts 2"]),
        ({"train_data": "texts1", "texts": None}, ["objective: alip compares 2", "texts raw give it 1", "records"]),
        ({"train_data": "texts1"}, ["texts1: texts per image: 1 (raw), --texts asks for 2; build records with more"]),
        (
            {"train_data": "texts2", "texts": 3, "objective": "infonce", "gates": {}},
            ["2 (raw, synthetic)", "asks for 3"],
        ),
        ({"train_data": "texts2", "texts": 3}, ["2 (raw, synthetic)", "asks for 3"]),
        (
            {"texts": None, "objective": "infonce", "gates": {}, "text_choice": "one", "text_probs": [0.5, 0.5]},
            ["text_probs: 2 numbers for the texts raw, synthetic, generated; give one for each"],
        ),
    ],
    ids=str,
)
def test_texts_that_do_not_suffice_are_refused_before_training(data, changes, words):
    changes = dict(changes)
    if "train_data" in changes:
        changes["train_data"] = str(Path(data["train_data"]).parent / changes["train_data"])
    with pytest.raises(ConfigError) as error:
        run(parse(Settings, data | METHOD | changes | {"name": "refused"}))
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)
    assert not (Path(data["logs"]) / "refused").exists()


def test_records_of_two_texts_serve_without_a_number(data):
    two = {"train_data": str(Path(data["train_data"]).parent / "texts2"), "texts": None, "max_steps": 1}
    assert "caption_loss" in logged(run(parse(Settings, data | METHOD | two | {"name": "two texts"})))[0]


@pytest.mark.parametrize("shape", [(4, 3), (4, 1, 3), (4, 3, 3), (5, 2, 3), (4, 2, 5), (2, 4, 3)], ids=str)
def test_features_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"features: .*texts \("):
        ALIP()(torch.ones(4, 3), torch.ones(shape), torch.tensor(1.0))
    with pytest.raises(ValueError, match="features: texts are not a floating-point tensor"):
        ALIP()(torch.ones(4, 3), torch.ones(shape).tolist(), torch.tensor(1.0))


# ---- settings ------------------------------------------------------------------------------------------------------


def test_settings_of_the_gates():
    arguments = ["--train-data", "x", "--objective", "alip", "--gates.init", "0.5", "--gates.pair-gamma", "3"]
    gates = read_command_line(arguments).loss.gates
    assert gates == GateSettings(init=0.5, pair_gamma=3.0) and gates.momentum == 0.99 and gates.sample_gamma == 2.0
    assert load_settings("alip-b32-yfcc15m").loss.gates == GateSettings()
    for flag, value, problem in (
        ("--gates.momentum", "1.5", "gates.momentum: 1.5 must be at most 1"),
        ("--gates.init", "40", "gates.init: 40.0 must be at most 1"),
        ("--gates.sample-gamma", "-1", "gates.sample_gamma: -1.0 must be at least 0"),
        ("--gates.pair-gamma", "nan", "gates.pair_gamma: nan is not a finite number"),
    ):
        with pytest.raises(ConfigError, match=problem):
            read_command_line(["--train-data", "x", "--objective", "alip", flag, value])
    with pytest.raises(ConfigError, match="gates: need objective alip, not infonce"):
        read_command_line(["--train-data", "x", "--gates.init", "0.5"])


def test_evaluation_leaves_the_means():
    alip = ALIP().eval()
    alip(torch.eye(3), torch.eye(3).flip(0).unsqueeze(1).expand(3, 2, 3), torch.tensor(2.0))
    assert alip.mean_similarity.tolist() == [1, 1, 1]


def test_half_precision_features_are_compared_in_float32():
    torch.manual_seed(0)
    image, text, scale = F.normalize(torch.randn(9, 64), dim=-1), F.normalize(torch.randn(9, 2, 64), dim=-1), 8.0
    text = F.normalize(text + image[:, None], dim=-1)
    image, text, found = image.bfloat16(), text.bfloat16(), []
    for cast in (torch.Tensor.bfloat16, torch.Tensor.float):
        alip = ALIP(GateSettings(init=0.5, momentum=0.5))
        with torch.autocast("cpu", torch.bfloat16, enabled=cast is torch.Tensor.bfloat16):
            losses, report = alip(cast(image), cast(text), torch.tensor(scale))
        found.append(losses | report)
    assert all(value.dtype == torch.float32 and torch.equal(value, found[1][key]) for key, value in found[0].items())


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_resumed_run_has_the_same_bits(data, whole, stop):
    folder = branch_off(data | METHOD, whole, f"from {stop}", stop)
    assert digest(find_checkpoint(folder)) == digest(find_checkpoint(whole))
    assert logged(folder) == logged(whole)
    assert torch.equal(means_of(folder), means_of(whole)) and not torch.equal(means_of(whole), means_of(whole, stop))


@pytest.mark.parametrize("changes", [{"precision": "amp"}, {"batch_size": BATCH // 2, "accum_freq": 2}], ids=str)
def test_a_resumed_run_has_the_same_bits_in_other_modes(data, changes):
    other = run(parse(Settings, data | METHOD | changes | {"name": "other mode", "resume": "latest"}))
    folder = branch_off(data | METHOD | changes, other, "from 3, too", 3)
    assert digest(find_checkpoint(folder)) == digest(find_checkpoint(other))
    shutil.rmtree(other)


def test_what_is_saved_is_what_is_logged(whole):
    for line in logged(whole):
        saved = means_of(whole, line["step"])
        assert [line[f"momentum_{name}_sim"] for name in NAMES] == saved.tolist()


@pytest.mark.parametrize(
    "damage",
    [lambda tensors: tensors.pop(MEANS), lambda tensors: tensors.update({MEANS: torch.ones(2)})],
    ids=["missing", "of another shape"],
)
def test_means_that_do_not_fit_are_refused(data, whole, damage, monkeypatch):
    def read(path, _read=checkpointing.read_tensors):
        tensors = _read(path)
        damage(tensors)
        return tensors

    monkeypatch.setattr(checkpointing, "read_tensors", read)
    with pytest.raises(
        CheckpointError,
        match=r"step-00000003: its optimizer or objective state does not fit \(mean_similarity: (missing|shape)",
    ):
        branch_off(data | METHOD, whole, "damaged", 3)


def test_another_objective_begins_with_its_own_means(data, whole):
    """Refused with everything that differs; allowed, METHOD takes up the weights of a CLIP run, and the other way."""
    plain = run(parse(Settings, data | {"name": "plain", "text_choice": "first"}))
    with pytest.raises(ConfigError) as error:
        branch_off(data | METHOD, plain, "refused", 5)
    differ = ["objective: 'infonce' -> 'alip'", "text_choice: 'first' -> 'all'", "texts: None -> 2"]
    assert all(line in error.value.problems for line in differ) and "--allow-change text_choice texts objective" in str(
        error.value
    )

    allowed = {"allow_change": ["objective", "text_choice", "texts", "gates"]}
    line = logged(branch_off(data | METHOD, plain, "to alip", 5, **allowed))[5]
    for name in NAMES:
        assert line[f"momentum_{name}_sim"] == pytest.approx(0.75 * 0.5 + 0.25 * line[f"current_{name}_sim"], rel=1e-6)
    back = find_checkpoint(branch_off(data | {"text_choice": "first"}, whole, "to infonce", 5, **allowed))
    assert MEANS not in read_tensors(back / "optim.safetensors")
    noted = [change["setting"] for change in json.loads((back / "state.json").read_text())["changes"]]
    assert sorted(noted) == ["gates", "objective", "text_choice", "texts"]


def test_other_gates_go_on_with_the_means(data, whole):
    other = data | METHOD | {"gates": {"init": -0.5, "momentum": 1.0}}
    with pytest.raises(ConfigError, match="gates: "):
        branch_off(other, whole, "refused", 5)
    folder = branch_off(other, whole, "other gates", 5, allow_change=["gates"])
    assert torch.equal(means_of(folder), means_of(whole, 5))


def test_a_skipped_step_leaves_the_means(data, monkeypatch):
    """Features that are not finite, and gradients that overflow float16: as if the step had not been."""
    trainer = make_trainer(data, **METHOD, on_nonfinite="skip")
    trainer.step(make_batch(0))
    before = trainer.state.objective.mean_similarity.clone()
    forward = type(trainer.state.model).forward

    def poisoned(*inputs, **named):
        return {name: value * float("nan") for name, value in forward(*inputs, **named).items()}

    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.state.model), "forward", poisoned)
        trainer.step(make_batch(1))
    assert torch.equal(trainer.state.objective.mean_similarity, before)
    trainer.step(make_batch(2))
    assert not torch.equal(trainer.state.objective.mean_similarity, before)


def test_an_overflow_leaves_the_means(data):
    trainer = make_trainer(data, **METHOD, precision="amp")
    trainer.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    values = trainer.step(make_batch(0))
    assert values["loss"].isfinite() and not values["grad_norm"].isfinite()
    assert trainer.state.objective.mean_similarity.tolist() == [0.5] * 3
    trainer.state.scaler.update(2.0**10)
    trainer.step(make_batch(1))
    assert 0.5 not in trainer.state.objective.mean_similarity.tolist()


# ---- log -----------------------------------------------------------------------------------------------------------


def test_log_and_tensorboard(data):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(parse(Settings, data | METHOD | {"name": "log", "max_steps": 2, "report_to": ["tensorboard"]}))
    keys = {f"{kind}_{name}" for name in NAMES for kind in ("current", "momentum")}
    keys = {f"{key}_sim" for key in keys} | {f"weight_{name}_mean" for name in NAMES}
    keys |= {"loss", "raw_loss", "caption_loss"}
    lines, events = logged(folder), EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for line in lines:
        assert keys <= line.keys() and line["loss"] == pytest.approx(line["raw_loss"] + line["caption_loss"])
    for key in keys:
        shown = {event.step: event.value for event in events.Scalars(key)}
        assert shown == pytest.approx({line["step"]: line[key] for line in lines}, rel=1e-6)


def test_other_objectives_have_no_such_lines(data):
    folder = run(parse(Settings, data | {"name": "no lines", "max_steps": 1}))
    assert not [key for key in logged(folder)[0] if key.endswith(("_sim", "_mean")) or key == "raw_loss"]
