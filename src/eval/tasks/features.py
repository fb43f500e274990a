"""Features of a set of pictures, with or without captions, written into a folder (see `feature_files`), or as
Chinese-CLIP's files beside its data (see `chinese_features`)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rwkv_clip.data.retrieval_set import RetrievalSet
from rwkv_clip.datasets import IMAGEFOLDER, ClassificationSet, MissingData, load_classification
from rwkv_clip.datasets.benchmarks import TEST
from rwkv_clip.dist import rank_and_size
from rwkv_clip.feature_files import Features, write_about, write_features
from rwkv_clip.features import on_all_ranks
from rwkv_clip.files import check_output, hash_bytes, new_folder

from ..cache import data_key, encode_cached, encode_labelled
from ..chinese_features import write_chinese_features
from ..chinese_sets import ChineseClipSet, Sides, load_chinese_clip
from ..encoder import Encoder
from ..report.files import place_of
from ..settings import CaptionedSettings
from . import retrieval


@dataclass(frozen=True, kw_only=True)
class FeaturesSettings(CaptionedSettings):
    """Write normalised features of pictures and texts, with their ids, into a folder."""

    data: str
    """JSON list, JSON lines, Karpathy's or COCO's JSON, or records; with `dataset` a folder as in classification; with
    `to` chinese-clip X_texts.jsonl or an LMDB's folder of a split."""
    dataset: str | None = None
    """imagefolder or a benchmark (cifar10 ..): its pictures with their labels, and no texts."""
    split: str | None = None
    """Use only entries of this split ("all": every one); needed where the file holds several. With a benchmark: test
    (default), train or val."""
    form: Literal["safetensors", "npy", "jsonl"] = "safetensors"
    """How features are written; jsonl is Chinese-CLIP's (images.img_feat.jsonl, texts.txt_feat.jsonl)."""
    to: Literal["folder", "chinese-clip"] = "folder"
    """folder: all into a new folder. chinese-clip: X_texts.txt_feat.jsonl and X_imgs.img_feat.jsonl beside the data, as
    its extract_features.py writes them; the next four settings belong to it."""
    sides: Sides = "both"
    """Which side is encoded."""
    image_data: str | None = None
    """LMDB's folder of a split, its `imgs` folder, or X_imgs.tsv; default: lmdb/X beside the texts, else the TSV."""
    image_feat_output_path: str | None = None
    """Another name for the file of image features."""
    text_feat_output_path: str | None = None
    """Another name for the file of text features."""


def load(settings: FeaturesSettings, device: torch.device) -> RetrievalSet | ClassificationSet | ChineseClipSet:
    """The set that `settings` name; all ranks call it."""
    _refuse_idle(settings)
    if settings.to == "chinese-clip":
        for name in ("image_feat_output_path", "text_feat_output_path"):
            if place := getattr(settings, name):
                check_output(name, Path(place), map(Path, filter(None, (settings.data, settings.image_data))))
        return on_all_ranks(lambda: load_chinese_clip(settings.data, settings.image_data, settings.sides), device)
    if not settings.dataset:
        return retrieval.load(settings, device)
    split = settings.split or TEST
    try:
        return on_all_ranks(lambda: load_classification(settings.dataset, settings.data, split=split), device)
    except MissingData as error:
        raise ValueError(f"dataset: {settings.dataset}: {error}") from None


def _refuse_idle(settings: FeaturesSettings) -> None:
    """ValueError for settings that have no meaning with the others."""
    chinese = ("image_data", "image_feat_output_path", "text_feat_output_path")
    captioned = ("image_root", "texts", "allow_outside")
    if settings.to == "chinese-clip":
        where, names = "to chinese-clip", ("dataset", "split", *captioned)
        idle = [name for name in names if getattr(settings, name)]
    else:
        where, idle = "to folder", [name for name in chinese if getattr(settings, name)]
        idle += ["sides"] if settings.sides != "both" else []
        if settings.dataset and not idle:
            where = f"dataset {settings.dataset}"
            idle = [name for name in (*captioned, "prefix") if getattr(settings, name)]
            idle += ["split"] if settings.split and settings.dataset == IMAGEFOLDER else []
    if idle:
        raise ValueError(f"{', '.join(idle)}: not allowed with {where}; leave it out")


