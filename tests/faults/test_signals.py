"""A signal saves and ends a run on all ranks, whenever it comes and to whom, and the same command goes on (P11)."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.ranks import digest, read_ids, start_ranks
from helpers.tiny import BATCH, make_smaller, make_tiny, to_arguments
from rwkv_clip.checkpoint import find_checkpoint, list_checkpoints
from rwkv_clip.training import loop
from rwkv_clip.training.data import batch as data_batch
from rwkv_clip.training.data import torch_loader
from rwkv_clip.training.faults import signals
from rwkv_clip.training.main import main

STEPS, SIGNALS = 40, 20
SLACK = 5  # seconds that a loaded machine may take longer
TOLD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(scope="module")
def data(new_folder):
    settings = make_smaller(make_tiny(new_folder("tiny")))
    often = {"save_every_n_steps": 8, "val_every_n_steps": 14, "log_every_n_steps": 5, "timeout": 60.0}
    return settings | often | {"batch_size": BATCH // 2, "max_steps": STEPS, "resume": "latest"}


def train_rank(settings: dict, folder: str, pauses: dict) -> None:
    """On a rank: the command line, with a file when signals are noted and one with the record ids of every step.

    pauses: seconds that `step` number n, validation, saving or the batch of a step takes longer, by `("step", n)`,
    `("validate", n)`, ..; on one rank only by `("data", n, rank)`.
    """
    multiprocessing.set_start_method("fork", force=True)  # data workers as in a run of its own, not by a server
    rank = os.environ["RANK"]
    messages = os.open(f"{folder}/messages{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(messages, 1), os.dup2(messages, 2)
    sys.argv[1:] = to_arguments(settings)
    patch = pytest.MonkeyPatch()
    enter, step, save = signals.Preemption.__enter__, loop.Trainer.step, loop.save_run
    train, trainers, fill = loop.train, [], torch_loader._Chunks.fill

    def entered(self):
        enter(self)
        Path(folder, f"ready{rank}").touch()
        pause("start", 0)
        return self

    def pause(what, number):
        for key in (what, number), (what, number, int(rank)):
            if key in pauses:
                Path(folder, f"paused{rank}").touch()
                time.sleep(pauses[key])

    def noted(trainer, *arguments, **options):
        trainers.append(trainer)
        train(trainer, *arguments, **options)

    def logged(self, batch):
        number = self.state.progress.step
        with open(f"{folder}/ids.{number:03}.{rank}", "a") as file:
            file.write(" ".join(map(str, [*batch.ids.tolist(), ""])))
        pause("step", number)
        return step(self, batch)

    def filled(self, item, image):
        pause("data", self.plan.first(item // self.per_step) // self.plan.global_batch)
        return fill(self, item, image)

    def saved(state, *arguments, **options):
        pause("save", state.progress.step)
        return save(state, *arguments, **options)

    def interrupts(self, function):
        def call(*arguments):
            pause("validate", trainers[0].state.progress.step)
            if self.signal:
                raise signals.Interrupted
            return function(*arguments)

        return call

    patch.setattr(signals.Preemption, "__enter__", entered)
    patch.setattr(signals.Preemption, "interrupts", interrupts)
    patch.setattr(loop.Trainer, "step", logged)
    patch.setattr(loop, "save_run", saved)
    patch.setattr(torch_loader._Chunks, "fill", filled)
    patch.setattr(data_batch, "PATIENCE", 0.2)  # with a thread that never comes back
    patch.setattr("rwkv_clip.training.main.train", noted)
    patch.setattr("rwkv_clip.training.main.plot_training", lambda folder: None)
    main()


class Run:
    """A run on two ranks, or another number, that is started again and again."""

    def __init__(self, data: dict, name: str, world: int = 2, **changes):
        self.folder, self.world = Path(data["logs"]) / name, world
        self.folder.mkdir(parents=True)
        self.settings = {**data, "name": name, **changes}

    def start(self, pauses: dict | None = None) -> None:
        """Start, and wait until both ranks note signals and, where there are pauses, one is at its pause."""
        for path in [*self.folder.glob("ready*"), *self.folder.glob("paused*"), *self.folder.glob("messages*")]:
            path.unlink()
        self.ranks = start_ranks(self.world, self.folder, train_rank, self.settings, str(self.folder), pauses or {})
        while len(list(self.folder.glob("ready*"))) < self.world or (pauses and not list(self.folder.glob("paused*"))):
            assert all(process.is_alive() for process in self.ranks), self.messages()
            time.sleep(0.005)

    def tell(self, number: int, ranks: tuple[int, ...] = (0, 1)) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.ranks[rank].pid, number)

    def seconds_to_save(self, number: int, ranks: tuple[int, ...]) -> float:
        """Tell ranks; how long it takes until the run's first checkpoint is there."""
        began = time.monotonic()
        self.tell(number, ranks)
        while not list(self.folder.glob(f"checkpoints/step-{'?' * 8}")) and time.monotonic() - began < 30:
            time.sleep(0.02)
        passed = time.monotonic() - began
        for process in self.ranks if passed >= 30 else ():  # they would outlive the test
            process.kill()
        return passed

    def wait_for(self, step: int) -> None:
        """Until a rank begins that step, or all are done."""
        while not list(self.folder.glob(f"ids.{step:03}.*")) and any(process.is_alive() for process in self.ranks):
            time.sleep(0.001)

    def end(self) -> list[int]:
        """Exit codes."""
        for process in self.ranks:
            process.join(60)
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:  # one that hangs must not outlive the test
            process.kill()
        assert not list(self.folder.glob("error*")) and "Traceback" not in "".join(self.messages()), self.messages()
        return codes

    def messages(self) -> list[str]:
        return [path.read_text() for kind in ("messages*", "error*") for path in sorted(self.folder.glob(kind))]

    def steps(self) -> int:
        """Steps in the newest checkpoint."""
        return int(find_checkpoint(self.folder).name[5:]) if list(self.folder.glob("checkpoints/step-*")) else 0

    def started(self) -> int:
        """Steps that were begun, each once: a repeated one would have its ids twice in its file."""
        ids = read_ids(str(self.folder / "ids"))
        assert all(len(step) == BATCH for step in ids)
        return len(ids)

    def outcome(self) -> tuple:
        """All that must not depend on interruptions: bits, record ids, logged steps and validations."""
        records = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        logged = [(r["step"], r.get("loss"), r.get("val_text_to_image_R@1")) for r in records]
        return digest(find_checkpoint(self.folder)), read_ids(str(self.folder / "ids")), logged


