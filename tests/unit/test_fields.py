"""Which field is what: decided once for all rows, named with what there is when it is missed, and nothing unsaid."""

import json
import re
from datetime import date, datetime
from decimal import Decimal

import numpy as np
import pytest

from helpers.pictures import picture
from helpers.sources import make_rows, save_images, save_jsonl
from rwkv_clip.data.build import build_records
from rwkv_clip.data.encode import Encoder, RowError
from rwkv_clip.data.fields import Choice, Condition, Texts, choose_fields
from rwkv_clip.data.records import RecordSet
from rwkv_clip.data.rows import Problem, Row
from rwkv_clip.tokenizer import make_tokenizer


def build(folder, rows, **settings):
    """Every row has the same picture."""
    if not (folder / "0.jpg").exists():
        (folder / "0.jpg").write_bytes(picture(0))
    path = save_jsonl(folder / "c.jsonl", [{"image": "0.jpg"} | row for row in rows])
    return build_records(path, str(folder / "out"), overwrite=True, **settings)


def texts_in(folder, i: int) -> list[list[int]]:
    return RecordSet(folder / "out").sample(i)[1].tolist()


def ids(*texts: str) -> list[list[int]]:
    return make_tokenizer()(list(texts)).tolist()


# ---- texts


def test_the_field_of_a_view_is_the_same_for_all_rows(tmp_path):
    rows = [{"raw": f"alt {i}", "caption": f"made {i}"} for i in range(6)]
    del rows[2]["raw"]
    rows[3]["raw"] = None
    rows[4]["raw"] = " "
    del rows[5]["caption"]
    rows[5]["text"] = "neither"
    report = build(tmp_path, rows)
    assert report.skipped == {"no raw text": 2, "empty text": 1} and report.fallbacks == {"synthetic": 1}
    assert [texts_in(tmp_path, i) for i in range(3)] == [
        ids("alt 0", "made 0"),
        ids("alt 1", "made 1"),
        ids("alt 5", "alt 5"),
    ]
    side = json.loads((tmp_path / "out.json").read_text())
    assert side["fields"] == ["raw", "caption"] and side["unused"] == {"text": 1}
    assert "no raw text: 2 (say where it is, --texts raw=FIELD)" in str(report)
    assert "c.jsonl line 3: no raw text" in str(report)


@pytest.mark.parametrize(
    "early, late, unused, names",
    [
        ({"raw": "a"}, {"raw": "a", "synthetic": "b"}, "synthetic", ("raw", "synthetic")),
        ({"caption": "a"}, {"caption": "a", "generated": "b"}, "generated", ("raw", "generated")),
        ({"raw": "a", "synthetic": "b"}, {"raw": "a", "synthetic": "b", "caption": "c"}, "caption", None),
        ({"text": "a"}, {"text": "a", "raw": "b"}, "raw", ("raw", "synthetic")),
        ({"captions": ["a"]}, {"captions": ["a", "b", "c"]}, "captions[1:]", None),
        ({"caption": "a"}, {"caption": "a", "title": "b"}, "title", ("raw", "synthetic")),
        ({"caption": "a"}, {"caption": "a", "texts": ["b"]}, "texts", ("raw", "synthetic")),
    ],
)
def test_texts_that_begin_late_are_counted_and_the_remedy_works(tmp_path, early, late, unused, names):
    rows = [early] * 120 + [late] * 3
    report = build(tmp_path, rows)
    number = 6 if unused == "captions[1:]" else 3
    assert report.unused == {unused: number} and report.count == 123
    line = next(line for line in str(report).splitlines() if "not used" in line)
    assert f"texts in {unused} not used: {number} (first: c.jsonl line 121)" in line
    entries = line.split("--texts ")[1].split()
    if entries[-1] == "..":
        entries[-1] = "captions.2"
    again = build(tmp_path, rows, texts=tuple(entries))
    assert again.unused == {} and again.fallbacks == {
        view: 120 for view in again.texts.names if again.fallbacks.get(view)
    }
    assert names is None or again.texts.names == names
    assert set(map(tuple, texts_in(tmp_path, 122))) == {tuple(ids(text)[0]) for text in "abc"[: len(again.texts.names)]}


@pytest.mark.parametrize(
    "row",
    [
        {"caption": "a dog ", "txt": " a dog"},  # as img2dataset writes it
        {"captions": ["a dog"], "title": ""},
        {"caption": "a dog", "text": None, "texts": [], "tokens": None},
    ],
)
def test_what_is_no_other_text_is_not_counted(tmp_path, row):
    report = build(tmp_path, [row])
    assert report.unused == {} and "not used" not in str(report)


