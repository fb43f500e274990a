"""What a report says in numbers, counted over the rows of a job as they come by: memory does not grow with them."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

from ..dedup import fold
from .diversity import Phrases, Survival

TEXTS = {"raw": "clean", "caption": "caption", "generated": "generated"}  # text -> its column
STAGES = ("caption", "tags", "compose")
CONTEXT = 77  # tokens of CLIP's text towers, start and end included
SAMPLES = 50  # random rows, and as many of the worst
GROUPS, EXAMPLES = 12, 3  # of duplicates that are shown, texts of each
MOST_COUNTED = 1 << 16  # different phrases, reasons or groups that are counted at a time
MOST_TEXT, MOST_LIST = 700, 16  # characters of a text, entries of a list that are kept of a row to show
MOST_NAME, MOST_PATH = 200, 4096  # characters of a name, reason or id that is counted; of a picture's name
MOST_TOKENS, MOST_TAGS = 512, 200  # as which more are counted
CLIP_BIN, RATE_BINS = 200, 10  # bins for each 1 of a CLIP score, and of a rate
_MARK = "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]"
_MARKS = re.compile(f"({_MARK}{{4}}){_MARK}+")  # on one letter: they would be drawn over other lines
SHOWN = (
    *("id", "image", "raw", "clean", "caption", "composed", "generated", "engine", "composer", "ocr", "tag_source"),
    *("rejects", "unsupported", "new_numbers", "new_names", "lost_facts", "flags", "tags", "compose_reason"),
    *("compose_status", "duplicate_of", "near_duplicate_of", "drop_reason", "language"),
    *("unsupported_rate", "clip_raw", "clip_caption", "clip_generated", "keep"),
    *("tokens_raw", "tokens_caption", "tokens_generated"),
)


class Top:
    """Counts of what is frequent. When more than MOST_COUNTED different values are met the rarer half is forgotten, and
    counts are lower bounds (`exact` is False)."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.total = 0
        self.exact = True

    def add(self, value: object) -> None:
        self.total += 1
        self.counts[plain(value, MOST_NAME)] += 1
        if len(self.counts) > MOST_COUNTED:
            self.exact = False
            self.counts = Counter(dict(self.most(MOST_COUNTED // 2)))

    def most(self, number: int) -> list[tuple[str, int]]:
        """The most frequent values with their counts; equal ones in the order of the alphabet."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:number]

    def named(self, number: int = 20) -> dict[str, int]:
        """{value: count} of the most frequent ones and, that the sum is right, of all others together."""
        named = dict(self.most(number))
        rest = self.total - sum(named.values())
        return named | ({"(others)": rest} if rest else {})


class Least:
    """The SAMPLES rows with the least keys, whatever the order in which they come."""

    def __init__(self) -> None:
        self.rows: list[tuple[tuple, dict]] = []
        self.bound: tuple | None = None

    def add(self, key: tuple, row: Mapping[str, Any]) -> None:
        if self.bound is not None and key >= self.bound:
            return
        self.rows.append((key, cut_row(row)))
        if len(self.rows) >= 2 * SAMPLES:
            self._shrink()
            self.bound = self.rows[-1][0]

    def _shrink(self) -> None:
        self.rows.sort(key=lambda item: item[0])
        del self.rows[SAMPLES:]

    def list(self) -> list[dict]:
        self._shrink()
        return [row for _, row in self.rows]


class Numbers:
    """`add` each row, then `results`."""

    def __init__(self) -> None:
        self.rows = self.undecided = self.kept = 0
        self.dropped, self.engines, self.rejects, self.openings = Top(), Top(), Top(), Top()
        self.tag_sources, self.languages, self.groups = Top(), Top(), Top()
        self.tokens: dict[str, Counter[int]] = {text: Counter() for text in TEXTS}
        self.longest = dict.fromkeys(TEXTS, 0)
        self.phrases = {text: Phrases() for text in TEXTS}
        self.clip: dict[str, Counter[int]] = {text: Counter() for text in TEXTS}
        self.clip_sums = dict.fromkeys(TEXTS, 0.0)
        self.survival = Survival()
        self.tags: Counter[int] = Counter()
        self.named = {text: [0, 0] for text in TEXTS}  # tags of rows that have the text, those it names
        self.composers: dict[str, _Rates] = {}
        self.failures = {stage: Top() for stage in STAGES}
        self.milliseconds: Counter[int] = Counter()
        self.sums: Counter[str] = Counter()
        self.worst, self.random = Least(), Least()

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row: a dict of its columns, any of which may be missing or None, but for `id`."""
        self.rows += 1
        words = {text: fold(row.get(column) or "") for text, column in TEXTS.items()}
        self._count_choice(row)
        self._count_texts(row, words)
        self._count_tags(row, words)
        self._count_verdict(row)
        self._count_stages(row)
        place = blake2b(str(row.get("id")).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self.random.add((place, str(row.get("id"))), row)
        if (badness := _badness(row)) is not None:
            self.worst.add((*badness, place, str(row.get("id"))), row)

    def _count_choice(self, row: Mapping[str, Any]) -> None:
        if row.get("keep") is None:
            self.undecided += 1
        elif row["keep"]:
            self.kept += 1
        else:
            self.dropped.add(_reason(row.get("drop_reason")))
        for column, kind in (("duplicate_of", "exact"), ("near_duplicate_of", "near")):
            if row.get(column) is not None:
                self.sums[kind] += 1
                self.groups.add(row[column])
                break

    def _count_texts(self, row: Mapping[str, Any], words: dict[str, list[str]]) -> None:
        for text, found in words.items():
            if found:
                self.phrases[text].add(found)
            if (tokens := row.get(f"tokens_{text}")) and row.get(TEXTS[text]):
                self.tokens[text][min(int(tokens), MOST_TOKENS)] += 1
                self.longest[text] = max(self.longest[text], int(tokens))
                self.sums[f"tokens_{text}"] += int(tokens)
            if (score := _number(row.get(f"clip_{text}"))) is not None:
                self.clip[text][math.floor(min(1.0, max(-1.0, score)) * CLIP_BIN)] += 1
                self.clip_sums[text] += score
        raw, generated = (_number(row.get(f"clip_{text}")) for text in ("raw", "generated"))
        if raw is not None and generated is not None:
            self.sums["clip_pairs"] += 1
            self.sums["clip_better"] += generated > raw
        if words["generated"]:
            self.openings.add(" ".join(words["generated"][:4]))
            self.languages.add(row.get("language") or "unknown")
            if words["raw"]:
                self.survival.add(words["raw"], words["generated"])

    def _count_tags(self, row: Mapping[str, Any], words: dict[str, list[str]]) -> None:
        tags = row.get("tags")
        if tags is None:
            return
        self.tags[min(len(tags), MOST_TAGS)] += 1
        self.tag_sources.add(row.get("tag_source") or "unknown")
        if row.get("tag_source") == "text":
            return  # taken from the texts: that they name them says nothing
        wanted = [{_singular(word) for word in fold(str(tag)[:MOST_TEXT])} for tag in tags]
        for text, found in words.items():
            if found:
                have = {_singular(word) for word in found}
                self.named[text][0] += len(wanted)
                self.named[text][1] += sum(bool(tag) and tag <= have for tag in wanted)

    def _count_verdict(self, row: Mapping[str, Any]) -> None:
        if row.get("engine"):
            self.engines.add(row["engine"])
        rejects = {_reason(reject) for reject in row.get("rejects") or ()}
        self.sums["rejected"] += bool(rejects)
        for reject in rejects:
            self.rejects.add(reject)
        if (rate := _number(row.get("unsupported_rate"))) is not None:
            name = plain(row.get("composer") or "unknown", MOST_NAME)
            self.composers.setdefault(name, _Rates()).add(rate)
        if (lost := row.get("lost_facts")) is not None:
            self.sums["facts_rows"] += 1
            self.sums["facts_losing"] += bool(len(lost))
            self.sums["facts_lost"] += len(lost)

    def _count_stages(self, row: Mapping[str, Any]) -> None:
        for stage in STAGES:
            status = row.get(f"{stage}_status")
            if status is not None and status != "ok":
                self.failures[stage].add(f"{status}: {_reason(row.get(f'{stage}_reason'))}")
        for column in ("prompt_tokens", "completion_tokens", "attempts"):
            self.sums[column] += int(row.get(column) or 0)
        if row.get("milliseconds"):
            # To about 5 %: the logarithm in steps.
            self.milliseconds[round(math.log(max(1, int(row["milliseconds"]))) / math.log(1.05))] += 1

    def results(self) -> dict[str, Any]:
        """All numbers, as they are written to report.json, but for the texts of duplicates."""
        clip = {text: self._clip(text) for text in TEXTS if self.clip[text]}
        pairs = self.sums["clip_pairs"]
        share = self.sums["clip_better"] / pairs if pairs else None
        openings = self.openings.most(SAMPLES)
        texts = max(1, self.phrases["generated"].texts)
        return {
            "rows": {
                "in": self.rows,
                "kept": self.kept,
                "undecided": self.undecided,
                "dropped": self.dropped.named(40),
            },
            "tokens": {text: self._tokens(text) for text in TEXTS if self.tokens[text]},
            "words": {text: phrases.results() for text, phrases in self.phrases.items()},
            "survival": self.survival.results(),
            "facts": {name: self.sums[f"facts_{name}"] for name in ("rows", "losing", "lost")},
            "tags": {
                "rows": self.tags.total(),
                "per_image": _sorted(self.tags),
                "sources": self.tag_sources.named(),
                "coverage": {text: {"tags": n, "named": named} for text, (n, named) in self.named.items() if n},
            },
            "composers": {name: rates.results() for name, rates in sorted(self.composers.items())},
            "engines": self.engines.named(),
            "rejected_rows": self.sums["rejected"],
            "rejects": self.rejects.named(40),
            "failures": {
                stage: {"rows": top.total, "reasons": top.named(12)}
                for stage, top in self.failures.items()
                if top.counts
            },
            "clip": {"texts": clip, "pairs": pairs, "generated_above_raw": share} if clip else None,
            "duplicates": {
                "exact": self.sums["exact"],
                "near": self.sums["near"],
                "groups": [{"id": first, "repeats": count} for first, count in self.groups.most(GROUPS)],
                "counts_exact": self.groups.exact,
            },
            "openings": {
                "different": len(self.openings.counts),
                "exact": self.openings.exact,
                "share_of_top": sum(count for _, count in openings) / texts,
                "top": [list(item) for item in openings],
            },
            "languages": self.languages.named(12),
            "used": {column: self.sums[column] for column in ("prompt_tokens", "completion_tokens", "attempts")},
            "milliseconds": {str(p): self._latency(p / 100) for p in (50, 95, 99)} if self.milliseconds else None,
        }

    def _clip(self, text: str) -> dict[str, Any]:
        rows = self.clip[text].total()
        scores = {f"{place / CLIP_BIN:.3f}": count for place, count in sorted(self.clip[text].items())}
        return {"rows": rows, "mean": self.clip_sums[text] / rows, "histogram": scores}

    def _tokens(self, text: str) -> dict[str, Any]:
        counts = self.tokens[text]
        return {
            "rows": counts.total(),
            "mean": self.sums[f"tokens_{text}"] / counts.total(),
            "median": quantile(counts, 0.5),
            "p95": quantile(counts, 0.95),
            "longest": self.longest[text],
            "over": sum(count for length, count in counts.items() if length > CONTEXT),
            "histogram": _sorted(counts),
        }

    def _latency(self, share: float) -> int:
        return round(1.05 ** quantile(self.milliseconds, share))


class _Rates:
    """Unsupported nouns / nouns of the texts of one composer."""

    def __init__(self) -> None:
        self.rows, self.any, self.sum = 0, 0, 0.0
        self.bins = [0] * (RATE_BINS + 1)  # 0, above 0 to 0.1, .. to 1

    def add(self, rate: float) -> None:
        self.rows += 1
        self.any += rate > 0
        self.sum += rate
        self.bins[min(RATE_BINS, max(0, math.ceil(rate * RATE_BINS - 1e-9)))] += 1

    def results(self) -> dict[str, Any]:
        return {"rows": self.rows, "mean": self.sum / self.rows, "any": self.any, "histogram": self.bins}


def find_examples(rows: Callable[[], Iterator[Mapping[str, Any]]], duplicates: dict[str, Any]) -> None:
    """Read the rows once more for `texts`, up to EXAMPLES different ones, of each group of duplicates."""
    groups = {group["id"]: group for group in duplicates["groups"]}
    for group in groups.values():
        group["texts"] = []
    missing = len(groups) * EXAMPLES
    for row in rows() if groups else ():
        for column in ("duplicate_of", "near_duplicate_of", "id"):
            group = groups.get(plain(row[column], MOST_NAME)) if row.get(column) is not None else None
            if group is not None:
                text = plain(row.get("generated"), 240)
                if text not in group["texts"] and len(group["texts"]) < EXAMPLES:
                    group["texts"].append(text)
                    missing -= 1
                break
        if not missing:
            return


def quantile(counts: Mapping[int, int], share: float) -> int:
    """The least value that at least `share` of the counted ones do not exceed; 0 of none."""
    left = share * sum(counts.values()) - 1e-9
    value = 0
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            break
    return value


def plain(text: object, most: int = MOST_TEXT) -> str:
    """A text as it can be shown: cut, without what turns lines around or cannot be written."""
    whole = "" if text is None else str(text)
    part = whole[:most]
    if not (part.isascii() and part.isprintable()):
        part = _MARKS.sub(r"\1", "".join(map(_shown, part)))
    return part if len(whole) <= most else f"{part}.. ({len(whole):,} characters)"


def _shown(character: str) -> str:
    if character in "\t\n\r\u2028\u2029":
        return " "
    kind = unicodedata.category(character)
    joiner = character in "\u200c\u200d"  # which join letters and emoji
    return "\ufffd" if kind in ("Cc", "Cs") or (kind == "Cf" and not joiner) else character


def cut_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that are shown, bounded; the names of row and picture as they are, so that it is found."""
    shown = {column: _cut(row[column]) for column in SHOWN if row.get(column) is not None}
    names = {name: row[name] for name in ("id", "image") if name in shown and len(str(row[name])) <= MOST_PATH}
    return shown | names | ({"row": row["row"]} if isinstance(row.get("row"), int) else {})


def _cut(value: Any) -> Any:
    if isinstance(value, (bool, int, float)):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return plain(value)
    return [plain(entry, 80) for entry in list(value)[:MOST_LIST]]


def _badness(row: Mapping[str, Any]) -> tuple[float, int, float] | None:
    """The worst rows have the least: unsupported nouns, then rejects, then a low score; None for nothing bad."""
    rate, score = _number(row.get("unsupported_rate")) or 0.0, _number(row.get("clip_generated"))
    rejects = len(row.get("rejects") or ()) + (row.get("compose_status") not in (None, "ok"))
    if not rate and not rejects and score is None:
        return None
    return -rate, -rejects, math.inf if score is None else score


def _number(value: Any) -> float | None:
    """None for what is missing or no finite number."""
    return float(value) if value is not None and math.isfinite(value) else None


def _reason(reason: object) -> str:
    """What a reason is about: the words before a colon, which details follow."""
    return plain(str(reason or "no reason given").split(": ")[0], 80)


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _sorted(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(value): counts[value] for value in sorted(counts)}


def count(rows: Iterable[Mapping[str, Any]]) -> Numbers:
    """All numbers of the rows."""
    numbers = Numbers()
    for row in rows:
        numbers.add(row)
    return numbers
