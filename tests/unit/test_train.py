"""Training end to end on tiny data: it learns, logs, resumes with the same bits, and refuses what does not fit."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rwkv_clip
from helpers.tiny import BATCH, COUNT, STEPS, make_tiny, to_arguments
from rwkv_clip.checkpoint import CheckpointError, find_checkpoint, read_tensors, read_weights
from rwkv_clip.config import ConfigError, flat_names, parse
from rwkv_clip.dist import join_world
from rwkv_clip.losses import InfoNCE
from rwkv_clip.training import loop
from rwkv_clip.training.data.batch import Batch
from rwkv_clip.training.faults.nonfinite import FiniteGuard, NumericsError
from rwkv_clip.training.main import read_command_line, run
from rwkv_clip.training.optim import Schedule, build_optimizer, update_weights
from rwkv_clip.training.optimizer_state import pack_state
from rwkv_clip.training.parallel import Shards
from rwkv_clip.training.run import claim_folder
from rwkv_clip.training.settings import OptimizerSettings, Settings, load_settings
from rwkv_clip.training.state import TrainState
from rwkv_clip.training.trainer import Trainer


@pytest.fixture(scope="module")
def data(new_folder):
    return make_tiny(new_folder("tiny"))


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
    assert parse(Settings, json.loads((whole / "settings.json").read_text())).optimizer.max_steps == STEPS
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
        trainer = Trainer(TrainState(model, InfoNCE(), settings(data, seed=seed, **changes), join_world("cpu"), 60))
        batch = Batch(torch.empty(0), text, torch.tensor(list(ids)), torch.full((64,), epoch), 0)
        return trainer.choose_texts(batch).flatten().tolist()

    first = chosen()
    assert sorted(set(first)) == [0, 1, 2] and chosen() == first
    assert chosen(ids=reversed(range(64)))[::-1] == first, "the place in the batch does not matter"
    assert chosen(seed=1) != first and chosen(epoch=1) != first and chosen(ids=range(64, 128)) != first
    assert set(chosen(text_choice="first")) == {0}
    assert set(chosen(text_probs=[0, 0.5, 0.5])) == {1, 2} and set(chosen(text_probs=[0, 0, 1])) == {2}


class Crash(Exception):
    pass


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_interrupted_equals_uninterrupted(data, whole, stop, monkeypatch):
    """Stopped in mid-epoch after any step, with the last checkpoint 0 to 2 steps before."""
    name = f"stop{stop}"
    step = loop.Trainer.step

    def crash(self, batch):
        if self.state.progress.step == stop:
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
    with pytest.raises(ConfigError, match="resume it by --resume latest"):
        run(settings(data, name="whole"))
    with pytest.raises(CheckpointError, match="no such file"):
        run(settings(data, name="new", resume="nowhere"))


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_clip.training.run.time.strftime", lambda _: "20261121-120000")
    names = [claim_folder(tmp_path / "logs", "vit") for _ in range(3)]
    assert names == [f"vit-20261121-120000{end}" for end in ("", "-2", "-3")]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == sorted(names)


def test_logs_that_cannot_be_a_folder_are_named(tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
    (tmp_path / "file").touch()
    for name in ("gone", "file", "file/below"):
        with pytest.raises(ConfigError, match=f"logs: .*{name} cannot be created"):
            claim_folder(tmp_path / name, "vit")


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "amp_bf16"},
        {"precision": "amp"},
        {"grad_checkpointing": True},
        {"schedule": "cosine", "cycle_beta1": False, "decay": "all", "text_choice": "first", "drop_path": 0.0},
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


def bits_of(trainer):
    """Copies of weights and optimizer state."""
    tensors = {**trainer.state.model.state_dict(), **pack_state(trainer.state.optimizer, trainer.state.shards.own)}
    return {key: value.clone() for key, value in tensors.items()}


@pytest.fixture(scope="module")
def history(data):
    """Weights and optimizer state of a good run after 0, 1, .. steps."""
    bits, step = [], loop.Trainer.step

    def recorded(self, batch):
        if not bits:
            bits.append(bits_of(self))
        values = step(self, batch)
        bits.append(bits_of(self))
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "step", recorded)
        run(settings(data, name="history"))
    return bits


@pytest.mark.parametrize("every", [1, 4], ids="logged every {}".format)
@pytest.mark.parametrize("at", [0, 4, 5, STEPS - 1])  # 5 and the last one are to be saved
def test_non_finite_numbers_stop_before_the_weights(data, history, monkeypatch, at, every):
    """The run stops at the bad step or one later, names it, and holds the bits of the step before."""
    forward, calls, trainers = rwkv_clip.RWKVCLIP.forward, iter(range(STEPS)), []

    def poisoned(self, *inputs, **named):
        features = forward(self, *inputs, **named)
        return features | {"image": features["image"] * (float("nan") if next(calls) == at else 1.0)}

    class Trainer(loop.Trainer):
        def step(self, batch):
            trainers.append(self)
            return super().step(batch)

    monkeypatch.setattr(rwkv_clip.RWKVCLIP, "forward", poisoned)
    monkeypatch.setattr("rwkv_clip.training.main.Trainer", Trainer)
    name = f"nan {at} {every}"
    with pytest.raises(NumericsError, match=rf"^step {at}: loss nan, gradient norm .*records \[\d+, .* on rank 0"):
        run(settings(data, name=name, log_every_n_steps=every))
    assert len(trainers) == at + (1 if every == 1 or at in (5, STEPS - 1) else 2), "one step later at most"
    bits = bits_of(trainers[0])
    slots = {key: torch.zeros_like(value) for key, value in bits.items() if key not in history[at]}
    assert same_bits(bits, history[at] | slots)  # the first step makes the optimizer's slots, which stay 0
    folder = Path(data["logs"]) / name
    saved = sorted(path.name for path in folder.glob("checkpoints/step-*"))
    assert saved == [f"step-{step:08d}" for step in range(3, at + 1, 3)][-2:]
    assert "NaN" not in (folder / "log.jsonl").read_text()


def test_a_bad_rank_stops_all(monkeypatch):
    watch = FiniteGuard(join_world("cpu"))
    good, ids = torch.tensor(1.0), torch.arange(3)
    assert watch.judge(good, good, False).item() == 0
    watch.report(0, ids, good, good)
    others = torch.tensor([1.0, 1.0, 0.0, 0.0])  # another rank's flags: failed, overflow, signal, void
    monkeypatch.setattr("rwkv_clip.training.faults.nonfinite.max_over_ranks", lambda own: torch.maximum(own, others))
    assert watch.judge(good, good, False).item() == 1
    monkeypatch.undo()
    watch.report(1, ids, good, good)
    with pytest.raises(NumericsError, match=r"^step 1: loss 1, gradient norm 1; records \[0, 1, 2\]"):
        watch.check()
    assert watch.judge(good, good, False).item() == 1, "no step after a bad one"


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_changes_nothing(data, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr("rwkv_clip.training.optim.FUSED", ())
    layer = torch.nn.Linear(3, 3)
    optimizer = build_optimizer(Shards(layer, torch.nn.Module()), settings(data).optimizer)
    before, nothing = [p.clone() for p in layer.parameters()], torch.tensor(1.0)
    for skip, moved in ((nothing, False), (torch.tensor(0.0), True)):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if skip else 1.0)
        update_weights(optimizer, skip)
        for parameter, old in zip(layer.parameters(), before):
            assert parameter.isfinite().all() and torch.equal(parameter, old) != moved
    assert [slots["step"].item() for slots in optimizer.state.values()] == [1, 1]


def test_fp16_overflow_is_skipped_and_the_scale_falls(data, monkeypatch):
    """A scale that makes gradients infinite: the first step is skipped, the next has a scale that fits."""
    trainers, init = [], loop.Trainer.__init__

    def start(self, *arguments):
        init(self, *arguments)
        self.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-110)
        trainers.append(self)

    monkeypatch.setattr(loop.Trainer, "__init__", start)
    run(settings(data, name="overflow", precision="amp", max_steps=4))
    steps = {slots["step"].item() for slots in trainers[0].state.optimizer.state.values()}
    assert steps == {3.0} and trainers[0].state.scaler.get_scale() == 2.0**10
    assert all(p.isfinite().all() for p in trainers[0].state.model.parameters())


class HostReads(TorchDispatchMode):
    """Operations that make the host wait for a device's number."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").rstrip("2").rstrip("_")
        by_mask = name.startswith("index") and torch.bool in [getattr(x, "dtype", 0) for x in tree_leaves(args)]
        if name in self.NAMES or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "amp"])
