"""An index of pictures: encoded once, kept up to date, whole at any instant.

The folder holds about.json, written last, which names the folder of the data (rows-000001: rows.jsonl, the vectors and
filters), pictures/, copies of those that came inside other files, and while a run is under way work/, its parts.

A picture is known by its stamp (name, bytes, time of change) or else by the hash of its bytes; only what neither knows
is encoded. New pictures are encoded in parts of PART, in the order of the source, and a run that was stopped goes on at
the next part: so rows, their order and every bit of the vectors are those of a run that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from rwkv_clip.data.encode import RowError
from rwkv_clip.data.image import ImageError, open_image
from rwkv_clip.files import DamagedError, hash_file, hold, parse_json, read_bytes, write_json, write_whole

from .encoding import name_place
from .parts import PICTURES, WORK, New, Store
from .pictures import KEPT_SIDE, show_upright
from .rows import MAX_JSON, Fields, Lines, encode_row, make_row
from .sources import Item, PictureSource, open_source
from .vectors import write_vectors

if TYPE_CHECKING:
    import torch

    from rwkv_clip.features import FeatureExtractor

SCHEMA = 1
KIND = "index of pictures"
PART = 256  # pictures that are encoded and kept together; a multiple of the blocks that models get
MODEL = ("checkpoint_sha256", "precision")  # what makes vectors comparable


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How pictures are encoded. device: None for the best present. batch_size, workers: images ahead of the model, and
    threads that decode them; no bit depends on either. progress: show a bar."""

    checkpoint: str
    model: str | None = None
    device: str | None = None
    precision: str = "fp32"
    batch_size: int = 64
    workers: int = 4
    progress: bool = True


@dataclass(frozen=True)
class Summary:
    """What a run did: rows of the index, pictures encoded, rows of the index before that are gone or changed, and how
    many pictures were left out for which reason."""

    rows: int
    encoded: int
    gone: int
    skipped: dict[str, int] = field(default_factory=dict)


def index_pictures(
    images: str,
    encoding: Encoding,
    output: str | Path,
    *,
    root: str | None = None,
    image_field: str | None = None,
    outside: bool = False,
) -> Summary:
    """Bring the index in the folder `output` up to date with the pictures that `images` names.

    images, root, image_field, outside: see `sources.open_source`. Another model or precision than the index has encodes
    all of them again. InUse where another process writes it; ValueError for what is no source, or has no picture.
    """
    from rwkv_clip.device import choose_device, keep_freed_memory
    from rwkv_clip.factory import load_for_inference
    from rwkv_clip.features import FeatureExtractor

    output, source = Path(output), open_source(images, root, image_field, outside)
    check_place(output)
    device, precision = choose_device(encoding.device), encoding.precision
    if device.type == "cpu":
        keep_freed_memory()
    loaded = load_for_inference(encoding.checkpoint, model=encoding.model, device=str(device), precision=precision)
    about = {
        "model": loaded.name,
        "checkpoint": name_place(encoding.checkpoint),
        "model_setting": name_place(encoding.model) if encoding.model else None,
        "checkpoint_sha256": loaded.digest,
        "precision": loaded.precision,
        "source": name_place(images),
        "roots": [str(path) for path in source.roots],
        "records": source.records,
        "outside": outside,
    }
    extractor = FeatureExtractor.of(loaded, device, workers=0)
    with hold(output / "index.lock", f"the index {output}", "wait until it is finished"):
        return _Run(output, source, extractor, encoding, about).run()


