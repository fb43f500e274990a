"""The report of a job: numbers that add up, a page that loads and runs nothing, whatever the rows hold."""

import io
import itertools
import json
import random
import tracemalloc
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from rwkv_clip.describe.dedup import fold
from rwkv_clip.describe.report import diversity, numbers, write_report
from rwkv_clip.describe.report.costs import count_stages, price_of, scale_up
from rwkv_clip.describe.report.diversity import Distinct, Phrases, Survival
from rwkv_clip.describe.report.numbers import Numbers, Top, count, plain, quantile
from rwkv_clip.describe.report.plots import Axes, short, ticks

STAGES = {
    "rows": {"rows": 100, "seconds": 2},
    "compose": {"rows": 80, "seconds": 40, "failed": 3, "prompt_tokens": 32_000, "completion_tokens": 4_000},
}
PRICES = {"prompt": 0.5, "completion": 2, "currency": "USD"}
COLUMNS = [
    "caption",
    "tags",
    "composed",
    "composer",
    "generated",
    "engine",
    "rejects",
    "unsupported",
    "clip_raw",
    "keep",
]


def make_rows(number: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    text = lambda: " ".join(f"w{rng.randrange(400)}" for _ in range(rng.randint(1, 20)))  # noqa: E731
    rows = []
    for place in range(number):
        keep = rng.random() < 0.8
        rate = rng.choice([None, 0.0, 0.0, 0.25, 1.0])
        rows.append(
            {
                **{"id": f"row{place}", "row": place, "image": f"{place}.png", "raw": text(), "clean": text()},
                **{"caption": text(), "tags": rng.sample(["w1", "w2", "w3", "w4 w5"], rng.randint(0, 4))},
                **{"tag_source": rng.choice(["ram", "text"]), "composed": text(), "composer": rng.choice(["a", "b"])},
                **{"generated": text(), "engine": rng.choice(["a", "b", "rules"]), "language": "en"},
                **{"rejects": rng.choice([[], [], ["too long"], ["number: 3", "number: 4", "name: Oslo"]])},
                **{"unsupported_rate": rate, "unsupported": ["w7"] if rate else [], "lost_facts": ["3"] * (place % 3)},
                **{"tokens_raw": rng.randint(3, 90), "tokens_caption": 12, "tokens_generated": rng.randint(3, 80)},
                **{"clip_raw": rng.random(), "clip_caption": None, "clip_generated": rng.choice([None, rng.random()])},
                **{"keep": keep, "drop_reason": None if keep else rng.choice(["duplicate", "low score: 0.1"])},
                **{"compose_status": rng.choice(["ok", "ok", "failed"]), "compose_reason": "http 500: <b>"},
                **{"prompt_tokens": 300, "completion_tokens": 40, "attempts": 1, "milliseconds": rng.randint(50, 900)},
                **{"duplicate_of": "row0" if place % 10 == 9 else None, "near_duplicate_of": None},
            }
        )
    return rows


def picture(width: int = 300, height: int = 200) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 60)).save(content, "PNG")
    return content.getvalue()


