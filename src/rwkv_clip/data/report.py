"""What became of the rows of a build: the numbers that are kept beside the records, and the report for the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .encode import NO_RAW, NUMBERS, OUTSIDE, Record, Skipped
from .fields import SYNTHETIC_FIELDS, Texts, name_text
from .records import TEXT_NAMES
from .samples import LINKED

SCALARS = ("count", "rows", "reencoded")
COUNTERS = ("skipped", "fallbacks", "cut", "unused", "where")
EXAMPLES = 10  # skipped rows that the report names
REMEDIES = {
    OUTSIDE: "name the folder that holds them, --images FOLDER, or trust all names in the input, --allow-outside",
    NO_RAW: "say where it is, --texts raw=FIELD",
    LINKED: "name the folder that holds what it leads to, or trust all links, --allow-outside",
}


@dataclass
class BuildReport:
    """What a build did with its rows, or one shard of it with some of them.

    count: records. skipped: reason -> rows. fallbacks: text -> records in which it is the raw text instead. cut: text
    -> those longer than the context. unused: field -> texts that were not taken. where: condition without an answer ->
    rows. examples: the first rows that were skipped. first: the first row of whatever else is counted. kept: files of
    an earlier run; damaged: those of them that had to be built again.
    """

    texts: Texts = Texts((), ())
    context: int = 0
    count: int = 0
    rows: int = 0
    reencoded: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    where: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)
    shards: list[Path] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    kept: int = 0
    verified: int = 0
    seconds: float = 0.0

    @property
    def filtered(self) -> int:
        """Rows that the conditions left out."""
        return self.rows - self.count - self.skipped.total()

    def note(self, outcome: Record | Skipped) -> None:
        """Count a row that --where did not leave out, except among `rows`."""
        if isinstance(outcome, Skipped):
            self.skipped[outcome.reason] += 1
            self.examples.append(f"{outcome.name}: {outcome.reason}")
            del self.examples[EXAMPLES:]
            return
        self.count += 1
        self.reencoded += outcome.reencoded
        for name in ("fallbacks", "cut", "unused"):
            getattr(self, name).update(getattr(outcome, name))
            for what in getattr(outcome, name):
                self.first.setdefault(f"{name} {what}", outcome.name)

    def add(self, other: BuildReport) -> None:
        """Sum up the counts, and keep the first examples."""
        for name in SCALARS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in COUNTERS:
            getattr(self, name).update(getattr(other, name))
        self.examples = (self.examples + other.examples)[:EXAMPLES]
        self.first = other.first | self.first

    def to_json(self) -> dict:
        """The counts as they stand in the .json of a shard."""
        numbers = {name: getattr(self, name) for name in SCALARS}
        return numbers | {name: dict(sorted(getattr(self, name).items())) for name in COUNTERS}

    @classmethod
    def from_json(cls, side: dict) -> BuildReport:
        """The inverse of to_json. KeyError, TypeError, ValueError where a count is missing or is none."""
        scalars = {name: side[name] for name in SCALARS}
        counters = {name: Counter(dict(side[name])) for name in COUNTERS}
        for number in (*scalars.values(), *(n for counter in counters.values() for n in counter.values())):
            if type(number) is not int or number < 0:
                raise ValueError(f"{number!r} is no number of rows")
        return cls(**scalars, **counters)

    def __str__(self) -> str:
        lines = [f"{self.count} records with texts {', '.join(self.texts.names)} in {len(self.shards)} file(s)"]
        lines += [f"  {shard}" for shard in self.shards[:3]] + ["  ..."] * (len(self.shards) > 3)
        skipped = self.skipped.total()
        lines.append(f"{self.rows} rows read, {self.filtered} left out by --where, {skipped} skipped")
        lines += [f"  --where {remark}: {n}" for remark, n in sorted(self.where.items())]
        lines += [*self.explain_skipped(), *self._describe_texts()]
        if self.reencoded:
            lines.append(f"{self.reencoded} pictures encoded anew as JPEG, the others kept byte for byte")
        lines += [f"built again: {damage}" for damage in self.damaged]
        if self.kept:
            lines.append(f"{self.kept} file(s) were complete already and kept")
        if self.verified:
            lines.append(f"{self.verified} records read back and decoded without error")
        return "\n".join([*lines, f"{self.seconds:.1f} s"])

    def explain_skipped(self) -> list[str]:
        """Lines: reasons with numbers and what can be done, then examples."""
        lines = []
        for reason, n in sorted(self.skipped.items()):
            remedy = f" ({REMEDIES[reason]})" if reason in REMEDIES else ""
            lines.append(f"  {reason}: {n}{remedy}")
        return lines + [f"    {example}" for example in self.examples]

    def explain_nothing(self, where: Iterable[object]) -> str:
        """Why there is no record at all; `where`: the conditions."""
        reasons = self.explain_skipped() or [f"no row was selected by --where {' '.join(map(str, where))}"]
        if not self.rows:
            reasons = ["the input has no rows; no row was selected"]
        return f"none of {self.rows} rows became a record: {'; '.join(reason.strip() for reason in reasons)}"

    def _describe_texts(self) -> list[str]:
        lines = []
        for name, n in sorted(self.fallbacks.items()):
            lines.append(f"no {name} text, raw taken instead: {n}{self._example('fallbacks', name)}")
        for name, n in sorted(self.cut.items()):
            lines.append(f"{name} texts cut at --context {self.context}: {n}{self._example('cut', name)}")
        for name, n in sorted(self.unused.items()):
            what = name if name.startswith(NUMBERS) else f"texts in {name}"
            lines.append(f"{what} not used: {n}{self._example('unused', name)}; to use them: {self._suggest(name)}")
        return lines

    def _example(self, kind: str, name: str) -> str:
        return f" (first: {self.first[f'{kind} {name}']})" if f"{kind} {name}" in self.first else ""

    def _suggest(self, field: str) -> str:
        """The setting with which the texts of a field would be used, too."""
        if field.endswith("[1:]"):
            name = field.removesuffix("[1:]")
            return f"--texts {name}.0 {name}.1 .."
        if field.startswith(NUMBERS):
            return f"--token-field {field.removeprefix(NUMBERS)}, if they are token ids"
        names, usual = self.texts.names, (*SYNTHETIC_FIELDS, *TEXT_NAMES)
        candidates = ["synthetic" if field in SYNTHETIC_FIELDS else field] if field in usual else []
        candidates += map(name_text, range(len(names), 2 * len(names) + 1))
        free = next(name for name in candidates if name not in names)
        chosen = [f"{name}={place}" for name, place in zip(names, self.texts.fields)]
        return f"--texts {' '.join([*chosen, f'{free}={field}'])}"
