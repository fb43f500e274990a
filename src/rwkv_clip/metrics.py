"""Ranks, nearest items, retrieval recall and classification accuracy as pure functions, for training and evaluation.

Everything rests on one count: the rank of a query's right item is the number of wrong items that are at least as
similar. Ties count against the model, so one that gives the same answer to everything finds nothing. Similarities are
formed from features rounded to multiples of 2^-26, so a float64 sum of products of unit vectors is exact in any order:
hit counts do not depend on chunk size, device, BLAS or the order of the items, and equal features tie exactly. The
rounding (7.5e-9 per coordinate) is finer than the float32 that features come in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
_GRID = 2.0**26
COLUMNS = 16  # images of a tile, for each of its captions
_LARGEST_NORM = 1.01  # exactness needs sums below 2, i.e. unit vectors
NEVER = torch.iinfo(torch.int64).max  # the rank of a caption without a right image: among no first k


def exact_features(features: Tensor, name: str = "features") -> Tensor:
    """Unit vectors (n, d) -> float64 (n, d) on the grid on which dot products are exact.

    Runs on the tensor's device, or on the CPU where the device has no float64 (MPS).
    ValueError for another shape, for NaN or Inf, and for vectors longer than 1.
    """
    if features.ndim != 2:
        raise ValueError(f"{name}: shape {tuple(features.shape)}; give one vector per row, shape (n, d)")
    features = features.detach()
    features = features.cpu() if features.device.type == "mps" else features
    features = features.to(torch.float64)
    norms = features.norm(dim=1)
    bad = torch.nonzero(~torch.isfinite(norms)).flatten()
    if len(bad):
        raise ValueError(f"{name}: row {int(bad[0])} (of {len(bad)} such rows) is not finite; the model is broken")
    if len(norms) and norms.max() > _LARGEST_NORM:
        row = int(norms.argmax())
        raise ValueError(f"{name}: row {row} has norm {norms[row]:.4g}; normalise features to length 1 first")
    return torch.round(features * _GRID) / _GRID


def tied_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Rank (from 0) of column `targets[i]` in row i of scores (n, m): how many others have its score or more."""
    return (scores >= scores.gather(1, targets[:, None])).sum(1) - 1


def target_ranks(queries: Tensor, items: Tensor, targets: Tensor, chunk: int = 256) -> Tensor:
    """Rank (from 0) of item `targets[i]` among all `items` for query i, ties before it; int64 (n,) on the CPU.

    queries (n, d) and items (m, d) are normalised features, targets (n,) indices into items. Only `chunk` rows of the
    similarity matrix exist at a time.
    """
    _check_chunk(chunk)
    if len(queries) != len(targets):
        raise ValueError(f"targets: {len(targets)} for {len(queries)} queries; give one target per query")
    if not len(queries):
        return torch.zeros(0, dtype=torch.int64)
    _check_indices("targets", targets, len(items))
    queries, items = exact_features(queries, "queries"), exact_features(items, "items")
    _check_widths(queries, items)
    items, targets = items.to(queries.device), targets.to(queries.device)
    chunks = zip(queries.split(chunk), targets.split(chunk))
    return torch.cat([tied_ranks(query @ items.T, target) for query, target in chunks]).cpu()


def nearest_items(
    queries: Tensor, items: Tensor, count: int, device: str | torch.device = "cpu", chunk: tuple[int, int] = (256, 8192)
) -> tuple[Tensor, Tensor]:
    """Indices (n, k) of the `count` best items of each query and their similarities, float64; k = min(count, items).

    queries (n, d), items (m, d): normalised features. Best first, ties in the order of the items; on the CPU. Computed
    on `device`, `chunk` queries x items at a time. This order is for display; what counts as found is decided by ranks.
    """
    _check_widths(queries, items)
    rows, columns = chunk
    asked = [exact_features(part.to(device), "queries") for part in queries.split(rows)]
    best = [(part.new_zeros(len(part), 0), part.new_zeros(len(part), 0, dtype=torch.int64)) for part in asked]
    for start in range(0, len(items), columns):
        part = exact_features(items[start : start + columns].to(device), "items")
        for i, (query, (scores, places)) in enumerate(zip(asked, best)):
            tile = query @ part.T
            found = _best_columns(tile, count)
            # Earlier items come first, and a stable sort keeps them before equal ones.
            scores, order = torch.cat([scores, tile.gather(1, found)], 1).sort(dim=1, descending=True, stable=True)
            places = torch.cat([places, found + start], 1).gather(1, order)
            best[i] = scores[:, :count], places[:, :count]
    scores, places = (torch.cat(parts).cpu() for parts in zip(*best))
    return places, scores


def retrieval_ranks(
    image: Tensor, text: Tensor, image_of_caption: Tensor | Sequence[int], chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """Ranks (from 0) in both directions: (image -> text, text -> image), int64, on the CPU.

    image (n, d), text (m, d): normalised features; image_of_caption (m,): the image that each caption belongs to, or
    where captions have several right images or none, (pairs, 2): a caption and an image that belongs to it. An image
    may have any number of captions and ranks as the best of them does among the captions of others, and so does a
    caption among images. An image without a caption is a candidate for text -> image but not a query: the first result
    has one entry per image that has captions, in order. A caption without an image is a query that finds nothing, of
    rank NEVER.
    Only a tile of `chunk` captions x 16 `chunk` images of the similarity matrix exists at a time.

    NOTE(parity): two images with the same caption tie on it, so neither finds it at rank 0; clip_benchmark leaves the
    order of equal captions to torch.topk.
    """
    _check_chunk(chunk)
    caption, owner = _right_pairs(image_of_caption, len(text), len(image))
    image, text = exact_features(image, "image"), exact_features(text, "text")
    _check_widths(text, image, "captions", "images")
    caption, owner, text = caption.to(image.device), owner.to(image.device), text.to(image.device)
    own = _own_similarity(image, text, caption, owner)
    best_text = own.new_full((len(image),), -torch.inf).scatter_reduce(0, owner, own, "amax")
    best_image = own.new_full((len(text),), -torch.inf).scatter_reduce(0, caption, own, "amax")
    # Below, right items count as well, so the best of them are taken off first.
    of_image = -torch.bincount(owner[own == best_text[owner]], minlength=len(image))
    of_text = -torch.bincount(caption[own == best_image[caption]], minlength=len(text))
    # Each tile of the similarity matrix exists once and serves both directions.
    for rows in _slices(len(text), chunk):
        for columns in _slices(len(image), COLUMNS * chunk):
            tile = text[rows] @ image[columns].T
            of_text[rows] += (tile >= best_image[rows, None]).sum(1)
            of_image[columns] += (tile >= best_text[columns]).sum(0)
    of_text[torch.isneginf(best_image)] = NEVER
    return of_image[torch.bincount(owner, minlength=len(image)) > 0].cpu(), of_text.cpu()


def _right_pairs(image_of_caption: Tensor | Sequence[int], captions: int, images: int) -> tuple[Tensor, Tensor]:
    """(captions, images) int64 (pairs,): which belong together, none twice."""
    given = torch.as_tensor(image_of_caption, dtype=torch.int64).cpu()
    if given.ndim == 2 and given.shape[1] == 2:
        caption, owner = given.unique(dim=0).unbind(1)
    elif given.ndim == 1 and len(given) == captions:
        caption, owner = torch.arange(captions), given
    else:
        raise ValueError(
            f"image_of_caption: {len(given)} entries for {captions} captions; give one per caption, or pairs of a "
            f"caption and an image, shape (pairs, 2)"
        )
    _check_indices("image_of_caption", caption, captions)
    _check_indices("image_of_caption", owner, images)
    return caption, owner


def recall_hits(ranks: Tensor, ks: Sequence[int] = RECALL_AT) -> dict[int, int]:
    """How many queries have their right item among the first k, for each k; a k beyond the items counts all."""
    for k in ks:
        if k < 1:
            raise ValueError(f"k: {k}; recall at k needs k >= 1")
    return {k: int((ranks < k).sum()) for k in ks}


def recall_at_k(
    image: Tensor,
    text: Tensor,
    image_of_caption: Tensor | Sequence[int],
    ks: Sequence[int] = RECALL_AT,
    chunk: int = 256,
) -> dict[str, float | int]:
    """Recall in both directions from normalised features; arguments as in `retrieval_ranks`.

    Where captions have several right images, finding any of them counts, as Chinese-CLIP's evaluation has it.

    Returns fractions `image_to_text_R@k`, `text_to_image_R@k` and `mean_recall` (their plain mean), the underlying
    integer counts `image_to_text_hits@k`, `text_to_image_hits@k`, and `images`, `captions`, `image_queries`. ValueError
    when there is nothing to rank.
    """
    if not len(image) or not len(text):
        raise ValueError(f"{len(image)} images and {len(text)} captions: recall needs at least one of each")
    if not torch.as_tensor(image_of_caption).numel():
        raise ValueError("image_of_caption: no caption belongs to an image, so nothing can be found")
    by_direction = dict(zip(("image_to_text", "text_to_image"), retrieval_ranks(image, text, image_of_caption, chunk)))
    hits = {name: recall_hits(ranks, ks) for name, ranks in by_direction.items()}
    recalls = {
        f"{name}_R@{k}": count / len(by_direction[name]) for name, counts in hits.items() for k, count in counts.items()
    }
    return {
        **recalls,
        "mean_recall": sum(recalls.values()) / len(recalls),
        **{f"{name}_hits@{k}": count for name, counts in hits.items() for k, count in counts.items()},
        "images": len(image),
        "captions": len(text),
        "image_queries": len(by_direction["image_to_text"]),
    }


def accuracy(ranks: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, object]:
    """Top-1, top-5 and mean per class from the rank (n,) of each sample's right class and its label (n,).

    A class without samples is left out of the mean and named in `classes_without_samples`. `top5` counts the
    first `top5_k` = min(5, classes). Keys: top1, top5, mean_per_class (fractions), hits1, hits5, samples,
    classes, top5_k.
    """
    classes = len(class_names)
    if len(ranks) != len(labels):
        raise ValueError(f"labels: {len(labels)} for {len(ranks)} ranks; give one label per sample")
    if not len(ranks):
        raise ValueError("no samples: accuracy needs at least one")
    _check_indices("labels", labels, classes)
    k = min(5, classes)
    hits = recall_hits(ranks, (1, k))
    counts = torch.bincount(labels.cpu(), minlength=classes)
    right = torch.bincount(labels.cpu()[ranks.cpu() < 1], minlength=classes)
    present = counts > 0
    return {
        "top1": hits[1] / len(ranks),
        "top5": hits[k] / len(ranks),
        "mean_per_class": float((right[present].double() / counts[present]).mean()),
        "hits1": hits[1],
        "hits5": hits[k],
        "top5_k": k,
        "samples": len(ranks),
        "classes": classes,
        "classes_without_samples": [name for name, some in zip(class_names, present.tolist()) if not some],
    }


def _best_columns(scores: Tensor, count: int) -> Tensor:
    """Columns (n, k) of each row's `count` best, ascending; of equal ones the first; k = min(count, columns).

    topk may pick any of equal scores, so it only determines the lowest score that is good enough.
    """
    count = min(count, scores.shape[1])
    last = scores.topk(count, dim=1).values[:, -1:]
    found = (scores >= last).nonzero()
    if len(found) > count * len(scores):  # ties at the last score
        better, equal = scores > last, scores == last
        found = (better | (equal & (equal.cumsum(1) <= count - better.sum(1, keepdim=True)))).nonzero()
    return found[:, 1].view(len(scores), count)


def _own_similarity(image: Tensor, text: Tensor, caption: Tensor, owner: Tensor) -> Tensor:
    """Similarity of every caption with its own image, in slices: all pairs at once would double the features."""
    pairs = zip(caption.split(4096), owner.split(4096))
    return torch.cat([(image[o] * text[c]).sum(1) for c, o in pairs])


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk: {chunk}; use at least 1")


def _check_widths(queries: Tensor, items: Tensor, asking: str = "queries", asked: str = "items") -> None:
    if queries.shape[-1] != items.shape[-1]:
        widths = f"{asking} have {queries.shape[-1]} dimensions and {asked} {items.shape[-1]}"
        raise ValueError(f"{widths}; give features of one width")


def _check_indices(name: str, indices: Tensor, count: int) -> None:
    outside = torch.nonzero((indices < 0) | (indices >= count)).flatten()
    if len(outside):
        at = int(outside[0])
        raise ValueError(f"{name}: entry {at} is {int(indices[at])}; it must be within 0 and {count - 1}")
