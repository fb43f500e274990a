"""The commands, one row each: the settings that make its flags, and what it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rwkv_clip.config import ranged
from rwkv_clip.data.image import MAX_BYTES
from rwkv_clip.files import new_folder, read_bytes

from .clip_retrieval import write_clip_retrieval
from .collection import Collection
from .encoding import Model
from .indexing import Encoding, index_pictures
from .settings import CollectionSettings, SourceSettings, parse_conditions
from .vectors import mix


@dataclass(frozen=True, kw_only=True)
class IndexSettings(SourceSettings):
    """Encode pictures into an index, or bring one up to date: only what is new or changed is encoded."""

    def problems(self) -> list[str]:
        """No pictures, and those of the table."""
        return super().problems() if self.images else ["images: not set; name a folder of pictures"]


@dataclass(frozen=True, kw_only=True)
class ServeSettings(CollectionSettings):
    """A page to search pictures with, and the same as JSON. Needs the extra `search`."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, without a password."""
    port: int = ranged(8000, minimum=0, maximum=65535)
    """Port to listen on; 0: a free one."""
    allow_host: tuple[str, ...] = ()
    """Names of this server, beside localhost, that a proxy before it lets through."""
    allow_origin: tuple[str, ...] = ()
    """Origins (https://example.org) whose pages may call the API."""


@dataclass(frozen=True, kw_only=True)
class QuerySettings(CollectionSettings):
    """Search once and print what is found."""

    text: str | None = None
    """A text to search pictures for."""
    picture: str | None = None
    """A picture file to search pictures like it for; with `text` both, see `weight`."""
    weight: float = ranged(0.5, minimum=0, maximum=1)
    """Of the picture, where a text is given as well."""
    k: int = ranged(10, minimum=1)
    """Results."""
    where: tuple[str, ...] = ()
    """FIELD=VALUE: only rows that have this value; several of a field mean any of them."""
    json: bool = False
    """Print lines of JSON."""

    def problems(self) -> list[str]:
        """Nothing to search for, and problems of the table."""
        nothing = self.text is None and self.picture is None
        return (["text: not set; give --text or --picture"] if nothing else []) + super().problems()


@dataclass(frozen=True, kw_only=True)
class ExportSettings(CollectionSettings):
    """Hand vectors and rows to an engine that serves more of them than one machine."""

    to: Literal["clip-retrieval", "qdrant", "lancedb"]
    """clip-retrieval: its files, also for autofaiss. qdrant, lancedb: their extras are needed."""
    target: str
    """A new folder; for qdrant also the address of a server, http://localhost:6333."""


def open_collection(settings: CollectionSettings) -> Collection:
    """What `settings` name, brought up to date first where they name pictures."""
    if settings.images:
        bring_up_to_date(settings)
        collection = Collection.open(settings.index_folder(), device=settings.device)
    else:
        assert settings.features is not None, "problems() sees to it"
        collection = Collection.open(
            settings.features,
            images=settings.image_root,
            checkpoint=settings.checkpoint,
            model=settings.model,
            device=settings.device,
        )
    collection.attach(settings.engine, settings.collection)
    return collection


def bring_up_to_date(settings: SourceSettings) -> None:
    """Index the pictures that `settings` name, and print what was done."""
    assert settings.images is not None and settings.checkpoint is not None, "problems() sees to it"
    encoding = Encoding(
        checkpoint=settings.checkpoint,
        model=settings.model,
        device=settings.device,
        precision=settings.precision,
        batch_size=settings.batch_size,
        workers=settings.workers,
    )
    folder = settings.index_folder()
    summary = index_pictures(
        settings.images,
        encoding,
        folder,
        root=settings.image_root,
        image_field=settings.image_field,
        outside=settings.allow_outside,
    )
    left = "".join(f"; {count} left out: {reason}" for reason, count in sorted(summary.skipped.items()))
    print(f"index: {folder}: {summary.rows} pictures, {summary.encoded} encoded, {summary.gone} gone{left}")


def serve(settings: ServeSettings) -> int | None:
    """Open the collection and serve it."""
    from .server import serve as run_server

    collection = open_collection(settings)
    if collection.model is not None:
        collection.model.load()  # says now what does not fit, and the first user does not wait
    return run_server(
        collection,
        settings.host,
        settings.port,
        allow_host=settings.allow_host,
        allow_origin=settings.allow_origin,
    )


def query(settings: QuerySettings) -> None:
    """Search once and print."""
    wanted = parse_conditions(settings.where)
    collection = open_collection(settings)
    if collection.model is None:
        raise ValueError(f"checkpoint: {settings.features} does not say what made it; name the model's checkpoint")
    vector = encode_query(collection.model, settings)
    allowed = collection.select(wanted) if wanted else None
    rows, scores = collection.vectors.search(vector[None], settings.k, allowed)
    for rank, (row, score) in enumerate(zip(rows[0].tolist(), scores[0].tolist()), 1):
        found = collection.describe(row)
        if settings.json:
            print(json.dumps({"rank": rank, "row": row, "score": score, **found}))
        else:
            line = f"{rank:4d}  {score:.4f}  {found['id']}  {' '.join(found['text'].split())[:100]}"
            print("".join(c if c.isprintable() else "?" for c in line))


def encode_query(model: Model, settings: QuerySettings) -> Any:
    """The unit vector of the text, the picture, or the weighted sum of both, float32 (C,)."""
    text = None if settings.text is None else model.encode_text(settings.text)
    if settings.picture is None:
        return text
    picture = model.encode_picture(read_bytes(Path(settings.picture), MAX_BYTES))
    if text is None:
        return picture
    mixed = mix(text, picture, settings.weight)
    return text if mixed is None else mixed  # opposite ones


def export(settings: ExportSettings) -> None:
    """Write the collection for another engine."""
    collection = open_collection(settings)
    if settings.to == "qdrant":
        from .qdrant import write_qdrant

        write_qdrant(collection, settings.target, settings.collection)
    elif settings.to == "lancedb":
        from .lancedb import write_lancedb

        write_lancedb(collection, settings.target, settings.collection)
    else:
        folder = new_folder(Path(settings.target))
        write_clip_retrieval(collection, folder)
        print(f"clip-retrieval: {folder}: {len(collection)} rows")
        return
    print(f"{settings.to}: {settings.target}: {len(collection)} rows in {settings.collection}")


@dataclass(frozen=True)
class Command:
    """settings: its table. run: does it, and returns the exit code or None for 0."""

    settings: type
    run: Callable[[Any], int | None]


COMMANDS: dict[str, Command] = {
    "index": Command(IndexSettings, bring_up_to_date),
    "serve": Command(ServeSettings, serve),
    "query": Command(QuerySettings, query),
    "export": Command(ExportSettings, export),
}
