"""The search page in a real browser over a large index: what a user waits for, from the click to the pictures.

python tests/bench/browse.py [--rows 1000000 --width 640 --pictures 400] [--shots FOLDER]

An index of that many rows, which share a few hundred drawn pictures, is written to disk and opened as `serve` opens
one; its vectors are those of the captions' words and the pictures' colors (helpers/search_collection.py) with noise, so
that answers make sense, and the encoder of texts takes no time. Each step is timed until all pictures that are then on
the screen are there. Needs Playwright and Chromium. --shots: keep a PNG of each step, to be looked
at. Before any time is printed, an answer is compared with that of the exact search.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Report, argument_parser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.browser import Watch, missing, open_browser
from helpers.search_collection import Encoder, make_collection, running
from rwkv_clip.files import write_whole
from rwkv_clip.metrics import nearest_items
from rwkv_clip.search.collection import Collection
from rwkv_clip.search.pictures import Pictures
from rwkv_clip.search.rows import Fields, IndexedRows, Lines, encode_row, make_row
from rwkv_clip.search.vectors import Vectors, write_vectors

QUERIES = ("a large red circle", "a blue star on grass", "a striped heart", "yellow ring at night", "green cross")
BLOCK = 16_384
NOISE = 0.6
ON_SCREEN = """() => {
    const seen = [...document.querySelectorAll(".tile img")].filter(image => {
        const box = image.getBoundingClientRect();
        return box.bottom > 0 && box.top < innerHeight;
    });
    return document.getElementById("progress").hidden && seen.length > 3
        && seen.every(image => image.complete && image.naturalWidth);
}"""


class Wide(Encoder):
    """The texts of `Encoder`, with numbers of zero to `width`."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def encode_text(self, text: str) -> np.ndarray:
        found = super().encode_text(text)
        return np.concatenate([found, np.zeros(self.width - len(found), np.float32)])


def write_index(folder: Path, rows: int, width: int, pictures: int) -> Collection:
    """rows.jsonl, filters, vectors and pictures."""
    stand_in = make_collection(pictures)
    for number in range(pictures):
        (folder / f"{number}.jpg").write_bytes(stand_in.picture(number))
    described = [stand_in.describe(number) for number in range(pictures)]
    base = np.pad(stand_in.vectors.take(range(pictures)), ((0, 0), (0, width - stand_in.vectors.width)))
    generator = torch.Generator().manual_seed(0)

    def lines() -> Iterator[bytes]:
        for row in range(rows):
            about = described[row % pictures]
            fields = {**about["fields"], "year": 2000 + row % 24, "camera": f"camera {row % 7}"}
            name = f"album-{row // 1000:04d}/picture-{row:07d}.jpg"
            yield encode_row(make_row(name, about["text"], fields, {"file": f"{row % pictures}.jpg"}))

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, rows, BLOCK):
            numbers = np.arange(start, min(start + BLOCK, rows))
            noise = torch.randn(len(numbers), width, generator=generator) * (NOISE / width**0.5)
            yield torch.nn.functional.normalize(torch.from_numpy(base[numbers % pictures]) + noise).numpy()

    write_whole(folder / "rows.jsonl", lines())
    Fields.survey(Lines(folder / "rows.jsonl"), rows).write(folder)
    write_vectors(folder, blocks(), rows, width)
    return open_index(folder, rows, width)


def open_index(folder: Path, rows: int, width: int) -> Collection:
    """As `Collection.open` does, with an encoder that needs no checkpoint."""
    return Collection("large", IndexedRows(folder, Pictures([folder]), rows), Vectors.open(folder), Wide(width))


