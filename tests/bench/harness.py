"""What every bench shares: a check before any speed, contenders timed in turn, one JSON and one table.

    parser = argument_parser(__doc__)                      # --device --repeats --output --commit
    args = parser.parse_args()
    report = Report("loss", args.device, commit=args.commit)
    report.gate("chunked loss", error, 1e-5)               # exits with code 1 when wrong: no speed is printed
    times = alternate({"plain": plain, "ours": ours}, repeats=args.repeats, device=args.device)
    for name, seconds in times.items():                    # goal: the least ratio to `baseline` that is aimed at
        report.add("8192 x 640", name, seconds=seconds, baseline="plain", goal=0.9 if name == "ours" else None)
    less = peak_memory(prepare, "plain", device=args.device) / peak_memory(prepare, "ours", device=args.device)
    report.ratio("8192 x 640", "memory of plain / ours", less, goal=10)
    report.missing("8192 x 640", "open_clip", "open_clip_torch is not installed")
    report.finish(args.output)

Needs torch and numpy only. Importing this file makes the checkout's rwkv_clip, rwkv_clip.training and
rwkv_clip.eval importable without an installation, so a bench imports it before them (isort's order does).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA = 1

sys.path.insert(0, str(ROOT / "src"))
import rwkv_clip  # noqa: E402
from rwkv_clip.device import keep_freed_memory  # noqa: E402

rwkv_clip.__path__.append(str(ROOT / "src"))  # src/training and src/eval are rwkv_clip.training and rwkv_clip.eval


def argument_parser(doc: str | None, *, repeats: int = 9) -> argparse.ArgumentParser:
    """Parser with the options that every bench has; `repeats` is the bench's own default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=torch.device(default), help=f"cpu or cuda ({default})")
    parser.add_argument("--repeats", type=_positive, default=repeats, help=f"timed calls per contender ({repeats})")
    parser.add_argument("--output", type=Path, help="folder or .json file of the result (tests/bench/results)")
    parser.add_argument("--commit", help="commit that is measured, where git cannot tell")
    return parser


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; use cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda: torch sees no GPU here; use --device cpu")
    return device


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; use a whole number from 1 on")
    return int(text)


def run_python(*arguments: object, log: Path | None = None) -> str:
    """Run Python with these arguments in a process of its own, with one thread; returns what it printed, which is added
    to `log`. SystemExit with its end where it fails."""
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    if log:
        with open(log, "a", encoding="utf-8") as out:
            out.write(done.stdout)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    contenders: dict[str, Callable[[], object]], *, repeats: int, warmup: int = 2, device: torch.device, rest: float = 0
) -> dict[str, list[float]]:
    """Seconds of each of `repeats` calls per contender, in turn (A B C A B C ..), so that drift meets all alike.

    rest: seconds before each call, where threads of the last contender go on spinning after its call.

    On a GPU times come from CUDA events, and a write larger than the cache goes before every call: no contender
    finds its inputs there, and the GPU is busy while Python starts the first kernel.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for turn in range(warmup + repeats):
        for name, call in contenders.items():
            time.sleep(rest)
            taken = _time_cpu(call) if flush is None else _time_cuda(call, flush)
            if turn >= warmup:
                seconds[name].append(taken)
    return seconds


def _time_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _time_cuda(call: Callable[[], object], flush: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(flush.device)
    flush.zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(flush.device)
    return start.elapsed_time(end) / 1e3


def clock(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call, and those that all threads of this process spent on CPUs (other processes matter less)."""
    start, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - busy


def peak_memory(prepare: Callable[..., Callable[[], object]], *arguments, device: torch.device) -> float:
    """Peak MiB that one call of `prepare(*arguments)()` adds to what was there before, in a fresh process.

    `prepare` is a function at the top of a bench's file: it makes inputs (not counted) and returns the call to
    measure. On a GPU: torch's allocator. On a CPU: resident memory, which counts what the first call starts (threads
    and their buffers, some MiB) unless `prepare` has done something small of the kind. RuntimeError if the call fails.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(sender, prepare, arguments, str(device)))
    process.start()
    sender.close()
    try:
        peak = receiver.recv()
    except EOFError:
        process.join()
        why = "out of memory?" if process.exitcode == -9 else "its error is above"
        raise RuntimeError(f"{prepare.__name__}{arguments}: exit code {process.exitcode}, {why}") from None
    process.join()
    return peak


def _measure_peak(sender, prepare, arguments, device: str) -> None:
    call = prepare(*arguments)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        before = _reset_resident()
        call()
        peak = _resident("VmHWM") - before
    sender.send(peak / 2**20)
    sender.close()


def _reset_resident() -> int:
    """Resident bytes now; the kernel's high-water mark starts again from there (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _resident("VmHWM")  # without the reset only growth beyond the highest so far is seen
    return _resident("VmRSS")


def _resident(field: str) -> int:
    """VmRSS or VmHWM in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # macOS: the mark in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def device_name(device: torch.device) -> str:
    """'NVIDIA H200' or 'AMD EPYC 9B45, 2 cores'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        name = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{re.sub(r'[ ]+[0-9]+-Core Processor$', '', name.strip())}, {cores} cores"


