"""Numbers that are not finite never reach the weights, on any rank, and the report names the records (promise P9)."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

import rwkv_clip
from helpers.ranks import digest, start_ranks
from helpers.tiny import BATCH, STEPS, make_smaller, make_tiny, to_arguments
from rwkv_clip.checkpoint import find_checkpoint, list_checkpoints, read_tensors
from rwkv_clip.config import parse
from rwkv_clip.dist import World
from rwkv_clip.losses import InfoNCE
from rwkv_clip.training import loop, trainer
from rwkv_clip.training.faults.nonfinite import FiniteGuard, NumericsError
from rwkv_clip.training.main import main, run
from rwkv_clip.training.parallel import Shards
from rwkv_clip.training.settings import Settings

AT, ROW = 5, 1  # the bad step, and the row of a bad record in its rank's batch
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def data(new_folder):
    settings = make_smaller(make_tiny(new_folder("tiny")))
    return settings | {"val_data": None, "log_every_n_steps": 4, "save_every_n_steps": 2, "timeout": 30.0}


class Poison:
    """Puts `value` into a training run of this process: at `steps`, on `ranks`, where `kind` says."""

    def __init__(self, patch, kind: str, value: float, steps=(AT,), ranks=(0, 1)):
        self.kind, self.value, self.steps, self.ranks = kind, value, steps, ranks
        self.active, self.done, self.trainer = False, [], None
        for owner, name in ((loop.Trainer, "step"), (rwkv_clip.RWKVCLIP, "forward"), (InfoNCE, "forward")):
            patch.setattr(owner, name, self._around(getattr(owner, name), f"{owner.__name__}.{name}"))
        patch.setattr(Shards, "gradient_norms", self._around(Shards.gradient_norms, "gradient_norms"))
        patch.setattr(trainer, "update_weights", self._around(trainer.update_weights, "update_weights"))
        patch.setattr("rwkv_clip.training.main.plot_training", lambda folder: None)

    def _around(self, function, name):
        def call(*arguments, **named):
            return getattr(self, name.replace(".", "_"))(function, *arguments, **named)

        return call

    def Trainer_step(self, function, trainer, batch):
        self.trainer = trainer
        self.active = trainer.state.progress.step in self.steps and trainer.state.world.rank in self.ranks
        self.done.append((trainer.state.progress.step, batch.ids.tolist()))
        return function(trainer, batch)

    def RWKVCLIP_forward(self, function, model, *inputs, **named):
        features = function(model, *inputs, **named)
        if self.active and self.kind == "features":
            text = features["text"]
            features["text"] = text + torch.zeros_like(text).index_fill_(0, torch.tensor(ROW), self.value)
        return features

    def InfoNCE_forward(self, function, *arguments, **features):
        losses, report = function(*arguments, **features)
        if self.active and self.kind == "loss":  # the gradients stay good
            losses = {name: loss + self.value for name, loss in losses.items()}
        return losses, report

    def gradient_norms(self, function, shards):
        if self.active and self.kind == "gradient":
            self.trainer.state.model.text_model.emb.weight.grad.view(-1)[7] = self.value
        return function(shards)

    def update_weights(self, function, optimizer, skip):
        if not (self.active and self.kind == "left out"):
            function(optimizer, skip)
        if self.active and self.kind == "weights":  # of a token that no text has: the loss does not see it
            with torch.no_grad():
                self.trainer.state.model.text_model.emb.weight[-1] = self.value


def train_poisoned(settings: dict, folder: str, *poison) -> None:
    """On a rank: the command line with a poison; leaves its messages, its steps and a digest of its weights behind."""
    rank = os.environ["RANK"]
    messages = os.open(f"{folder}/messages{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(messages, 1), os.dup2(messages, 2)
    sys.argv[1:] = to_arguments(settings)
    poison = Poison(pytest.MonkeyPatch(), *poison)
    try:
        main()
    finally:
        weights = torch.cat([p.detach().flatten() for p in poison.trainer.state.model.parameters()])
        state = {
            "done": poison.done,
            "bits": weights.view(torch.int32).long().mul(torch.arange(len(weights))).sum().item(),
        }
        Path(folder, f"state{rank}").write_text(json.dumps(state))


class Outcome:
    """What a run on two ranks left behind."""

    def __init__(self, data: dict, name: str, *poison, **changes):
        self.folder = Path(data["logs"]) / name
        self.folder.mkdir(parents=True)
        settings = data | {"name": name, "batch_size": BATCH // 2, **changes}
        ranks = start_ranks(2, self.folder, train_poisoned, settings, str(self.folder), *poison)
        for process in ranks:
            process.join(60)
        self.codes = [process.exitcode for process in ranks]
        for process in ranks:  # one that hangs must not outlive the test
            process.kill()
        self.messages = [(self.folder / f"messages{rank}").read_text() for rank in range(2)]
        assert not list(self.folder.glob("error*")) and "Traceback" not in "".join(self.messages), self.messages
        states = [json.loads((self.folder / f"state{rank}").read_text()) for rank in range(2)]
        self.steps = [[step for step, _ in state["done"]] for state in states]
        self.ids = [dict(state["done"]) for state in states]
        self.bits = [state["bits"] for state in states]
        self.report = report_of(self.folder)


def report_of(folder: Path) -> list[dict]:
    path = folder / "nonfinite.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def assert_finite(folder: Path) -> None:
    """Every number of every checkpoint."""
    checkpoints = list_checkpoints(folder)
    assert checkpoints
    for path in checkpoints:
        for name in ("model", "optim"):
            assert all(tensor.isfinite().all() for tensor in read_tensors(path / f"{name}.safetensors").values())


WHERE = [("loss", (0, 1)), ("gradient", (0, 1)), ("features", (1,))]
STOPS = [(kind, ranks, value) for kind, ranks in WHERE for value in (NAN, INF)]
STOPS += [("loss", (1,), NAN), ("gradient", (1,), INF), ("features", (0,), NAN)]


@pytest.mark.parametrize("kind, ranks, value", STOPS, ids=str)
def test_all_ranks_stop_at_the_same_step(data, kind, ranks, value):
    run = Outcome(data, f"stop {kind} {ranks} {value}", kind, value, (AT,), ranks)
    assert run.codes == [4, 4]
    assert run.steps == [list(range(AT + 1))] * 2, "one step later at most; step 6 is saved, and checked before that"
    assert run.bits[0] == run.bits[1]
    assert_finite(run.folder)
    assert find_checkpoint(run.folder).name == "step-00000004"
    (bad,) = run.report
    assert (bad["step"], bad["policy"], bad["epoch"]) == (AT, "stop", 0)
    if kind == "features":  # the loss of every rank has met them
        assert bad["found_by"] == "features" and bad["ranks"] == [0, 1]
        assert bad["records"] == {str(ranks[0]): [run.ids[ranks[0]][AT][ROW]]}
    else:
        assert bad["found_by"] == "step" and bad["ranks"] == list(ranks)
        assert bad["records"] == {str(rank): run.ids[rank][AT] for rank in range(2)}
    assert (bad["loss"] == str(value)) if kind == "loss" else (bad["grad_norm"] in ("nan", "inf"))
    assert set(bad["towers"]) == {"image_model", "text_model", "logit_scale"}
    if kind == "gradient":
        assert bad["towers"]["text_model"] == str(value) and bad["towers"]["image_model"] > 0
    rank, ids = next(iter(bad["records"].items()))
    for message in run.messages:
        assert f"error: step {AT}: loss" in message and f"records {ids} on rank {rank}" in message
        assert str(run.folder / "nonfinite.jsonl") in message


@pytest.fixture(scope="module")
def left_out(data):
    """A good run whose update at the steps in question is not made."""
    return Outcome(data, "left out", "left out", 0.0, (3, 4, AT))


@pytest.mark.parametrize("kind, ranks", [("loss", (1,)), ("gradient", (1,)), ("features", (0,))], ids=str)
def test_a_skipped_step_is_a_step_left_out(data, left_out, kind, ranks):
    run = Outcome(data, f"skip {kind}", kind, NAN, (3, 4, AT), ranks, on_nonfinite="skip")
    assert run.codes == left_out.codes == [0, 0]
    assert run.steps == [list(range(STEPS))] * 2
    assert digest(find_checkpoint(run.folder)) == digest(find_checkpoint(left_out.folder))
    assert run.bits == left_out.bits and run.bits[0] == run.bits[1]
    assert [(bad["step"], bad["in_a_row"], bad["policy"]) for bad in run.report] == [
        (3, 1, "skip"), (4, 2, "skip"), (AT, 3, "skip")]  # fmt: skip
    assert f"step {AT}: loss" in run.messages[0] and "skipped, 3 of at most 3 in a row" in run.messages[0]
    log = (run.folder / "log.jsonl").read_text()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in log.splitlines()] == [4, 8, 10]


# ---- one process -----------------------------------------------------------------------------------------------------


def settings(data, **changes) -> Settings:
    return parse(Settings, {**data, "on_nonfinite": "skip", "max_nonfinite": 2, **changes})


@pytest.mark.parametrize(
    "steps, stopped",
    [((3, 4), None), ((3, 4, 6, 7), None), ((3, 4, 5), 5), ((7, 8, 9), 9), ((2, 4, 5, 6, 7), 6)],
    ids=str,
)
def test_more_than_max_nonfinite_in_a_row_stop(data, monkeypatch, steps, stopped):
    poison = Poison(monkeypatch, "loss", NAN, steps)
    chosen = settings(data, name=f"row {steps}", log_every_n_steps=3, save_every_n_steps=5)
    if stopped is None:
        run(chosen)
        assert len(poison.done) == STEPS
    else:
        with pytest.raises(NumericsError, match=rf"^step {stopped}: .*; 3 steps in a row, --max-nonfinite 2\. Try"):
            run(chosen)
        assert len(poison.done) <= stopped + 2
    folder = Path(data["logs"]) / chosen.run.name
    assert [bad["step"] for bad in report_of(folder)] == [step for step in steps if stopped is None or step <= stopped]
    if list_checkpoints(folder):
        assert_finite(folder)


class Crash(Exception):
    pass


@pytest.mark.parametrize("saved, after", [(4, 6), (5, 5), (6, 6)])  # steps; what is not saved is reported again
def test_a_resumed_run_goes_on_counting(data, monkeypatch, saved, after):
    """Interrupted between bad steps: it ends where it would have ended, with the same weights and the same report."""
    steps = (2, 4, 5, 6, 7)
    with monkeypatch.context() as patch:
        whole = Poison(patch, "loss", INF, steps)
        with pytest.raises(NumericsError, match=r"^step 6:") as stopped:
            run(settings(data, name=f"whole {saved}", save_every_n_steps=saved))
    with monkeypatch.context() as patch:
        Poison(patch, "loss", INF, steps)
        step = loop.Trainer.step

        def crash(trainer, batch):
            if trainer.state.progress.step == after:
                raise Crash
            return step(trainer, batch)

        patch.setattr(loop.Trainer, "step", crash)
        with pytest.raises(Crash):
            run(settings(data, name=f"part {saved}", save_every_n_steps=saved))
    part = Poison(monkeypatch, "loss", INF, steps)
    with pytest.raises(NumericsError, match=r"^step 6:") as resumed:
        run(settings(data, name=f"part {saved}", save_every_n_steps=saved, resume="latest"))
    assert part.done[0][0] == saved
    assert str(resumed.value).replace("part", "whole") == str(stopped.value)
    mine, theirs = (dict(poison.trainer.state.model.state_dict()) for poison in (part, whole))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    folders = [Path(data["logs"]) / f"{name} {saved}" for name in ("part", "whole")]
    assert report_of(folders[0]) == report_of(folders[1])
    assert digest(find_checkpoint(folders[0])) == digest(find_checkpoint(folders[1]))


def test_weights_that_are_not_finite_are_not_saved(data, monkeypatch):
    Poison(monkeypatch, "weights", INF, (3,))
    with pytest.raises(NumericsError, match=r"^text_model\.emb\.weight: not finite; nothing is saved"):
        run(settings(data, name="weights"))
    folder = Path(data["logs"]) / "weights"
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002"]
    assert_finite(folder)


class RunningMean(InfoNCE):
    """An objective with a running statistic, as ALIP's."""

    leave_out = ()

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.calls = 0

    def forward(self, image, text, logit_scale):
        if self.calls not in self.leave_out:
            self.mean.lerp_(text.detach().mean(), 0.1)
        self.calls += 1
        return super().forward(image, text, logit_scale)


def test_running_statistics_skip_a_bad_step_too(data, monkeypatch):
    found = []
    for kind, name in (("features", "poisoned"), ("left out", "good")):
        with monkeypatch.context() as patch:
            objective = RunningMean()
            objective.leave_out = (AT,) if kind == "left out" else ()
            patch.setattr("rwkv_clip.training.main.make_objective", lambda *_, made=objective: made)
            Poison(patch, kind, NAN, (AT,))
            folder = run(settings(data, name=f"statistics {name}"))
            assert objective.mean.isfinite() and objective.mean != 0
            found.append(digest(find_checkpoint(folder)))
    assert found[0] == found[1]


def test_a_count_beyond_a_new_limit_does_not_stop_a_good_step():
    watch = FiniteGuard(World(0, 1, torch.device("cpu")), 1)
    watch.load_state_dict({"nonfinite_in_a_row": 3})
    good, ids = torch.tensor(1.0), torch.arange(3)
    assert watch.judge(good, good, False).item() == 0
    watch.report(0, ids, good, good)
    watch.check()
    assert watch.state_dict() == {"nonfinite_in_a_row": 0}