@pytest.fixture(scope="module")
def whole(data):
    run = Run(data, "whole")
    run.start()
    assert run.end() == [0, 0]
    assert run.started() == run.steps() == STEPS
    return run.outcome()


def test_signals_at_random_times(data, whole):
    """Twenty signals: of three kinds, to one rank or both, between the noting of signals and the end of the run."""
    rng, told, chains, run = random.Random(4), 0, 0, None
    while told < SIGNALS:
        if run is None:
            run, chains = Run(data, f"chain{chains}"), chains + 1
        before = run.steps()
        run.start()
        if rng.random() < 0.8:  # else about the start; a clock alone would tell a slow machine nothing but that
            run.wait_for(rng.randint(before, STEPS))
        time.sleep(rng.uniform(0, 0.02))
        number, ranks = rng.choice(TOLD), rng.choice([(0,), (1,), (0, 1)])
        run.tell(number, ranks)
        codes = run.end()
        if codes == [0, 0]:  # it was done before
            assert run.steps() == STEPS and run.outcome() == whole
            run = None
            continue
        told += 1
        assert codes == [75, 75], run.messages()
        assert run.started() == run.steps() >= before, "all steps begun are saved"
        line = f"stopped by {number.name} after step {run.steps()}: all saved in {run.folder}; the same command resumes"
        assert [message.splitlines()[-1] for message in run.messages()] == [line] * 2
    if run is not None:
        run.start()
        assert run.end() == [0, 0] and run.outcome() == whole


PLACES = [
    (("start", 0), (1,), 0),
    (("save", 8), (1,), 10),  # told in the ninth step, known in the tenth
    (("validate", 14), (0,), 14),  # the resumed run makes up for it
    (("step", STEPS - 1), (1,), STEPS),
]


def test_signals_at_certain_places(data, whole):
    """Before the first step, while saving, during validation, in the last step."""
    run = Run(data, "places")
    for at, ranks, after in PLACES:
        run.start({at: 0.3})
        run.tell(signal.SIGTERM, ranks)
        assert run.end() == [75, 75] and run.steps() == after, (at, run.messages())
    run.start()
    assert run.end() == [0, 0] and run.outcome() == whole


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_signal_while_averaged_weights_are_validated(parallel, data):
    """Told in the first half, on the rank that validates: no rank waits for it in the second."""
    run = Run(data, f"averaged {parallel}", parallel=parallel, ema_decay=0.9)
    at, ranks, after = PLACES[2]
    run.start({at: 0.3})
    run.tell(signal.SIGTERM, ranks)
    assert run.end() == [75, 75] and run.steps() == after, run.messages()
    run.start()
    assert run.end() == [0, 0] and run.steps() == STEPS


def test_a_second_signal_ends_at_once(data):
    """Not so its echo: who signals all processes reaches a rank twice, by itself and by torchrun."""
    run = Run(data, "second")
    run.start({("step", 2): 1.5})
    for _ in range(3):
        run.tell(signal.SIGTERM)
        time.sleep(0.05)
    assert run.end() == [75, 75] and run.steps() == 4
    run.start({("step", 5): 30.0})
    run.tell(signal.SIGINT)
    time.sleep(signals.ECHO + 0.2)
    begin = time.monotonic()
    run.tell(signal.SIGTERM)
    assert run.end() == [-signal.SIGTERM] * 2 and time.monotonic() - begin < 5
    assert [path.name for path in list_checkpoints(run.folder)][-1] == "step-00000004"


