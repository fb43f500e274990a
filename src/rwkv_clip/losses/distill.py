"""Distillation: the student's scores of the batch are told to be like those of a teacher (open_clip's DistillClipLoss).

Beside an objective's own losses, any of them: soft cross-entropies of rows and columns of the scores, in chunks as in
`pairs`, so that memory grows with the batch and not with its square. Student and teacher may differ in width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..config import ConfigError
from ..dist import gather, max_over_ranks, rank_and_size, sum_over_ranks
from .objective import Objective
from .pairs import check_features, comparison_dtype, score_chunks

SEEN = ("teacher_image", "teacher_text")


class Teacher(Protocol):
    """What knows a teacher's features of a batch: one of the two methods returns them, normalised, as `teacher_image`
    (B, D) and `teacher_text` (B, D), or (B, V, D) for V texts; the other returns nothing. See `Objective`."""

    recalls: tuple[str, ...]
    scale: float  # exponentiated

    @property
    def sources(self) -> Mapping[str, str]: ...

    def observe(self, image: Tensor, text: Tensor) -> dict[str, Tensor]: ...

    def recall(self, facts: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


class Distilled(Objective):
    """The losses of another objective and `distill`, with the weight 1, as in open_clip.

    distill: the mean over images of the cross-entropy of the student's softmax over all texts with the teacher's, and
    over texts of that over all images, halved. Each softmax has its own logit_scale; a bias has no effect on it. What
    --positives mask leaves out counts here: the teacher knows that equal texts are equal.
    """

    made: ClassVar[tuple[str, ...]] = SEEN

    def __init__(self, objective: Objective, teacher: Teacher):
        """ConfigError for an objective of several image views, for a teacher sees one."""
        super().__init__()
        if objective.image_views > 1:
            name = type(objective).__name__
            raise ConfigError([f"distill_model: {name} sees {objective.image_views} views of an image, a teacher one"])
        self.objective, self.teacher = objective, teacher  # of which only the first is a module here
        self.needs = tuple(dict.fromkeys((*objective.needs, "image", "text", "logit_scale", *SEEN)))
        self.texts, self.begins = objective.texts, objective.begins  # type: ignore[misc]
        self.scale_limits, self.sources = objective.scale_limits, teacher.sources
        self.recalls = teacher.recalls

    def observe(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return self.teacher.observe(image, text)

    def recall(self, facts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.teacher.recall(facts)

    def forward(
        self, teacher_image: Tensor, teacher_text: Tensor, **features: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both losses; features: what the objective needs, and image, text and logit_scale."""
        losses, report = self.objective(**{name: features[name] for name in self.objective.needs})
        image, text, scale = (features[name] for name in ("image", "text", "logit_scale"))
        of_images, of_texts = soft_losses(image, text, scale, teacher_image, teacher_text, self.teacher.scale)
        return {**losses, "distill": (of_images.mean() + of_texts.mean()) / 2}, report


