"""Ranks with shares of a model (--parallel fsdp, hsdp) compute what ranks with all of it compute and hold only their
shares, and their checkpoints are those of any run.

One start of ranks does the work of many tests: `trained` and `resumed` hold what they found.
"""

import dataclasses
import gc
import json
import os
import re
import signal
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

import rwkv_clip
from helpers.ranks import digest, run_ranks
from helpers.tiny import MODEL, make_smaller, make_tiny
from rwkv_clip.checkpoint import find_checkpoint, read_description
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.data.retrieval_set import load_retrieval
from rwkv_clip.dist import World, join_world, leave_world, mean_over_ranks
from rwkv_clip.features import FeatureExtractor
from rwkv_clip.losses import InfoNCE
from rwkv_clip.retrieval import evaluate_retrieval
from rwkv_clip.training import loop, main, parallel
from rwkv_clip.training.checkpointing import restore_snapshot, save_run, take_snapshot
from rwkv_clip.training.data.batch import Batch
from rwkv_clip.training.faults.nonfinite import NumericsError
from rwkv_clip.training.faults.signals import Preempted
from rwkv_clip.training.gradients import Inputs
from rwkv_clip.training.parallel import Shards, distribute_model, whole_tensors
from rwkv_clip.training.saver import Saver
from rwkv_clip.training.settings import ParallelSettings, Settings
from rwkv_clip.training.state import TrainState
from rwkv_clip.training.trainer import Trainer

BATCH, STEPS, SAVED = 16, 5, 3  # a checkpoint after SAVED steps
MODELS = {
    "ours": {"image": {**MODEL["image"], "drop_path": 0.4}, "text": {**MODEL["text"], "vocab": 1000, "depth": 1}},
    "one block": {"image": {**MODEL["image"], "depth": 1}, "text": {**MODEL["text"], "vocab": 1000, "depth": 1}},
    "open_clip": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 1000, "width": 16, "heads": 2, "layers": 2},
    },
}
# Kind of run: ranks, ranks of a node, --parallel. Checkpoints move between the first four.
KINDS = {"one": (1, 1, "ddp"), "ddp": (2, 2, "ddp"), "fsdp": (2, 2, "fsdp"), "hsdp": (4, 2, "hsdp")}
KINDS |= {"fsdp 4": (4, 4, "fsdp")}
MOVED = list(KINDS)[:4]
WAYS = {
    "plain": {"dtype": torch.float64},
    "accumulated": {"dtype": torch.float64, "accum_freq": 2, "grad_checkpointing": True},
    "open_clip": {"dtype": torch.float64, "model": "open_clip"},
    "saved": {},
}