# ---- data that stand still -------------------------------------------------------------------------------------------

NEVER, AT = 600.0, 5
KINDS = {
    "plain": {},
    "accumulated, fp16": {"accum_freq": 2, "batch_size": BATCH // 4, "precision": "amp"},
    "in a fixed order": {"deterministic": True, "max_ranks": 2},
    "shares": {"parallel": "fsdp"},
}


QUIET = {"val_data": None, "max_steps": 8, "save_every_n_steps": 100}


def state_at(folder: Path, step: int) -> tuple:
    """All of a checkpoint that the next step depends on."""
    path = folder / "checkpoints" / f"step-{step:08}"
    state = json.loads((path / "state.json").read_text())
    return digest(path), [state[key] for key in ("samples_seen", "scaler", "nonfinite_in_a_row")]


@pytest.fixture(scope="module")
def good(data):
    """By kind: what a run whose data do not stand still is after the step."""
    found = {}

    def get(kind: str) -> tuple:
        if kind not in found:
            run = Run(data, f"good {kind}", **QUIET | {"save_every_n_steps": 1, "keep_checkpoints": 99} | KINDS[kind])
            run.start()
            assert run.end() == [0, 0]
            found[kind] = state_at(run.folder, AT)
        return found[kind]

    return get


@pytest.mark.parametrize("told", [(0,), (1,)], ids=["who waits for a rank", "who waits for data"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_while_data_stand_still_on_one_rank(data, good, kind, told):
    """All ranks stop where they were before the step that lacks data: the same bits as in a run that stood there."""
    run = Run(data, f"still {kind} {told}", **QUIET | KINDS[kind])
    run.start({("data", AT, 1): NEVER})
    run.wait_for(AT)  # rank 0 begins it
    time.sleep(0.2)
    assert run.seconds_to_save(signal.SIGTERM, told) < 5 + SLACK
    assert run.end() == [75, 75] and run.steps() == AT, run.messages()
    assert state_at(run.folder, AT) == good(kind)
    assert f"stopped by SIGTERM after step {AT}: all saved" in run.messages()[0]


def test_a_signal_while_the_first_batch_is_waited_for_on_one_rank(data):
    run = Run(data, "still at the start", **QUIET)
    run.start({("data", 0, 0): NEVER})
    run.wait_for(0)
    run.tell(signal.SIGINT, (1,))
    assert run.end() == [75, 75] and run.steps() == 0, run.messages()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_data_stand_still_in_one_process(data, number, workers):
    run = Run(data, f"alone {number} {workers}", 1, **QUIET, workers=workers)
    run.start({("data", AT): NEVER})
    run.wait_for(AT - 1)
    time.sleep(0.5)  # it waits, most likely; should it not, it is told a little earlier
    assert run.seconds_to_save(number, (0,)) < 5 + SLACK
    assert run.end() == [75] and run.steps() in (AT - 1, AT), run.messages()
    assert f"stopped by {number.name} after step {run.steps()}: all saved" in run.messages()[0]


def test_data_of_one_process_that_stand_still_end_it_after_the_timeout(data):
    """Saved, with code 5, and it says for whom it waits."""
    run = Run(data, "alone for ever", 1, **QUIET, workers=1, timeout=2.0)
    run.start({("data", AT): NEVER})
    assert run.end() == [5] and run.steps() == AT
    line = r"error: no data for \d+ s, waiting for data worker \d+ \(asleep\); all saved after step 5; raise --timeout"
    assert re.search(line + r" \(2\) to wait", run.messages()[0])


def test_torchrun_passes_a_signal_on(data, whole, free_port):
    """The agent gets SIGTERM; both ranks and their data workers with it. The same arguments then end the run."""
    run = Run(data, "torchrun", workers=1)
    folder = run.folder
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port)]
    command += ["-m", "rwkv_clip.training.main", "--", *to_arguments(run.settings)]
    agent = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        while not list(folder.glob("checkpoints/step-*")):
            assert agent.poll() is None, agent.communicate()[1]
            time.sleep(0.01)
        begin = time.monotonic()
        agent.send_signal(signal.SIGTERM)
        messages = agent.communicate(timeout=60)[1]
        assert time.monotonic() - begin < 20
    finally:
        agent.kill()
    step = int(find_checkpoint(folder).name[5:])
    line = f"stopped by SIGTERM after step {step}: all saved in {folder}; the same command resumes"
    assert messages.count(line) == 2 and 0 < step < STEPS and agent.returncode == 1
    run.start()  # with the same arguments
    assert run.end() == [0, 0] and digest(find_checkpoint(folder)) == whole[0]
