"""Teachers for distillation: a frozen model that sees what the student sees, or features that one has written before.

A model encodes each micro-batch as the towers get it: the same crops, resized where it wants another size, and the same
token ids, padded where it reads longer texts. So its targets fit what the student sees ("consistent teaching": Beyer et
al. 2021, arXiv 2106.05237), for the price of its forward pass.

Stored features cost a look-up. The teacher saw each image once, whole and not mirrored, and its tokenizer does not
matter: the target of a crop is what the whole image shows. They are found by content: an image by its encoded bytes, a
text by its token ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_clip.checkpoint import SUFFIX
from rwkv_clip.config import ConfigError
from rwkv_clip.data.recordio import spread
from rwkv_clip.data.records import RecordError, Records
from rwkv_clip.factory import create_model, holds_weights, load_for_inference
from rwkv_clip.feature_files import Features, read_about, read_features
from rwkv_clip.files import hash_bytes
from rwkv_clip.losses import FACTS, LossSettings, Objective
from rwkv_clip.losses.distill import SEEN, Distilled
from rwkv_clip.models.specification import ContrastiveModel, ModelSpec
from rwkv_clip.pretrained import find_released
from rwkv_clip.tokenizer import prepare_texts
from rwkv_clip.transform import normalize

from .checks import hash_weights
from .data.augment import hash_rows
from .data.samples import DataError
from .settings import Settings

LOOKED_AT = 64  # records whose features are looked up before training begins
WRITE = "write them with: python -m rwkv_clip.eval.main features --checkpoint TEACHER --data RECORDS"


def add_teacher(
    objective: Objective, settings: Settings, spec: ModelSpec, records: Records, device: torch.device
) -> Objective:
    """The objective with the teacher that the settings name, if they name one. ConfigError where teacher, model (spec)
    and records do not fit together."""
    loss, data = settings.loss, settings.data
    if loss.distill_features:
        stored = StoredFeatures(Path(loss.distill_features), spec)
        stored.check_some(records, 1 if data.text_choice == "first" else data.texts)
        return Distilled(objective, stored)
    if loss.distill_model:
        return Distilled(objective, FrozenModel(_load(loss, device), spec, device))
    return objective


def _load(settings: LossSettings, device: torch.device) -> ContrastiveModel:
    name, weights = settings.distill_model, settings.distill_pretrained
    assert name is not None, "add_teacher asks"
    if weights:
        return create_model(name, weights, device=device)
    tagged = name.count(":") > 1 if name.startswith("open_clip:") else find_released(name) is not None
    if not (tagged or holds_weights(name) or Path(name).exists() or name.endswith(SUFFIX)):
        raise ConfigError(
            [
                f"distill_model: {name!r} names no weights; give them by --distill-pretrained, or name what holds "
                f"both: a run, an export, open_clip:NAME:TAG, hf-hub:org/name"
            ]
        )
    return load_for_inference(name, device=device).model


class FrozenModel:
    """A model as a `Teacher`. ConfigError for one that cannot read the student's token ids."""

    recalls: tuple[str, ...] = ()

    def __init__(self, model: ContrastiveModel, student: ModelSpec, device: torch.device):
        self.model, spec = model.eval().requires_grad_(False), model.spec
        own, theirs = student.tokenizer(), spec.tokenizer()
        if own.name != theirs.name or own.context > theirs.context:
            raise ConfigError(
                [
                    f"distill_model: {spec.name} reads {theirs.context} tokens of {theirs.name!r}, the model "
                    f"{own.context} of {own.name!r}; take a teacher with the same tokenizer and at least that context, "
                    f"or its features (--distill-features)"
                ]
            )
        self.size, self.context = tuple(spec.image_size), theirs.context
        self.padding = int(theirs("")[0, -1])
        self.pixels = [torch.tensor(values, device=device) for values in spec.pixels]
        self.scale = model.logit_scale.exp().item()
        self.sources = {"distill_model": f"{hash_weights(model):016x}"}

    def observe(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """image uint8 (B, 3, h, w), text (B, T) or (B, V, T) -> normalised features (B, E), and (B, E) or (B, V, E)."""
        pixels = image
        if tuple(image.shape[-2:]) != self.size:
            wide = F.interpolate(image.float().div_(255), self.size, mode="bicubic", antialias=True)
            pixels = wide.clamp_(0, 1)
        rows = F.pad(text.flatten(0, -2), (0, self.context - text.shape[-1]), value=self.padding)
        found = self.model(normalize(pixels, *self.pixels), rows, needs=("image", "text"))
        return dict(zip(SEEN, (found["image"].float(), found["text"].float().unflatten(0, text.shape[:-1]))))

    def recall(self, facts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing."""
        return {}


class StoredFeatures:
    """A folder of features as a `Teacher`; they stay in host memory. ConfigError for one that does not hold all that
    is needed."""

    recalls: tuple[str, ...] = FACTS

    def __init__(self, folder: Path, student: ModelSpec):
        self.folder = folder
        try:
            about = read_about(folder)
            found = [read_features(folder, kind) for kind in ("images", "texts")]
        except (ValueError, OSError) as error:
            raise ConfigError([f"distill_features: {error}"]) from None
        scale = about.get("logit_scale")
        images, captions = found
        if images is None or captions is None or images.vectors.shape[1] != captions.vectors.shape[1]:
            raise ConfigError([f"distill_features: {folder} lacks images or texts of one width; {WRITE}"])
        if not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
            raise ConfigError([f"distill_features: {folder / 'about.json'} has no logit_scale; {WRITE}"])
        if not all(isinstance(key := row.get("key"), int) and 0 <= key < 2**63 for row in images.rows):
            raise ConfigError([f"distill_features: {folder / 'images.jsonl'} has no keys of the images; {WRITE}"])
        self.scale = float(scale)
        self.images = _Table(np.array([row["key"] for row in images.rows], np.int64), images.vectors)
        self.captions = _Table(_hash_texts(captions, student), captions.vectors)
        content = hashlib.sha256(repr(scale).encode())
        for table in (self.images, self.captions):
            content.update(table.keys.tobytes() + np.ascontiguousarray(table.vectors).tobytes())
        self.sources = {"distill_features": content.hexdigest()[:16]}

    def check_some(self, records: Records, texts: int | None) -> None:
        """ConfigError unless images and first `texts` texts (None: all) of some records are there."""
        missing, count = [], 0
        for i in spread(len(records), LOOKED_AT):
            try:
                data, tokens = records.sample(i)
            except RecordError:
                continue  # counted and replaced when its turn comes
            count += 1
            for what, table, keys in (
                ("the image", self.images, np.array([hash_bytes(data)], np.int64)),
                ("a text", self.captions, hash_rows(tokens[:texts])),
            ):
                if (table.find(keys) < 0).any():
                    missing.append(f"{what} of {records.name(i)}")
                    break
        if missing:
            raise ConfigError(
                [f"distill_features: {self.folder} lacks {missing[0]} ({len(missing)} of {count} records); {WRITE}"]
            )

    def observe(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def recall(self, facts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features by keys of images (B,) and of texts (B,) or (B, V): (B, E), and (B, E) or (B, V, E); zeros for blank
        images, whose keys are negative. DataError for what is not there."""
        blank, found = facts["image_keys"].numpy() < 0, []
        for what, table, keys in (
            ("image", self.images, facts["image_keys"].numpy()),
            ("text", self.captions, facts["text_keys"].numpy()),
        ):
            rows = table.find(keys)
            absent = (rows < 0) & ~blank.reshape(-1, *[1] * (keys.ndim - 1))
            if absent.any():
                raise DataError(f"distill_features: {self.folder} lacks {absent.sum()} {what}s of a batch; {WRITE}")
            vectors = table.vectors[np.maximum(rows, 0)]
            vectors[rows < 0] = 0
            found.append(torch.from_numpy(vectors))
        return dict(zip(SEEN, found))


class _Table:
    """Vectors (n, E) by int64 keys (n,); of equal keys the first counts."""

    def __init__(self, keys: np.ndarray, vectors: Tensor):
        self.keys, first = np.unique(keys, return_index=True)
        self.vectors = vectors.numpy()[first]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Row of each key, -1 where there is none."""
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)


def _hash_texts(captions: Features, student: ModelSpec) -> np.ndarray:
    """Keys of stored texts, as the student reads them: of their token ids where these were stored, else of their
    words."""
    tokenizer, rows = student.tokenizer(), captions.rows
    if rows and all("tokens" in row for row in rows):
        ids = np.zeros((len(rows), tokenizer.context), np.int64)
        try:
            for place, row in zip(ids, rows):
                given: Any = row["tokens"][: tokenizer.context]
                place[: len(given)] = given
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError([f"distill_features: tokens of a stored text are no ids ({error}); {WRITE}"]) from None
        return hash_rows(ids)
    if not all(isinstance(row.get("text"), str) for row in rows):
        raise ConfigError([f"distill_features: the rows of texts have neither `tokens` nor `text`; {WRITE}"])
    return hash_rows(tokenizer(prepare_texts(tokenizer, [row["text"] for row in rows])).numpy())