def find_commit() -> tuple[str, bool]:
    """(short commit, whether code differs from it); ('unknown', True) without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=9", "HEAD"), bool(
            git("status", "--porcelain", "--", "src", "tests/bench/*.py")
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def command_line() -> str:
    """The command of this process, folders of the machine left out."""
    arguments = [f"../{Path(a).name}" if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return " ".join(["python", f"tests/bench/{Path(sys.argv[0]).name}", *arguments])


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


class Report:
    """Checks, rows and ratios of one bench run on one device."""

    def __init__(self, name: str, device: torch.device, *, commit: str | None = None):
        if device.type == "cpu":
            keep_freed_memory()  # as training and evaluation do
        found, changed = find_commit()
        self.name = name
        self.facts = {
            "schema": SCHEMA,
            "bench": name,
            "device": device_name(device),
            "kind": device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit or found,
            "changed": changed if commit is None else False,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": command_line(),
        }
        self.gates: list[dict] = []
        self.rows: list[dict] = []
        self.ratios: list[dict] = []
        print(f"{name}: {self.facts['device']}, {self.facts['threads']} threads, torch {torch.__version__}", flush=True)

    def gate(self, what: str, error: float, limit: float) -> None:
        """Record a check; ends the bench with exit code 1 unless error <= limit (NaN fails)."""
        error = float(error)
        if not error <= limit:
            raise SystemExit(f"{what} is wrong: error {error:.3g}, allowed {limit:.3g}; no speed is printed")
        self.gates.append({"what": what, "error": error, "limit": limit})

    def add(
        self,
        case: str,
        contender: str,
        *,
        seconds: float | list[float] | None = None,
        baseline: str | None = None,
        goal: float | None = None,
        **figures: float,
    ) -> None:
        """One row. seconds: per call, of `alternate`. baseline: the contender of the case that the ratio (its median
        seconds / ours) is to; goal: the least ratio aimed at, for the plot. figures: numbers, e.g.
        images_per_second=.., peak_mib=.. ."""
        if goal is not None and baseline is None:
            raise ValueError(f"{case}, {contender}: goal={goal} without a baseline; name the contender it is over")
        row = {"case": case, "contender": contender, "baseline": baseline, "goal": goal}
        if seconds is not None:
            values = [seconds] if isinstance(seconds, (int, float)) else list(seconds)
            row["seconds"] = dict(zip(("first_quartile", "median", "third_quartile"), quartiles(values)))
            row["calls"] = len(values)
        row["figures"] = {key: float(value) for key, value in figures.items()}
        self.rows.append(row)

    def missing(self, case: str, contender: str, why: str) -> None:
        """A row that could not be measured here, and why."""
        self.rows.append({"case": case, "contender": contender, "missing": why})

    def ratio(self, case: str, what: str, value: float, *, goal: float | None = None) -> None:
        """A ratio that is not one of times (memory, MFU, ..); larger is better, `goal` is the least aimed at."""
        self.ratios.append({"case": case, "what": what, "value": float(value), "goal": goal})

    def finish(self, output: Path | None = None) -> Path:
        """Print the table and write the JSON to `output` (folder or .json file); returns the file."""
        ratios = self._ratios_of_times() + self.ratios
        content = {**self.facts, "gates": self.gates, "rows": self.rows, "ratios": ratios}
        print(format_result(content), flush=True)
        output = output or RESULTS
        if output.suffix != ".json":
            tag = f"{self.facts['device']} torch{torch.__version__} {self.facts['commit']}"
            output = output / f"{self.name}-{re.sub(r'[^a-z0-9.]+', '-', tag.lower())}.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(content, indent=1) + "\n")
        return output

    def _ratios_of_times(self) -> list[dict]:
        medians = {(row["case"], row["contender"]): row["seconds"]["median"] for row in self.rows if "seconds" in row}
        found = []
        for row in self.rows:
            own, other = (medians.get((row["case"], row.get(key))) for key in ("contender", "baseline"))
            if own is not None and other is not None and row["baseline"] != row["contender"]:
                row["ratio"] = other / own
                what = f"{row['contender']} over {row['baseline']}"
                same = {"case": row["case"], "contender": row["contender"]}
                found.append({**same, "what": what, "value": other / own, "goal": row["goal"]})
        return found


def format_number(value: float) -> str:
    """Three digits or so: 0.0123, 4.56, 789, 12,345."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def table_of(content: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows, as text, of a result (the content of a JSON): columns that no row fills are left out."""
    figures = list(dict.fromkeys(key for row in content["rows"] for key in row.get("figures", {})))
    header = ["case", "contender", "ms", "quartiles", *(key.replace("_", " ") for key in figures), "ratio", "goal"]
    rows = []
    for row in content["rows"]:
        times, own = row.get("seconds"), row.get("figures", {})
        line = [row["case"], row["contender"]]
        if "missing" in row:
            line += [f"not measured: {row['missing']}"] + [""] * (len(header) - 3)
        else:
            line += [format_number(1e3 * times["median"]) if times else ""]
            ends = [times["first_quartile"], times["third_quartile"]] if times and row["calls"] > 1 else []
            line += [" - ".join(format_number(1e3 * end) for end in ends)]
            line += [format_number(own[key]) if key in own else "" for key in figures]
            line += [f"{row[key]:.2f}" if row.get(key) is not None else "" for key in ("ratio", "goal")]
        rows.append(line)
    keep = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in keep], [[row[i] for i in keep] for row in rows]


def format_result(content: dict) -> str:
    """The result as aligned lines for a terminal."""
    header, rows = table_of(content)
    short = [row if not any(cell.startswith("not measured") for cell in row) else row[:2] for row in rows]
    widths = [max([len(header[i]), *(len(row[i]) for row in short if i < len(row))]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    for ratio in content["ratios"]:
        if "contender" in ratio:
            continue  # stands in its row already
        aim = f" (goal {ratio['goal']:g})" if ratio["goal"] is not None else ""
        lines.append(f"{ratio['case']}: {ratio['what']}: {ratio['value']:.2f}{aim}")
    lines.append(f"checks passed: {len(content['gates'])}")
    return "\n".join(lines)
