"""Several sources of records as one: `a::b`, with a factor for each that says how often an epoch takes its records.

Source i of n_i records and factor f_i gives round(n_i * f_i) samples to every epoch, not one more or less; the orders
of training say when. Its records keep their order, numbered after those of the sources before it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ConfigError
from .recordio import beside, split_path
from .records import Records

BETWEEN = "::"  # open_clip's separator, of sources and of factors
LARGEST = 1_000_000  # factor
FACTORS = "train_data_upsampling_factors"  # the setting, as messages name it
AGREED = (  # facts of records in which sources may not differ: attribute, name, remedy
    ("context", "tokens per text", "build them with the same --context"),
    ("tokenizer", "tokenizer", "build them with the same one"),
    ("vocab_size", "vocabulary", "build them with the same tokenizer"),
)


def split_sources(spec: str) -> list[str]:
    """The sources that `a::b` names, each in one of the ways of `open_records`. A name with :: in it that is there is
    one source. ConfigError for an empty or a repeated one."""
    path = Path(spec)
    if BETWEEN not in spec or os.path.exists(path) or os.path.exists(beside(split_path(path), ".rec")):
        return [spec]
    names = [name.strip() for name in spec.split(BETWEEN)]
    if not all(names):
        raise ConfigError([f"train_data: {spec!r} has an empty source; put one on both sides of every {BETWEEN}"])
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError([f"train_data: the source {twice!r} is there {names.count(twice)} times; give it a factor"])
    return names


def parse_factors(text: str) -> list[Fraction]:
    """`2::0.5` -> the exact factors. ConfigError for what is no number in (0, 1,000,000]."""
    found, problems = [], []
    for part in text.split(BETWEEN):
        try:
            value = float(part)
        except ValueError:
            problems.append(f"{FACTORS}: {part!r} of {text!r} is not a number; write 2::1, one for each source")
            continue
        if value == 0:
            problems.append(f"{FACTORS}: 0 in {text!r} takes nothing of its source; leave the source out")
        elif not 0 < value <= LARGEST:  # also NaN
            problems.append(f"{FACTORS}: {part.strip()} in {text!r} must be more than 0 and at most {LARGEST:,}")
        else:
            found.append(Fraction(Decimal(part.strip())))  # as written: 0.1 of 5 records is exactly a half
    if problems:
        raise ConfigError(problems)
    return found


@dataclass(frozen=True)
class Source:
    """One source of a mixture. name: as the user gave it."""

    name: str
    records: Records
    factor: Fraction

    @cached_property
    def samples(self) -> int:
        """Samples of every epoch: records x factor, rounded to the nearest whole number, a half upwards."""
        return math.floor(len(self.records) * self.factor + Fraction(1, 2))


class Mixture(Records):
    """The records of several sources, one source after the other.

    texts: of each record, only its first so many; None: all, and then every source must have the same number. Picklable
    as its sources are. ConfigError where the sources do not agree in tokenizer, vocabulary, context or number of texts,
    or where a source would give no sample to an epoch.
    """

    def __init__(self, sources: list[Source], texts: int | None = None):
        self.sources = sources
        if problems := [*_find_disagreements(sources, texts), *_find_idle(sources)]:
            raise ConfigError(problems)
        self.several = any(source.records.several for source in sources)
        self._ends = list(accumulate(len(source.records) for source in sources))
        self.files = [file for source in sources for file in source.records.files]
        self.layout = replace(sources[0].records.layout, text_names=_join_names(sources, texts), content=None)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch: the sum of the sources' samples."""
        return sum(source.samples for source in self.sources)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal sha256 over the digests of the sources, in their order, and their samples in an epoch."""
        about = [[source.records.digest, len(source.records), source.samples] for source in self.sources]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def limit_vocab(self, vocab: int) -> int:
        """As `Records.limit_vocab`, of all sources."""
        self.layout = replace(self.layout, vocab_size=vocab)
        return max(source.records.limit_vocab(vocab) for source in self.sources)

    def name(self, i: int) -> str:
        """How messages name record `i`: as its source does."""
        source, row = self._locate(i)
        return source.records.name(row)

    def source_of(self, i: int) -> str:
        """Name of the source that record `i` is from."""
        return self._locate(i)[0].name

    def sample(self, i: int) -> tuple[bytes, np.ndarray]:
        """(encoded image, token ids int64 (texts, context)) of record `i`. RecordError if it holds anything else."""
        return self.draw_sample(i, None)

    def draw_sample(self, i: int, drawn: float | None) -> tuple[bytes, np.ndarray]:
        """As `Records.draw_sample`, of the record's source."""
        source, row = self._locate(i)
        image, tokens = source.records.draw_sample(row, drawn)
        return image, tokens[: len(self.layout.text_names)]

    def _locate(self, i: int) -> tuple[Source, int]:
        if not 0 <= i < self._ends[-1]:
            raise IndexError(f"record {i} of {self._ends[-1]}")
        number = bisect_right(self._ends, i)
        return self.sources[number], i - (self._ends[number - 1] if number else 0)