def soft_losses(
    image: Tensor, text: Tensor, scale: Tensor, teacher_image: Tensor, teacher_text: Tensor, teacher_scale: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropies, with the teacher's probabilities as targets, of each own image's among all ranks' texts, and of
    each own text's among all ranks' images.

    image (B, D), text (B, D) or (B, V, D), teacher_image (B, E), teacher_text as the texts but for E. -> losses as of
    `contrastive_losses`, whose conditions hold for both, differentiable once, by what is the student's.
    """
    texts, taught = check_features(image, text, scale=scale), check_features(teacher_image, teacher_text)
    if texts.shape[:2] != taught.shape[:2]:
        raise ValueError(
            f"features: texts {tuple(text.shape)} and the teacher's {tuple(teacher_text.shape)}; should be as many"
        )
    with torch.autocast(image.device.type, enabled=False):
        dtype, first = comparison_dtype(image), rank_and_size()[0] * len(image)
        image, scale, everybody = image.to(dtype), scale.to(dtype).reshape(()), gather(texts.to(dtype))
        theirs = teacher_image.detach().to(dtype) * teacher_scale, gather(taught.detach().to(dtype))
        parts = [
            score_softly(image, one.contiguous(), scale, theirs[0], other.contiguous(), first)[:2]
            for one, other in zip(everybody.unbind(1), theirs[1].unbind(1))
        ]
        of_images, of_texts = (torch.stack(part, 1).view(text.shape[:-1]) for part in zip(*parts))
        return of_images, of_texts


@torch.library.custom_op("rwkv_clip::soft_losses", mutates_args=())
def score_softly(
    image: Tensor, texts: Tensor, scale: Tensor, teacher_image: Tensor, teacher_texts: Tensor, first: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`soft_losses` with the texts of all ranks: image (B, D), texts (N, D), teacher_image (B, E), already multiplied
    by the teacher's scale, teacher_texts (N, E).

    -> losses of the images (B,) and of their texts (B,); for the backward pass of all rows (2, 2, B) and of all columns
    (2, 2, N), of student and teacher each: the largest score, and the sum of the exponentials of the scores less that.
    """
    fits = image.dim() == texts.dim() == 2 and image.shape[1] == texts.shape[1] and image.dtype == texts.dtype
    fits &= teacher_image.dim() == teacher_texts.dim() == 2 and teacher_image.shape[1] == teacher_texts.shape[1]
    fits &= (len(teacher_image), len(teacher_texts)) == (len(image), len(texts)) and len(image) > 0
    if not fits or scale.numel() != 1 or not 0 <= first <= len(texts) - len(image):
        shapes = ", ".join(str(tuple(x.shape)) for x in (image, texts, teacher_image, teacher_texts, scale))
        raise ValueError(
            f"soft_losses: {shapes}, first {first}; should be (B, D), (N, D), (B, E), (N, E), one number, and first at "
            f"most N - B"
        )
    count, own = len(image), slice(first, first + len(image))
    losses = image.new_empty(count)
    rows = image.new_empty(2, 2, count)  # of student and teacher
    columns = image.new_zeros(2, 3, len(texts))  # the same, with the sum of the exponentials times the student's scores
    columns[:, 0] = float("-inf")
    for chunk, student, taught in _both(image, texts, scale, teacher_image, teacher_texts):
        (scores, work), (targets, _) = student[2:], taught[2:]
        for i, values in enumerate((scores, targets)):
            part = _sum_weighted(values, scores, 1, work)
            rows[i, :, chunk] = part[:2]
            if i:
                losses[chunk] = rows[0, 0, chunk] + rows[0, 1, chunk].log() - part[2] / part[1]
            columns[i] = _add_weighted(columns[i], _sum_weighted(values, scores, 0, work))
    top = max_over_ranks(columns[:, 0].contiguous())
    sums = sum_over_ranks(columns[:, 1:] * (columns[:, :1] - top[:, None]).exp())
    of_texts = top[0, own] + sums[0, 0, own].log() - sums[1, 1, own] / sums[1, 0, own]
    return losses, of_texts, rows, torch.stack((top, sums[:, 0]), 1)


@torch.library.custom_op("rwkv_clip::soft_losses_backward", mutates_args=())
def score_softly_backward(
    g_losses: Tensor, features: list[Tensor], rows: Tensor, columns: Tensor, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, of texts (this rank's contribution; `gather` sums them) and of scale, from those of the
    losses (2, B). features: the inputs of the forward pass; rows, columns: its results after the losses.

    d/d score = g_images * (softmax over the row, less the teacher's) + g_texts * (the same over the column).
    """
    image, texts, scale, *_ = features
    weights = image.new_zeros(len(texts))
    weights[first : first + len(image)] = g_losses[1]
    weights = sum_over_ranks(weights)
    d_image, d_texts = torch.empty_like(image), torch.zeros_like(texts)
    for chunk, student, taught in _both(*features):
        for i, (_, _, values, work) in enumerate((student, taught)):
            torch.sub(values, rows[i, 0, chunk, None], out=work).exp_().mul_((g_losses[0] / rows[i, 1])[chunk, None])
            values.sub_(columns[i, 0]).exp_().mul_(weights / columns[i, 1]).add_(work)
        d_scores = student[2].sub_(taught[2])
        torch.mm(d_scores, texts, out=d_image[chunk])
        d_texts.addmm_(d_scores.T, student[1])
    d_scale = (d_image * image).sum()
    return d_image.mul_(scale), d_texts, d_scale


def _both(image: Tensor, texts: Tensor, scale: Tensor, teacher_image: Tensor, teacher_texts: Tensor) -> Any:
    """Yield (rows as a slice, a chunk of the student's scores, the same of the teacher's), see `score_chunks`."""
    chunks = score_chunks(image, texts, scale, 0, None)
    others = score_chunks(teacher_image, teacher_texts, scale.new_ones(()), 0, None)
    for student, taught in zip(chunks, others):
        yield student[0], student, taught


def _sum_weighted(values: Tensor, scores: Tensor, dim: int, work: Tensor) -> Tensor:
    """(3, ..): maxima of `values` over `dim`, sums of the exponentials of the values less those, and of these times the
    scores."""
    top = values.amax(dim, keepdim=True)
    exponentials = torch.sub(values, top, out=work).exp_()
    total = exponentials.sum(dim)
    return torch.stack((top.squeeze(dim), total, exponentials.mul_(scores).sum(dim)))


def _add_weighted(a: Tensor, b: Tensor) -> Tensor:
    """Combine two (3, ..) of `_sum_weighted`."""
    top = torch.maximum(a[0], b[0])
    return torch.cat((top[None], a[1:] * (a[0] - top).exp() + b[1:] * (b[0] - top).exp()))


@score_softly.register_fake
def _(image: Tensor, texts: Tensor, *_: Any) -> tuple[Tensor, ...]:
    batch = image.shape[0]
    return *(image.new_empty(batch) for _ in range(2)), *(image.new_empty(2, 2, n) for n in (batch, texts.shape[0]))


@score_softly_backward.register_fake
def _(_g_losses: Tensor, features: list[Tensor], *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in features[:3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *features, ctx.first = inputs
    ctx.save_for_backward(*features, *output[2:])


def _differentiate(ctx: Any, g_images: Tensor, g_texts: Tensor, *_: Tensor) -> tuple[Any, ...]:
    *features, rows, columns = ctx.saved_tensors
    found = score_softly_backward(torch.stack((g_images, g_texts)), list(features), rows, columns, ctx.first)
    return *found, None, None, None


score_softly.register_autograd(_differentiate, setup_context=_save)
