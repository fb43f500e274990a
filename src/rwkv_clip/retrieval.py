"""Zero-shot retrieval: a set of pictures with captions, and the recall of a model on it.

Used by validation during training and by `rwkv_clip.eval`. A set comes from a JSON list, JSON lines, a
Karpathy split file or .rec shards. Pictures stay on disk until they are needed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rwkv_clip.features import DECODE_WORKERS, encode_images, encode_texts, open_picture
from rwkv_clip.metrics import RECALL_AT, recall_at_k

EVERY_SPLIT = "all"


@dataclass(frozen=True)
class RetrievalSet:
    """Pictures and their captions, as text or (from records) as token rows.

    `open(i)` gives picture i as PIL RGB. `image_of_caption` (captions,) int64: the picture of each caption.
    """

    name: str  # what the set is called in a report: "flickr30k", or the name of its file
    path: str
    split: str | None
    image_names: Sequence[str]
    open: Callable[[int], object]
    image_of_caption: np.ndarray
    captions: list[str] | None = None
    tokens: np.ndarray | None = None  # int64 (captions, context)
    tokenizer: str | None = None  # the name of the tokenizer that made `tokens`, where known

    def caption_text(self, index: int) -> str:
        """A caption for people to read; a token row has no text, so it shows as its number."""
        return self.captions[index] if self.captions is not None else f"caption {index}"


@dataclass(frozen=True)
class RetrievalResult:
    """Metrics as `metrics.recall_at_k` names them, and the features (float32, CPU, length 1) behind them."""

    metrics: dict[str, float | int]
    image_features: torch.Tensor
    text_features: torch.Tensor


@dataclass(frozen=True)
class _Row:
    """One entry of a caption file; `where` is its place for messages."""

    where: str
    image: str
    captions: list[str]
    split: str | None


def load_retrieval(
    path: str | Path,
    *,
    split: str | None = None,
    image_root: str | Path | None = None,
    views: Sequence[str] | None = None,
) -> RetrievalSet:
    """Read a retrieval set.

    path: a JSON list or JSON lines of {"image": path, "caption" | "captions": text or list, "split":
    optional}; a Karpathy file {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}; or
    .rec shards (prefix, file, glob, comma list). Rows that name the same picture are joined. Pictures lie
    below `image_root`, else below the file's folder or its `images` folder. split: which rows to take ("all":
    every row); required where the file holds several. views: for .rec, the names of the texts to use
    (default: all; equal ones of a picture count once). ValueError with file, line and field for whatever is
    wrong, FileNotFoundError where there is no such file.
    """
    source = Path(path)
    if source.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        if views is not None:
            raise ValueError(f"views: {list(views)} given, but {source} is no .rec; leave views out")
        return _from_captions(source, split, Path(image_root) if image_root is not None else None)
    if split not in (None, EVERY_SPLIT) or image_root is not None:
        raise ValueError(f"{path}: records have no split and no image folder; leave split and image_root out")
    return _from_records(str(path), views)


def evaluate_retrieval(
    model: torch.nn.Module,
    data: RetrievalSet,
    preprocess: Callable,
    tokenizer: Callable,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
    prefix: str = "",
    ks: Sequence[int] = RECALL_AT,
    workers: int = DECODE_WORKERS,
    progress: bool = False,
) -> RetrievalResult:
    """Recall of `model` on `data` in both directions; the model's training mode is restored afterwards.

    preprocess: PIL -> float (3, h, w); tokenizer: list of texts -> int64 (n, context); autocast: dtype or
    None; prefix: put before every caption ("a photo of " in the tables of RWKV-CLIP and ALIP).
    """
    tokens = caption_tokens(data, tokenizer, prefix)
    common = {"device": device, "batch_size": batch_size, "autocast": autocast, "progress": progress}
    images = encode_images(model, data.open, len(data.image_names), preprocess, workers=workers, **common)
    texts = encode_texts(model, tokens, **common)
    metrics = recall_at_k(images, texts, torch.from_numpy(data.image_of_caption), ks)
    return RetrievalResult(metrics, images, texts)


def caption_tokens(data: RetrievalSet, tokenizer: Callable, prefix: str = "") -> torch.Tensor:
    """Token rows int64 (captions, context) of a set; ValueError where records do not fit the tokenizer."""
    if data.tokens is None:
        return tokenizer([prefix + caption for caption in data.captions])
    if prefix:
        raise ValueError(f"prefix: {prefix!r} cannot be put before the finished tokens of {data.path}; leave it out")
    name, context = getattr(tokenizer, "name", None), getattr(tokenizer, "context", None)
    if name and data.tokenizer and name != data.tokenizer:
        raise ValueError(f"{data.path}: tokens made by {data.tokenizer!r}, the model reads {name!r}; build it again")
    if context and data.tokens.shape[1] > context:
        raise ValueError(f"{data.path}: {data.tokens.shape[1]} tokens a text, the model reads {context}")
    return torch.from_numpy(data.tokens)


def _from_captions(source: Path, split: str | None, image_root: Path | None) -> RetrievalSet:
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; give a .json, .jsonl or .rec retrieval set")
    name, rows = _read_rows(source)
    rows, split = _choose_split(source, rows, split)
    places: dict[str, int] = {}
    captions, owner = [], []
    for row in rows:
        index = places.setdefault(row.image, len(places))
        captions += row.captions
        owner += [index] * len(row.captions)
    files = _find_images(source, rows, image_root)
    images = [files[image] for image in places]
    return RetrievalSet(
        name=name,
        path=str(source),
        split=split,
        image_names=list(places),
        open=lambda index: open_picture(images[index]),
        image_of_caption=np.asarray(owner, np.int64),
        captions=captions,
    )


def _read_rows(source: Path) -> tuple[str, list[_Row]]:
    """Name of the set (its own, else folder and file) and its rows."""
    name = f"{source.resolve().parent.name}/{source.stem}"
    if source.suffix.lower() != ".json":
        return name, list(_lines(source))
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}:{error.lineno}: not JSON ({error.msg}); JSON lines end in .jsonl") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    if isinstance(content, list):
        return name, [_row(entry, f"{source}: entry {i}") for i, entry in enumerate(content)]
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        entries = enumerate(content["images"])
        rows = [_karpathy_row(entry, f"{source}: images[{i}]") for i, entry in entries]
        return str(content.get("dataset") or name), rows
    raise ValueError(f'{source}: neither a list of entries nor {{"images": [...]}}; see load_retrieval for the forms')


def _lines(source: Path) -> Iterator[_Row]:
    # Read as bytes: universal newlines would count a lone carriage return inside a text as a line.
    for number, line in enumerate(source.read_bytes().split(b"\n"), 1):
        where = f"{source}:{number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg}); every line is one JSON object") from error
        yield _row(entry, where)


def _row(entry: object, where: str) -> _Row:
    entry = _object(entry, where)
    field = "captions" if "captions" in entry else "caption"
    if field not in entry:
        raise ValueError(f"{where}: no field 'caption' or 'captions'; add the text or texts of the picture")
    texts = entry[field] if isinstance(entry[field], list) else [entry[field]]
    return _Row(where, _text(entry, "image", where), _texts(texts, field, where), _split_of(entry, where))


def _karpathy_row(entry: object, where: str) -> _Row:
    entry = _object(entry, where)
    sentences = entry.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(s, dict) for s in sentences):
        raise ValueError(f"{where}: field 'sentences' must be a list of {{\"raw\": text}}")
    image = _text(entry, "filename", where)
    if entry.get("filepath"):
        image = f"{_text(entry, 'filepath', where)}/{image}"
    return _Row(where, image, _texts([s.get("raw") for s in sentences], "sentences", where), _split_of(entry, where))


def _object(entry: object, where: str) -> dict:
    if not isinstance(entry, dict):
        raise ValueError(f'{where}: {type(entry).__name__} instead of an object; write {{"image": ..., ...}}')
    return entry


def _text(entry: dict, field: str, where: str) -> str:
    value = entry.get(field)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: field {field!r} is {value!r}; give a path as text")
    return value


def _texts(texts: list, field: str, where: str) -> list[str]:
    if not texts:
        raise ValueError(f"{where}: field {field!r} is empty; give at least one text or remove the entry")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: field {field!r} holds {text!r}; every caption is a text that is not empty")
    return texts


def _split_of(entry: dict, where: str) -> str | None:
    split = entry.get("split")
    if split is not None and not isinstance(split, str):
        raise ValueError(f"{where}: field 'split' is {split!r}; give a name such as 'test'")
    return split


def _choose_split(source: Path, rows: list[_Row], split: str | None) -> tuple[list[_Row], str | None]:
    if not rows:
        raise ValueError(f"{source}: no entries; give at least one picture with a caption")
    counts = Counter(row.split for row in rows)
    known = ", ".join(f"{name} ({count})" for name, count in counts.items())
    if split == EVERY_SPLIT:
        return rows, split
    if split is None and len(counts) > 1:
        raise ValueError(f"{source}: several splits: {known}; choose one by split, or {EVERY_SPLIT!r}")
    if split is None:
        return rows, next(iter(counts))
    if split not in counts:
        raise ValueError(f"{source}: split {split!r} is not in the file, which holds {known}")
    return [row for row in rows if row.split == split], split


def _find_images(source: Path, rows: list[_Row], image_root: Path | None) -> dict[str, Path]:
    """File of every picture. ValueError that counts the missing ones and names the first."""
    roots = [source.parent, source.parent / "images"] if image_root is None else [image_root]
    found, missing = {}, []
    for row in rows:
        if row.image in found:
            continue
        file = next((root / row.image for root in roots if (root / row.image).is_file()), None)
        if file is None:
            missing.append(row)
        else:
            found[row.image] = file
    if missing:
        looked = " or ".join(str(root) for root in roots)
        raise ValueError(
            f"{missing[0].where}: field 'image': {missing[0].image!r} is not below {looked} "
            f"({len(missing)} of {len(rows)} entries lack theirs); set image_root to the pictures' folder"
        )
    return found


def _from_records(spec: str, views: Sequence[str] | None) -> RetrievalSet:
    from rwkv_clip.recordio import RecordSet

    records = RecordSet(spec)
    unknown = [view for view in views or () if view not in records.views]
    if unknown or (views is not None and not len(views)):
        raise ValueError(f"views: {list(views)} of {spec}; choose from {list(records.views)}")
    wanted = [records.views.index(view) for view in views or records.views]
    tokens, owner = [], []
    for index in range(len(records)):
        rows = records.sample(index)[1][wanted]
        _, first = np.unique(rows, axis=0, return_index=True)
        tokens.append(rows[np.sort(first)])
        owner += [index] * len(first)
    return RetrievalSet(
        name=Path(spec).stem,
        path=spec,
        split=None,
        image_names=[records.name(index) for index in range(len(records))],
        open=lambda index: open_picture(records.sample(index)[0], records.name(index)),
        image_of_caption=np.asarray(owner, np.int64),
        tokens=np.concatenate(tokens).astype(np.int64),
        tokenizer=records.tokenizer,
    )