def check_place(output: Path) -> None:
    """ValueError where the folder holds something else than an index."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is no folder; give another name")
    if output.is_dir() and not read_index(output):
        own = {"index.lock", WORK, PICTURES}
        others = [path.name for path in output.iterdir() if path.name not in own and not path.name.startswith("rows-")]
        others = [name for name in others if not name.endswith(".part")]
        if others:
            raise ValueError(f"output: {output} holds other files ({min(others)}); give a new folder")


def read_index(folder: Path) -> dict[str, Any]:
    """about.json of an index; {} where the folder holds none. DamagedError for one that cannot be read."""
    where = folder / "about.json"
    if not where.is_file():
        return {}
    about = parse_json(read_bytes(where, MAX_JSON), str(where))
    if not isinstance(about, dict) or about.get("kind") != KIND:
        return {}
    data = about.get("data")
    if about.get("schema") != SCHEMA or not isinstance(data, str) or not data.startswith("rows-") or "/" in data:
        raise DamagedError(f"{where}: is not of schema {SCHEMA}; index the pictures again, into a new folder")
    return about


class _Seen(NamedTuple):
    """A picture that was looked at. pixels: what the model gets, None where its vector is known. copy: what is to be
    kept of it. problem: why it is left out."""

    item: Item
    hash: str = ""
    pixels: torch.Tensor | None = None
    copy: bytes = b""
    problem: str = ""


def _pass_on(pixels: Any) -> Any:
    """Stands for the preprocessing that is done already."""
    return pixels


class _Run:
    """One run over a source. about: what about.json will say of the model and the source."""

    def __init__(
        self,
        output: Path,
        source: PictureSource,
        extractor: FeatureExtractor,
        encoding: Encoding,
        about: dict[str, Any],
    ):
        self.output, self.source, self.encoding, self.about = output, source, encoding, about
        self.preprocess = extractor.preprocess
        self.extractor = dataclasses.replace(extractor, preprocess=_pass_on)
        self.before = read_index(output)
        old = output / self.before["data"] if self.before else None
        same = all(self.before.get(name) == about[name] for name in MODEL)
        self.store = Store(output, {name: about[name] for name in MODEL}, old, same)

    def run(self) -> Summary:
        """Look at all pictures, encode the new ones, publish."""
        found: list[tuple[Item, str]] = []
        skipped: Counter[str] = Counter()
        group: dict[str, _Seen] = {}
        encoded = 0
        bar = tqdm(
            total=self.source.count, unit=" pictures", desc="index", disable=None if self.encoding.progress else True
        )
        with bar, contextlib.closing(self._look()) as pictures:
            for seen in pictures:
                bar.update()
                if seen.problem:
                    skipped[seen.problem] += 1
                    continue
                found.append((seen.item, seen.hash))
                # What was new when its thread looked may have come again meanwhile.
                if seen.pixels is not None and not self._knows(seen.hash, seen.item) and seen.hash not in group:
                    group[seen.hash] = seen
                    encoded += 1
                if len(group) == PART:
                    self._encode(group)
            self._encode(group)
        if not found:
            reasons = "; ".join(f"{reason}: {count}" for reason, count in skipped.most_common(3))
            raise ValueError(f"images: {self.about['source']} has no picture that can be read ({reasons or 'empty'})")
        gone = self._publish(found, dict(sorted(skipped.items())))
        return Summary(len(found), encoded, gone, dict(skipped))

    def _look(self) -> Generator[_Seen, None, None]:
        from rwkv_clip.features import read_ahead

        return read_ahead(self._look_at, self.source.items(), self.encoding.workers, self.encoding.batch_size)

    def _look_at(self, item: Item) -> _Seen:
        key = self.store.stamps.get(item.stamp, "") if item.stamp else ""
        if self._knows(key, item):
            return _Seen(item, key)
        try:
            data = item.read()
            key = hashlib.blake2b(data, digest_size=20).hexdigest()
            if self._knows(key, item):
                return _Seen(item, key)
            pixels = self.preprocess(open_image(data, item.id))
            return _Seen(item, key, pixels, b"" if item.place else show_upright(data, KEPT_SIDE, item.id))
        except RowError as error:
            return _Seen(item, problem=str(error))
        except ImageError as error:
            return _Seen(item, problem="unreadable image" if "unreadable" in error.reason else error.reason)

    def _knows(self, key: str, item: Item) -> bool:
        """Whether the vector is known, and a copy of the picture where one is needed."""
        known = self.store.known.get(key)
        return known is not None and bool(item.place or known.kept)

    def _encode(self, group: dict[str, _Seen]) -> None:
        """Encode and keep what waits in `group`, and empty it."""
        if group:
            pixels: list[Any] = [seen.pixels for seen in group.values()]
            vectors = self.extractor.encode_images(pixels.__getitem__, len(pixels)).numpy()
            self.store.add([New(seen.hash, seen.item.stamp, seen.copy) for seen in group.values()], vectors)
            group.clear()

    # ---- the result

    def _publish(self, found: list[tuple[Item, str]], skipped: dict[str, int]) -> int:
        """Write the data, then about.json; returns how many rows of the index before are gone or changed."""
        hashes = [key for _, key in found]
        used = {name for name in map(self._copy_of, found) if name}
        lines = [encode_row(self._row(item, key)) for item, key in found]
        gone = self._count_gone(found)
        data = self.before.get("data")
        if not data or not self._same(data, lines):
            folder = self.output / f"rows-{int((data or 'rows-0').removeprefix('rows-')) + 1:06d}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write_whole(folder / "rows.jsonl", lines)
            Fields.survey(Lines(folder / "rows.jsonl"), len(lines)).write(folder)
            width = self.store.known[hashes[0]].matrix.shape[1]
            write_vectors(folder, self.store.blocks(hashes), len(lines), width)
            data = folder.name
        about = {"schema": SCHEMA, "kind": KIND, "data": data, "rows": len(lines), **self.about, "skipped": skipped}
        if about != self.before:
            write_json(self.output / "about.json", about)
        for path in self.output.glob("rows-*"):
            if path.name != data:
                shutil.rmtree(path, ignore_errors=True)
        self.store.finish(used)
        return gone

    def _row(self, item: Item, key: str) -> dict[str, Any]:
        place = item.place or self.store.known[key].kept
        return {**make_row(item.id, item.text, item.fields, place), "stamp": item.stamp, "hash": key}

    def _copy_of(self, pair: tuple[Item, str]) -> str:
        item, key = pair
        return "" if item.place else self.store.known[key].kept["kept"][0]

    def _same(self, data: str, lines: Iterable[bytes]) -> bool:
        """Whether the index has these very rows, of the same model."""
        digest = hashlib.sha256()
        for line in lines:
            digest.update(line)
        same = all(self.before.get(name) == self.about[name] for name in MODEL)
        return same and hash_file(self.output / data / "rows.jsonl") == digest.hexdigest()

    def _count_gone(self, found: list[tuple[Item, str]]) -> int:
        if not self.before:
            return 0
        now = {(item.id, key) for item, key in found}
        rows = Lines(self.output / self.before["data"] / "rows.jsonl")
        return sum((row["id"], row.get("hash")) not in now for row in rows)
