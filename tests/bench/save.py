"""Saving: how long a checkpoint holds training up, written at once and in the background, and verification on loading.

python tests/bench/save.py [--model RWKV-CLIP-B-32 --batch 8 --folder DIR]

Weights, gradients and AdamW's state of the model, a training step in bfloat16 autocast where the device computes in it.
Held up: the seconds of the call, and what the steps take longer than usual until the file is there; as a share of 100
steps. Floors: bytes / speed of sha256 on one core (a save needs a pass over what it writes and one over what it reads
back), bytes / speed of copying the same tensors. --folder: where checkpoints go for the time of the bench (the system's
folder for temporary files).
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Report, alternate, argument_parser, synchronize
from models import contrastive_loss, make_inputs, make_ours
from torch import Tensor, nn

import rwkv_clip
from rwkv_clip.checkpoint import find_checkpoint, read_tensors, save_checkpoint, verify_checkpoint
from rwkv_clip.device import autocast_dtype
from rwkv_clip.training.optimizer_state import pack_state
from rwkv_clip.training.saver import Saver

INTERVAL = 100  # steps between saves
TOWER = {"width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
TINY = {"image": {"image_size": [32, 32], "patch": 16, **TOWER}, "text": {"context": 8, **TOWER}}


class Training:
    """A model, its optimizer and one batch."""

    def __init__(self, model: nn.Module, batch: int, size: int, device: torch.device):
        self.model, self.device, self.dtype = model, device, autocast_dtype("auto", device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        image, text = make_inputs(batch, size, device, torch.float32)
        self.inputs = image, text[:, : model.spec.text.context]

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            features = self.model(*self.inputs)[:3]
        contrastive_loss(*features).backward()
        self.optimizer.step()
        synchronize(self.device)
        return time.perf_counter() - start

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.model.state_dict(), pack_state(self.optimizer, dict(self.model.named_parameters()))

    def size(self) -> int:
        return sum(t.numel() * t.element_size() for part in self.tensors() for t in part.values())


def hold_up(training: Training, save: Callable[[], object], usual: float, busy: Callable[[], bool]) -> float:
    """Seconds that a save costs: the call, and what the steps take longer while it is still being written."""
    start = time.perf_counter()
    save()
    seconds = time.perf_counter() - start
    while busy():
        seconds += training.step() - usual
    return seconds


def check(report: Report, folder: Path, device: torch.device) -> None:
    """What the writer thread stores are the bits of the moment of the save; saving does not change training."""
    runs = []
    for saves in (True, False):
        torch.manual_seed(0)
        training = Training(rwkv_clip.create_model(TINY).to(device), 4, 32, device)
        with Saver(folder, keep=2) as saver:
            for step in range(1, 6):
                training.step()
                if saves:
                    saver.save(step, *training.tensors(), {})
        runs.append([{key: value.cpu().clone() for key, value in part.items()} for part in training.tensors()])
    read = [read_tensors(find_checkpoint(folder) / name) for name in ("model.safetensors", "optim.safetensors")]
    for what, other in (("checkpoint", read), ("training without saves", runs[1])):
        wrong = sum(not torch.equal(value, b[key]) for a, b in zip(runs[0], other) for key, value in a.items())
        report.gate(f"{what}: tensors whose bits differ", wrong, 0)


def measure_floors(report: Report, case: str, training: Training, repeats: int) -> None:
    """Seconds of hashing and of copying as many bytes as a checkpoint has."""
    size, block = training.size(), bytes(2**26)
    (hashed,) = alternate({"": lambda: hashlib.sha256(block)}, repeats=5, device=torch.device("cpu")).values()
    report.add(case, "floor: one sha256", seconds=size / len(block) * statistics.median(hashed))
    buffers = [[torch.empty_like(t, device="cpu") for t in part.values()] for part in training.tensors()]

    def copy() -> None:
        for part, copies in zip(training.tensors(), buffers):
            for tensor, buffer in zip(part.values(), copies):
                buffer.copy_(tensor.detach())

    (copied,) = alternate({"": copy}, repeats=repeats, warmup=1, device=torch.device("cpu")).values()
    report.add(case, "floor: a copy", seconds=copied, gb_per_second=size / 1e9 / statistics.median(copied))


def measure(report: Report, case: str, training: Training, folder: Path, repeats: int) -> None:
    """What a save costs, in turn: at once, in the background."""
    usual = statistics.median([training.step() for _ in range(repeats + 2)][1:])
    report.add(case, "a training step", seconds=usual)
    seconds: dict[str, list[float]] = {"at once": [], "in the background": []}
    calls, step = [], 0
    with Saver(folder, keep=2) as saver:
        saver.save(step, *training.tensors(), {}, last=True)  # makes the buffers
        for _ in range(repeats):
            step += 1
            at_once = lambda: save_checkpoint(folder, step, *training.tensors(), {}, keep=2)  # noqa: E731, B023
            seconds["at once"].append(hold_up(training, at_once, usual, lambda: False))
            training.step()  # or the next save has nothing new to write
            step += 1
            start = time.perf_counter()
            saver.save(step, *training.tensors(), {})
            calls.append(time.perf_counter() - start)
            rest = hold_up(training, lambda: None, usual, lambda: saver._thread.is_alive())
            seconds["in the background"].append(calls[-1] + rest)
    for name, taken in seconds.items():
        share = 100 * statistics.median(taken) / (INTERVAL * usual)
        report.add(case, name, seconds=taken, baseline="at once", percent_of_100_steps=share)
    report.add(case, "in the background: the call", seconds=calls)
    share = statistics.median(seconds["in the background"]) / (INTERVAL * usual)
    report.ratio(case, "5 % / share of 100 steps that a save costs", 0.05 / share, goal=1)


def measure_verification(report: Report, case: str, size: int, folder: Path, repeats: int) -> None:
    """Comparing the newest checkpoint with its manifest, as every start does."""
    path, host = find_checkpoint(folder), torch.device("cpu")
    (taken,) = alternate({"": lambda: verify_checkpoint(path)}, repeats=repeats, warmup=1, device=host).values()
    speed = size / 1e9 / statistics.median(taken)
    report.add(case, "verify", seconds=taken, gb_per_second=speed)
    if size > 1e8:
        report.ratio(case, "verification, GB/s", speed, goal=1)


def main() -> None:
    """Check, then the tiny model, then the large one."""
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument("--model", default="RWKV-CLIP-B-32", help="preset (RWKV-CLIP-B-32)")
    parser.add_argument("--batch", type=int, help="pairs per training step (8, on a GPU 512)")
    parser.add_argument("--folder", type=Path, help="for checkpoints of about 12 bytes per parameter, three at a time")
    args = parser.parse_args()
    report = Report("save", args.device, commit=args.commit)
    batch = args.batch or (8 if args.device.type == "cpu" else 512)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        check(report, Path(folder) / "check", args.device)
        tiny = Training(rwkv_clip.create_model(TINY).to(args.device), 8, 32, args.device)
        models = {"tiny, 1.7 M parameters": lambda: tiny}
        large = f"{args.model}, batch {batch}"
        models[large] = lambda: Training(make_ours(args.model, args.device), batch, 224, args.device)
        for case, make in models.items():
            training = make()
            training.step()
            measure(report, case, training, Path(folder) / case, args.repeats)
            measure_floors(report, case, training, args.repeats)
            measure_verification(report, case, training.size(), Path(folder) / case, args.repeats)
            del training
    report.finish(args.output)


if __name__ == "__main__":
    main()
