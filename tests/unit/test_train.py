"""Training end to end on tiny data: it learns, logs, resumes with the same bits, and refuses what does not fit."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny import BATCH, COUNT, STEPS, make_tiny, to_arguments

import rwkv_clip
from rwkv_clip.checkpoint import CheckpointError, find_checkpoint, read_tensors, read_weights
from rwkv_clip.config import ConfigError, Settings, parse
from rwkv_clip.dist import join_world
from rwkv_clip.objective import make_objective
from rwkv_clip.training import loop
from rwkv_clip.training.data import Batch
from rwkv_clip.training.main import read_command_line, run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def settings(data, **changes) -> Settings:
    return parse(Settings, {**data, **changes})


def state_of(folder):
    path = find_checkpoint(folder)
    return {**read_weights(path), **read_tensors(path / "optim.safetensors")}, json.loads(
        (path / "state.json").read_text()
    )


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(data):
    """An uninterrupted run."""
    return run(settings(data, name="whole", val_every_n_steps=5))


def test_run_folder(whole):
    records = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    keys = {
        "loss",
        "lr",
        "logit_scale",
        "grad_norm",
        "samples_per_second",
        "wait_share",
        "peak_memory_mb",
        "epoch",
    }
    assert keys <= steps[0].keys() and steps[-1]["epoch"] == pytest.approx(STEPS * BATCH / COUNT)
    assert [r["step"] for r in records if "val_text_to_image_R@1" in r] == [5, 10]
    assert (whole / "training.png").stat().st_size > 10_000
    assert parse(Settings, json.loads((whole / "settings.json").read_text())).max_steps == STEPS
    names = [path.name for path in sorted((whole / "checkpoints").iterdir())]
    assert names == ["step-00000009", "step-00000010"]


def test_checkpoint_opens_for_inference_without_further_settings(whole):
    loaded = rwkv_clip.load_for_inference(whole)
    assert loaded.name == "model" and len(loaded.digest) == 64
    text = loaded.model.encode_text(loaded.tokenizer(["stripes 3"]), normalize=True)
    assert text.shape == (1, 32)


def test_text_choice_depends_on_seed_epoch_and_sample_only(data):
    text = torch.arange(3).expand(64, 3).unsqueeze(-1)  # view v of every sample is the token v

    def chosen(seed=0, epoch=0, ids=range(64), **changes):
        model = rwkv_clip.create_model(data["model"])
        trainer = loop.Trainer(
            model, make_objective("infonce"), settings(data, seed=seed, **changes), join_world("cpu"), 60
        )
        batch = Batch(torch.empty(0), text, torch.tensor(list(ids)), torch.full((64,), epoch), 0)
        return trainer.choose_view(batch).flatten().tolist()

    first = chosen()
    assert sorted(set(first)) == [0, 1, 2] and chosen() == first
    assert chosen(ids=reversed(range(64)))[::-1] == first, "the place in the batch does not matter"
    assert chosen(seed=1) != first and chosen(epoch=1) != first and chosen(ids=range(64, 128)) != first
    assert set(chosen(views="first")) == {0}


class Crash(Exception):
    pass


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_interrupted_equals_uninterrupted(data, whole, stop, monkeypatch):
    """Stopped in mid-epoch after any step, with the last checkpoint 0 to 2 steps before."""
    name = f"stop{stop}"
    step = loop.Trainer.step

    def crash(self, batch):
        if self.progress.step == stop:
            raise Crash
        return step(self, batch)

    monkeypatch.setattr(loop.Trainer, "step", crash)
    with pytest.raises(Crash):
        run(settings(data, name=name))
    monkeypatch.undo()
    folder = run(settings(data, name=name, resume="latest"))
    (ours, our_state), (theirs, their_state) = state_of(folder), state_of(whole)
    assert same_bits(ours, theirs)
    assert our_state["samples_seen"] == their_state["samples_seen"] == STEPS * BATCH
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in logged if "loss" in record] == list(range(1, STEPS + 1))


def test_the_seed_decides(data, whole):
    again = run(settings(data, name="again"))
    other = run(settings(data, name="other", seed=1))
    assert same_bits(state_of(again)[0], state_of(whole)[0])
    assert not same_bits(state_of(other)[0], state_of(whole)[0])


@pytest.mark.parametrize("changes", [{"lr": 0.5}, {"seed": 3}, {"batch_size": 4}, {"max_steps": 12}, {"wd": 0.0}])
def test_resume_refuses_another_run(data, whole, changes):
    with pytest.raises(ConfigError, match="belongs to a run with other settings") as error:
        run(settings(data, name="whole", resume="latest", **changes))
    assert any("->" in problem for problem in error.value.problems)


def test_a_second_run_does_not_overwrite_the_first(data, whole):
    with pytest.raises(ConfigError, match="add --resume latest"):
        run(settings(data, name="whole"))
    with pytest.raises(CheckpointError, match="no such file"):
        run(settings(data, name="new", resume="nowhere"))


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"grad_checkpointing": True},
        {"schedule": "cosine", "cycle_beta1": False, "decay": "all", "views": "first", "drop_path": 0.0},
        {"workers": 2, "val_data": None},
        {"report_to": ["tensorboard"]},
        {"loader": "dali", "workers": 1},
        {"torchcompile": True, "grad_checkpointing": True},
    ],
    ids=str,
)
def test_variants_train(data, changes):
    if changes.get("loader") == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install -e .[dali]")
    folder = run(settings(data, max_steps=2, name=f"variant {abs(hash(str(changes)))}", **changes))
    last = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][-1]
    assert last["step"] == 2
    if "report_to" in changes:
        assert list((folder / "tensorboard").iterdir())


def test_wandb_gets_every_record(data, monkeypatch):
    class Run:
        logged, finished = [], False

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            Run.finished = True

    stub = types.SimpleNamespace(init=lambda **about: Run())
    monkeypatch.setitem(sys.modules, "wandb", stub)
    run(settings(data, name="charts", max_steps=2, report_to=["wandb"]))
    assert [step for step, values in Run.logged if "loss" in values] == [1, 2] and Run.finished
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb is not installed; pip install -e \.\[wandb\]"):
        run(settings(data, name="no charts", max_steps=2, report_to=["wandb"]))


def test_recomputation_changes_nothing(data, whole):
    assert same_bits(state_of(run(settings(data, name="lean", grad_checkpointing=True)))[0], state_of(whole)[0])


def test_non_finite_numbers_stop_before_the_weights(data, monkeypatch):
    forward = rwkv_clip.RWKVCLIP.forward

    def poisoned(self, image, text):
        features, *rest = forward(self, image, text)
        return features * float("nan"), *rest

    monkeypatch.setattr(rwkv_clip.RWKVCLIP, "forward", poisoned)
    with pytest.raises(loop.NumericsError, match=r"step 0: loss nan.*records \["):
        run(settings(data, name="nan"))


@pytest.mark.parametrize("start, bound", [(9.0, 100.0), (-3.0, 1.0)])
def test_logit_scale_stays_between_1_and_100(data, monkeypatch, start, bound):
    init = rwkv_clip.RWKVCLIP.__init__

    def extreme(self, config):
        init(self, config)
        self.logit_scale.data.fill_(start)

    monkeypatch.setattr(rwkv_clip.RWKVCLIP, "__init__", extreme)
    folder = run(settings(data, name=f"scale {start}", max_steps=1))
    assert read_weights(folder)["logit_scale"].exp().item() == pytest.approx(bound)


def test_open_clip_towers_train(data):
    model = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    }
    path = Path(data["model"]).with_name("vit.json")
    path.write_text(json.dumps(model))
    folder = run(settings(data, model=str(path), name="vit", max_steps=2))
    loaded = rwkv_clip.load_for_inference(folder)
    assert loaded.model.encode_image(torch.randn(1, 3, 32, 32)).shape == (1, 32)


def test_records_of_a_longer_context_are_refused(data, tmp_path):
    model = json.loads(Path(data["model"]).read_text())
    model["text"]["context"] = 6
    (tmp_path / "short.json").write_text(json.dumps(model))
    with pytest.raises(ConfigError, match="8 tokens a text, the model's context is 6"):
        run(settings(data, model=str(tmp_path / "short.json"), name="short"))


def test_command_line(data):
    parsed = read_command_line(["--preset", "rwkv-clip-b32-yfcc15m", "--train-data", "x", "--lr", "0.5", "--flip", "0"])
    assert (parsed.model, parsed.lr, parsed.flip, parsed.decay) == ("RWKV-CLIP-B-32", 0.5, 0.0, "all")
    assert read_command_line(to_arguments(data)) == settings(data)
    assert read_command_line(["--train-data", "x", "--preset=demo"]).model == "RWKV-CLIP-Ti-8"
    with pytest.raises(ConfigError, match="preset: needs a value; shipped: demo"):
        read_command_line(["--preset"])
    with pytest.raises(ConfigError) as error:
        read_command_line(["--lr", "-1", "--epochs", "0"])
    assert len(error.value.problems) == 3  # and no records


FLAGS = """
batch-size beta1 beta2 crop-area crop-aspect cycle-beta1 decay device drop-path epochs eps flip
grad-checkpointing grad-clip-norm keep-checkpoints loader log-every-n-steps logs lr max-steps model name
objective precision pretrained report-to resume save-every-n-steps schedule seed torchcompile train-data
val-data val-every-n-steps val-prefix val-split views warmup wd workers
"""


def test_public_flags_are_frozen():
    """Users have these in their scripts. A new one is added here on purpose; none disappears."""
    assert sorted(f.name.replace("_", "-") for f in dataclasses.fields(Settings)) == FLAGS.split()


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--train-data", "nowhere"], 2, "nowhere"),
        (["--lr", "-1", "--train-data", "x"], 2, "lr: -1.0 must be more than 0"),
        (["--preset", "rwkv-clip-b32"], 2, "did you mean 'rwkv-clip-b32-yfcc15m'"),
        ([], 2, "train_data: not set"),
        (["--batchsize", "3"], 2, "batch"),
    ],
)
def test_mistakes_end_with_a_code_and_no_traceback(arguments, code, message):
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_clip.training.main", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr
