"""An objective that uses all of the contract: a head of its own, running means, two views of each image, and tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_clip.dist import gather
from rwkv_clip.losses import Objective
from rwkv_clip.losses.pairs import contrastive_losses


class Toy(Objective):
    """Both views are told from the texts; what the head makes of their tokens from each other, less a running mean."""

    needs = ("image", "text", "image_tokens", "logit_scale")
    image_views = 2
    texts = None

    def __init__(self, width: int = 32):
        super().__init__()
        self.head = nn.Linear(width, 8)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("center", torch.zeros(8))

    def forward(
        self, image: Tensor, text: Tensor, image_tokens: Tensor, logit_scale: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """image (B, 2, D), text (B, D), image_tokens (B, 2, L, W)."""
        named = [contrastive_losses(view.contiguous(), text, logit_scale) for view in image.unbind(1)]
        contrastive = torch.stack([(a.mean() + b.mean()) / 2 for a, b in named]).mean()
        local = self.head(image_tokens.mean(2).to(self.head.weight.dtype))  # (B, 2, 8)
        with torch.no_grad():
            mean = gather(local).mean((0, 1))
            if self.training:
                self.center.mul_(0.5).add_(mean, alpha=0.5)
        first, second = F.normalize(local - self.center, dim=-1).unbind(1)
        a, b = contrastive_losses(first.contiguous(), second.contiguous(), self.temperature.exp())
        return {"contrastive": contrastive, "local": (a.mean() + b.mean()) / 2}, {"center_norm": self.center.norm()}


class ImageAlone(Objective):
    """Asks for neither text nor temperature, and has a parameter that it does not use."""

    needs = ("image",)

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(4, 4)

    def forward(self, image: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"first": image[:, 0].mean()}, {}
