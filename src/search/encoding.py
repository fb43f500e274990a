"""The model that encodes queries, loaded when the first one comes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_clip.data.image import open_image

if TYPE_CHECKING:
    from rwkv_clip.features import FeatureExtractor


class Model:
    """A checkpoint as `load_for_inference` takes it, that encodes texts and pictures; one query at a time.

    digest: what the checkpoint has to be, by its sha256; None: anything. prefix: put before every text.
    """

    def __init__(
        self,
        checkpoint: str,
        model: str | None = None,
        *,
        device: str | None = None,
        precision: str = "fp32",
        digest: str | None = None,
        prefix: str = "",
    ):
        self.checkpoint, self.prefix = checkpoint, prefix
        self._settings: dict[str, Any] = {"model": model, "precision": precision}
        self._device, self._digest = device, digest
        self._extractor: FeatureExtractor | None = None
        self._lock = threading.Lock()

    def load(self) -> FeatureExtractor:
        """The loaded model, once. ValueError where the checkpoint is not what made the vectors."""
        with self._lock:
            if self._extractor is None:
                from rwkv_clip.device import choose_device, keep_freed_memory
                from rwkv_clip.factory import load_for_inference
                from rwkv_clip.features import FeatureExtractor

                device = choose_device(self._device)
                if device.type == "cpu":
                    keep_freed_memory()
                loaded = load_for_inference(self.checkpoint, device=str(device), **self._settings)
                if self._digest not in (None, loaded.digest):
                    raise ValueError(
                        f"checkpoint: {self.checkpoint} is not what made the vectors; index the pictures again"
                    )
                self._extractor = FeatureExtractor.of(loaded, device, workers=0)
            return self._extractor

    def encode_text(self, text: str) -> np.ndarray:
        """The vector of a text, float32 (C,), of length 1. What the context does not hold is cut off."""
        from rwkv_clip.tokenizer import prepare_texts

        extractor = self.load()
        texts = prepare_texts(extractor.tokenizer, [self.prefix + text.encode("utf-8", "replace").decode()])
        with self._lock:  # one after the other takes no longer than all at once
            return extractor.encode_query(texts[0]).numpy()

    def encode_picture(self, data: bytes) -> np.ndarray:
        """The vector of an encoded picture, float32 (C,), of length 1. ImageError for what is none or too large."""
        picture, extractor = open_image(data, "picture"), self.load()
        with self._lock:
            return extractor.encode_query(image=picture).numpy()


def name_place(place: str) -> str:
    """The absolute path of a file or folder; a name stays a name."""
    return str(Path(place).absolute()) if Path(place).exists() else place
