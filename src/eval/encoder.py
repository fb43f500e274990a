"""A loaded model and how an evaluation runs it: what every task gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rwkv_clip.features import FeatureExtractor

if TYPE_CHECKING:
    from rwkv_clip.factory import Loaded


@dataclass(frozen=True)
class Encoder:
    """A model of `load_for_inference`, its feature extractor, and the folder of cached features."""

    loaded: Loaded
    extractor: FeatureExtractor
    cache: Path | None = None

    @classmethod
    def of(cls, loaded: Loaded, device: torch.device, cache: Path | None = None, **options: Any) -> Encoder:
        """options: further fields of the extractor."""
        return cls(loaded, FeatureExtractor.of(loaded, device, **options), cache)

    @property
    def device(self) -> torch.device:
        return self.extractor.device
