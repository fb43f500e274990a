"""Captions that nobody would write: always (1, T) ids below the vocabulary, EOT where it is due, and soon."""

import json
import random
import time
import unicodedata

import numpy as np
import pytest

from helpers.pictures import encode, paint
from rwkv_clip.data.build import build_records
from rwkv_clip.data.records import RecordSet
from rwkv_clip.factory import get_tokenizer
from rwkv_clip.tokenizer import MAX_CHARACTERS, make_tokenizer

SOT, EOT = 49406, 49407
CONTEXTS = (2, 3, 16, 52, 77)


def nasty() -> list[str]:
    draw = random.Random(0)
    texts = ["", " ", "\n\t\r", "\0", "\0" * 300, "\x01\x02\x1b[31m", "\ud800", "a\udfffb", "\ufeff", "\u200b\u200d"]
    texts += ["a" * 5000, "a b " * 2000, "!" * 3000, "'" * 999, "&amp;" * 999, "&#x110000;&#0;", "\u202eabc", "𝒜𝓫𝔠"]
    texts += ["👨‍👩‍👧‍👦" * 60, "e" + "\u0301" * 500, "ﷺ" * 90, "한국어 텍스트", "עברית", "العربية", "ไทย" * 40, "İıſß"]
    texts += ["%s%n{}{0}$(rm)`id`", "'; DROP TABLE x;--", "<script>", "../../etc/passwd", "\\x00\\u0000", "\xa0\u3000"]
    texts += ["<start_of_text>", "<end_of_text>", "a <end_of_text> b", "<end_of_text>" * 99, "</w>", "don't won't"]
    every = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) != "Cn"]
    while len(texts) < 300:
        texts.append("".join(draw.choices(every, k=draw.choice([1, 3, 30, 300]))))
    return texts


@pytest.mark.parametrize("context", CONTEXTS)
def test_three_hundred_strings(context):
    tokenizer, texts = make_tokenizer(context=context), nasty()
    assert len(texts) == 300
    for text in texts:
        ids = tokenizer([text])
        assert ids.shape == (1, context) and ids.min() >= 0 and ids.max() < tokenizer.vocab_size == 49408
        row = ids[0].tolist()
        last = max(i for i, token in enumerate(row) if token)
        assert row[0] == SOT and row[last] == EOT, repr(text)
        if "<" not in text:  # CLIP's tokenizer takes its marks written out for the marks themselves
            assert row.count(SOT) == row.count(EOT) == 1, repr(text)
    together = tokenizer(texts)
    assert all((tokenizer(text)[0] == row).all() for text, row in zip(texts[:60], together))


@pytest.mark.parametrize("name", ["RWKV-CLIP-B-32", "ViT-B-32", "ViT-L-14-336", "convnext_base"])
def test_same_ids_as_open_clip(name):
    import open_clip

    texts = [text for text in nasty() if len(text) <= 64 * 77]
    theirs = open_clip.get_tokenizer("ViT-B-32")
    assert len(texts) > 290 and (get_tokenizer(name)(texts) == theirs(texts)).all()


def test_long_texts_are_read_as_far_as_the_context_goes():
    import open_clip

    draw, words = random.Random(1), ["a", "photo", "of", "two", "dogs", "playing", "near", "water,", "at", "dawn"]
    texts = [" ".join(draw.choices(words, k=3000)), "internationalization " * 999, "x" * 6000, "😀" * 6000, "1" * 6000]
    texts += [" " * 9000 + "a dog", "a" + "\n" * 9000 + "dog"]
    assert (make_tokenizer()(texts) == open_clip.get_tokenizer("ViT-B-32")(texts)).all()


@pytest.mark.parametrize("text", ["a", "a b ", "😀", "&amp;", "1", "한", "\0", " ", "<"])
def test_a_megabyte_takes_no_time(text):
    tokenizer = make_tokenizer()
    tokenizer("warm")
    long = (text * 10**6)[: 10**6]
    begin = time.perf_counter()
    ids = tokenizer([long])
    assert time.perf_counter() - begin < 0.5  # about 20 ms; open_clip's takes 1.5 s
    assert ids.shape == (1, 77) and (ids == EOT).sum() == 1


def test_what_is_no_caption_is_refused():
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="100,000,000 characters, more than 1,048,576"):
        tokenizer("a" * 100_000_000)
    for wrong in (None, 3, b"x", [None], [b"x"], ["a", ["b"]], {"a": 1}):
        with pytest.raises(ValueError, match="should be a str"):
            tokenizer(wrong)


def test_builder_counts_and_names(tmp_path):
    (tmp_path / "0.jpg").write_bytes(encode(paint(24, 16), "JPEG"))
    texts = ["good", "", "  ", "\0\0", "a" * (MAX_CHARACTERS + 1), "dog " * 9000, "\ud800 x", 5, None, "<end_of_text>"]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"image": "0.jpg", "raw": text}) + "\n" for text in texts))
    report = build_records(str(path), str(tmp_path / "t"))
    skipped = {"empty text": 3, "no raw text": 1, "text too long": 1, "text is not a string": 1}
    assert report.skipped == skipped and report.count == 4 and report.cut == {"raw": 1}
    records = RecordSet(tmp_path / "t")
    long = records.sample(1)[1][0]
    assert long[0] == SOT and long[-1] == EOT and (long[1:-1] == long[1]).all()
    for i in range(4):
        tokens = records.sample(i)[1]
        assert tokens.shape == (1, 77) and tokens[0, 0] == SOT and EOT in tokens[0] and np.all(tokens < 49408)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "json"])
def test_bytes_that_are_not_utf8_are_named(ending, tmp_path):
    (tmp_path / "0.jpg").write_bytes(encode(paint(24, 16), "JPEG"))
    mark = b"\t" if ending == "tsv" else b","
    rows = {
        "jsonl": b'{"image": "0.jpg", "raw": "a"}\n{"image": "0.jpg", "raw": "caf\xe9"}\n',
        "json": b'[{"image": "0.jpg", "raw": "caf\xe9"}]',
    }.get(ending, mark.join([b"image", b"raw"]) + b"\n" + mark.join([b"0.jpg", b"caf\xe9"]) + b"\n")
    path = tmp_path / f"c.{ending}"
    path.write_bytes(rows)
    place = "line 2" if ending == "jsonl" else "UTF-8" if ending == "json" else "line"
    with pytest.raises(ValueError, match=rf"c\.{ending}: .*{place}"):
        build_records(str(path), str(tmp_path / "t"))
