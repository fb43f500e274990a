"""Captions by a model of transformers (extra `captioners`): BLIP, Florence-2, or any of its image-text-to-text classes.

Greedy, so that the same pictures give the same captions. Weights are read from safetensors only, no code of a model's
folder is run, and nothing is fetched unless a setting allows it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rwkv_clip.data.image import ImageError
from rwkv_clip.device import AUTOCAST, choose_device
from rwkv_clip.files import hash_file

from .pictures import Found, open_found
from .settings import CaptionerSettings

COLUMNS = {"caption": "str", "caption_source": "str", "caption_status": "str", "caption_reason": "str"}
VERSION = 1


class TransformersCaptioner:
    """Captions of pictures. name: of the model. decides: every setting that decides a caption."""

    def __init__(self, model: Any, processor: Any, settings: CaptionerSettings, digest: str):
        self._model, self._processor, self._settings = model, processor, settings
        self._special = set(getattr(processor, "tokenizer", processor).all_special_ids)
        self.name = f"transformers:{Path(str(settings.caption_model)).name}"
        self.decides = {
            "captioner": self.name,
            "captioner_weights": digest,
            "captioner_prompt": settings.captioner_prompt,
            "caption_tokens": settings.caption_tokens,
            "precision": settings.precision,
            "captioner_version": VERSION,
        }

    @classmethod
    def load(cls, settings: CaptionerSettings) -> TransformersCaptioner:
        """ValueError for a model that is not there or cannot be used, ImportError that names the extra."""
        transformers, name = _import_transformers(), settings.caption_model
        if not name:
            raise ValueError("caption_model: not set; give a folder that save_pretrained wrote, or a name on the hub")
        common = {
            "local_files_only": not settings.download,
            "trust_remote_code": False,
            **({"revision": settings.captioner_revision} if settings.captioner_revision else {}),
        }
        device = choose_device(settings.device)
        transformers.utils.logging.disable_progress_bar()  # loading takes seconds
        try:
            processor = transformers.AutoProcessor.from_pretrained(name, **common)
            model = transformers.AutoModelForImageTextToText.from_pretrained(
                name, use_safetensors=True, dtype=AUTOCAST[settings.precision] or torch.float32, **common
            )
        except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            remedy = "" if settings.download else "; --download lets it be fetched"
            raise ValueError(f"caption_model: {name!r} cannot be loaded ({first}){remedy}") from None
        if getattr(processor, "image_processor", None) is None:
            raise ValueError(f"caption_model: {name!r} takes no pictures; name an image-text-to-text model")
        return cls(model.to(device).eval(), processor, settings, _digest(name, model))

    def caption(self, pictures: Sequence[Found]) -> list[dict[str, Any]]:
        """The columns of each picture's row, in their order; where there is no caption, the reason."""
        results = [self._failed(found.reason) for found in pictures]
        for places, images in self._open(pictures, results):
            for place, (text, reason) in zip(places, self._write(images)):
                results[place] = self._failed(reason) if reason else self._wrote(text)
        return results

    def _open(self, pictures: Sequence[Found], results: list[dict[str, Any]]) -> Iterator[tuple[list[int], list[Any]]]:
        """Batches of (places, RGB pictures) of those that can be read; notes the others in `results`."""
        places: list[int] = []
        images: list[Any] = []
        for place, found in enumerate(pictures):
            try:
                images.append(open_found(found))
                places.append(place)
            except ImageError as error:
                results[place] = self._failed(error.reason)
            if len(images) == self._settings.caption_batch:
                yield places, images
                places, images = [], []
        if images:
            yield places, images

    def _write(self, images: list[Any]) -> list[tuple[str, str]]:
        """(caption, "") or ("", why there is none) of each picture."""
        prompt = self._settings.captioner_prompt
        asked = {"text": [prompt] * len(images), "padding": True} if prompt else {}
        inputs = self._processor(images=images, return_tensors="pt", **asked)
        inputs = {name: self._place(value) for name, value in inputs.items()}
        with torch.no_grad():
            ids = self._model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=self._settings.caption_tokens
            )
        given = inputs.get("input_ids")
        if given is not None and ids.shape[1] > given.shape[1] and torch.equal(ids[:, : given.shape[1]], given):
            ids = ids[:, given.shape[1] :]  # models that go on writing repeat what they were asked
        texts = self._processor.batch_decode(ids, skip_special_tokens=True)
        return [self._judge(" ".join(text.split()), row) for text, row in zip(texts, ids.tolist())]

    def _judge(self, text: str, ids: list[int]) -> tuple[str, str]:
        if not any(character.isalpha() for character in text):
            return "", "no words"
        # Whatever ended early ends with a token that is no text, its own end or padding.
        if len(ids) >= self._settings.caption_tokens and ids[-1] not in self._special:
            return "", f"cut at {self._settings.caption_tokens} tokens"
        return text, ""

    def _place(self, value: Any) -> Any:
        """On the model's device; pictures in the type of its weights."""
        if not isinstance(value, torch.Tensor):
            return value
        dtype = self._model.dtype if value.is_floating_point() else None
        return value.to(self._model.device, dtype)

    def _wrote(self, text: str) -> dict[str, Any]:
        return {"caption": text, "caption_source": self.name, "caption_status": "ok", "caption_reason": ""}

    def _failed(self, reason: str) -> dict[str, Any]:
        return {"caption": None, "caption_source": None, "caption_status": "failed", "caption_reason": reason}


def _import_transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise ImportError("captioners of transformers: pip install -e '.[captioners]'") from None
    return transformers


def _digest(name: str, model: Any) -> str:
    """SHA-256 of a folder's weights, or the commit of a model of the hub."""
    files = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    if files:
        return hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest()
    return str(getattr(model.config, "_commit_hash", None) or name)
