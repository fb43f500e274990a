"""How data are to be read: what a user may say about them."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("csv", "jsonl", "parquet", "webdataset", "datasets")  # beside rec and lmdb

SEPARATORS = {"\\t": "\t", "tab": "\t", "comma": ","}  # as they are typed


@dataclass(frozen=True)
class Reading:
    """How data are read. kind: "auto", "rec", "lmdb" or one of KINDS. separator: of a table's columns. image_field and
    text_fields: where picture and texts are. index: folder of the indices. images: the folder that names of pictures
    are looked up in. Of None and () the usual is taken."""

    kind: str = "auto"
    separator: str | None = None
    image_field: str | None = None
    text_fields: tuple[str, ...] = ()
    index: str | None = None
    images: str | None = None