class User:
    """A page that is looked at."""

    def __init__(self, browser: Any, url: str, shots: Path | None):
        self._context = browser.new_context(viewport={"width": 1280, "height": 800})
        self.page = self._context.new_page()
        self.page.set_default_timeout(60_000)
        self.watch, self._url, self._shots = Watch(self.page, url), url, shots

    def time(self, name: str, act: Callable[[], object], changes: bool = True) -> float:
        """Seconds until the pictures that an act brings are on the screen. changes: the first row is another then."""
        before = self._first()
        start = time.perf_counter()
        act()
        while (changes and self._first() == before) or not self.page.evaluate(ON_SCREEN):
            if time.perf_counter() - start > 60:
                raise SystemExit(f"{name}: no pictures after a minute: {self.page.inner_text('body')[:500]}")
        seconds = time.perf_counter() - start
        if self._shots and not (file := self._shots / f"{name.replace(' ', '-')}.png").exists():
            self.page.wait_for_timeout(500)  # pictures fade in
            self.page.screenshot(path=str(file))
        return seconds

    def open(self) -> None:
        """The first page."""
        self.page.goto(self._url)

    def search(self, text: str) -> None:
        """By a text."""
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")

    def click(self, selector: str) -> None:
        """On the first that fits, without waiting for what it loads."""
        self.page.locator(selector).first.evaluate("element => element.click()")

    def scroll(self, tiles: int) -> None:
        """Down, until so many tiles are there."""
        while self.count() < tiles:
            self.page.evaluate("scrollTo(0, document.body.scrollHeight)")
            self.page.wait_for_timeout(5)

    def count(self) -> int:
        """Tiles."""
        return self.page.locator("a.tile").count()

    def _first(self) -> str:
        return self.page.evaluate("location.href + document.querySelector('a.tile')?.dataset.row")


def measure(report: Report, case: str, user: User, collection: Collection, args) -> None:
    """All steps, as often as there are repeats."""
    times: dict[str, list[float]] = {}

    def note(name: str, act: Callable[[], object], changes: bool = True) -> None:
        times.setdefault(name, []).append(user.time(name, act, changes))

    year = "#filters .menu[data-name='year'] input"
    for turn in range(args.repeats):
        text = QUERIES[turn % len(QUERIES)]
        user.page.goto("about:blank")
        note("open", user.open)
        note("search by a text", lambda text=text: user.search(text))
        if not turn:
            check(report, case, user, collection, text)
        note("scroll to 400", lambda: user.scroll(400), changes=False)
        note("filter", lambda: user.click(year))
        note("click a picture", lambda: user.click("a.tile"))
        note("mix in words", lambda text=text: user.search(f"{text} in the sky"))
        note("go back", lambda: user.page.go_back())
    for name, seconds in times.items():
        report.add(case, name, seconds=seconds)
    if user.watch.problems:
        raise SystemExit(f"the page had problems: {user.watch.problems}")


def check(report: Report, case: str, user: User, collection: Collection, text: str) -> None:
    """The page shows the rows of the exact search, in order."""
    rows = user.page.eval_on_selector_all("a.tile", "tiles => tiles.map(tile => Number(tile.dataset.row))")
    query = torch.from_numpy(collection.model.encode_text(text)[None])
    best: list[tuple[float, int]] = []
    for number, block in enumerate(collection.vectors.blocks()):
        places, scores = nearest_items(query, torch.from_numpy(block), min(40, len(block)))
        best += [(-score, number * 8192 + place) for place, score in zip(places[0].tolist(), scores[0].tolist())]
        best = sorted(best)[:40]
    report.gate(f"{case}: rows that differ from the exact search", rows != [row for _, row in best], 0)


def main() -> None:
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000], help="pictures (1000000)")
    parser.add_argument("--width", type=int, default=640, help="numbers in a vector (640)")
    parser.add_argument("--pictures", type=int, default=400, help="different ones (400)")
    parser.add_argument("--shots", type=Path, help="folder for a PNG of each step")
    args = parser.parse_args()
    report = Report("browse", args.device, commit=args.commit)
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    for rows in args.rows:
        case = f"{rows:,} x {args.width}"
        if why := missing():
            report.missing(case, "the page", why)
            continue
        folder = Path(tempfile.mkdtemp(prefix="browse-"))
        try:
            write_index(folder, rows, args.width, args.pictures)
            opened = [_clock(lambda folder=folder, rows=rows: open_index(folder, rows, args.width)) for _ in range(3)]
            report.add(case, "the server opens the index", seconds=statistics.median(opened))
            collection = open_index(folder, rows, args.width)
            with running(collection) as url, open_browser() as browser:
                measure(report, case, User(browser, url, args.shots), collection, args)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    report.finish(args.output)


def _clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
