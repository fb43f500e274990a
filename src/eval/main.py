"""Command line of the evaluation.

    python -m rwkv_clip.eval.main retrieval --checkpoint logs/my-run --data flickr8k/captions.jsonl --split test
    python -m rwkv_clip.eval.main classification --checkpoint logs/my-run --dataset cifar10 --data data
    python -m rwkv_clip.eval.main linear-probe --checkpoint logs/my-run --dataset cifar10 --data data
    python -m rwkv_clip.eval.main features --checkpoint logs/my-run --data flickr8k/captions.jsonl --name mine
    python -m rwkv_clip.eval.main search --features logs/eval/mine --query "a dog in the snow"
    python -m rwkv_clip.eval.main knn --image-feats I.img_feat.jsonl --text-feats T.txt_feat.jsonl --output P.jsonl
    python -m rwkv_clip.eval.main recall test_texts.jsonl P.jsonl recall.json
    python -m rwkv_clip.eval.main invert --input test_texts.jsonl
    python -m rwkv_clip.eval.main report logs/eval/run-1 logs/eval/run-2 --output logs/eval/comparison

Exit codes: 0 done, 2 a user's mistake or nothing evaluated, 3 damaged records, 76 results cannot be written (one line
says what, no traceback; figures are printed anyway).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from rwkv_clip.config import ConfigError, check
from rwkv_clip.device import keep_freed_memory
from rwkv_clip.dist import join_world, leave_world, rank_and_size
from rwkv_clip.errors import run_command
from rwkv_clip.features import on_all_ranks

from .encoder import Encoder
from .report.files import check_place
from .settings import EvalSettings
from .tasks import TASKS, Task


def evaluate(settings: EvalSettings) -> int:
    """Run the task that `settings` belong to. Returns the exit code. Under torchrun all ranks share the work."""
    if problems := check(settings):
        raise ConfigError(problems)
    task = next(task for task in TASKS.values() if task.settings is type(settings))
    if task.load is None:
        return task.run(settings)
    world = join_world(settings.device)
    try:
        return _evaluate(task, settings, world.device)
    finally:
        leave_world()


def _evaluate(task: Task, settings: EvalSettings, device: torch.device) -> int:
    from rwkv_clip.factory import load_for_inference

    if device.type == "cpu":
        keep_freed_memory()
    data = task.load(settings, device)  # before the model: a mistake here shows at once
    on_all_ranks(lambda: check_place(settings.logs) if rank_and_size()[0] == 0 else None, device)
    loaded = load_for_inference(
        settings.checkpoint, model=settings.model, device=str(device), precision=settings.precision
    )
    options = {"batch_size": settings.batch_size, "workers": settings.workers, "progress": True}
    return task.run(settings, data, Encoder.of(loaded, device, settings.cache_folder, **options))


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and evaluate; returns the exit code."""
    import tyro

    kinds = {name: task.settings for name, task in TASKS.items()}
    settings = tyro.extras.subcommand_cli_from_dict(kinds, args=arguments, prog="python -m rwkv_clip.eval.main")
    memory = "use --precision bf16, fewer --workers, or another --device"
    return run_command(lambda: evaluate(settings), memory=memory, one_line=True)


if __name__ == "__main__":
    sys.exit(main())
