"""The `clip_benchmark` command with our models: the real package, with one more model type in its table of loaders.

    python -m rwkv_clip.eval.clip_benchmark eval --model_type rwkv_clip --model - --pretrained logs/my-run \\
        --dataset flickr8k --task zeroshot_retrieval --dataset_root flickr8k --recall_k 1 5 10

Everything after the module's name goes to clip_benchmark, whose data sets, loaders, loops and metrics do the work.
--pretrained takes what --checkpoint of `rwkv_clip.eval.main` takes; --model is the preset or JSON of a file that holds
weights only, and `-` where the checkpoint describes its model. In Python: `register()`, then clip_benchmark as usual.

clip_benchmark has no plug-in point for other packages, so its own console script does not know our models: this module
fills the table and then runs that script.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from rwkv_clip.factory import load_for_inference

MODEL_TYPE = "rwkv_clip"
DESCRIBED = "-"  # as --model: the checkpoint describes its model


def load_ours(model_name: str, pretrained: str, cache_dir: str | None = None, device: str | torch.device = "cpu"):
    """(model, transform, tokenizer) as clip_benchmark asks for them. Nothing is fetched, so cache_dir is not used."""
    model = None if model_name == DESCRIBED else model_name
    loaded = load_for_inference(pretrained, model=model, device=device)
    return loaded.model, loaded.preprocess, loaded.tokenizer


def register() -> None:
    """Add our model type to the clip_benchmark that is imported in this process; a second call changes nothing."""
    from clip_benchmark import models

    models.TYPE2FUNC[MODEL_TYPE] = load_ours
    if MODEL_TYPE not in models.MODEL_TYPES:  # the list that its command line checks
        models.MODEL_TYPES.append(MODEL_TYPE)


def mend_accuracy() -> None:
    """clip_benchmark 1.6.2 takes float() of one-element arrays, which numpy 2.4 refuses: compute the same figure
    without."""
    try:
        float(np.ones(1))
        return
    except TypeError:
        from clip_benchmark.metrics import zeroshot_classification

    def accuracy(output: torch.Tensor, target: torch.Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
        found = output.topk(max(topk), 1, True, True).indices == target[:, None]
        return [int(found[:, :k].sum()) / len(target) for k in topk]

    zeroshot_classification.accuracy = accuracy


def main() -> int:
    """clip_benchmark's command line; 2 for a user's mistake."""
    try:
        register()
        mend_accuracy()
        from clip_benchmark import cli
    except ImportError as error:
        print(f"error: {error}; install clip_benchmark: pip install -e '.[clip-benchmark]'", file=sys.stderr)
        return 2
    try:
        return cli.main() or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