def test_no_step_waits_for_the_device(data, monkeypatch, precision):
    """Between logs a step reads no number back. (On a CPU this is how it can be told; a GPU would wait there.)

    Without drop path, whose samples are drawn on the host: here that cannot be told from the device."""
    seen, step = [], loop.Trainer.step

    def watched(self, batch):
        with HostReads() as reads:
            values = step(self, batch)
        seen.append(reads.seen)
        return values

    monkeypatch.setattr(loop.Trainer, "step", watched)
    run(settings(data, name=f"waits {precision}", precision=precision, max_steps=5, val_data=None, drop_path=0.0))
    assert seen == [[]] * 5
    with HostReads() as reads:
        bool(torch.ones(1) > 0), torch.ones(()).item(), torch.ones(2)[torch.ones(2) > 0]
    assert reads.seen == ["_local_scalar_dense", "_local_scalar_dense", "index"], "they are seen when they happen"


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


@pytest.mark.parametrize("changes", [{"accum_freq": 2}, {"deterministic": True, "max_ranks": 2}], ids=str)
def test_a_temperature_with_a_dimension_is_one_of_the_model(data, changes):
    """open_clip's nonscalar_logit_scale: not a row per sample, however many micro-batches there are."""
    model = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
        "nonscalar_logit_scale": True,
    }
    path = Path(data["model"]).with_name("nonscalar.json")
    path.write_text(json.dumps(model))
    weights = read_weights(run(settings(data, model=str(path), name=f"nonscalar {changes}", max_steps=2, **changes)))
    assert weights["logit_scale"].shape == (1,)