def test_five_captions_of_which_one_is_used(tmp_path):
    report = build(tmp_path, [{"captions": [f"text {i}" for i in range(5)]}] * 3)
    assert report.unused == {"captions[1:]": 12} and "--texts captions.0 captions.1 .." in str(report)
    chosen = tuple(f"captions.{i}" for i in range(5))
    report = build(tmp_path, [{"captions": [f"text {i}" for i in range(5)]}] * 3, texts=chosen)
    assert report.unused == {} and len(report.texts.names) == 5


@pytest.mark.parametrize("context", [2, 3, 8, 77])
def test_cut_texts_are_counted_to_the_token(tmp_path, context):
    """A text of n words has n + 2 tokens. Ids are those of the tokenizer."""
    lengths = [1, context - 3, context - 2, context - 1, context, 500]
    rows = [{"raw": " ".join(["dog"] * max(n, 1)), "synthetic": "cat"} for n in lengths]
    rows[0]["synthetic"] = ""
    report = build(tmp_path, rows, context=context, texts=("raw", "synthetic"))
    cut = [max(n, 1) + 2 > context for n in lengths]
    assert report.cut == {view: n for view, n in (("raw", sum(cut)), ("synthetic", 5 * (context < 3))) if n}
    assert json.loads((tmp_path / "out.json").read_text())["cut"] == report.cut
    records, tokenizer = RecordSet(tmp_path / "out"), make_tokenizer(context=context)
    for i, row in enumerate(rows):
        assert (records.sample(i)[1] == tokenizer([row["raw"], row["synthetic"] or row["raw"]]).numpy()).all()
    first = f"raw texts cut at --context {context}: {sum(cut)} (first: c.jsonl line {cut.index(True) + 1})"
    assert first in str(report)


# ---- token ids


def test_numbers_that_are_no_token_ids(tmp_path):
    rows = [{"caption": "a", "tokens": [1, 2, 3]}, {"caption": "b", "tokens": [4]}]
    report = build(tmp_path, rows)
    assert texts_in(tmp_path, 1) == ids("b") and report.unused == {"numbers in tokens": 2}
    told = "numbers in tokens not used: 2 (first: c.jsonl line 1); to use them: --token-field tokens, if they are"
    assert told in str(report)
    fitting = [{"caption": "a", "tokens": [5] * 77}, {"caption": "b", "tokens": [5] * 77}]
    build(tmp_path, fitting)
    assert texts_in(tmp_path, 1) == [[5] * 77]
    build(tmp_path, fitting, texts=("raw=caption",))
    assert texts_in(tmp_path, 1) == ids("b")
    build(tmp_path, [*fitting, {"caption": "c", "tokens": [5]}])
    assert texts_in(tmp_path, 1) == ids("b")


@pytest.mark.parametrize(
    "tokens, settings, shape",
    [
        ([1, 2, 3], {}, "(3,)"),
        ([1.0] * 78, {}, "(78,)"),
        ([[1] * 52] * 3, {}, "(3, 52)"),
        ([[1] * 3] * 77, {}, "(77, 3)"),
        ([[1] * 231], {}, "(1, 231)"),
        ([[1] * 77] * 4, {}, "(4, 77)"),
        ([[1] * 77] * 3, {"texts": ("raw", "synthetic")}, "(3, 77)"),
        ([[[1] * 77]], {}, "(1, 1, 77)"),
        ([1] * 8, {"token_field": "tokens", "context": 3}, "(8,)"),
    ],
)
def test_token_ids_of_another_shape_are_refused(tmp_path, tokens, settings, shape):
    with pytest.raises(ValueError) as error:
        build(tmp_path, [{"tokens": tokens}], **settings)
    for part in ("c.jsonl line 1: tokens", shape, f"--context {settings.get('context', 77)}", "--texts raw=FIELD"):
        assert part in str(error.value)


def test_token_ids_of_one_row_that_do_not_fit(tmp_path):
    good = [[1, 2, 3], [4, 5, 6]]
    rows = [{"tokens": good}, {"tokens": np.transpose(good).tolist()}, {"tokens": good[0]}, {"caption": "a"}]
    rows += [{"tokens": [1, 2, 3, 4, 5, 6]}]
    report = build(tmp_path, rows, context=3)
    assert report.skipped == {
        "token ids of shape (3, 2), should be (2, 3)": 1,
        "wrong number of token ids": 1,
        "no token ids": 1,
    }
    assert texts_in(tmp_path, 0) == texts_in(tmp_path, 1) == good


