"""Sets for retrieval: pictures with their captions, from caption files or records. Pictures stay on disk until
needed."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image

from ..files import OutsideError, find_below, read_bytes
from ..tokenizer import count_cut, prepare_texts
from .captions import ENDINGS, Captioned, read_captions
from .chinese_clip import ImageFile, find_pair, is_texts_file, read_texts
from .image import MAX_BYTES, open_picture
from .lmdb import find_splits, open_split
from .records import RecordSet, names_lmdb
from .rows import SourceError

EVERY_SPLIT = "all"
FORMS = (
    "JSON lines (.jsonl), a JSON list, Karpathy's or COCO's JSON (.json), Chinese-CLIP's NAME_texts.jsonl or "
    "LMDB folder, or records (.rec) that data2rec.py made"
)


@dataclass(frozen=True)
class RetrievalSet:
    """Pictures and their captions, as text or (from records) as token rows.

    `open(i)` gives picture i as PIL RGB, `read(i)` its encoded bytes, where they are known. `image_of_caption`
    (captions,) int64: the picture of each caption, where `pairs` is given the first of its pictures, or -1. `pairs`
    (pairs, 2) int64: a caption and one of its pictures, in the order of the captions, for sets whose captions have
    several or none. `image_ids`, `text_ids`: the numbers that Chinese-CLIP's files give them.
    """

    name: str  # what a report calls the set: "flickr30k", or the name of its file
    path: str
    split: str | None
    image_names: Sequence[str]
    open: Callable[[int], Image]
    image_of_caption: np.ndarray
    captions: list[str] | None = None
    tokens: np.ndarray | None = None  # int64 (captions, context)
    tokenizer: str | None = None  # name of the tokenizer that made `tokens`, if known
    files: Sequence[Path] = ()  # all files that hold the pictures
    note: str = ""  # what a reader of the results should know about the set
    pairs: np.ndarray | None = None
    image_ids: list[int] | None = None
    text_ids: list[int] | None = None
    read: Callable[[int], bytes] | None = None

    @property
    def right_images(self) -> np.ndarray:
        """What belongs together, as `metrics.retrieval_ranks` takes it."""
        return self.image_of_caption if self.pairs is None else self.pairs

    @property
    def all_pairs(self) -> np.ndarray:
        """Every caption with each of its pictures, in the order of the captions: int64 (pairs, 2)."""
        if self.pairs is not None:
            return self.pairs
        return np.stack([np.arange(len(self.image_of_caption)), self.image_of_caption], 1)

    def images_of(self, index: int) -> list[int]:
        """The pictures of a caption."""
        if self.pairs is None:
            return [int(self.image_of_caption[index])]
        start, end = np.searchsorted(self.pairs[:, 0], (index, index + 1))
        return self.pairs[start:end, 1].tolist()

    def caption_text(self, index: int) -> str:
        """A caption for people to read; a token row has no text and is called by its number."""
        return self.captions[index] if self.captions is not None else f"caption {index}"

    def tokenize(self, tokenizer: Callable, prefix: str = "") -> tuple[torch.Tensor, int]:
        """Token rows int64 (captions, context) of prefix + caption, and how many captions the context cuts short.

        Records do not say which of their captions were cut: all that fill the context are counted. ValueError if their
        tokens do not fit the tokenizer.
        """
        if self.captions is not None:
            texts = prepare_texts(tokenizer, [prefix + caption for caption in self.captions])
            tokens = tokenizer(texts)
            return tokens, count_cut(texts, tokens, tokenizer)
        if prefix:
            raise ValueError(f"prefix: {prefix!r} cannot be put before the tokens of {self.path}; leave it out")
        name, context = getattr(tokenizer, "name", None), getattr(tokenizer, "context", None)
        if name and self.tokenizer and name != self.tokenizer:
            raise ValueError(
                f"{self.path}: tokens made by {self.tokenizer!r}, the model reads {name!r}; build the records again"
            )
        if context and self.tokens.shape[1] > context:
            raise ValueError(
                f"{self.path}: {self.tokens.shape[1]} tokens a text, the model reads {context}; build the records again"
            )
        return torch.from_numpy(self.tokens), int((self.tokens[:, -1] != 0).sum())


def load_retrieval(
    path: str | Path,
    *,
    split: str | None = None,
    image_root: str | Path | None = None,
    texts: Sequence[str] | None = None,
    allow_outside: bool = False,
) -> RetrievalSet:
    """Read a retrieval set.

    path: Chinese-CLIP's NAME_texts.jsonl with NAME_imgs.tsv beside it, or a split folder of its LMDB; a JSON list or
    JSON lines of {"image": path, "caption" | "captions": text or list, "split": optional} (other
    names: IMAGE_FIELDS and CAPTION_FIELDS of `fields`); a Karpathy file {"images": [{"filename", "filepath", "split",
    "sentences": [{"raw"}]}]}; COCO's {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}; or
    .rec shards (prefix, file, glob, comma list). Entries that name the same file are one picture, and so are records
    that hold the same bytes. Pictures lie below `image_root`, else below the file's folder or its `images` folder;
    names that lead out of it (`..`, absolute, links) are refused unless `allow_outside`. split: which entries to take
    ("all": every one); required if the file holds several splits. texts: for .rec, the names of the texts to use
    (default: all; equal ones of a picture count once). ValueError with file, entry and field for whatever is wrong,
    FileNotFoundError if there is no such file.
    """
    source = Path(path)
    if is_texts_file(source) or names_lmdb(path):
        if split not in (None, EVERY_SPLIT) or image_root is not None or texts is not None:
            raise ValueError(f"{path}: Chinese-CLIP's files are of one split; leave split, image_root and texts out")
        return _from_text_file(source) if is_texts_file(source) else _from_lmdb(source)
    if source.suffix.lower() in ENDINGS:
        if texts is not None:
            raise ValueError(f"texts: {list(texts)} given, but {source} is no .rec; leave texts out")
        return _from_captions(source, split, Path(image_root) if image_root is not None else None, allow_outside)
    if source.suffix.lower() not in ("", ".rec") and source.is_file():
        raise ValueError(f"{source}: a {source.suffix} file is no retrieval set; give {FORMS}")
    if split not in (None, EVERY_SPLIT) or image_root is not None:
        raise ValueError(f"{path}: records have no split and no image folder; leave split and image_root out")
    return _from_records(str(path), texts)


# ---- caption files ---------------------------------------------------------------------------------------------------


def _from_captions(source: Path, split: str | None, image_root: Path | None, outside: bool) -> RetrievalSet:
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; give {FORMS}")
    name, entries = read_captions(source)
    entries, split = _choose_split(source, entries, split)
    files = _find_images(source, entries, image_root, outside)
    # One file is one picture, however its name is spelled.
    own = {image: os.path.realpath(file) for image, file in files.items()}
    images: dict[str, tuple[int, str]] = {}
    captions, owners = [], []
    for entry in entries:
        index, _ = images.setdefault(own[entry.image], (len(images), entry.image))
        captions += entry.captions
        owners += [index] * len(entry.captions)
    if not captions:
        raise ValueError(f"{source}: no picture has a caption; give at least one")
    names = [image for _, image in images.values()]
    paths = [files[image] for image in names]
    return RetrievalSet(
        name=str(name or f"{source.resolve().parent.name}/{source.stem}"),
        path=str(source),
        split=split,
        image_names=names,
        open=lambda index: open_picture(paths[index]),
        image_of_caption=np.asarray(owners, np.int64),
        captions=captions,
        files=paths,
        note=_describe_oddities(names, captions, owners),
        read=lambda index: read_bytes(paths[index], MAX_BYTES),
    )


def _choose_split(source: Path, entries: list[Captioned], split: str | None) -> tuple[list[Captioned], str | None]:
    if not entries:
        raise ValueError(f"{source}: no entries; give at least one picture with a caption")
    counts = Counter(entry.split for entry in entries)
    present = ", ".join(f"{name} ({count})" for name, count in counts.items())
    if split == EVERY_SPLIT:
        return entries, split
    if split is None and len(counts) > 1:
        raise ValueError(f"{source}: several splits: {present}; choose one by split, or {EVERY_SPLIT!r}")
    if split is None:
        return entries, next(iter(counts))
    if split not in counts:
        raise ValueError(f"{source}: split {split!r} is not in the file, which holds {present}; choose one of these")
    return [entry for entry in entries if entry.split == split], split


def _find_images(source: Path, entries: list[Captioned], image_root: Path | None, outside: bool) -> dict[str, Path]:
    """File of every picture. ValueError that counts those that lead out, or are missing, and names the first."""
    roots = [source.parent, source.parent / "images"] if image_root is None else [image_root]
    found: dict[str, Path | None] = {}
    wrong: dict[bool, list[str]] = {True: [], False: []}  # by whether the name leads out
    for entry in entries:
        if entry.image in found:
            continue
        found[entry.image], leads_out = None, False
        reason = f"{entry.image!r} is not below {' or '.join(map(str, roots))}"
        for root in roots:
            try:
                found[entry.image] = found[entry.image] or find_below(root, entry.image, outside)
            except ValueError as error:
                leads_out, reason = isinstance(error, OutsideError), str(error)
        if found[entry.image] is None:
            wrong[leads_out].append(f"{entry.where}: field 'image': {reason}")
    if places := wrong[True]:
        remedy = "set image_root to the pictures' folder, or trust the names with --allow-outside"
        raise ValueError(f"{places[0]} ({len(places)} of {len(found)} such names); {remedy}")
    if places := wrong[False]:
        counted = f"{len(places)} of {len(found)} pictures are missing"
        raise ValueError(f"{places[0]} ({counted}); set image_root to the pictures' folder")
    return found


def _describe_oddities(names: list[str], captions: list[str], owners: list[int]) -> str:
    """What is unusual about a set, counted, with an example."""
    notes, silent = [], sorted(set(range(len(names))) - set(owners))
    if silent:
        example = f"the first is {names[silent[0]]}"
        notes.append(f"{len(silent)} of {len(names)} pictures have no caption ({example}): candidates, but no queries")
    counts = Counter(zip(owners, captions))
    if repeated := len(captions) - len(counts):
        place, text = next(pair for pair, count in counts.items() if count > 1)
        notes.append(f"{repeated} captions repeat one of the same picture, e.g. {text[:60]!r} of {names[place]}")
    return "; ".join(notes)


# ---- records ---------------------------------------------------------------------------------------------------------


def _from_records(spec: str, texts: Sequence[str] | None) -> RetrievalSet:
    records = RecordSet(spec)
    unknown = [name for name in texts or () if name not in records.text_names]
    if unknown or (texts is not None and not len(texts)):
        raise ValueError(f"texts: {list(texts)} of {spec}; choose from {list(records.text_names)}")
    columns = [records.text_names.index(name) for name in texts or records.text_names]
    # Records have no names, so a picture is told by its bytes: (its number, the first record that holds it).
    pictures: dict[bytes, tuple[int, int]] = {}
    tokens, owners, seen = [], [], set()
    for index in range(len(records)):
        payload, rows = records.sample(index)
        number, _ = pictures.setdefault(_digest(payload), (len(pictures), index))
        for row in rows[columns]:
            if (text := _digest(number.to_bytes(8, "little") + row.tobytes())) not in seen:
                seen.add(text)
                tokens.append(row)
                owners.append(number)
    first = [index for _, index in pictures.values()]
    joined = f"{len(records)} records hold {len(first)} different pictures: equal ones are joined"
    return RetrievalSet(
        name=Path(spec).stem,
        path=spec,
        split=None,
        image_names=[records.name(index) for index in first],
        open=lambda number: open_picture(records.sample(first[number])[0], records.name(first[number])),
        image_of_caption=np.asarray(owners, np.int64),
        tokens=np.stack(tokens).astype(np.int64),
        tokenizer=records.tokenizer,
        files=[path for file in records.files for path in (file.path, file.index_path)],
        note=joined if len(first) < len(records) else "",
        read=lambda number: records.sample(first[number])[0],
    )


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


# ---- Chinese-CLIP's files --------------------------------------------------------------------------------------------


def _from_text_file(file: Path) -> RetrievalSet:
    images, texts = ImageFile(find_pair(file)[0]), []
    for line in read_texts(file):
        if line.problem:
            raise SourceError(
                f"{file}: line {line.number}: {line.problem}; repair it: an evaluation leaves nothing out"
            )
        texts.append((line.text_id, line.text, line.image_ids))
    name = file.name.removesuffix("_texts.jsonl")
    return _number(images.ids, texts, images.picture, f"{file.resolve().parent.name}/{name}", [images.file, file])


def _from_lmdb(spec: Path) -> RetrievalSet:
    """NOTE(parity): a text that belongs to no image is in no pair; evaluate NAME_texts.jsonl where that matters."""
    folders = find_splits(spec)
    if len(folders) > 1:
        raise ValueError(f"{spec}: names {len(folders)} LMDB folders; an evaluation is of one")
    split, texts = open_split(folders[0]), {}
    if not split.count:
        raise SourceError(f"{folders[0]}: has no pairs, as hidden test sets have none; give another split")
    for i in range(split.count):
        image_id, text_id, text = split.pair(i)
        texts.setdefault((text_id, text), []).append(image_id)
    ids = [image_id for image_id, _ in split.image_ids()]
    found = [(text_id, text, image_ids) for (text_id, text), image_ids in texts.items()]
    files = [folders[0] / half / "data.mdb" for half in ("imgs", "pairs")]
    above = folders[0].resolve().parent
    above = above.parent if above.name == "lmdb" else above  # where the builder puts it, in the folder of the TSV
    return _number(ids, found, split.picture, f"{above.name}/{folders[0].resolve().name}", files)


def _number(
    ids: list[str], texts: list[tuple], read: Callable[[str], bytes], name: str, files: list[Path]
) -> RetrievalSet:
    """A set of the pictures with these ids, in the order of an LMDB's keys, and texts (id, text, ids of its images)."""
    ids = sorted(ids, key=lambda image_id: image_id.encode("utf-8", "surrogatepass"))
    places = {image_id: place for place, image_id in enumerate(ids)}
    right = [list(dict.fromkeys(places[str(i)] for i in image_ids if str(i) in places)) for _, _, image_ids in texts]
    pairs = [(caption, image) for caption, images in enumerate(right) for image in images]
    if not pairs and any(image_ids for _, _, image_ids in texts):
        raise SourceError(f"{files[-1]}: no text belongs to a picture of {files[0]}; are the ids the same?")
    numbered = all(isinstance(text_id, int) for text_id, _, _ in texts) and all(i.lstrip("-").isdecimal() for i in ids)
    notes = []
    if absent := sum(str(i) not in places for _, _, image_ids in texts for i in image_ids):
        notes.append(f"{absent} ids of images are not among the pictures, and cannot be found")
    if alone := sum(not images for images in right):
        notes.append(f"{alone} of {len(texts)} texts belong to no picture: queries that find nothing")
    if repeated := len(texts) - len({text_id for text_id, _, _ in texts}):
        notes.append(f"{repeated} text_ids come again with another text")
    return RetrievalSet(
        name=name,
        path=str(files[-1] if files[-1].suffix == ".jsonl" else files[-1].parent.parent),
        split=None,
        image_names=ids,
        open=lambda index: open_picture(read(ids[index]), f"{files[0]} image {ids[index]}"),
        image_of_caption=np.asarray([images[0] if images else -1 for images in right], np.int64),
        captions=[text for _, text, _ in texts],
        files=files,
        note="; ".join(notes),
        pairs=np.asarray(pairs, np.int64).reshape(-1, 2),
        image_ids=[int(i) for i in ids] if numbered else None,
        text_ids=[text_id for text_id, _, _ in texts] if numbered else None,
        read=lambda index: read(ids[index]),
    )
