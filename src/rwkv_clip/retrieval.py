"""Zero-shot retrieval: the recall of a model on a set of images with captions. For training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .data.retrieval_set import RetrievalSet
from .features import FeatureExtractor
from .metrics import recall_at_k


@dataclass(frozen=True)
class RetrievalResult:
    """Metrics as `metrics.recall_at_k` names them, and the features (float32, CPU, length 1) they come from."""

    metrics: dict[str, float | int]
    image_features: torch.Tensor
    text_features: torch.Tensor
    captions_cut: int  # that are longer than the context, see `RetrievalSet.tokenize`


def evaluate_retrieval(extractor: FeatureExtractor, data: RetrievalSet, prefix: str = "") -> RetrievalResult:
    """Recall on `data` in both directions; all ranks call it.

    prefix: put before every caption ("a photo of " in the tables of RWKV-CLIP and ALIP). ValueError where records do
    not fit the tokenizer.
    """
    tokens, cut = data.tokenize(extractor.tokenizer, prefix)
    images = extractor.encode_images(data.open, len(data.image_names))
    texts = extractor.encode_tokens(tokens)
    metrics = recall_at_k(images, texts, torch.from_numpy(data.right_images))
    return RetrievalResult(metrics, images, texts, cut)
