"""What became of the rows of a build: the numbers that are kept beside the records, and the report for the user."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .encode import NO_RAW, NUMBERS, OUTSIDE, Encoded
from .fields import SYNTHETIC_FIELDS, name_view
from .records import VIEWS
from .shards import LINKED

SCALARS = ("rows", "count", "reencoded")
SUMS = ("skipped", "fallbacks", "cut", "unused", "where")
EXAMPLES = 10  # skipped rows that the report names
REMEDIES = {
    OUTSIDE: "name the folder that holds them, --images FOLDER, or trust all names in the input, --allow-outside",
    NO_RAW: "say where it is, --views raw=FIELD",
    LINKED: "name the folder that holds what it leads to, or trust all links, --allow-outside",
}


@dataclass
class Counts:
    """Rows read, by what became of them.

    skipped: reason -> rows. fallbacks: view -> records in which it took the raw text. cut: view -> texts that were
    longer than the context. unused: field -> texts that were not taken. where: condition without an answer -> rows.
    """

    rows: int = 0
    count: int = 0
    reencoded: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    where: Counter[str] = field(default_factory=Counter)

    @property
    def filtered(self) -> int:
        """Rows that the conditions left out."""
        return self.rows - self.count - self.skipped.total()

    def note(self, encoded: Encoded) -> None:
        """Count one row that was not left out."""
        if encoded.problem:
            self.skipped[encoded.problem] += 1
        else:
            self.count += 1
            self.reencoded += encoded.reencoded
            self.fallbacks.update(encoded.fallbacks)
            self.cut.update(encoded.cut)
            self.unused.update(encoded.unused)

    def add(self, other: Counts) -> None:
        """Sum up."""
        for name in SCALARS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in SUMS:
            getattr(self, name).update(getattr(other, name))

    def to_json(self) -> dict:
        """As it stands in the .json of a shard."""
        numbers = {name: getattr(self, name) for name in ("count", "rows", "reencoded")}
        return numbers | {name: dict(sorted(getattr(self, name).items())) for name in SUMS}

    @classmethod
    def from_json(cls, side: dict) -> Counts:
        """The inverse of to_json. KeyError, TypeError, ValueError where something is missing or no number of things."""
        sums = [Counter(dict(side[name])) for name in SUMS]
        scalars = [side[name] for name in SCALARS]
        for number in (*scalars, *(n for counter in sums for n in counter.values())):
            if type(number) is not int or number < 0:
                raise ValueError(f"{number!r} is no number of rows")
        return cls(*scalars, *sums)


@dataclass
class BuildReport:
    """What a build did.

    `views` are found in `fields`; `examples` names the first skipped rows, `first` the first row of anything else that
    was counted; `kept` counts files of an earlier run, `damaged` names those that had to be built again.
    """

    views: tuple[str, ...]
    fields: tuple[str, ...] = ()
    context: int = 0
    shards: list[Path] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    examples: list[str] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    kept: int = 0
    verified: int = 0
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """Number of records."""
        return self.counts.count

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> rows."""
        return dict(self.counts.skipped)

    @property
    def fallbacks(self) -> dict[str, int]:
        """View -> records in which it took the raw text."""
        return dict(self.counts.fallbacks)

    def note(self, encoded: Encoded) -> None:
        """Keep the name of a row that is the first example of something."""
        if encoded.problem and len(self.examples) < EXAMPLES:
            self.examples.append(f"{encoded.name}: {encoded.problem}")
        missing, cut = (f"no {view}" for view in encoded.fallbacks), (f"cut {view}" for view in encoded.cut)
        for what in (*missing, *cut, *encoded.unused):
            self.first.setdefault(what, encoded.name)

    def __str__(self) -> str:
        counts = self.counts
        lines = [f"{counts.count} records with views {', '.join(self.views)} in {len(self.shards)} file(s)"]
        lines += [f"  {shard}" for shard in self.shards[:3]] + ["  ..."] * (len(self.shards) > 3)
        left_out, skipped = counts.filtered, counts.skipped.total()
        lines.append(f"{counts.rows} rows read, {left_out} left out by --where, {skipped} skipped")
        lines += [f"  --where {remark}: {n}" for remark, n in sorted(counts.where.items())]
        lines += [*self.explain_skipped(), *self._describe_texts()]
        if counts.reencoded:
            lines.append(f"{counts.reencoded} pictures encoded anew as JPEG, the others kept byte for byte")
        lines += [f"built again: {damage}" for damage in self.damaged]
        if self.kept:
            lines.append(f"{self.kept} file(s) were complete already and kept")
        if self.verified:
            lines.append(f"{self.verified} records read back and decoded without error")
        return "\n".join([*lines, f"{self.seconds:.1f} s"])

    def explain_skipped(self) -> list[str]:
        """Lines: reasons with numbers and what can be done, then examples."""
        lines = []
        for reason, n in sorted(self.counts.skipped.items()):
            remedy = f" ({REMEDIES[reason]})" if reason in REMEDIES else ""
            lines.append(f"  {reason}: {n}{remedy}")
        return lines + [f"    {example}" for example in self.examples]

    def _describe_texts(self) -> list[str]:
        counts, lines = self.counts, []
        for view, n in sorted(counts.fallbacks.items()):
            lines.append(f"no {view} text, raw taken instead: {n}{self._example(f'no {view}')}")
        for view, n in sorted(counts.cut.items()):
            lines.append(f"{view} texts cut at --context {self.context}: {n}{self._example(f'cut {view}')}")
        for name, n in sorted(counts.unused.items()):
            what = name if name.startswith(NUMBERS) else f"texts in {name}"
            lines.append(f"{what} not used: {n}{self._example(name)}; to use them: {self._suggest(name)}")
        return lines

    def _example(self, what: str) -> str:
        return f" (first: {self.first[what]})" if what in self.first else ""

    def _suggest(self, field: str) -> str:
        """The setting with which the texts of a field would be used, too."""
        if field.endswith("[1:]"):
            name = field.removesuffix("[1:]")
            return f"--views {name}.0 {name}.1 .."
        if field.startswith(NUMBERS):
            return f"--token-field {field.removeprefix(NUMBERS)}, if they are token ids"
        names = ["synthetic" if field in SYNTHETIC_FIELDS else field] if field in (*SYNTHETIC_FIELDS, *VIEWS) else []
        names += map(name_view, range(len(self.views), 2 * len(self.views) + 1))
        name = next(name for name in names if name not in self.views)
        chosen = [f"{view}={place}" for view, place in zip(self.views, self.fields)]
        return f"--views {' '.join([*chosen, f'{name}={field}'])}"


class Pictures:
    """Tells one sequence of pictures from another by what `encoder.Picture` has `seen`."""

    def __init__(self):
        self._sum, self._any = hashlib.sha256(), False

    def add(self, seen: str) -> None:
        """Of the next row."""
        if seen:
            self._sum.update(seen.encode() + b"\n")
            self._any = True

    def digest(self) -> str | None:
        """Of all pictures so far; None while no row has named a file."""
        return self._sum.hexdigest() if self._any else None

    def copy(self) -> Pictures:
        """As it is now."""
        other = Pictures()
        other._sum, other._any = self._sum.copy(), self._any
        return other