def run(settings: FeaturesSettings, data: RetrievalSet | ClassificationSet | ChineseClipSet, encoder: Encoder) -> int:
    """Encode the set and write it into a new folder, or Chinese-CLIP's files."""
    if isinstance(data, ChineseClipSet):
        names = settings.image_feat_output_path, settings.text_feat_output_path
        for path in write_chinese_features(encoder, data, settings.prefix, *names):
            if rank_and_size()[0] == 0:
                print(f"features: {path}")
        return 0
    started, loaded = time.monotonic(), encoder.loaded
    if isinstance(data, ClassificationSet):
        about, found = _encode_classes(data, encoder)
    else:
        about, found = _encode_captioned(data, encoder, settings.prefix)
    if rank_and_size()[0]:
        return 0
    about = {
        "model": loaded.name,
        "checkpoint": _absolute(settings.checkpoint),
        "model_setting": _absolute(settings.model) if (settings.model or "").endswith(".json") else settings.model,
        "checkpoint_sha256": loaded.digest,
        "precision": loaded.precision,
        **about,
        **{features.kind: len(features.rows) for features in found},
        "width": found[0].vectors.shape[1],
        "logit_scale": loaded.model.logit_scale.exp().item(),
        "seconds": round(time.monotonic() - started, 3),
    }
    folder = new_folder(place_of(settings, "features", loaded.name))
    for features in found:
        write_features(folder, features, settings.form)
    write_about(folder, about)
    print(f"features: {folder}")
    return 0


def _absolute(place: str | None) -> str | None:
    """The absolute path of a file or folder; a name stays a name."""
    return os.path.abspath(place) if place and os.path.exists(place) else place


def _encode_captioned(data: RetrievalSet, encoder: Encoder, prefix: str) -> tuple[dict, list[Features]]:
    """A retrieval set: pictures, and texts with the pictures that they belong to."""
    tokenizer = encoder.loaded.tokenizer
    tokens, cut = data.tokenize(tokenizer, prefix)
    names = list(map(str, data.image_names))
    items = [*names, *data.files]
    images = encode_cached(encoder, lambda: data_key(data.name, data.split, len(names), data.open, items), data.open)
    texts = encoder.extractor.encode_tokens(tokens)
    owners = [data.images_of(i) for i in range(len(data.image_of_caption))]
    image_rows: list[dict[str, Any]] = [{"image_id": name} for name in names]
    if data.read is not None:  # what training finds the features of its images by
        for index, row in enumerate(image_rows):
            row["key"] = hash_bytes(data.read(index))
    text_rows: list[dict[str, Any]] = [
        {"text_id": i, "text": data.caption_text(i), "image_ids": [names[image] for image in own]}
        for i, own in enumerate(owners)
    ]
    if data.captions is None and data.tokens is not None:
        for row, ids in zip(text_rows, data.tokens):
            row["tokens"] = np.trim_zeros(ids, "b").tolist()
    note = "; ".join(filter(None, [data.note, retrieval.note_cut(data, cut, tokenizer)]))
    about = {"dataset": data.name, "path": data.path, "split": data.split, "prefix": prefix}
    about |= {"captions_cut": cut, "note": note}
    return about, [Features("images", images, image_rows), Features("texts", texts, text_rows)]


def _encode_classes(data: ClassificationSet, encoder: Encoder) -> tuple[dict, list[Features]]:
    """A split of a classification set: pictures with their labels."""
    vectors, names = encode_labelled(encoder, data), list(data.class_names)
    rows = [{"image_id": i, "label": label, "class": names[label]} for i, label in enumerate(data.labels.tolist())]
    empty = [name for label, name in enumerate(names) if not (data.labels == label).any()]
    note = "; ".join(filter(None, [data.note, f"no samples: {', '.join(empty)}" if empty else ""]))
    about = {"dataset": data.name, "path": data.path, "split": data.split, "class_names": names, "note": note}
    return about, [Features("images", vectors, rows)]
