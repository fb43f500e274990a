"""A checkpoint that scores pictures and texts, and tags pictures: any of ours, or one of open_clip's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from rwkv_clip.data.image import ImageError
from rwkv_clip.device import choose_device, keep_freed_memory
from rwkv_clip.features import FeatureExtractor
from rwkv_clip.tokenizer import prepare_texts

from .pictures import Found, open_found
from .settings import CheckpointSettings

if TYPE_CHECKING:
    from rwkv_clip.factory import Loaded

BLANK = Image.new("RGB", (32, 32))


class Towers:
    """Features of pictures and texts. name: of the checkpoint. decides: what a feature depends on, for a job's stages.

    A feature does not depend on what else is in its batch.
    """

    def __init__(self, loaded: Loaded, extractor: FeatureExtractor, name: str):
        self._loaded, self._extractor, self.name = loaded, extractor, name
        self.decides = {"checkpoint": loaded.digest, "checkpoint_model": loaded.name, "precision": loaded.precision}

    @classmethod
    def load(cls, settings: CheckpointSettings) -> Towers:
        """ValueError for a checkpoint that is not there or does not fit, see `factory.load_for_inference`."""
        from rwkv_clip.factory import load_for_inference

        if settings.checkpoint is None:
            raise ValueError("checkpoint: not set; give a run folder, a weights file or open_clip:NAME:TAG")
        device = choose_device(settings.device)
        if device.type == "cpu":
            keep_freed_memory()
        loaded = load_for_inference(
            settings.checkpoint, model=settings.checkpoint_model, device=device, precision=settings.precision
        )
        extractor = FeatureExtractor.of(loaded, device, workers=settings.decoders)
        return cls(loaded, extractor, f"{loaded.name}:{loaded.digest[:12]}")

    def encode_pictures(self, pictures: Sequence[Found]) -> tuple[Tensor, list[str]]:
        """(features (n, C), float32 of length 1, and for each picture why it has none, "" where it has one).

        The features of a picture without one mean nothing.
        """
        reasons = [""] * len(pictures)

        def open_one(place: int) -> Image.Image:
            try:
                return open_found(pictures[place])
            except ImageError as error:
                reasons[place] = error.reason
                return BLANK

        return self._extractor.encode_images(open_one, len(pictures)), reasons

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features (n, C), float32 of length 1; a text longer than the context is cut."""
        tokenizer = self._loaded.tokenizer
        return self._extractor.encode_tokens(tokenizer(prepare_texts(tokenizer, texts)))