class Run:
    """A run of one kind in this process, which may be one of several ranks."""

    def __init__(self, world: World, kind: str, model: str = "ours", dtype: torch.dtype = torch.float32, **changes):
        size, local, parallel = KINDS[kind]
        assert size == world.size
        batch = BATCH // size // changes.get("accum_freq", 1)
        fixed = {"precision": "fp32", "lr": 1e-5, "max_steps": STEPS, "schedule": "constant", "log_every_n_steps": 1}
        settings = parse(Settings, {**fixed, "parallel": parallel, "batch_size": batch, **changes})
        torch.manual_seed(0)
        net = rwkv_clip.create_model(MODELS[model])
        with torch.no_grad():  # away from the initial zeros, so that every parameter has a gradient
            for parameter in net.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        world = dataclasses.replace(world, local_size=local)
        self.trainer = Trainer(TrainState(net.to(dtype), InfoNCE(), settings, world, 100))
        self.most_whole = 0
        pixels = self.trainer.gradients.normalize
        self.trainer.gradients.normalize = lambda image: pixels(image).to(dtype)

    def count_whole(self) -> None:
        """From now on have in `most_whole` the bytes of parameters that are whole at a time, in some norm's forward."""

        def count(*_: object) -> None:
            whole = [p.nbytes for p in self.trainer.state.model.parameters() if not isinstance(p, DTensor)]
            self.most_whole = max(self.most_whole, sum(whole))

        for module in self.trainer.state.model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_hook(count)

    def batch(self) -> Batch:
        """This rank's share of the batch of the step that comes next."""
        step, world = self.trainer.state.progress.step, self.trainer.state.world
        g = torch.Generator().manual_seed(step)
        image = torch.randint(256, (BATCH, 3, 32, 32), generator=g, dtype=torch.uint8)
        text = torch.randint(1, 1000, (BATCH, 3, 8), generator=g)
        ids = torch.arange(BATCH * step, BATCH * (step + 1))
        share = BATCH // world.size
        own = [x[world.rank * share : (world.rank + 1) * share] for x in (image, text, ids)]
        return Batch(*own, torch.zeros_like(own[2]), step * BATCH)

    def train(self, until: int) -> list[float]:
        """Losses and gradient norms, as the log has them."""
        numbers = []
        while self.trainer.state.progress.step < until:
            values = self.trainer.step(self.batch())
            numbers += mean_over_ranks({k: values[k] for k in ("loss", "grad_norm")}, torch.device("cpu")).values()
        self.trainer.state.watch.check()
        return numbers

    def save(self, folder: Path) -> str | None:
        """Digest of the checkpoint, on the main rank."""
        saver = Saver(folder, keep=9) if self.trainer.state.world.is_main else None
        self.trainer.check()
        save_run(self.trainer.state, saver, "tiny", last=True)
        return digest(find_checkpoint(folder)) if saver else None

    def weights(self) -> dict[str, torch.Tensor]:
        return whole_tensors(self.trainer.state.model.state_dict(), True)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients of the batch that comes next."""
        trainer, batch = self.trainer, self.batch()
        inputs = Inputs(batch.image, trainer.choose_texts(batch), trainer.draw_drops(batch))
        trainer.gradients.run(trainer.state.progress.step, inputs, lambda loss: loss)
        found = {name: p.grad for name, p in trainer.state.model.named_parameters() if p.grad is not None}
        found = {key: value.clone() for key, value in whole_tensors(found, True).items()}
        trainer.state.model.zero_grad()
        return found


def bytes_held() -> int:
    """Memory of all tensors in this process; whole weights that FSDP has let go have none."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and not isinstance(x, DTensor)]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def train_kinds(folder: Path, kinds: dict[str, list[str]]) -> None:
    """On every rank: runs of these kinds and ways; a file of findings for each, and checkpoints of "saved"."""
    gc.freeze()  # what was there before is not looked at each time
    world = join_world("cpu")
    for kind, ways in kinds.items():
        for way in ways:
            before = bytes_held()
            run = Run(world, kind, **WAYS[way])
            run.count_whole()
            found = {"gradients": run.gradients(), "numbers": run.train(SAVED), "most whole": run.most_whole}
            if way == "saved":
                found["bytes"] = bytes_held() - before - sum(g.nbytes for g in found["gradients"].values())
                run.save(folder / f"saved {kind}")
            found["numbers"] += run.train(STEPS) if way in ("plain", "saved") else []
            found["digest"] = run.save(folder / f"saved {kind}") if way == "saved" else None
            found["weights"] = run.weights()
            torch.save(found, folder / f"{kind} {way} {world.rank}")
            del run, found
    leave_world()


def resume_kinds(folder: Path, kinds: list[str]) -> None:
    """On every rank: go on from everybody's checkpoints."""
    world = join_world("cpu")
    for kind in kinds:
        for source in MOVED:
            run = Run(world, kind)
            with torch.no_grad():
                for parameter in run.trainer.state.shards.own.values():
                    parameter.fill_(0.5)  # nothing is right by chance
            path = folder / f"saved {source}" / f"step-{SAVED:08}"
            restore_snapshot(run.trainer.state, path, read_description(path))
            found = {"loaded": run.save(folder / f"{kind} from {source}")}
            if source in (kind, "fsdp"):
                found["numbers"] = run.train(STEPS)
                found["digest"] = run.save(folder / f"{kind} from {source}")
            torch.save(found, folder / f"{kind} from {source} {world.rank}")
    leave_world()


def read(folder: Path, name: str) -> dict:
    return torch.load(folder / name, weights_only=True)


@pytest.fixture(scope="module")
def trained(new_folder):
    """Folder of findings."""
    folder = new_folder("trained")
    train_kinds(folder, {"one": list(WAYS)})
    run_ranks(2, folder, train_kinds, folder, {"ddp": ["saved", "open_clip"], "fsdp": list(WAYS)})
    run_ranks(4, folder, train_kinds, folder, {"hsdp": ["accumulated", "saved"], "fsdp 4": ["saved"]})
    return folder


@pytest.fixture(scope="module")
def resumed(trained):
    resume_kinds(trained, ["one"])
    run_ranks(2, trained, resume_kinds, trained, ["ddp", "fsdp"])
    run_ranks(4, trained, resume_kinds, trained, ["hsdp"])
    return trained