# ---- what is missed


@pytest.mark.parametrize(
    "row, settings, message",
    [
        (
            {"words": "a"},
            {},
            r"texts: none of the first 3 rows has a text 'raw' \(nor raw_caption, .*they have image, words",
        ),
        (
            {"raw": "a"},
            {"texts": ("raw=alt",)},
            "texts: no row has a text 'alt'; they have image, raw; .* --texts raw=FIELD",
        ),
        (
            {"raw": "a"},
            {"texts": ("raw", "x=blip")},
            "no row has a text 'blip'; they have image, raw; .*or leave x out",
        ),
        ({"raw": "a"}, {"texts": ("raw=raw.0",)}, "no row has a text 'raw.0'"),
        ({"raw": "a"}, {"image_field": "jpeg"}, "image_field: no row has a field 'jpeg'; they have image, raw"),
        ({"raw": "a"}, {"token_field": "ids"}, "token_field: no row has numbers in 'ids'; they have image, raw"),
        ({"raw": "a"}, {"token_field": "raw"}, "token_field: no row has numbers in 'raw'"),
        *(
            (
                {"raw": "a", "split": "x"},
                {"where": ("raw!=b", f"splt{sign}3")},
                f"where: 'splt{sign}3': no row has a field",
            )
            for sign in ("=", "!=", ">=", "<=", ">", "<")
        ),
        ({"raw": "a"}, {"where": ("raw=b",)}, "none of 3 rows became a record: no row was selected by --where raw=b"),
    ],
)
def test_a_field_that_no_row_has(tmp_path, row, settings, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, [row] * 3, **settings)
    assert not list(tmp_path.glob("out*"))


def test_no_picture_in_any_row(tmp_path):
    path = save_jsonl(tmp_path / "c.jsonl", [{"url": "http://a/0.jpg", "caption": "a"}])
    with pytest.raises(ValueError, match=r"none of the first 1 rows has a field 'image' \(nor images.*url, caption"):
        build_records(path, str(tmp_path / "out"))


def test_names_that_begin_late_are_looked_for_in_all_rows(tmp_path):
    rows = [{"raw": "a"}] * 130 + [{"raw": "a", "blip": "", "long": ""}, {"raw": "a", "blip": "b", "split": "val"}]
    rows += [{"raw": "a", "long": "c", "photo": "0.jpg"}]
    names = ("raw", "synthetic=blip", "generated=long")
    report = build(tmp_path, rows, texts=names, where=("split!=test",))
    assert report.fallbacks == {"synthetic": 132, "generated": 132}
    assert report.where == {"split!=test: no field split, taken": 132}
    assert build(tmp_path, rows, image_field="photo").count == 1


def test_names_that_open_clip_uses(tmp_path):
    save_images(tmp_path, 2)
    (tmp_path / "c.tsv").write_text("filepath\ttitle\n0.jpg\ta dog\n1.jpg\ta cat\n")
    build_records(str(tmp_path / "c.tsv"), str(tmp_path / "out"))
    assert [texts_in(tmp_path, i) for i in range(2)] == [ids("a dog"), ids("a cat")]


# ---- conditions

SCORES = [{"score": 0.1}, {"score": "0.5"}, {"score": 3}, {"score": "high"}, {"score": True}, {"score": None}, {}]
SCORES += [{"score": float("nan")}, {"score": " 1e3 "}, {"score": "test"}]


@pytest.mark.parametrize(
    "condition, taken, remarks",
    [
        ("score>=0.5", (1, 2, 8), {"is not a number": 4, "no field score": 2}),
        ("score > 0.5", (2, 8), {"is not a number": 4, "no field score": 2}),
        ("score<=0.5", (0, 1), {"is not a number": 4, "no field score": 2}),
        ("score<0.5", (0,), {"is not a number": 4, "no field score": 2}),
        ("score=3", (2,), {"no field score": 2}),
        ("score==3,test", (2, 9), {"no field score": 2}),
        ("score!=3", (0, 1, 3, 4, 5, 6, 7, 8, 9), {"no field score": 2}),
        ("score!=null", (0, 1, 2, 3, 4, 7, 8, 9), {"no field score": 2}),
        ("score=null", (5, 6), {"no field score": 2}),
        ("score=true", (4,), {"no field score": 2}),
    ],
)
def test_conditions(tmp_path, condition, taken, remarks):
    rows = [{"raw": f"text {i}", **row} for i, row in enumerate(SCORES)]
    report = build(tmp_path, rows, where=(condition,), shard_size=0)
    assert [texts_in(tmp_path, i) for i in range(report.count)] == [ids(f"text {i}") for i in taken]
    for what, n in remarks.items():
        (found,) = [(key, count) for key, count in report.where.items() if what in key]
        assert found[1] == n and f"--where {found[0]}: {n}" in str(report)
        assert found[0].endswith(", taken" if 6 in taken and "no field" in what else ", left out")
    assert len(report.where) == len(remarks)


