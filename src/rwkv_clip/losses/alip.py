"""ALIP: InfoNCE with adaptive weights of samples and pairs (Yang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ranged
from ..dist import gather
from .objective import Objective
from .pairs import comparison_dtype, contrastive_losses


@dataclass(frozen=True)
class GateSettings:
    """ALIP's gates: how much a sample, and each of its two pairs, counts. Defaults are those of the released code."""

    init: float = ranged(1.0, minimum=-1, maximum=1)
    """Running means of the similarities before the first step. They are 1 at most, so the weights start near 0 and the
    loss warms up by itself."""
    momentum: float = ranged(0.99, minimum=0, maximum=1)
    """Fraction of a running mean that a step keeps."""
    sample_gamma: float = ranged(2.0, minimum=0)
    """How steeply a sample's weight falls where its two texts disagree (gamma_s)."""
    pair_gamma: float = ranged(2.0, minimum=0)
    """The same for the weight of an image with one of its texts (gamma_p)."""

    def problems(self) -> list[str]:
        return []


class ALIP(Objective):
    """InfoNCE of two texts per image, raw and synthetic, where samples and pairs that seem mismatched count less.

    Yang et al. 2023 (arXiv 2308.08428), as in the released code. Three similarities of every sample, between its texts
    and between the image and either, are compared with their running means over all batches:

        sample weight   min(exp(sample_gamma * (S - H)), 1)    of the two texts (language consistency gate)
        pair weight     exp(pair_gamma * (S - H))              of image and text, where the texts agree less than on
                                                               average, else 1 (description consistency gate)

    The running means are those of the global batch, the same on all ranks, updated before use, once per step however
    many micro-batches it is computed in.

    NOTE(parity): the released code updates them with every accumulated micro-batch and in steps that overflow float16
    (a skipped step of ours leaves no trace), loses the means when it stops, and cannot score own rows only. By default
    its towers get gradients divided by the number of ranks, its temperature does not; ours are those of one process.
    """

    texts = 2
    mean_similarity: Tensor  # (3,), as in `similarities`

    def __init__(self, gates: GateSettings = GateSettings()):
        super().__init__()
        self.gates = gates
        self.register_buffer("mean_similarity", torch.full((3,), gates.init))

    def forward(self, image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """image (B, D), text (B, 2, D), normalised; logit_scale: scalar, already exponentiated.

        ValueError for other shapes. In evaluation mode the running means do not change."""
        of_images, of_texts = contrastive_losses(image, text, logit_scale)
        if of_images.shape[1:] != (self.texts,):
            raise ValueError(f"features: texts {tuple(text.shape)}; ALIP needs (B, 2, D): raw, synthetic")
        with torch.no_grad():  # the weights are constants
            similarities = self.similarities(image, text)
            means = gather(similarities).mean(0)  # no sum over ranks: these are the bits of one process
            if self.training:
                kept = self.gates.momentum
                self.mean_similarity.mul_(kept).add_(means, alpha=1 - kept)
            of_samples, of_pairs = self.weigh(similarities)
            report = self._report(means, of_samples, of_pairs)
        raw, caption = (of_samples[:, None] * of_pairs * (of_images + of_texts) / 2).mean(0)
        return {"raw_loss": raw, "caption_loss": caption}, report

    def similarities(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, D), (B, 2, D) -> (B, 3): cosines of raw and synthetic text, of image and raw, of image and synthetic."""
        image, (raw, caption) = image.to(comparison_dtype(image)), text.to(comparison_dtype(image)).unbind(1)
        return torch.stack([(raw * caption).sum(1), (image * raw).sum(1), (image * caption).sum(1)], 1)

    def weigh(self, similarities: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3) -> weights of samples (B,) and of their pairs (B, 2), by the current running means."""
        ratios = (similarities - self.mean_similarity).exp()
        agreement, of_pairs = ratios[:, :1] ** self.gates.sample_gamma, ratios[:, 1:] ** self.gates.pair_gamma
        return agreement.clamp(max=1).squeeze(1), torch.where(agreement < 1, of_pairs, 1.0)

    def _report(self, means: Tensor, of_samples: Tensor, of_pairs: Tensor) -> dict[str, Tensor]:
        """Names of the released log: `text` stands for the two texts, `raw` and `caption` for image and text. Means of
        weights are those of this rank."""
        weights = torch.cat([of_samples.mean()[None], of_pairs.mean(0)])
        columns = zip(("text", "raw", "caption"), means, self.mean_similarity.clone(), weights)
        report: dict[str, Tensor] = {}
        for name, current, running, weight in columns:
            report |= {f"current_{name}_sim": current, f"momentum_{name}_sim": running, f"weight_{name}_mean": weight}
        return report