EXACT = [("fsdp", "plain"), ("fsdp", "accumulated"), ("fsdp", "open_clip"), ("ddp", "open_clip")]
EXACT += [("hsdp", "accumulated")]


@pytest.mark.parametrize("kind, way", EXACT)
def test_gradients_and_weights_are_those_of_one_process(trained, kind, way):
    """In float64: gradients of the first step, losses, gradient norms, and weights in the end."""
    for rank in range(KINDS[kind][0]):
        found, expected = read(trained, f"{kind} {way} {rank}"), read(trained, f"one {way} 0")
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            gap = (found["gradients"][name] - gradient).abs().max() / gradient.abs().max().clamp(1e-12)
            assert gap <= 1e-12 and gradient.any(), name
        assert found["numbers"] == pytest.approx(expected["numbers"], rel=1e-12)
        assert max((found["weights"][k] - w).abs().max() for k, w in expected["weights"].items()) <= 1e-9


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp", "fsdp 4"])
def test_losses_are_those_of_one_process(trained, kind):
    """In float32, with the kernels that training uses."""
    expected = read(trained, "one saved 0")["numbers"]
    for rank in range(KINDS[kind][0]):
        assert read(trained, f"{kind} saved {rank}")["numbers"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind, share", [("fsdp", 1 / 2), ("hsdp", 1 / 2), ("fsdp 4", 1 / 4)])
def test_a_rank_holds_its_share(trained, kind, share):
    """After a step: weights, gradients and optimizer state, and no whole weights that were left behind."""
    whole = read(trained, "one saved 0")["bytes"]
    for rank in range(KINDS[kind][0]):
        held = read(trained, f"{kind} saved {rank}")["bytes"] / whole
        assert 0.8 * share <= held <= 1.15 * share, "a parameter of few rows is not cut in equal parts"


@pytest.mark.parametrize("source", MOVED)
@pytest.mark.parametrize("kind", MOVED)
def test_checkpoints_move(trained, resumed, kind, source):
    """What is loaded is what was saved, to the bit, and the run goes on as if nothing had been: on ranks of the same
    kind with the same bits. (It goes on here from checkpoints of the same kind and of fsdp.)"""
    saved = read(trained, f"{source} saved 0")
    ended = [read(resumed, f"{kind} from {source} {rank}") for rank in range(KINDS[kind][0])]
    assert ended[0]["loaded"] == digest(trained / f"saved {source}" / f"step-{SAVED:08}")
    for found in ended if source in (kind, "fsdp") else []:
        assert found["numbers"] == pytest.approx(saved["numbers"][2 * SAVED :], rel=1e-6)
    if kind == source:
        assert ended[0]["digest"] == saved["digest"] != ended[0]["loaded"]


@pytest.mark.parametrize(
    "kind, way", [("fsdp", "saved"), ("fsdp", "open_clip"), ("hsdp", "saved"), ("fsdp 4", "saved")]
)
def test_one_block_is_whole_at_a_time(trained, kind, way):
    sizes = {name: g.nbytes for name, g in read(trained, f"one {way} 0")["gradients"].items()}
    blocks = {}
    for name in sizes:
        block = re.match(r".*(layers|blocks)\.\d+\.", name)
        key = block.group() if block else ""
        blocks[key] = blocks.get(key, 0) + sizes[name]
    rest = blocks.pop("")
    assert len(blocks) == (3 if way == "saved" else 4)
    assert read(trained, f"{kind} {way} 0")["most whole"] == rest + max(blocks.values()) < sum(sizes.values())


def stop_and_overflow(folder: Path) -> None:
    """On both ranks: a number in rank 1's share of the gradients is not finite, in float32 and in float16."""
    world = join_world("cpu")
    take = Shards.take_gradients

    def spoil(shards: Shards) -> None:
        take(shards)
        if world.rank == 1:
            shards.own["text_model.blocks.0.att.key.weight"].grad[0, 0] = float("inf")

    for precision in ("fp32", "amp"):
        run = Run(world, "fsdp", "one block", precision=precision)
        scaler, own = run.trainer.state.scaler, run.trainer.state.shards.own.values()
        scaler.load_state_dict(scaler.state_dict() and {**scaler.state_dict(), "scale": 2.0**10})
        run.train(1)
        before = [parameter.clone() for parameter in own]
        Shards.take_gradients = spoil
        if precision == "fp32":
            with pytest.raises(NumericsError, match=r"^step 1: loss [0-9.]+, gradient norm (inf|nan)"):
                run.train(2)
        else:
            run.train(2)
            assert scaler.get_scale() == 2.0**9, "on both ranks"
        assert all(torch.equal(a, b) for a, b in zip(before, own))
        Shards.take_gradients = take
        if precision == "amp":
            run.train(3)
            assert not any(torch.equal(a, b) for a, b in zip(before, own) if a.numel())
    weights, optim, _ = take_snapshot(run.trainer.state, "tiny")
    assert bool(weights) == bool(optim) == world.is_main, "nobody else keeps whole tensors"
    leave_world()


def test_a_bad_number_in_one_share_reaches_all(tmp_path):
    """All ranks stop, or skip the step and lower the scale, and no weight has moved."""
    run_ranks(2, tmp_path, stop_and_overflow, tmp_path)


def compile_blocks(folder: Path) -> None:
    """On both ranks: losses without and with compiled blocks, and how many graphs there are."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    world = join_world("cpu")
    numbers = [Run(world, "fsdp", "one block", torchcompile=compiled).train(2) for compiled in (False, True)]
    torch.save([*numbers, torch._dynamo.utils.counters["stats"]["unique_graphs"]], folder / f"compiled {world.rank}")
    leave_world()


def test_compiled_blocks(tmp_path):
    run_ranks(2, tmp_path, compile_blocks, tmp_path)
    for rank in range(2):
        plain, compiled, graphs = read(tmp_path, f"compiled {rank}")
        assert graphs == 2 and compiled == pytest.approx(plain, rel=1e-6), "a block of images, a block of texts"


def command_line(settings: dict, stop: int | None) -> None:
    """On both ranks: a run that rank 1 is told to end in step `stop`."""
    step = loop.Trainer.step

    def told(self, batch):
        if self.state.progress.step == stop and self.state.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    loop.Trainer.step = told
    try:
        main.run(parse(Settings, settings))
        assert stop is None
    except Preempted as stopped:
        assert str(stopped).startswith(f"SIGTERM after step {stop + 1}")
    leave_world()


def test_a_run_that_is_told_to_stop(tmp_path):
    """By the command line's function, with validation by the main rank: it goes on with the same bits, and what it
    leaves opens for inference."""
    data = make_smaller(make_tiny(tmp_path))
    changes = {"batch_size": 4, "max_steps": 5, "val_every_n_steps": 2, "resume": "latest", "parallel": "fsdp"}
    for name, stops in (("whole", [None]), ("parts", [2, None])):
        for stop in stops:
            run_ranks(2, tmp_path, command_line, {**data, **changes, "name": name}, stop)
    outcomes = []
    for name in ("whole", "parts"):
        folder = tmp_path / "logs" / name
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        metrics = [{k: v for k, v in r.items() if k.startswith(("val_", "loss", "grad_norm"))} for r in records]
        outcomes.append((digest(find_checkpoint(folder)), metrics))
    assert outcomes[0] == outcomes[1] and sum("val_mean_recall" in m for m in outcomes[0][1]) == 3
    loaded = rwkv_clip.load_for_inference(tmp_path / "logs" / "whole")
    extractor = FeatureExtractor.of(loaded, torch.device("cpu"), batch_size=4)
    found = evaluate_retrieval(extractor, load_retrieval(data["val_data"])).metrics
    assert found["mean_recall"] == outcomes[0][1][-1]["val_mean_recall"], "what the main rank saw is what was saved"


def test_one_process_holds_all():
    run = Run(World(0, 1, torch.device("cpu")), "one", parallel="fsdp")
    assert all(run.trainer.state.shards.own[name] is p for name, p in run.trainer.state.model.named_parameters())


def test_unequal_nodes_are_refused():
    settings = parse(ParallelSettings, {"parallel": "hsdp"})
    world = World(0, 3, torch.device("cpu"), local_size=2)
    with pytest.raises(ConfigError, match="parallel: hsdp needs equal nodes; 3 ranks, but 2 on this one; use fsdp"):
        distribute_model(torch.nn.Linear(1, 1), torch.nn.Module(), settings, world)


def test_neighbours_share(monkeypatch):
    """hsdp: three nodes of two ranks."""
    meshes = []
    monkeypatch.setattr(parallel, "init_device_mesh", lambda *shape, **names: meshes.append((*shape, *names.values())))
    monkeypatch.setattr(parallel, "_shard", lambda model, *_: model)
    world = World(5, 6, torch.device("cpu"), local_size=2)
    distribute_model(torch.nn.Linear(1, 1), torch.nn.Module(), parse(ParallelSettings, {"parallel": "hsdp"}), world)
    assert meshes == [("cpu", (3, 2), ("copy", "shard"))]