class Page(HTMLParser):
    """All elements of a page and its text; complains about what is not closed."""

    VOID = frozenset(("meta", "img", "br"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read_page(path) -> Page:
    """Checks that nothing in the page runs or is loaded."""
    content = path.read_bytes().decode()
    page = Page(content)
    ids = {about.get("id") for _, about in page.elements}
    for tag, about in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "audio", "video", "source")
        assert not [name for name in about if name.startswith("on") or name in ("srcset", "action", "background")]
        assert about.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert about.get("href", "#rows").startswith("#") and about.get("href", "#rows")[1:] in ids
        assert "url(" not in about.get("style", "") and about.get("http-equiv") is None
    style = content[content.index("<style>") : content.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style
    return page


def report(rows, folder, about=None, pictures=lambda row: None):
    path = write_report(lambda: iter(rows), about or {}, pictures, folder)
    assert path == folder / "report.html" and sorted(p.name for p in folder.iterdir()) == ["report.html", "report.json"]
    results = json.loads((folder / "report.json").read_text())
    check_sums(results, len(rows))
    return results, read_page(path)


def check_sums(results: dict, rows: int) -> None:
    counted = results["rows"]
    assert counted["in"] == rows == counted["kept"] + counted["undecided"] + sum(counted["dropped"].values())
    for lengths in results["tokens"].values():
        assert lengths["rows"] == sum(lengths["histogram"].values())
    for rates in results["composers"].values():
        assert rates["rows"] == sum(rates["histogram"]) == rates["histogram"][0] + rates["any"]
    assert results["tags"]["rows"] == sum(results["tags"]["per_image"].values())
    for scores in (results["clip"] or {"texts": {}})["texts"].values():
        assert scores["rows"] == sum(scores["histogram"].values())
    for failed in results["failures"].values():
        assert failed["rows"] == sum(failed["reasons"].values())


def test_numbers_are_those_of_a_slow_count(tmp_path):
    rows = make_rows(500)
    results, _ = report(rows, tmp_path)
    assert results["rows"]["kept"] == sum(row["keep"] for row in rows)
    assert results["rows"]["dropped"] == {
        reason: sum(str(row["drop_reason"]).startswith(reason) for row in rows) for reason in results["rows"]["dropped"]
    }
    for text, column in numbers.TEXTS.items():
        words = [fold(row[column]) for row in rows]
        found = results["words"][text]
        assert found["texts"] == 500 and found["words"] == sum(map(len, words)) and found["exact"]
        assert found["vocabulary"] == len(set(itertools.chain(*words))) == found["growth"][-1][1]
        for size in (1, 2, 3):
            runs = [tuple(row[k : k + size]) for row in words for k in range(len(row) - size + 1)]
            assert found[f"distinct_{size}"] == pytest.approx(len(set(runs)) / len(runs))
        lengths = [row[f"tokens_{text}"] for row in rows]
        assert results["tokens"][text]["over"] == sum(length > 77 for length in lengths)
        assert results["tokens"][text]["mean"] == pytest.approx(np.mean(lengths))
        assert results["tokens"][text]["median"] == sorted(lengths)[249]
    for name, rates in results["composers"].items():
        own = [
            row["unsupported_rate"] for row in rows if row["composer"] == name and row["unsupported_rate"] is not None
        ]
        assert rates["rows"] == len(own) and rates["mean"] == pytest.approx(np.mean(own))
    pairs = [(row["clip_raw"], row["clip_generated"]) for row in rows if row["clip_generated"] is not None]
    assert results["clip"]["generated_above_raw"] == pytest.approx(np.mean([b > a for a, b in pairs]))
    assert set(results["clip"]["texts"]) == {"raw", "generated"}
    assert results["rejects"]["number"] == results["rejects"]["name"] == sum(len(row["rejects"]) == 3 for row in rows)
    assert results["rejected_rows"] == sum(bool(row["rejects"]) for row in rows)
    assert results["engines"] == {name: sum(row["engine"] == name for row in rows) for name in results["engines"]}
    named = [
        tag
        for row in rows
        if row["tag_source"] == "ram"
        for tag in row["tags"]
        if set(fold(tag)) <= set(fold(row["caption"]))
    ]
    assert results["tags"]["coverage"]["caption"]["named"] == len(named)
    assert results["facts"] == {"rows": 500, "losing": 333, "lost": sum(place % 3 for place in range(500))}
    assert results["duplicates"]["exact"] == 50 and results["duplicates"]["groups"][0]["repeats"] == 50
    assert results["duplicates"]["groups"][0]["texts"][0] == rows[0]["generated"]
    assert results["failures"]["compose"]["reasons"] == {
        "failed: http 500": sum(row["compose_status"] == "failed" for row in rows)
    }


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"id": "a"}],
        [{"id": "a", "raw": "x", "clean": "x", "generated": "x", "engine": "raw"}],
        [{"id": "a", **dict.fromkeys(numbers.SHOWN[1:])}],
        [{"id": "a", "tags": [], "rejects": [], "unsupported": [], "lost_facts": []}],
        [{"id": "a", "clip_raw": 0.2, "tokens_raw": 3, "clean": "one"}],
        [{"id": "a", "clip_raw": float("nan"), "clip_generated": float("inf"), "unsupported_rate": float("nan")}],
        [{"id": "a", "clip_raw": -1.0}, {"id": "b", "clip_raw": 1.0}, {"id": "c", "clip_raw": 1e9}],
        [{"id": "a", "tags": ["x"] * 1000, "tokens_generated": 10**9, "generated": "x"}],
        make_rows(1),
    ],
    ids=str,
)
def test_few_rows_and_columns(rows, tmp_path):
    results, page = report(rows, tmp_path)
    text = " ".join(page.text)
    assert "Rows in, rows out" in text and "nan" not in text.lower().replace("fernan", "")
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize("missing", COLUMNS)
def test_any_column_may_be_missing(missing, tmp_path):
    rows = [{name: value for name, value in row.items() if not name.startswith(missing)} for row in make_rows(40)]
    report([{"id": str(place), **row} for place, row in enumerate(rows)], tmp_path, {"stages": STAGES})


