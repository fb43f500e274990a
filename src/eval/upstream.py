"""`--legacy`: figures as the released code of RWKV-CLIP and ALIP counts them, beside the exact ones, for comparison.

Every defect of that code that changes a figure or ends the run is named in the output, with its effect on this set,
including the one that cannot be reproduced. The exact figures stay the result.

Of equal logits, the released code takes whichever torch.topk (classification) or torch.argsort (retrieval) puts first.
We call the same operators, on the CPU, where their order is fixed, and report how much any order could change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_clip.metrics import RECALL_AT, exact_features

RANKS, BATCH = 8, 128  # the released evaluation: 8 processes, its default batch
FLICKR_CAPTIONS = 5
_CHUNK = 1024


def count_classification(
    features: Tensor, weights: Tensor, labels: Tensor, dataset: str, classes: int
) -> dict[str, object]:
    """Top-1 and mean per class as the released code counts them, how many rows tie, and the defects by name.

    features (n, d) and weights (classes, d): normalised; labels (n,). `hits1_range`: hits if every tie at the top
    were lost, and if every one were won. mean_per_class is None where the released code divides by zero.
    """
    logits = integer_logits(features, weights)
    labels = labels.cpu()
    phantoms = phantom_rows(len(labels)) if dataset == "imagenet" else 0
    if phantoms:
        logits = torch.cat([logits, torch.zeros(phantoms, classes, dtype=torch.int64)])
        labels = torch.cat([labels, torch.zeros(phantoms, dtype=torch.int64)])
    right = logits.topk(1, dim=1).indices[:, 0] == labels
    own = logits.gather(1, labels[:, None])
    top = logits.amax(1, keepdim=True)
    tied = (logits == top).sum(1)
    at_top = (own == top)[:, 0]
    counts = torch.bincount(labels, minlength=classes)
    hits = torch.bincount(labels[right], minlength=classes)
    absent = int((counts == 0).sum())
    metrics = {
        "top1": int(right.sum()) / len(labels),
        "mean_per_class": None if absent else float((hits.double() / counts).mean()),
        "hits1": int(right.sum()),
        "samples": len(labels),
        "tied_rows": int((tied > 1).sum()),
        "hits1_range": [int((at_top & (tied == 1)).sum()), int(at_top.sum())],
    }
    defects = [_integers(metrics)]
    if phantoms:
        defects.append(_phantoms(phantoms, int(right[-phantoms:].sum())))
    if absent:
        effect = f"{absent} of {classes} classes have no sample: the released code stops with ZeroDivisionError"
        defects.append(_defect("absent-class", "mean per class divides by every class's count", True, effect))
    if dataset == "sun397":
        effect = "no seed to repeat: the figure is that of the split that this report names"
        says = "the split is seeded with hash(), salted anew in every process, so each rank draws its own"
        defects.append(_defect("salted-split", says, False, effect))
    return {"metrics": metrics, "defects": defects}


def count_retrieval(image: Tensor, text: Tensor, image_of_caption: Tensor, dataset: str) -> dict[str, object]:
    """Recall as the released code counts it: float32 similarities, an unstable sort, five captions for Flickr30k.

    image (n, d), text (m, d): normalised features in the order of the set. `*_hits@k_range`: hits if every tie were
    lost, and if every one were won.
    """
    owner = torch.as_tensor(image_of_caption, dtype=torch.int64).cpu()
    defects = []
    if dataset == "flickr30k":
        owner, defect = _five_captions(owner, len(image))
        defects.append(defect)
    captions_of = _groups(owner, len(image))
    directions = {
        "image_to_text": _sorted_ranks(image, text, captions_of),
        "text_to_image": _sorted_ranks(text, image, [own[None] for own in owner]),
    }
    metrics: dict[str, object] = {}
    for name, ranks in directions.items():
        for k in RECALL_AT:
            found, lost, won = ((ranks[:, column] < k).sum().item() for column in range(3))
            metrics |= {f"{name}_R@{k}": found / len(ranks), f"{name}_hits@{k}": found}
            metrics[f"{name}_hits@{k}_range"] = [lost, won]
    recalls = [value for key, value in metrics.items() if "_R@" in key]
    metrics["mean_recall"] = sum(recalls) / len(recalls)
    open_ranks = sum(int((ranks[:, 1] != ranks[:, 2]).sum()) for ranks in directions.values())
    defects.insert(0, _unstable(open_ranks, sum(map(len, directions.values()))))
    if len(text) % BATCH == 1:
        effect = f"{len(text)} captions leave one for the last batch of {BATCH}: the released code stops with an error"
        defects.append(_defect("lone-caption", "squeeze() of a text batch of one", False, effect))
    return {"metrics": metrics, "defects": defects}


def integer_logits(features: Tensor, weights: Tensor) -> Tensor:
    """100 * cosine truncated to whole numbers, toward zero: int64 (n, classes) on the CPU.

    From exact similarities, so that no figure depends on batch, device or BLAS (the released code's are float32).
    """
    features, weights = exact_features(features, "features"), exact_features(weights, "weights")
    weights = weights.to(features.device).T
    return torch.cat([(100 * (part @ weights)).to(torch.int64).cpu() for part in features.split(_CHUNK)])


def phantom_rows(samples: int, ranks: int = RANKS, batch: int = BATCH) -> int:
    """Rows of the released ImageNet buffers without a picture: each rank's last batch counts as a full one."""
    return sum(-(samples // ranks + (rank < samples % ranks)) % batch for rank in range(ranks))


def _defect(name: str, says: str, reproduced: bool, effect: str) -> dict[str, object]:
    """What the released code does wrong, whether our second count reproduces it, and its effect on this set."""
    return {"name": name, "says": says, "reproduced": reproduced, "effect": effect}


def _integers(metrics: dict) -> dict[str, object]:
    low, high = metrics["hits1_range"]
    rows, samples = metrics["tied_rows"], metrics["samples"]
    effect = (
        f"{rows} of {samples} rows ({100 * rows / samples:.1f} %) tie at the top; by their order top-1 could be "
        f"anything from {100 * low / samples:.1f} to {100 * high / samples:.1f} %, torch.topk makes it "
        f"{100 * metrics['top1']:.1f} %"
    )
    return _defect("integer-logits", "100 * cosine goes into an int64 buffer, cut toward zero", True, effect)


def _phantoms(count: int, right: int) -> dict[str, object]:
    effect = f"{count} rows that hold no picture count as samples of class 0, {right} of them as right"
    says = f"ImageNet buffers hold whole batches ({RANKS} ranks, batch {BATCH}); the rest stays zero"
    return _defect("phantom-rows", says, True, effect)


def _five_captions(owner: Tensor, images: int) -> tuple[Tensor, dict[str, object]]:
    """Captions 5 k .. 5 k + 4 belong to picture k, whatever the file says."""
    assumed = torch.arange(len(owner)) // FLICKR_CAPTIONS
    if len(owner) != FLICKR_CAPTIONS * images:
        effect = f"{len(owner)} captions for {images} pictures: the released code stops here; the set's own pairs used"
        assumed = owner
    else:
        effect = f"{int((assumed != owner).sum())} of {len(owner)} captions go to a wrong picture"
    says = "Flickr30k: caption 5 k to 5 k + 4 are taken for those of picture k"
    return assumed, _defect("five-captions", says, assumed is not owner, effect)


def _unstable(open_ranks: int, queries: int) -> dict[str, object]:
    effect = f"{open_ranks} of {queries} queries have ranks that only the sort decides"
    return _defect("unstable-sort", "float32 similarities, and ties in the order of an unstable argsort", True, effect)


def _groups(owner: Tensor, images: int) -> list[Tensor]:
    """Captions of each picture."""
    return list(torch.argsort(owner, stable=True).split(torch.bincount(owner, minlength=images).tolist()))


def _sorted_ranks(queries: Tensor, items: Tensor, right: list[Tensor]) -> Tensor:
    """int64 (queries with a right item, 3): best rank of the right items as sorted, with ties lost, with ties won."""
    kept = [number for number, own in enumerate(right) if len(own)]
    queries, items = queries.float().cpu(), items.float().cpu()
    ranks = []
    for start in range(0, len(kept), _CHUNK):
        rows = kept[start : start + _CHUNK]
        similarity = queries[rows] @ items.T
        for row, scores in zip(rows, similarity):
            own = scores[right[row]].amax()
            better, equal = int((scores > own).sum()), int((scores == own).sum())
            others, found = equal - int((scores[right[row]] == own).sum()), better
            if others:  # otherwise every sort agrees
                place = torch.empty(len(scores), dtype=torch.int64)
                place[torch.argsort(scores, descending=True)] = torch.arange(len(scores))
                found = int(place[right[row]].amin())
            ranks.append((found, better + others, better))
    return torch.tensor(ranks, dtype=torch.int64).reshape(-1, 3)
