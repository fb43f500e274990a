"""What is read, and how samples are made from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rwkv_clip.config import ConfigError, ranged
from rwkv_clip.data.direct.reading import SEPARATORS, Reading
from rwkv_clip.data.mixture import parse_factors

from ..policy import build_policy

DatasetType = Literal["auto", "rec", "lmdb", "csv", "jsonl", "parquet", "webdataset", "datasets"]


@dataclass(frozen=True)
class DataSettings:
    """What is read, and how samples are made from it."""

    train_data: str | None = None
    """Data: records by prefix, .rec, folder, glob or comma list; Chinese-CLIP's LMDB; .csv .tsv .jsonl .parquet .tar; a
    saved `datasets` folder. Several sources: a::b."""
    train_data_upsampling_factors: str | None = None
    """With --train-data a::b, 2::0.5: an epoch takes the records of a twice and half of b's; default: each once."""
    dataset_type: DatasetType = "auto"
    """What --train-data is; auto: told by its ending, or by what a folder holds. csv: .tsv as well."""
    csv_separator: str | None = None
    """What separates the columns of a table; default: tabs in a .tsv or where the first line has more of them, else
    commas."""
    csv_img_key: str | None = None
    """The column or field with the picture or its name, of any kind of data but rec and lmdb; default: the usual names
    (image, filepath, jpg, ..)."""
    csv_caption_key: tuple[str, ...] | None = None
    """The column or field with the caption; several for several texts per picture; default: the usual names (caption,
    text, title, txt, ..)."""
    image_folder: str | None = None
    """Where names of pictures in tables begin, and what they may not lead out of; default: the folder of the table."""
    index: str | None = None
    """Folder for the indices of tars and Parquet files; default: beside each of them."""
    val_data: str | None = None
    """Retrieval set for validation during the run: JSONL, JSON or records."""
    val_split: str | None = None
    """Use only the entries of --val-data that belong to this split."""
    val_prefix: str = ""
    """Prepended to every caption in validation."""
    val_batch_size: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Pairs that the validation loss compares with each other; default: --batch-size."""
    text_choice: Literal["one", "first", "all"] = "one"
    """Texts per image and step: one drawn at random (seeded by sample), always the first, or all of them."""
    texts: int | None = field(default=None, metadata={"limits": {"minimum": 1}})
    """Use the first N texts of each record, which must hold at least N; default: all."""
    text_probs: tuple[float, ...] | None = None
    """Probability of each text, in the records' order, with --text-choice one; default: the same for all."""
    workers: int = ranged(4, minimum=0)
    """Decoding processes (torch) or threads (DALI) per rank; 0 decodes in the training process."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """auto: DALI where it is installed, a GPU is present and the settings are nothing beyond it, else torch."""
    crop: Literal["random", "whole"] = "random"
    """What an image shows: a random crop, or all of it, squashed to the model's size."""
    crop_area: tuple[float, float] = (0.7, 1.0)
    """Fraction of the image that a random crop keeps."""
    crop_aspect: tuple[float, float] = (0.8, 1.25)
    """Width / height of a random crop, relative to the image's pixels."""
    flip: float = ranged(0.5, minimum=0, maximum=1)
    """Probability of mirroring an image."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized, in either case antialiased; bicubic needs the torch loader."""
    auto_augment: str | None = None
    """timm's policy applied to each crop: original (AutoAugment), rand-m9-mstd0.5, ..; needs the torch loader."""
    max_bad: int = ranged(100, minimum=0)
    """Up to this many damaged records are always tolerated, each replaced by the next good one."""
    max_bad_fraction: float = ranged(0.001, minimum=0, maximum=1)
    """The run ends when more than --max-bad records and more than this fraction of those seen are damaged."""

    def problems(self) -> list[str]:
        found = []
        if self.train_data_upsampling_factors is not None:
            try:
                parse_factors(self.train_data_upsampling_factors)
            except ConfigError as error:
                found += error.problems
        for name in ("crop_area", "crop_aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "crop_area" and high > 1):
                found.append(f"{name}: ({low}, {high}) is not an increasing range of positive numbers up to 1 (area)")
        if (probs := self.text_probs) is not None:
            if self.text_choice != "one":
                found.append(
                    f"text_probs: {list(probs)} is for --text-choice one, not {self.text_choice}; leave it out"
                )
            if min(probs, default=-1.0) < 0 or abs(sum(probs) - 1) > 1e-6:
                found.append(f"text_probs: {list(probs)} are no probabilities, which are 0 or more and have the sum 1")
            if self.texts not in (None, len(probs)):
                found.append(f"text_probs: {len(probs)} numbers for --texts {self.texts}; give one for each text")
        if self.csv_separator is not None and len(SEPARATORS.get(self.csv_separator, self.csv_separator)) != 1:
            found.append(f"csv_separator: {self.csv_separator!r} is not one character; for example ',' or '\\t'")
        if self.csv_caption_key is not None and len(set(self.csv_caption_key)) != max(1, len(self.csv_caption_key)):
            found.append(
                f"csv_caption_key: {list(self.csv_caption_key)} has no name, or one twice; name each text once"
            )
        if self.loader == "dali" and (unable := self.beyond_dali()):
            found.append(f"{unable} is nothing that the loader dali does; use --loader torch")
        if self.auto_augment is not None:
            try:
                build_policy(self.auto_augment, (224, 224), self.interpolation)
            except ValueError as error:
                found.append(str(error))
        return found

    def reading(self) -> Reading:
        """How --train-data is read."""
        return Reading(
            self.dataset_type,
            self.csv_separator,
            self.csv_img_key,
            self.csv_caption_key or (),
            self.index,
            self.image_folder,
        )

    def beyond_dali(self) -> str:
        """The setting, with its value, that only the torch loader can do; "" without one."""
        if self.auto_augment is not None:
            return f"auto_augment: {self.auto_augment!r}"
        return "" if self.interpolation == "bilinear" else f"interpolation: {self.interpolation}"