SAID = {
    "float": (3.0, ["3", "3.0", "30e-1"], ["3.5", "three", "", "nan"]),
    "long": (2**60 + 1, [str(2**60 + 1)], [str(2**60)]),
    "fraction": (0.1, ["0.1"], ["0.10000001"]),
    "decimal": (Decimal("1.50"), ["1.5", "1.50"], ["15"]),
    "nan": (float("nan"), ["nan"], ["3", "sNaN"]),
    "truth": (True, ["true", "True"], ["1", "false"]),
    "nothing": (None, ["null"], ["", "None"]),
    "date": (date(2020, 1, 2), ["2020-01-02"], ["2020-01-03", '"2020-01-02"']),
    "time": (datetime(2020, 1, 2, 3), ["2020-01-02 03:00:00"], ["2020-01-02"]),
    "bytes": (b"train", ["train"], ["b'train'"]),
    "text": ("3", ["3"], ["3.0"]),
    "list": ([1, "a"], [], ["1"]),
}


@pytest.mark.parametrize("value, said, others", SAID.values(), ids=SAID)
def test_a_value_is_what_a_reader_would_call_it(value, said, others):
    for sign in ("=", "!="):
        taken = [Condition.parse(f"x{sign}{text}").judge(Row("r", {"x": value}, None))[0] for text in said + others]
        assert taken == [sign == "="] * len(said) + [sign == "!="] * len(others)


@pytest.mark.parametrize("text", ["score", "=3", ">=3", "score>=high", "score<", "score>1,2", "", "  =3"])
def test_conditions_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"where: {text!r}")):
        Condition.parse(text)


def test_remarks_are_counted_once_with_shards_and_when_resumed(tmp_path):
    rows = [{"raw": "a", "score": i} if i % 3 else {"raw": "a"} for i in range(20)]
    whole = build(tmp_path, rows, where=("score>4",), shard_size=4)
    assert whole.where == {"score>4: no field score, left out": 7} and whole.count == 10
    sides = [json.loads(path.read_text())["where"] for path in sorted(tmp_path.glob("out-*.json"))]
    assert sum(sum(side.values()) for side in sides) == 7
    for ending in (".json", "-00002.idx"):
        (tmp_path / f"out{ending}").unlink()
    again = build(tmp_path, rows, where=("score>4",), shard_size=4)
    assert again.to_json() == whole.to_json() and again.kept == 2


# ---- pictures that come with the row


def test_the_picture_of_a_row(tmp_path):
    (tmp_path / "0.jpg").write_bytes(picture(0))
    encoder = Encoder(Choice(Texts(("raw",), ("raw",))))
    fields = {"raw": "a", "image": "0.jpg"}
    inside = Row("r", fields, None, picture(1))
    assert encoder(inside).image == picture(1) and encoder(inside).seen == ""
    assert encoder(Row("r", fields, None)).reason == "missing image"  # names in a tar are no paths
    assert encoder(Row("r", fields, tmp_path)).image == picture(0)
    assert encoder(Row("r", fields, tmp_path, Problem("image too large"))).reason == "image too large"
    named = Encoder(Choice(Texts(("raw",), ("raw",))), image_field="image")
    assert named(Row("r", fields, tmp_path, picture(1))).image == picture(0)


def test_choice_and_label_know_no_rows_and_odd_ones():
    assert choose_fields([], (), None, 77).texts.names == ("raw",)
    encoder = Encoder(Choice(Texts(("raw",), ("raw",)), "tokens"))
    with pytest.raises(RowError, match="no token ids"):
        encoder._take_tokens(Row("r", {"tokens": ["a"]}, None))
    assert Row("r", {}, None).image is None and make_rows(1)