def test_records_of_a_longer_context_are_refused(data, tmp_path):
    model = json.loads(Path(data["model"]).read_text())
    model["text"]["context"] = 6
    (tmp_path / "short.json").write_text(json.dumps(model))
    with pytest.raises(ConfigError, match="8 tokens per text, the model's context is 6"):
        run(settings(data, model=str(tmp_path / "short.json"), name="short"))


def test_command_line(data):
    parsed = read_command_line(["--preset", "rwkv-clip-b32-yfcc15m", "--train-data", "x", "--lr", "0.5", "--flip", "0"])
    assert (parsed.model.model, parsed.data.flip) == ("RWKV-CLIP-B-32", 0.0)
    assert (parsed.optimizer.lr, parsed.optimizer.decay) == (0.5, "all")
    assert read_command_line(to_arguments(data)) == settings(data)
    assert read_command_line(["--train-data", "x", "--preset=demo"]).model.model == "RWKV-CLIP-Ti-8"
    with pytest.raises(ConfigError, match=r"preset: needs a value; shipped: .*demo"):
        read_command_line(["--preset"])
    with pytest.raises(ConfigError, match="preset: demo x are 2 values; give one"):
        read_command_line(["--preset", "demo", "x"])
    with pytest.raises(ConfigError) as error:
        read_command_line(["--lr", "-1", "--epochs", "0"])
    assert len(error.value.problems) == 3  # and no records


FLAGS = """
accum-freq allow-change auto-augment batch-size beta1 beta2 crop crop-area crop-aspect csv-caption-key csv-img-key
csv-separator cycle-beta1 dataset-type decay deterministic device distill-features distill-model distill-pretrained
drop-path ema-decay ema-warmup epochs epochs-cooldown eps eval eval-every-n-steps flip force-context-length
force-image-size force-patch-dropout freeze gates grad-checkpointing grad-clip-norm image-folder imagenet-v2
imagenet-val index interpolation keep-best keep-checkpoints layer-decay-image layer-decay-text loader lock-image
lock-image-freeze-bn-stats lock-image-unlocked-groups lock-text lock-text-freeze-layer-norm lock-text-unlocked-layers
log-every-n-steps logs lora-alpha lora-rank lora-targets lr lr-cooldown-end lr-cooldown-power lr-image lr-text max-bad
max-bad-fraction max-nonfinite max-ranks max-steps model momentum name objective on-nonfinite opt opt-kwargs parallel
positives precision pretrained pretrained-image pretrained-text published report-to report-training-batch-acc resume
save-every-n-steps save-frequency schedule seed text-choice text-probs texts timeout torchcompile train-data
train-data-upsampling-factors use-bn-sync val-batch-size val-data val-every-n-steps val-frequency val-prefix val-split
wandb-notes wandb-project-name wandb-tags warmup warmup-fraction wd workers zeroshot-frequency
"""


def test_public_flags_are_frozen():
    """Users have these in their scripts. A new one is added here on purpose; none disappears."""
    assert sorted(name.replace("_", "-") for name in flat_names(Settings)) == FLAGS.split()


def test_flags_of_before(caplog):
    """Two names still work; two meanings that have become open_clip's are refused with what to say instead."""
    old = read_command_line(["--train-data", "x", "--views", "first", "--max-bad-share=0.5"])
    assert (old.data.text_choice, old.data.max_bad_fraction) == ("first", 0.5)
    assert "--views is called --text-choice" in caplog.text
    with pytest.raises(ConfigError) as error:
        read_command_line(["--train-data", "x", "--warmup", "0.1", "--precision=fp16"])
    assert [p.split(";")[1] for p in error.value.problems] == [
        " use --warmup-fraction 0.1",
        " for autocast in that type use --precision amp",
    ]


def test_files_of_before(tmp_path):
    path = tmp_path / "old.json"
    path.write_text('{"views": "all", "warmup": 0.25, "precision": "fp16", "max_bad_share": 0.5}')
    found = load_settings(str(path))
    assert (found.data.text_choice, found.data.max_bad_fraction, found.parallel.precision) == ("all", 0.5, "amp")
    assert (found.optimizer.warmup, found.optimizer.warmup_fraction) == (None, 0.25)


def test_warmup_counts_steps():
    """As in open_clip; the fraction means as many steps as it comes to."""
    counted, fraction = (parse(OptimizerSettings, x) for x in ({"warmup": 30}, {"warmup_fraction": 0.3}))
    schedules = [Schedule.from_settings(settings, 100) for settings in (counted, fraction)]
    assert len({tuple(map(schedule.lr, range(100))) for schedule in schedules}) == 1
    assert schedules[0].lr(29) == 1e-3 > schedules[0].lr(28)


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
        timeout=600,
    )
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr
