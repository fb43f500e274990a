"""Contrastive losses of pairs: every image against all texts of the global batch, every text against all images.

The scores of a batch are never stored as a whole: `pair_losses` is an operator that computes them in chunks of rows,
forward and backward, so that memory grows with the batch and not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..dist import gather, max_over_ranks, rank_and_size, sum_over_ranks

# Rows of scores per chunk. CPU: at 8,192 columns a chunk is 16 MiB and stays in the last-level cache while the
# exponentials read it. Elsewhere: a product with the texts yields only rows x D numbers, too few for a large GPU if the
# rows are few.
CPU_ROWS, ROWS = 512, 2048
CHUNK = 2**26  # scores per chunk, for any number of columns; the two buffers hold 256 MiB each in float32


def contrastive_losses(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_keys: Tensor | None = None,
    text_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each own image among all ranks' texts, and of each own text among all ranks' images.

    image: (B, D); text: (B, D), or (B, V, D) where an image has V texts, the v-th compared with other images' v-th; row
    i of one belongs to row i of the other; scale: scalar. -> (B,) and (B,), or (B, V) and (B, V), computed in float32,
    or float64 where the images are float64, whatever autocast says. Differentiable once; as with `gather`, a gradient
    is that of the sum over ranks of what each computes from its losses.

    image_keys, int64 (B,), and text_keys, int64 shaped as the texts but for D: an image and another's text whose images
    or texts have equal keys are no negatives, their score counts nowhere (as if it were minus infinity). A text is
    compared by the keys of the v-th texts. An image and its own text are a pair whatever their keys. With keys that are
    all different the losses have the bits of those without keys.
    """
    texts = check_features(image, text, scale=scale)
    with torch.autocast(image.device.type, enabled=False):
        dtype, first = comparison_dtype(image), rank_and_size()[0] * len(image)
        image, scale, everybody = image.to(dtype), scale.to(dtype).reshape(()), gather(text.to(dtype))
        keys = gather_keys(texts, image_keys, text_keys)
        if text.dim() == 2:
            return pair_losses(image, everybody, scale, first, keys[0])[:2]
        columns = zip(everybody.unbind(1), keys)
        parts = [pair_losses(image, one.contiguous(), scale, first, key)[:2] for one, key in columns]
        of_images, of_texts = (torch.stack(part, 1) for part in zip(*parts))
        return of_images, of_texts


def check_features(image: Tensor, text: Tensor, **scalars: Tensor) -> Tensor:
    """The texts (B, D) or (B, V, D) as (B, V, D). ValueError, with the shapes, unless they fit the images (B, D), and
    unless all, the scalars by name too, are floating-point tensors on one device."""
    for name, value in {"images": image, "texts": text, **scalars}.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.device != image.device:
            raise ValueError(f"features: {name} are not a floating-point tensor on the images' device")
    for name, value in scalars.items():
        if value.numel() != 1:
            raise ValueError(f"features: the {name} has {value.numel()} elements, should be one number")
    texts = text.unsqueeze(1) if text.dim() == 2 else text
    if image.dim() != 2 or texts.dim() != 3 or texts.shape[::2] != image.shape or not texts.numel():
        raise ValueError(
            f"features: images {tuple(image.shape)} and texts {tuple(text.shape)}; both must be (B, D), one text per "
            f"image, or texts (B, V, D), with B and V at least 1"
        )
    return texts


@torch.no_grad()
def rank_own_first(
    image: Tensor, text: Tensor, image_keys: Tensor | None = None, text_keys: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Whether each own image scores higher with its own text than with any other rank's or its own rank's, and each own
    text with its own image: bool, shaped as the losses of `contrastive_losses`, whose arguments these are.

    A tie counts against. With keys, what they leave out of the loss is left out here."""
    texts = text.unsqueeze(1) if text.dim() == 2 else text
    with torch.autocast(image.device.type, enabled=False):
        dtype, first = comparison_dtype(image), rank_and_size()[0] * len(image)
        image, texts = image.detach().to(dtype), texts.detach().to(dtype)
        images, keys = gather(image), gather_keys(texts, image_keys, text_keys)
        found = [
            (_compare_own(image, gather(one), first, key), _compare_own(one, images, first, key))
            for one, key in zip((x.contiguous() for x in texts.unbind(1)), keys)
        ]
    of_images, of_texts = (torch.stack(part, 1) for part in zip(*found))
    return of_images.view(text.shape[:-1]), of_texts.view(text.shape[:-1])


def _compare_own(rows: Tensor, columns: Tensor, first: int, keys: Tensor | None) -> Tensor:
    """Whether the score of row i (B, D) with column first + i is larger than that with any other column (N, D)."""
    found = rows.new_empty(len(rows), dtype=torch.bool)
    for chunk, _, scores, _ in score_chunks(rows, columns, rows.new_ones(()), first, keys):
        diagonal = scores.diagonal(first + chunk.start)
        own = diagonal.clone()
        diagonal.fill_(float("-inf"))
        found[chunk] = own > scores.amax(1)
    return found


@torch.no_grad()
def measure_duplicates(image_keys: Tensor | None, text_keys: Tensor) -> Tensor:
    """Fraction of the pairs of all ranks whose text, or image where its keys (B,) are known, is another pair's, too.

    text_keys: (B,) or (B, V), the v-th texts among themselves. -> float scalar."""
    keys = gather(text_keys.reshape(len(text_keys), -1))
    repeated = torch.stack([_occurs_again(column) for column in keys.unbind(1)], 1)
    if image_keys is not None:
        repeated |= _occurs_again(gather(image_keys))[:, None]
    return repeated.float().mean()


def _occurs_again(keys: Tensor) -> Tensor:
    _, places, counts = keys.unique(return_inverse=True, return_counts=True)
    return counts[places] > 1


def gather_keys(texts: Tensor, image_keys: Tensor | None, text_keys: Tensor | None) -> list[Tensor | None]:
    """For each of the V texts (B, V, D) of an image: the keys of all ranks' images and texts, int64 (1 or 2, N)."""
    found = []
    for name, keys, rows in (("image", image_keys, texts.shape[:1]), ("text", text_keys, texts.shape[:2])):
        if keys is None:
            continue
        if keys.dtype != torch.int64 or keys.device != texts.device or keys.numel() != rows.numel():
            raise ValueError(
                f"{name}_keys: {keys.dtype} {tuple(keys.shape)} on {keys.device}, should be int64 {tuple(rows)} on "
                f"{texts.device}, as many as there are {name}s"
            )
        found.append(keys.reshape(len(texts), -1).expand(-1, texts.shape[1]))
    if not found:
        return [None] * texts.shape[1]
    return list(gather(torch.stack(found, 1)).permute(2, 1, 0).contiguous())


def comparison_dtype(features: Tensor) -> torch.dtype:
    """The dtype in which features are compared."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


@torch.library.custom_op("rwkv_clip::pair_losses", mutates_args=())
def pair_losses(
    image: Tensor, texts: Tensor, scale: Tensor, first: int, keys: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`contrastive_losses` with the texts of all ranks: image (B, D), texts (N, D), the text of image i is first + i.

    One dtype, float32 or float64. -> losses of the images (B,) and of their texts (B,); for the backward pass, (2, B)
    and (2, N): the largest score of every row and column, and the sum of the exponentials of the scores less that. The
    two are kept separate, because their log-sum-exp would be rounded at the magnitude of the scores. Stable at any
    scale.

    keys: (K, N), K of each pair: image i and text j != first + i are left out where any of their keys are equal.
    """
    fits = image.dim() == texts.dim() == 2 and image.shape[1] == texts.shape[1] and image.dtype == texts.dtype
    if not fits or scale.numel() != 1 or not image.is_floating_point() or not len(image):
        raise ValueError(
            f"pair_losses: images {image.dtype} {tuple(image.shape)}, texts {texts.dtype} {tuple(texts.shape)}, scale "
            f"{tuple(scale.shape)}; should be (B, D) and (N, D) of one dtype and one number, B at least 1"
        )
    if keys is not None and (keys.dim() != 2 or keys.shape[1] != len(texts) or keys.is_floating_point()):
        raise ValueError(f"pair_losses: keys {keys.dtype} {tuple(keys.shape)}, should be integers (K, {len(texts)})")
    if not 0 <= first <= len(texts) - len(image):
        raise ValueError(f"pair_losses: first {first} with {len(image)} images exceeds the {len(texts)} texts")
    rows, matched = image.new_empty(2, len(image)), image.new_empty(len(image))
    columns = torch.stack((image.new_full((len(texts),), float("-inf")), image.new_zeros(len(texts))))
    for chunk, _, scores, work in score_chunks(image, texts, scale, first, keys):
        matched[chunk] = scores.diagonal(first + chunk.start)
        rows[:, chunk] = _sum_exp(scores, 1, work)
        part = _sum_exp(scores, 0, work)
        columns = _add_sums(columns, part, torch.maximum(columns[0], part[0]))
    columns = _add_sums_of_ranks(columns)
    own = columns[:, first : first + len(image)]
    return rows[0] - matched + rows[1].log(), own[0] - matched + own[1].log(), rows, columns


@torch.library.custom_op("rwkv_clip::pair_losses_backward", mutates_args=())
def pair_losses_backward(
    g_losses: Tensor,
    image: Tensor,
    texts: Tensor,
    scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    first: int,
    keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, of texts (this rank's contribution; `gather` sums them) and of scale, from those of the
    losses (2, B).

    d/d score = g_images * softmax over the row + g_texts * softmax over the column, minus both weights on the matching
    pairs. What is left out has no gradient.
    """
    g_images, g_texts = g_losses
    own = torch.zeros_like(columns[1])
    own[first : first + len(image)] = g_texts
    of_rows, of_columns, of_pairs = g_images / rows[1], sum_over_ranks(own) / columns[1], g_images + g_texts
    d_image, d_texts = torch.empty_like(image), torch.zeros_like(texts)
    for chunk, scaled, scores, work in score_chunks(image, texts, scale, first, keys):
        torch.sub(scores, rows[0, chunk, None], out=work).exp_().mul_(of_rows[chunk, None])
        d_scores = scores.sub_(columns[0]).exp_().mul_(of_columns).add_(work)
        d_scores.diagonal(first + chunk.start).sub_(of_pairs[chunk])
        torch.mm(d_scores, texts, out=d_image[chunk])
        d_texts.addmm_(d_scores.T, scaled)
    d_scale = (d_image * image).sum()  # scores are linear in the scale; no division, so 0 is a scale like any other
    return d_image.mul_(scale), d_texts, d_scale


def score_chunks(
    image: Tensor, texts: Tensor, scale: Tensor, first: int, keys: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield (rows as a slice, their scaled images, their scores, a work buffer of that size); buffers are reused."""
    wanted = CPU_ROWS if image.device.type == "cpu" else ROWS
    height = max(1, min(wanted, CHUNK // len(texts), len(image)))
    buffers = image.new_empty(2, height, len(texts))
    for start in range(0, len(image), height):
        chunk = slice(start, min(start + height, len(image)))
        scores, work = buffers[:, : chunk.stop - start]
        scaled = image[chunk] * scale
        torch.mm(scaled, texts.T, out=scores)
        if keys is not None:
            # The smallest number, not minus infinity: a column may have nothing else in a chunk, or on a rank, and the
            # difference of two infinities is no number. Beside the pair's own score its exponential is 0.
            scores.masked_fill_(_find_repeats(keys, first + chunk.start, len(scores)), torch.finfo(scores.dtype).min)
        yield chunk, scaled, scores, work


def _find_repeats(keys: Tensor, first: int, count: int) -> Tensor:
    """Which pairs have a key of pair first + i, for i < count, but are not that pair: bool (count, N)."""
    found = keys.new_zeros(count, keys.shape[1], dtype=torch.bool)
    for row in keys:
        found |= row[first : first + count, None] == row
    found.diagonal(first).fill_(False)
    return found


def _sum_exp(scores: Tensor, dim: int, work: Tensor) -> Tensor:
    """(2, ..): maxima over `dim`, sums of the exponentials of the scores less those."""
    top = scores.amax(dim, keepdim=True)
    return torch.stack((top.squeeze(dim), torch.sub(scores, top, out=work).exp_().sum(dim)))


def _add_sums(a: Tensor, b: Tensor, top: Tensor) -> Tensor:
    """Combine two (2, ..) of `_sum_exp`; top: the larger of their maxima."""
    return torch.stack((top, a[1] * (a[0] - top).exp() + b[1] * (b[0] - top).exp()))


def _add_sums_of_ranks(part: Tensor) -> Tensor:
    """The same over all ranks."""
    top = max_over_ranks(part[0])
    return torch.stack((top, sum_over_ranks(part[1] * (part[0] - top).exp())))


@pair_losses.register_fake
def _(image: Tensor, texts: Tensor, scale: Tensor, first: int, keys: Tensor | None = None) -> tuple[Tensor, ...]:
    batch = image.shape[0]
    return *(image.new_empty(batch) for _ in range(2)), image.new_empty(2, batch), image.new_empty(2, texts.shape[0])


@pair_losses_backward.register_fake
def _(_g_losses: Tensor, image: Tensor, texts: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(image), torch.empty_like(texts), torch.empty_like(scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, texts, scale, ctx.first, keys = inputs
    ctx.save_for_backward(image, texts, scale, *output[2:], keys)


def _differentiate(ctx: Any, g_images: Tensor, g_texts: Tensor, _rows: Tensor, _columns: Tensor) -> tuple[Any, ...]:
    *saved, keys = ctx.saved_tensors
    return *pair_losses_backward(torch.stack((g_images, g_texts)), *saved, ctx.first, keys), None, None


pair_losses.register_autograd(_differentiate, setup_context=_save)
