"""Zero-shot retrieval: a set of pictures with captions, and the recall of a model on it.

Used by validation during training and by `rwkv_clip.eval`. A set comes from a JSON list, JSON lines, a
Karpathy split file, COCO's captions or .rec shards. Pictures stay on disk until they are needed.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .features import DECODE_WORKERS, encode_images, encode_texts, open_picture
from .files import find_below, parse_json
from .metrics import RECALL_AT, recall_at_k
from .tokenizer import Tokenizer

EVERY_SPLIT = "all"
JSON = (".json", ".jsonl", ".ndjson")
FORMS = "JSON lines (.jsonl), a JSON list, Karpathy's or COCO's JSON (.json), or records (.rec) that data2rec.py made"
# What rows call them, the first that is there.
IMAGE_FIELDS = ("image", "image_path", "filepath", "file_name", "filename", "path")
CAPTION_FIELDS = ("captions", "caption", "title", "text", "raw", "raw_caption", "txt")


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
    files: Sequence[Path] = ()  # all files that the pictures lie in
    note: str = ""  # what a reader of the figures should know about the set

    def caption_text(self, index: int) -> str:
        """A caption for people to read; a token row has no text, so it shows as its number."""
        return self.captions[index] if self.captions is not None else f"caption {index}"


@dataclass(frozen=True)
class RetrievalResult:
    """Metrics as `metrics.recall_at_k` names them, and the features (float32, CPU, length 1) behind them."""

    metrics: dict[str, float | int]
    image_features: torch.Tensor
    text_features: torch.Tensor
    captions_cut: int = 0  # as `count_cut` has it


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
    allow_outside: bool = False,
) -> RetrievalSet:
    """Read a retrieval set.

    path: a JSON list or JSON lines of {"image": path, "caption" | "captions": text or list, "split": optional} (other
    names: IMAGE_FIELDS, CAPTION_FIELDS); a Karpathy file {"images": [{"filename", "filepath", "split", "sentences":
    [{"raw"}]}]}; COCO's {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}; or .rec shards
    (prefix, file, glob, comma list). Rows that name the same file are one picture, records that hold the same bytes
    as well. Pictures lie below `image_root`, else below the file's folder or its `images` folder; names that lead out
    of it (`..`, absolute, links) are refused unless `allow_outside`. split: which rows to take ("all": every row);
    required where the file holds several. views: for .rec, the names of the texts to use (default: all; equal ones
    of a picture count once). ValueError with file, line and field for whatever is wrong, FileNotFoundError where
    there is no such file.
    """
    source = Path(path)
    if source.suffix.lower() in JSON:
        if views is not None:
            raise ValueError(f"views: {list(views)} given, but {source} is no .rec; leave views out")
        return _from_captions(source, split, Path(image_root) if image_root is not None else None, allow_outside)
    if source.suffix.lower() not in ("", ".rec") and source.is_file():
        raise ValueError(f"{source}: a {source.suffix} file is no retrieval set; give {FORMS}")
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
    return RetrievalResult(metrics, images, texts, count_cut(data, tokens, tokenizer, prefix))


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


def count_cut(data: RetrievalSet, tokens: torch.Tensor, tokenizer: Callable, prefix: str = "") -> int:
    """How many captions are longer than the context, so that `tokens` (`caption_tokens`) lack their ends.

    Records do not say which of their captions were cut: of these all that fill the context are counted.
    """
    if data.captions is None:
        return int((tokens[:, -1] != 0).sum())
    return count_cut_texts([prefix + caption for caption in data.captions], tokens, tokenizer)


def count_cut_texts(texts: Sequence[str], tokens: torch.Tensor, tokenizer: Callable) -> int:
    """How many of the texts have more tokens than fit into the rows (n, context) that the tokenizer made of them.

    0 for a tokenizer that is none of ours and cannot be asked for a longer context.
    """
    if not isinstance(tokenizer, Tokenizer):
        return 0
    longer = tokens.shape[1] + 1
    padding = tokenizer("", longer)[0, -1]
    full = torch.nonzero(tokens[:, -1] != padding).flatten().tolist()
    return int((tokenizer([texts[i] for i in full], longer)[:, -1] != padding).sum())


def _from_captions(source: Path, split: str | None, image_root: Path | None, outside: bool) -> RetrievalSet:
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; give {FORMS}")
    name, rows = _read_rows(source)
    rows, split = _choose_split(source, rows, split)
    files = _find_images(source, rows, image_root, outside)
    # One file is one picture, however its name is spelled.
    own = {image: os.path.realpath(file) for image, file in files.items()}
    images: dict[str, tuple[int, str]] = {}
    captions, owner = [], []
    for row in rows:
        index, _ = images.setdefault(own[row.image], (len(images), row.image))
        captions += row.captions
        owner += [index] * len(row.captions)
    if not captions:
        raise ValueError(f"{source}: no picture has a caption; give at least one")
    names = [image for _, image in images.values()]
    paths = [files[image] for image in names]
    return RetrievalSet(
        name=name,
        path=str(source),
        split=split,
        image_names=names,
        open=lambda index: open_picture(paths[index]),
        image_of_caption=np.asarray(owner, np.int64),
        captions=captions,
        files=paths,
        note=_note_of(names, captions, owner),
    )


def _note_of(names: list[str], captions: list[str], owner: list[int]) -> str:
    """What is unusual about a set, counted, with an example."""
    notes, silent = [], sorted(set(range(len(names))) - set(owner))
    if silent:
        example = f"the first is {names[silent[0]]}"
        notes.append(
            f"{len(silent)} of {len(names)} pictures have no caption ({example}): found by texts, but no query"
        )
    counts = Counter(zip(owner, captions))
    if again := len(captions) - len(counts):
        place, text = next(pair for pair, count in counts.items() if count > 1)
        notes.append(f"{again} captions stand a second time with their picture, e.g. {text[:60]!r} of {names[place]}")
    return "; ".join(notes)


def _read_rows(source: Path) -> tuple[str, list[_Row]]:
    """Name of the set (its own, else folder and file) and its rows."""
    name = f"{source.resolve().parent.name}/{source.stem}"
    if source.suffix.lower() != ".json":
        return name, list(_lines(source))
    try:
        content = parse_json(source.read_bytes(), str(source))
    except ValueError as error:
        raise ValueError(f"{error}; JSON lines end in .jsonl") from None
    if isinstance(content, list):
        return name, [_row(entry, f"{source}: entry {i}") for i, entry in enumerate(content)]
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        found = f"an object of {', '.join(content) or 'nothing'}" if isinstance(content, dict) else repr(content)[:80]
        raise ValueError(
            f'{source}: neither a list of entries nor {{"images": [...]}}, but {found[:200]}; give {FORMS}'
        )
    if isinstance(content.get("annotations"), list):
        return name, _coco_rows(entries, content["annotations"], str(source))
    rows = [_karpathy_row(entry, f"{source}: images[{i}]") for i, entry in enumerate(entries)]
    return str(content.get("dataset") or name), rows


def _lines(source: Path) -> Iterator[_Row]:
    # Read as bytes: universal newlines would count a lone carriage return inside a text as a line.
    for number, line in enumerate(source.read_bytes().split(b"\n"), 1):
        where = f"{source}:{number}"
        if line.strip():
            try:
                entry = parse_json(line, where)
            except ValueError as error:
                raise ValueError(f"{error}; every line is one JSON object") from None
            yield _row(entry, where)


def _row(entry: object, where: str) -> _Row:
    entry = _object(entry, where)
    image, field = _field(entry, IMAGE_FIELDS), _field(entry, CAPTION_FIELDS)
    if field is None:
        also, own = ", ".join(CAPTION_FIELDS[2:]), ", ".join(entry)[:200] or "no field"
        raise ValueError(
            f"{where}: no field 'caption' or 'captions' (also read: {also}), but {own}; add the picture's text or texts"
        )
    texts = entry[field] if isinstance(entry[field], list) else [entry[field]]
    return _Row(where, _text(entry, image or "image", where), _texts(texts, field, where), _split_of(entry, where))


def _coco_rows(images: list, annotations: list, where: str) -> list[_Row]:
    """One row for each picture, captions in the order of the file; pictures without one are rows as well."""
    captions: dict[object, list[str]] = {}
    names = []
    for i, entry in enumerate(images):
        entry = _object(entry, f"{where}: images[{i}]")
        identity = entry.get("id")
        if not isinstance(identity, (int, str)) or identity in captions:
            why = "stands there twice" if isinstance(identity, (int, str)) else "is no number"
            raise ValueError(f"{where}: images[{i}]: field 'id': {identity!r} {why}; give each picture its own")
        captions[identity] = []
        names.append((f"{where}: images[{i}]", identity, _text(entry, "file_name", f"{where}: images[{i}]")))
    for i, entry in enumerate(annotations):
        place = f"{where}: annotations[{i}]"
        entry = _object(entry, place)
        identity = entry.get("image_id")
        if not isinstance(identity, (int, str)) or identity not in captions:
            raise ValueError(
                f"{place}: field 'image_id': {identity!r} is no 'id' of images; take the file as published"
            )
        if "caption" not in entry:
            raise ValueError(f"{place}: no field 'caption', but {', '.join(entry)[:200]}; take captions_*.json")
        captions[identity] += _texts([entry["caption"]], "caption", place)
    return [_Row(place, name, captions[identity], None) for place, identity, name in names]


def _field(entry: dict, names: Sequence[str]) -> str | None:
    """The first of the names that has a value, else the first that is there."""
    return next((n for n in names if entry.get(n)), next((n for n in names if n in entry), None))


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
        own = ", ".join(entry)[:200] or "no field"
        raise ValueError(f"{where}: field {field!r} is {value!r}; give a path as text (the entry has {own})")
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


def _find_images(source: Path, rows: list[_Row], image_root: Path | None, outside: bool) -> dict[str, Path]:
    """File of every picture. ValueError that counts the missing ones, and those that lead out, and names the first."""
    roots = [source.parent, source.parent / "images"] if image_root is None else [image_root]
    found: dict[str, Path | None] = {}
    wrong: dict[bool, list[str]] = {True: [], False: []}  # leads out, is not there
    for row in rows:
        if row.image in found:
            continue
        reason = f"{row.image!r} is not below {' or '.join(map(str, roots))}"
        leads_out = found[row.image] = None
        for root in roots:
            try:
                found[row.image] = found[row.image] or find_below(root, row.image, outside)
            except ValueError as error:
                leads_out, reason = not outside, str(error)
        if found[row.image] is None:
            wrong[bool(leads_out)].append(f"{row.where}: field 'image': {reason}")
    for leads_out, places in wrong.items():
        if places:
            remedy = "set image_root to the pictures' folder"
            remedy += ", or trust the names with --allow-outside" if leads_out else ""
            kind = "such names" if leads_out else "pictures are missing"
            raise ValueError(f"{places[0]} ({len(places)} of {len(found)} {kind}); {remedy}")
    return found


def _from_records(spec: str, views: Sequence[str] | None) -> RetrievalSet:
    from .data.records import RecordSet

    records = RecordSet(spec)
    unknown = [view for view in views or () if view not in records.text_names]
    if unknown or (views is not None and not len(views)):
        raise ValueError(f"views: {list(views)} of {spec}; choose from {list(records.text_names)}")
    wanted = [records.text_names.index(view) for view in views or records.text_names]
    # Records have no names, so a picture is known by its bytes: (its number, the first record that holds it).
    pictures: dict[bytes, tuple[int, int]] = {}
    tokens, owner, seen = [], [], set()

    def known(content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=16).digest()

    for index in range(len(records)):
        payload, rows = records.sample(index)
        number, _ = pictures.setdefault(known(payload), (len(pictures), index))
        for row in rows[wanted]:
            if (text := known(number.to_bytes(8, "little") + row.tobytes())) not in seen:
                seen.add(text)
                tokens.append(row)
                owner.append(number)
    first = [index for _, index in pictures.values()]
    joined = f"{len(records)} records hold {len(first)} different pictures: equal ones are joined"
    return RetrievalSet(
        name=Path(spec).stem,
        path=spec,
        split=None,
        image_names=[records.name(index) for index in first],
        open=lambda number: open_picture(records.sample(first[number])[0], records.name(first[number])),
        image_of_caption=np.asarray(owner, np.int64),
        tokens=np.stack(tokens).astype(np.int64),
        tokenizer=records.tokenizer,
        files=[path for file in records.files for path in (file.path, file.index_path)],
        note=joined if len(first) < len(records) else "",
    )
