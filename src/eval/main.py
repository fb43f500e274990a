"""Command line of the evaluation.

    python -m rwkv_clip.eval.main retrieval --checkpoint logs/my-run --data flickr8k/captions.jsonl --split test
    python -m rwkv_clip.eval.main classification --checkpoint logs/my-run --dataset cifar10 --data data
    python -m rwkv_clip.eval.main linear-probe --checkpoint logs/my-run --dataset cifar10 --data data
    python -m rwkv_clip.eval.main features --checkpoint logs/my-run --data flickr8k/captions.jsonl --name mine
    python -m rwkv_clip.eval.main search --features logs/eval/mine --query "a dog in the snow"
    python -m rwkv_clip.eval.main report logs/eval/run-1 logs/eval/run-2 --output logs/eval/comparison

Exit codes: 0 done, 2 a mistake of the user or nothing evaluated, 3 damaged records, 76 results cannot be written (one
line says what, no traceback; figures are printed all the same).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rwkv_clip.device import keep_freed_memory
from rwkv_clip.dist import World, join_world, leave_world
from rwkv_clip.errors import STORAGE, run_command

from . import classification, export, linear_probe, retrieval, search
from .cache import on_all_ranks
from .report import Report, check_place, collect
from .settings import (
    ClassificationSettings,
    EvalSettings,
    FeaturesSettings,
    LinearProbeSettings,
    ReportSettings,
    RetrievalSettings,
    SearchSettings,
)
from .tables import markdown_section

TASKS = {
    "retrieval": RetrievalSettings,
    "classification": ClassificationSettings,
    "linear-probe": LinearProbeSettings,
    "features": FeaturesSettings,
    "search": SearchSettings,
    "report": ReportSettings,
}
ROOMS = {
    RetrievalSettings: retrieval,
    ClassificationSettings: classification,
    LinearProbeSettings: linear_probe,
    FeaturesSettings: export,
}


def evaluate(settings: EvalSettings | SearchSettings | ReportSettings) -> int:
    """Load the model, run the task, print the table. Returns the exit code. Under torchrun all ranks share the work."""
    if isinstance(settings, ReportSettings):
        folder, tables = collect(settings.runs, settings.output)
        print("\n".join(map(markdown_section, tables)), end="")
        print(f"results: {folder}")
        return 0
    settings.check()
    if isinstance(settings, SearchSettings):
        for path in search.run(settings):
            print(f"results: {path}")
        return 0
    world = join_world(settings.device)
    try:
        return _evaluate(settings, world)
    finally:
        leave_world()


def _evaluate(settings: EvalSettings, world: World) -> int:
    from rwkv_clip.factory import load_for_inference

    device = world.device
    if device.type == "cpu":
        keep_freed_memory()
    room = ROOMS[type(settings)]
    data = room.load(settings, device)  # before the model: what is wrong here costs no minute
    on_all_ranks(lambda: check_place(settings.logs) if world.is_main else None, device)
    loaded = load_for_inference(
        settings.checkpoint, model=settings.model, device=str(device), precision=settings.precision
    )
    found = room.run(settings, data, loaded, device)
    if isinstance(found, Report):
        return _finish(found, world)
    if world.is_main:
        print(f"features: {found}")
    return 0


def _finish(report: Report, world: World) -> int:
    report.finish()
    undone = [result for result in report.results if result["status"] != "done"]
    if world.is_main:
        print(report.text(), end="")
        if report.folder:
            print(f"results: {report.folder}")
        for result in undone:
            print(f"{result['status']}: {result['dataset']}: {result['reason']}", file=sys.stderr)
    if world.is_main and not report.saved:
        return STORAGE
    failed = any(result["status"] == "failed" for result in undone)
    # A rank without results has left them to the main rank.
    return 2 if failed or (report.results and len(undone) == len(report.results)) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and evaluate; returns the exit code."""
    import tyro

    settings = tyro.extras.subcommand_cli_from_dict(TASKS, args=arguments, prog="python -m rwkv_clip.eval.main")
    memory = "use --precision bf16, fewer --workers, or another --device"
    return run_command(lambda: evaluate(settings), memory=memory, one_line=True)


if __name__ == "__main__":
    sys.exit(main())
