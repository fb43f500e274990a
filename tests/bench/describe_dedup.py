"""Duplicates of generated texts: what is found of planted ones, what is joined wrongly, seconds and memory.

python tests/bench/describe_dedup.py [--rows 100000 --captions FILE.jsonl --shapes 20x5 16x4 ..]

A grammar writes captions of 8 to 25 words. 5 % of the rows are made exact duplicates of others (other case,
punctuation and white space), 5 % near ones (a word changed, dropped or added). exact, near: planted rows that are in
the group of the row that they were made from. possible: of the near ones whose similarity to it reaches the threshold
(a changed word in eight does not reach 0.8). false: rows that are less alike than the threshold to the one that they
are said to repeat (0 by construction: candidates are compared). unplanted: rows near to one that they were not made
from; a grammar, like people, sometimes writes almost the same twice. ms: time of the processor. MiB: growth of resident
memory, right for the first search only.

--shapes: bands x hashes that are tried beside those of the code. --captions: JSONL with "captions" lists instead of
the grammar; their short texts reach fewer of the changed words.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import Report, _resident, argument_parser  # which makes the checkout importable

from rwkv_clip.describe import dedup


def words(text: str, by: str = " ") -> list[str]:
    return text.split(by)


WHO = words(
    "man woman boy girl child dog cat horse cyclist skier surfer farmer chef nurse soldier dancer painter teacher"
)
WHAT = words(
    "ball bicycle guitar umbrella kite book phone camera bottle basket ladder suitcase hat scarf bench table chair "
    "bridge boat truck bus train plane tent fence statue fountain tower castle church barn mill windmill door lamp "
    "market stall stage screen piano violin drum flag banner sign poster window gate wall roof garden tree flower bush "
    "river lake pond beach cliff hill mountain field meadow forest path road street square station platform"
)
HOW = words(
    "red blue green yellow white black brown grey small large old new tall short wooden metal striped spotted shiny "
    "dusty broken painted crowded empty quiet bright dark colourful rusty snowy sunny foggy narrow wide steep round wet"
)
DOES = words(
    "holding riding watching carrying painting repairing pushing pulling climbing crossing passing throwing catching "
    "cleaning touching following photographing decorating leaving entering"
)
WHERE = words(
    "in front of,next to,behind,near,beside,under,above,across from,along,around,on top of,at the edge of,far from", ","
)
WHEN = words("at night,at dawn,in the rain,in winter,in summer,on a cloudy day,in the morning,after school", ",")
PLACES = [
    f"{a}{b}" for a in words("ber lon mar ost wes nor sud hal kir tor") for b in words("burg don ford ville ham stad")
]


def write_captions(rows: int, rng: random.Random) -> Iterator[str]:
    """Captions of 8 to 25 words."""

    def thing(words: list[str]) -> str:
        return " ".join([*rng.sample(HOW, rng.choice((0, 1, 1, 2))), rng.choice(words)])

    for _ in range(rows):
        text = f"a {thing(WHO)} {rng.choice(DOES)} a {thing(WHAT)} {rng.choice(WHERE)} the {thing(WHAT)}"
        while len(text.split()) < rng.randint(8, 23):
            more = rng.random()
            if more < 0.5:
                text += f" {rng.choice(WHERE)} a {thing(WHAT)}"
            elif more < 0.75:
                text += f" with a {thing(WHO)}"
            else:
                text += f" {rng.choice(WHEN)}" if more < 0.9 else f" of {rng.choice(PLACES)}"
        yield " ".join(text.split()[:25])


def plant(texts: list[str], rng: random.Random) -> tuple[dict[int, int], dict[int, int]]:
    """Make 5 % of the rows exact, 5 % near duplicates of rows that stay; {row: what it was made from} of both."""
    count = len(texts) // 20  # 5 %
    places = rng.sample(range(len(texts)), 2 * count)
    free = sorted(set(range(len(texts))) - set(places))
    exact, near = {}, {}
    for number, place in enumerate(places):
        source = rng.choice(free)
        words = texts[source].split()
        if number < count:
            exact[place] = source
            texts[place] = rng.choice((" ", "  ")).join(rng.choice((str, str.title, str.upper))(w) for w in words) + "."
            continue
        near[place] = source
        spot, change = rng.randrange(len(words)), number % 3
        new = rng.choice((WHAT, HOW, PLACES))
        words[spot : spot + (change != 2)] = [] if change == 1 else [rng.choice(new)]
        texts[place] = " ".join(words)
    return exact, near


def alike(a: str, b: str) -> float:
    return dedup.similarity(dedup.fold(a), dedup.fold(b))


def group_of(found: dedup.Duplicates, row: int) -> int:
    if found.exact[row] >= 0:
        row = int(found.exact[row])
    return int(found.near[row]) if found.near[row] >= 0 else row


class Peak:
    """Highest resident memory inside the block, in MiB above what it was before."""

    def __enter__(self) -> Peak:
        self.before, self.most, self.ended = _resident("VmRSS"), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.ended.wait(0.02):
            self.most = max(self.most, _resident("VmRSS"))

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()
        self.mib = (max(self.most, self.before) - self.before) / 2**20


def measure(texts: list[str], exact: dict[int, int], near: dict[int, int], threshold: float) -> dict[str, float]:
    """Figures of one search."""
    start = time.process_time()
    with Peak() as peak:
        found = dedup.find_duplicates(iter(texts), threshold)
    seconds = time.process_time() - start
    made = near | exact
    near_pairs = [(row, first) for row, first in enumerate(found.near.tolist()) if first >= 0]
    exact_pairs = [(row, first) for row, first in enumerate(found.exact.tolist()) if first >= 0]
    false = sum(alike(texts[a], texts[b]) < threshold for a, b in near_pairs)
    false += sum(dedup.fold(texts[a]) != dedup.fold(texts[b]) for a, b in exact_pairs)
    possible = {row: source for row, source in near.items() if alike(texts[row], texts[source]) >= threshold}
    shares = {}
    for name, kind in (("exact", exact), ("near", near), ("possible", possible)):
        right = sum(group_of(found, row) == group_of(found, source) for row, source in kind.items())
        shares[f"{name}_percent"] = 100 * right / max(1, len(kind))
    others = sum(made.get(row, row) != made.get(first, first) for row, first in near_pairs)
    return {"seconds": seconds, **shares, "false": false, "unplanted": others, "peak_mib": peak.mib}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--captions", type=Path)
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--shapes", nargs="*", default=[], help="bands x hashes, such as 16x4")
    args = parser.parse_args()
    report = Report("describe_dedup", torch.device("cpu"), commit=args.commit)
    rng = random.Random(0)
    if args.captions:
        lines = args.captions.read_text().splitlines()
        texts = [text for line in lines for text in json.loads(line)["captions"]][: args.rows]
    else:
        texts = list(write_captions(args.rows, rng))
    exact, near = plant(texts, rng)
    case = f"{len(texts):,} rows, {sum(len(text.split()) for text in texts) / len(texts):.1f} words each"
    for shape in [f"{dedup.BANDS}x{dedup.HASHES}", *args.shapes]:
        dedup.BANDS, dedup.HASHES = map(int, shape.split("x"))
        figures = measure(texts, exact, near, args.threshold)
        if not report.rows:
            report.gate("exact duplicates, percent that are missed", 100 - figures["exact_percent"], 1)
            report.gate("near duplicates, percent that are missed", 100 - figures["possible_percent"], 5)
            report.gate("rows that are joined wrongly", figures["false"], 0)
        report.add(case, f"{shape} hashes", **figures)
    report.finish(args.output)


if __name__ == "__main__":
    main()