def open_mixture(
    spec: str, factors: str | None, texts: int | None, open_source: Callable[[str], Records]
) -> Records | Mixture:
    """The records that `a::b` names, mixed by factors `2::1` (None: 1 each); of one source with the factor 1 its own.

    texts: how many of each record are used, see `Mixture`. open_source: name -> records. ConfigError, and what
    open_source raises.
    """
    names = split_sources(spec)
    shares = [Fraction(1)] * len(names) if factors is None else parse_factors(factors)
    if len(shares) > len(names):
        lost = ", ".join(f"{float(share):g}" for share in shares[len(names) :])
        there = f"{_count(len(names), 'source')} ({', '.join(names)})"
        raise ConfigError(
            [f"{FACTORS}: {lost} in {factors!r} is for a source that is not there; train_data has {there}"]
        )
    if len(shares) < len(names):
        lost = ", ".join(map(repr, names[len(shares) :]))
        raise ConfigError([f"{FACTORS}: {factors!r} has no factor for {lost}; give one for each source, 1 to keep it"])
    if len(names) == 1 and shares == [1]:
        return open_source(spec)
    return Mixture([Source(name, open_source(name), share) for name, share in zip(names, shares)], texts)


def describe_shares(mixture: Mixture) -> list[str]:
    """A line for each source: records, factor, samples an epoch, share."""
    return [
        f"source {source.name}: {_count(len(source.records), 'record')} x {float(source.factor):g} = "
        f"{_count(source.samples, 'sample')} an epoch, {source.samples / mixture.epoch_samples:.2%}"
        for source in mixture.sources
    ]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def identify(records: Records) -> dict[str, Any]:
    """What tells records from others, as JSON data: count and digest, and of a mixture those of its sources."""
    facts: dict[str, Any] = {"count": len(records), "digest": records.digest}
    if isinstance(records, Mixture):
        facts["sources"] = [
            {
                "name": source.name,
                **identify(source.records),
                "factor": float(source.factor),
                "samples": source.samples,
            }
            for source in records.sources
        ]
    return facts


def _find_disagreements(sources: list[Source], texts: int | None) -> list[str]:
    """Problems of sources whose samples do not fit into one batch, or whose ids mean other words."""
    problems = []
    for key, what, remedy in AGREED:
        own = {source.name: getattr(source.records, key) for source in sources}
        known = {name: value for name, value in own.items() if value is not None}  # the files of others do not say
        if len(set(known.values())) > 1:
            listed = ", ".join(f"{value} in {name}" for name, value in known.items())
            problems.append(f"train_data: sources differ in {what}: {listed}; {remedy}")
    held = {source.name: source.records.text_names for source in sources}
    counts = {len(names) for names in held.values()}
    if len(counts) > 1 and min(counts) < (texts or max(counts)):
        listed = ", ".join(f"{len(names)} in {name} ({', '.join(names)})" for name, names in held.items())
        asked = f", and --texts asks for {texts}" if texts else ""
        problems.append(
            f"train_data: sources differ in texts per image: {listed}{asked}; use --texts {min(counts)}, the first of "
            f"each record, or build records with as many"
        )
    return problems


def _find_idle(sources: list[Source]) -> list[str]:
    return [
        f"{FACTORS}: {float(source.factor):g} of {_count(len(source.records), 'record')} in {source.name} "
        f"rounds to no sample an epoch; use at least {0.5 / len(source.records):g}, or leave it out"
        for source in sources
        if not source.samples
    ]


def _join_names(sources: list[Source], texts: int | None) -> tuple[str, ...]:
    """Names of the texts, by their place; where sources call a text differently, all its names: raw|caption."""
    columns = zip(*(source.records.text_names[:texts] for source in sources))
    return tuple("|".join(dict.fromkeys(column)) for column in columns)
