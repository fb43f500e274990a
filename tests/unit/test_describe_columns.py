"""Captions and tags that exist already: found by id, picture or place, everything counted."""

import csv
import json

import numpy as np
import pytest

from helpers.sources import save_jsonl
from rwkv_clip.data.encode import RowError
from rwkv_clip.data.rows import SourceError
from rwkv_clip.describe import columns
from rwkv_clip.describe.columns import ColumnSettings, read_column
from rwkv_clip.describe.parquet import write_parquet
from rwkv_clip.describe.token_texts import Decoder
from rwkv_clip.tokenizer import make_tokenizer


def save(path, entries: list[dict]):
    """In the format of the ending."""
    if path.suffix == ".jsonl":
        save_jsonl(path, entries)
    elif path.suffix == ".json":
        path.write_text(json.dumps(entries))
    elif path.suffix == ".parquet":
        kinds = {str: "str", int: "int", list: "str list"}
        write_parquet(path, {name: kinds[type(value)] for name, value in entries[0].items()}, [entries])
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(entries[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(entries)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_captions_of_a_file(tmp_path, ending):
    entries = [{"id": f"id{i}", "caption": f'a "caption", {i}'} for i in (3, 1, 2, 7)]
    column = read_column(save(tmp_path / f"captions.{ending}", entries), "caption")
    assert column.by == "id" and len(column) == 4
    found = [column.find({"id": f"id{i}", "row": i}) for i in range(4)]
    assert found[0] is None
    assert found[1:] == [{"caption": f'a "caption", {i}', "caption_source": "file"} for i in (1, 2, 3)]
    assert (column.counts["asked"], column.counts["found"], column.count_unused()) == (4, 3, 1)
    assert "3 rows found; 1 rows that are not in the file; 1 entries that no row asked for" in str(column)


@pytest.mark.parametrize(
    "value, tags, scores",
    [
        ("man | paper bag | head", ["man", "paper bag", "head"], None),
        ("man, paper bag,head", ["man", "paper bag", "head"], None),
        (["man", "paper bag"], ["man", "paper bag"], [0.9, 0.7]),
        (["man"], ["man"], None),
        ("", None, None),
        ([], None, None),
        (None, None, None),
        (5, None, None),
    ],
)
def test_tags_of_a_file(tmp_path, value, tags, scores):
    other = {"id": "other", "tags": "dog"}
    column = read_column(
        save(tmp_path / "t.jsonl", [{"id": 1, "tags": value, "tag_scores": [0.9, 0.7]}, other]), "tags"
    )
    expected = tags and {"tags": tags, "tag_scores": scores, "tag_source": "file"}
    assert column.find({"id": "1"}) == expected
    assert column.counts["entries without tags"] == (tags is None)


def test_tags_of_a_table(tmp_path):
    column = read_column(save(tmp_path / "tags.csv", [{"id": "a", "tags": "man | hat"}]), "tags")
    assert column.find({"id": "a"})["tags"] == ["man", "hat"]
    column = read_column(save(tmp_path / "tags.parquet", [{"id": "a", "tags": ["man", "hat"]}]), "tags")
    assert column.find({"id": "a"})["tags"] == ["man", "hat"]


@pytest.mark.parametrize("settings, by", [({}, "id"), ({"key": "image"}, "image"), ({"key": "row"}, "row")])
def test_keys_are_ids_pictures_or_places(tmp_path, settings, by):
    entries = [{"id": f"id{i}", "image": f"./photos//{i}.jpg", "caption": f"caption {i}"} for i in range(5)]
    column = read_column(save(tmp_path / "c.jsonl", entries), "caption", ColumnSettings(**settings))
    row = {"id": "id1", "image": "photos/2.jpg", "row": 3}
    number = {"id": 1, "image": 2, "row": 3}[by]
    assert column.by == by and column.find(row)["caption"] == f"caption {number}"


def test_a_picture_is_the_key_where_there_is_no_id(tmp_path):
    column = read_column(save(tmp_path / "c.csv", [{"image_path": "a/1.jpg", "ofa": "x"}]), "caption")
    assert column.by == "image" and column.find({"id": "z", "image": "a/1.jpg"})["caption"] == "x"
    assert column.find({"id": "z", "image": None}) is None


def test_repeated_and_empty_entries_are_counted(tmp_path):
    entries = [
        ("a", "first"),
        ("b", "x"),
        ("a", "second"),
        (None, "y"),
        ("c", " "),
        ("a", "third"),
        ("", "z"),
        (1, "n"),
    ]
    column = read_column(save_jsonl(tmp_path / "c.jsonl", [{"id": k, "caption": v} for k, v in entries]), "caption")
    assert column.find({"id": "a"})["caption"] == "first" and column.find({"id": "1"})["caption"] == "n"
    assert column.find({"id": "c"}) is None and len(column) == 3
    assert column.counts["entries with the key of an earlier one"] == 2
    assert column.counts["entries without a key"] == 2 and column.counts["entries without caption"] == 1


def test_equal_hashes_do_not_mix_entries_up(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "_hash", lambda key: len(key) % 2)
    entries = [{"id": "x" * (i % 40 + 1), "caption": f"caption {i}"} for i in range(60)]
    column = read_column(save(tmp_path / "c.jsonl", entries), "caption")
    assert len(column) == 40 and column.counts["entries with the key of an earlier one"] == 20
    for i in range(40):
        assert column.find({"id": "x" * (i + 1)})["caption"] == f"caption {i}"
    assert column.find({"id": "x" * 50}) is None and column.count_unused() == 0


def test_a_million_entries_would_fit(tmp_path):
    """Bytes per entry, of which a million may have 300 MB."""
    count = 20_000
    entries = [
        {"id": f"{i:012d}", "caption": f"a caption of usual length about the thing number {i}"} for i in range(count)
    ]
    column = read_column(save(tmp_path / "c.jsonl", entries), "caption")
    arrays = (column._hashes, column._order, column._starts, column._used)
    held = len(column._bytes) + sum(one.nbytes for one in arrays)
    assert held / count < 150


@pytest.mark.parametrize(
    "entries, kind, settings, message",
    [
        ([{"id": 1, "x": "y"}], "caption", {}, "no field caption or synthetic"),
        ([{"id": 1, "caption": "y"}], "caption", {"field": "z"}, "no field z for caption"),
        ([{"caption": "y"}], "caption", {}, "no field says which row"),
        ([{"id": 1, "caption": "y"}], "words", {}, "not one of raw, caption"),
        ([], "caption", {}, "no field"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, entries, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        read_column(save_jsonl(tmp_path / "c.jsonl", entries), kind, ColumnSettings(**settings))


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"id": 1, "caption": "a"}\n{"id": ')
    with pytest.raises(SourceError, match="line 2"):
        read_column(tmp_path / "c.jsonl", "caption")
    (tmp_path / "c.npy").write_bytes(b"no array")
    with pytest.raises(SourceError, match=r"not an \.npy"):
        read_column(tmp_path / "c.npy", "caption")


# ---- token ids -------------------------------------------------------------------------------------------------------

TEXTS = [
    "a red circle on a table",
    "Hello, World! It's 12",
    "wow !! what ? !",
    "naïve café ☕ 東京",
    "!",
    "a !",
    "word " * 100,
]


@pytest.mark.parametrize("text", TEXTS)
def test_decoded_texts_have_the_same_tokens(text):
    tokens = make_tokenizer()([text])
    [decoded] = Decoder()(tokens.numpy()[0])
    assert make_tokenizer()([decoded]).tolist() == tokens.tolist()
    assert decoded == decoded.lower().strip() and "<" not in decoded


def test_id_0_is_padding_only_after_the_end():
    """The id of "!" within a word of signs is 0."""
    tokens = make_tokenizer()(["!#& a"]).numpy()[0]
    padded = np.zeros(77, np.int64)
    padded[: len(tokens[tokens != 0])] = tokens[tokens != 0]
    assert 0 in tokens[: int(np.argmax(tokens))], "this text shows nothing"
    assert Decoder()(tokens) != Decoder()(padded)
    [decoded] = Decoder()(tokens)
    assert decoded.startswith("!")


@pytest.mark.parametrize("shape", [(3, 154), (3, 2, 77)])
@pytest.mark.parametrize("kind, place", [("raw", 0), ("caption", 1)])
def test_published_arrays_are_found_by_place(tmp_path, shape, kind, place):
    texts = [["A dog", "a dog on grass"], ["IMG 1", "a street"], ["two cats", ""]]
    ids = np.stack([make_tokenizer()(two).numpy() for two in texts]).astype(np.int32).reshape(shape)
    np.save(tmp_path / "ids.npy", ids)
    column = read_column(tmp_path / "ids.npy", kind)
    found = [column.find({"id": "x", "row": i}) for i in range(4)]
    assert [one and one[kind] for one in found] == [*(two[place].lower() or None for two in texts), None]
    assert len(column) == 3 and column.count_unused() == (kind == "caption")
    with pytest.raises(ValueError, match="raw texts or captions by row"):
        read_column(tmp_path / "ids.npy", "tags")


def test_lists_of_ids_in_a_table(tmp_path):
    ids = make_tokenizer()(["a dog", "a cat"]).tolist()
    by_place = read_column(save_jsonl(tmp_path / "a.jsonl", [{"texts": one} for one in ids]), "raw")
    assert by_place.by == "row" and [by_place.find({"row": i})["raw"] for i in range(2)] == ["a dog", "a cat"]
    entries = [{"id": f"id{i}", "texts": one} for i, one in enumerate(ids)]
    by_id = read_column(save_jsonl(tmp_path / "b.jsonl", [*entries, {"id": "bad", "texts": [1] * 77 + [2]}]), "caption")
    assert by_id.by == "id" and by_id.find({"id": "id1"})["caption"] == "a cat"
    assert by_id.find({"id": "bad"}) is None and by_id.counts["entries without caption"] == 1


@pytest.mark.parametrize(
    "tokens",
    [None, np.zeros(0), np.zeros(76), np.full(77, -1), np.full(77, 49408), np.full(77, 0.5), np.full(77, np.nan)],
)
def test_ids_that_cannot_be_are_errors(tokens):
    with pytest.raises(RowError):
        Decoder()(tokens)
