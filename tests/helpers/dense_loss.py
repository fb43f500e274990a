"""InfoNCE with repeats left out, as one matrix of all scores."""

import torch
from torch import Tensor


def dense_losses(
    image: Tensor, text: Tensor, scale: Tensor, image_keys: Tensor | None = None, text_keys: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The formula of `contrastive_losses` for one process: losses of images and of texts, (B,) or (B, V) each."""
    if text.dim() == 3:
        columns = text_keys.unbind(1) if text_keys is not None else [None] * text.shape[1]
        parts = [dense_losses(image, one, scale, image_keys, key) for one, key in zip(text.unbind(1), columns)]
        return torch.stack([a for a, _ in parts], 1), torch.stack([b for _, b in parts], 1)
    scores = scale * image @ text.T
    repeated = torch.zeros(scores.shape, dtype=torch.bool)
    for keys in (image_keys, text_keys):
        if keys is not None:
            repeated |= keys[:, None] == keys[None]
    scores = scores.masked_fill(repeated & ~torch.eye(len(image), dtype=torch.bool), float("-inf"))
    return scores.logsumexp(1) - scores.diagonal(), scores.logsumexp(0) - scores.diagonal()


def make_keys(batch: int, *texts: int) -> tuple[Tensor, Tensor]:
    """Keys of images (B,) and texts (B, ..), large as hashes are, with repeats of both, alone and together."""
    big = 2**62
    images = big + torch.arange(batch)
    images[[1, 5, 9]] = images[0].item()
    found = big + torch.arange(batch * 7, 8 * batch)
    found[[2, 3, 10, 11]] = found[5].item()
    keys = torch.stack([found.roll(3 * i) for i in range(texts[0])], 1) if texts else found
    return images, keys


def dense_soft_losses(
    image: Tensor, text: Tensor, scale: Tensor, teacher_image: Tensor, teacher_text: Tensor, teacher_scale: float
) -> tuple[Tensor, Tensor]:
    """The formula of `soft_losses` for one process: losses of images and of texts, (B,) or (B, V) each."""
    if text.dim() == 3:
        columns = zip(text.unbind(1), teacher_text.unbind(1))
        parts = [dense_soft_losses(image, x, scale, teacher_image, y, teacher_scale) for x, y in columns]
        return torch.stack([a for a, _ in parts], 1), torch.stack([b for _, b in parts], 1)
    scores, targets = scale * image @ text.T, teacher_scale * teacher_image @ teacher_text.T
    of_images = -(targets.softmax(1) * scores.log_softmax(1)).sum(1)
    return of_images, -(targets.softmax(0) * scores.log_softmax(0)).sum(0)


def dense_sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_keys: Tensor | None = None,
    text_keys: Tensor | None = None,
) -> Tensor:
    """The formula of `compare_pairs` for one process: scalar."""
    if text.dim() == 3:
        columns = text_keys.unbind(1) if text_keys is not None else [None] * text.shape[1]
        parts = [dense_sigmoid_loss(image, x, scale, bias, image_keys, key) for x, key in zip(text.unbind(1), columns)]
        return torch.stack(parts).mean()
    own = torch.eye(len(image), dtype=torch.bool)
    left_out = torch.zeros_like(own)
    for keys in (image_keys, text_keys):
        if keys is not None:
            left_out |= keys[:, None] == keys[None]
    logits = scale * image @ text.T + bias
    losses = -torch.nn.functional.logsigmoid(torch.where(own, logits, -logits))
    return losses.masked_fill(left_out & ~own, 0.0).sum() / len(image)
