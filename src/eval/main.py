"""Command line of the evaluation.

    python -m rwkv_clip.eval.main retrieval --checkpoint logs/my-run --data flickr8k/captions.jsonl --split
    test python -m rwkv_clip.eval.main classification --checkpoint logs/my-run --dataset cifar10 --data data

Exit codes: 0 done, 2 a mistake of the user or nothing evaluated (one line says what, no traceback).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rwkv_clip.allocator import keep_freed_memory
from rwkv_clip.dist import World, join_world, leave_world

from . import classification, retrieval
from .report import markdown
from .settings import ClassificationSettings, EvalSettings, RetrievalSettings

TASKS = {"retrieval": RetrievalSettings, "classification": ClassificationSettings}


def evaluate(settings: EvalSettings) -> int:
    """Load the model, run the task, print the table. Returns the exit code. Under torchrun all ranks share the work."""
    settings.check()
    world = join_world(settings.device)
    try:
        return _evaluate(settings, world)
    finally:
        leave_world()


def _evaluate(settings: EvalSettings, world: World) -> int:
    from rwkv_clip.model import load_for_inference

    device = world.device
    if device.type == "cpu":
        keep_freed_memory()
    loaded = load_for_inference(
        settings.checkpoint, model=settings.model, device=str(device), precision=settings.precision
    )
    task = retrieval if isinstance(settings, RetrievalSettings) else classification
    report = task.run(settings, loaded, device)
    undone = [result for result in report.results if result["status"] != "done"]
    if world.is_lead:
        print(markdown(report.table()), end="")
        print(f"results: {report.folder}")
        for result in undone:
            print(f"{result['status']}: {result['dataset']}: {result['reason']}", file=sys.stderr)
    failed = any(result["status"] == "failed" for result in undone)
    return 2 if failed or len(undone) == len(report.results) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and evaluate; returns the exit code."""
    import tyro

    settings = tyro.extras.subcommand_cli_from_dict(TASKS, args=arguments, prog="python -m rwkv_clip.eval.main")
    try:
        return evaluate(settings)
    except (ValueError, OSError) as error:
        print("error: " + "; ".join(line.strip(" ;") for line in str(error).splitlines()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