def test_without_scores_the_page_says_so(tmp_path):
    _, page = report([{"id": "a", "generated": "a dog"}], tmp_path)
    assert "CLIP scores were not measured" in " ".join(page.text)


HOSTILE = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "<!-- </body></html> -->",
    "javascript:alert(1) http://example.org/x.png",
    "\u202egnp.exe\u2066 \u200f hidden",
    "a\x00b\x1b[31m\x07",
    "half \ud800 a character",
    "مرحبا بالعالم שלום",
    "e" + "\u0301" * 500,
    "{title} %s {{x}} ${y}",
    "<" * 3000,
    "word " * 200_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_hostile_texts_are_shown_as_text_and_cut(text, tmp_path):
    row = {column: text for column in numbers.SHOWN if column not in ("keep", "unsupported_rate")}
    lists = ("rejects", "unsupported", "new_numbers", "new_names", "lost_facts", "flags", "tags")
    row |= {column: [text] for column in lists}
    row |= {f"tokens_{name}": 5 for name in numbers.TEXTS} | {f"clip_{name}": 0.1 for name in numbers.TEXTS}
    row |= {"unsupported_rate": 1.0, "keep": False, "caption_status": text, "caption_reason": text}
    other = row | {"id": "b", "keep": True}
    stages = {text[:100]: {"rows": 1, "seconds": 1}}
    about = {"title": text, "settings": {text[:100]: text}, "versions": {text[:100]: text}, "stages": stages}
    _, page = report([row, other], tmp_path, about | {"prices": {"prompt": 1, "currency": text}})
    shown = "".join(page.text)
    assert plain(text, 120)[:100] in shown  # the parser has undone the escapes
    assert "\u0301" * 5 not in shown
    assert not set(shown) & set("\u202e\u2066\u200f\x00\x1b\x07")
    assert (tmp_path / "report.html").stat().st_size < 150_000


def test_pictures_are_small_jpegs_and_missing_ones_say_why(tmp_path):
    def find(row):
        if row["image"] == "lost.png":
            raise FileNotFoundError(2, "No such file", "lost.png")
        return {"wide.png": picture(900, 300), "small.png": picture(20, 10), "bad.png": b"no picture"}.get(row["image"])

    names = ["wide.png", "small.png", "bad.png", "gone.png", "lost.png", None]
    _, page = report([{"id": str(n), "image": name} for n, name in enumerate(names)], tmp_path, None, find)
    sizes = sorted((about["width"], about["height"]) for tag, about in page.elements if tag == "img")
    assert sizes == [("20", "10"), ("224", "75")]
    text = "".join(page.text)
    assert "gone.png: not found" in text and "the row names no picture" in text and "No such file" in text
    assert "bad.png: " in text and text.count("wide.png") == 0


def test_the_name_of_a_picture_arrives_unchanged(tmp_path):
    asked, name = [], "a\u202e\t" + "x" * 3000
    report([{"id": "a", "image": name}], tmp_path, None, lambda row: asked.append(row["image"]))
    assert asked == [name]


@pytest.mark.parametrize("order", [1, -1])
def test_worst_and_random_rows_do_not_depend_on_the_order(order, tmp_path):
    rows = make_rows(400)[::order]
    results, _ = report(rows, tmp_path)

    def badness(row: dict) -> tuple:
        score = row["clip_generated"]
        wrong = len(row["rejects"]) + (row["compose_status"] == "failed")
        return -(row["unsupported_rate"] or 0), -wrong, 9 if score is None else score

    by_id = {row["id"]: badness(row) for row in rows}
    assert [by_id[found] for found in results["worst"]] == sorted(by_id.values())[:50]
    assert len(results["random"]) == len(set(results["random"])) == numbers.SAMPLES
    assert results["random"] == [row["id"] for row in count(make_rows(400)).random.list()]


def test_rows_with_nothing_bad_are_not_the_worst(tmp_path):
    fine = {"unsupported_rate": 0.0, "rejects": [], "compose_status": "ok"}
    results, _ = report([{"id": "a", **fine}, {"id": "b", **fine, "rejects": ["x"]}], tmp_path)
    assert results["worst"] == ["b"] and sorted(results["random"]) == ["a", "b"]


def test_unsupported_words_are_marked_in_the_text_that_was_not_taken(tmp_path):
    row = {"id": "a", "composed": "Two giraffes eat.", "generated": "Two cows.", "unsupported": ["giraffe"]}
    _, page = report([row | {"composer": "m", "rejects": ["unsupported"]}], tmp_path)
    assert "<mark>giraffes</mark>" in (tmp_path / "report.html").read_text() and "not taken:" in "".join(page.text)


def test_what_is_around_a_marked_word_is_text_too(tmp_path):
    row = {
        "id": "a",
        "generated": "<b>one</b> cow <i>two</i> cow <u>",
        "unsupported": ["cow", "<", ""],
        "composer": "m",
    }
    _, page = report([row | {"composed": row["generated"], "rejects": ["x"]}], tmp_path)
    assert row["generated"] in "".join(page.text) and ("u", {}) not in page.elements


def test_time_tokens_and_money(tmp_path):
    results, page = report(make_rows(10), tmp_path, {"stages": STAGES, "prices": PRICES})
    assert results["cost"] == {
        **{"prompt_tokens": 32_000, "completion_tokens": 4_000, "seconds": 42.0},
        **{"money": pytest.approx(0.016 + 0.008), "currency": "USD"},
    }
    line = results["scale"][1]
    assert line["rows"] == 1_000_000 and line["hours"] == pytest.approx((0.02 + 0.5) * 1e6 / 3600)
    assert line["prompt_tokens"] == 400_000_000 and line["money"] == pytest.approx(200 + 100)
    assert "0.02 USD" in "".join(page.text).replace("\xa0", " ")


def test_no_money_without_prices_and_tokens_of_rows_without_stages(tmp_path):
    results, _ = report(make_rows(10), tmp_path)
    assert results["cost"]["money"] is None and results["cost"]["prompt_tokens"] == 3000 and results["scale"] == []
    assert price_of({"prompt_tokens": 5, "completion_tokens": 5}, None) is None
    assert scale_up(count_stages({"a": {"rows": 5, "seconds": 0}}), None) == []


def test_the_same_rows_give_the_same_bytes(tmp_path):
    files = []
    for name in "ab":
        (tmp_path / name).mkdir()
        report(make_rows(120), tmp_path / name, {"stages": STAGES}, lambda row: picture())
        files.append([(tmp_path / name / file).read_bytes() for file in ("report.html", "report.json")])
    assert files[0] == files[1]


def test_memory_does_not_grow_with_the_rows(monkeypatch, tmp_path):
    """With the bounds lowered as 10,000 rows are to 10 million."""
    monkeypatch.setattr(numbers, "MOST_COUNTED", 256)
    monkeypatch.setattr(diversity, "MOST_KEPT", 1024)
    monkeypatch.setattr(diversity, "MOST_WORDS", 256)
    monkeypatch.setattr(diversity, "BATCH", 1024)

    def rows(number):
        for place in range(number):
            text = " ".join(f"{place}x{word}" for word in range(8))
            repeats = f"id {place - 1}" if place % 3 == 0 else None
            yield {"id": f"id {place}", "clean": text, "generated": text, "duplicate_of": repeats, "clip_raw": 0.1}

    def peak(number):
        tracemalloc.start()
        write_report(lambda: rows(number), {}, lambda row: None, tmp_path)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)
    assert peak(10_000) < 1.3 * peak(2_000)


@pytest.mark.parametrize("number", [0, 1, 1000, 50_000])
def test_different_values_are_counted(number):
    distinct = Distinct(4096)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**64, number, np.uint64, endpoint=False)
    for part in (values[: number // 3], values, values[number // 2 :]):
        distinct.add(part)
    assert distinct.count() == (number if number <= 4096 else pytest.approx(number, rel=0.08))
    assert len(distinct.kept) <= 4096


@pytest.mark.parametrize("batch", [1, 5, 1 << 16])
def test_runs_of_words_do_not_cross_texts(monkeypatch, batch):
    monkeypatch.setattr(diversity, "BATCH", batch)
    phrases = Phrases()
    for words in (["a", "b"], ["c"], [], ["a", "b", "c"], ["b", "a"]):
        phrases.add(words)
    results = phrases.results()
    assert results["distinct_1"] == 3 / 8 and results["distinct_2"] == 3 / 4 and results["distinct_3"] == 1
    assert results["growth"][0] == [1, 2] and results["growth"][-1] == [5, 3]


def test_rare_words_that_survive():
    survival = Survival()
    for place in range(10):
        survival.add(["common", f"rare{place}"], ["common"] if place % 2 else ["common", f"rare{place}"])
    results = survival.results()
    assert results["rare_words"] == 10 and results["rare_share_kept"] == 0.5 and results["share_kept"] == 0.75


def test_a_sample_of_words_gives_the_same_shares(monkeypatch):
    monkeypatch.setattr(diversity, "MOST_WORDS", 512)
    survival = Survival()
    for place in range(20_000):
        survival.add([f"w{place}"], [f"w{place}"] if place % 4 == 0 else [])
    results = survival.results()
    assert len(survival.words) <= 512 and results["sampled"] > 1
    assert results["rare_share_kept"] == pytest.approx(0.25, abs=0.06)
    assert results["words"] == pytest.approx(20_000, rel=0.2)


def test_frequent_values_survive_the_bound(monkeypatch):
    monkeypatch.setattr(numbers, "MOST_COUNTED", 100)
    top = Top()
    for place in range(5000):
        top.add(f"once {place}")
        top.add("often") if place % 3 == 0 else top.add("more often")
    assert [name for name, _ in top.most(2)] == ["more often", "often"] and not top.exact
    assert len(top.counts) <= 101


def test_groups_beyond_the_bound_are_still_counted_in_all(monkeypatch):
    monkeypatch.setattr(numbers, "MOST_COUNTED", 10)
    counted = Numbers()
    for place in range(100):
        counted.add({"id": str(place), "keep": False, "drop_reason": f"reason {place}"})
    check_sums(counted.results(), 100)


@pytest.mark.parametrize("share, value", [(0.5, 3), (0.01, 1), (0.6, 3), (0.61, 9), (1.0, 9)])
def test_quantiles(share, value):
    assert quantile({9: 4, 1: 2, 3: 4}, share) == value


@pytest.mark.parametrize("low, high", [(0, 1), (0, 7), (-0.6, 3.6), (0, 1e-4), (0, 123456), (0.1, 0.42), (5, 6)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high, 5)
    assert 1 <= len(found) <= 12 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert len({short(tick) for tick in found}) == len(found)


def test_axes_of_nothing():
    axes = Axes([], [])
    assert axes.draw("x", "y") and np.isfinite([axes.x(0), axes.y(0)]).all()
