"""Prediction files that the released evaluation refuses: its failure JSON and text, exit code 0, or 3 by --strict."""

import json

import pytest

from rwkv_clip.eval.main import main

TEN = list(range(10))
WAYS = {"t2i": ("text_id", "image_ids", "image_id", "images"), "i2t": ("image_id", "text_ids", "text_id", "texts")}
SCHEMA = "it should be an integer (not string), please check your schema"


def evaluate(folder, gold: str, predictions: str | bytes | None, *more: str) -> tuple[int, dict]:
    (folder / "gold.jsonl").write_text(gold)
    if predictions is not None:
        (folder / "p.jsonl").write_bytes(predictions if isinstance(predictions, bytes) else predictions.encode())
    code = main(["recall", *(str(folder / name) for name in ("gold.jsonl", "p.jsonl", "out.json")), *more])
    return code, json.loads((folder / "out.json").read_text())


def row(query: str, found: str, /, **fields) -> str:
    """A good line with these fields instead; "query" and "found" stand for the names of the direction."""
    line = {query: 1, found: TEN}
    for name, value in fields.items():
        line[{"query": query, "found": found}[name]] = value
        if value is ...:
            del line[{"query": query, "found": found}[name]]
    return json.dumps(line)


# (line, message); {line} is the line, the others as in WAYS
WRONG = {
    "no JSON": ("{{'x'", "Cannot parse this line into json object: {line}"),
    "blank": ("", "Cannot parse this line into json object: "),
    "cut off": ('{"text_id": 1, "image_ids": [1, 2', "Cannot parse this line into json object: {line}"),
    "deep": ("[" * 100000, "Cannot parse this line into json object: {line}"),
    "byte order mark": ("\ufeff{}", "Cannot parse this line into json object: {line}"),
    "a number": ("7", "There exists one line not containing {query}: {line}"),
    "null": ("null", "There exists one line not containing {query}: {line}"),
    "a list of names": ('["text_id", "image_id"]', "There exists one line not containing {query}: {line}"),
    "no query": ({"query": ...}, "There exists one line not containing {query}: {line}"),
    "text as query": ({"query": "1"}, f"Found an invalid {{query}} 1, {SCHEMA}"),
    "float as query": ({"query": 1.0}, f"Found an invalid {{query}} 1.0, {SCHEMA}"),
    "null as query": ({"query": None}, f"Found an invalid {{query}} None, {SCHEMA}"),
    "nothing found": ({"found": ...}, "There exists one line not containing the predicted {found}: {line}"),
    "no list": ({"found": {"1": 2}}, "The {found} field of {query} 1 is not a list, please check your schema"),
    "nine": ({"found": TEN[:9]}, "{Query} 1 has wrong number of predicted {found}! Require 10, but 9 founded."),
    "eleven": ({"found": [*TEN, 11]}, "{Query} 1 has wrong number of predicted {found}! Require 10, but 11 founded."),
    "none": ({"found": []}, "{Query} 1 has wrong number of predicted {found}! Require 10, but 0 founded."),
    "text found": ({"found": [*TEN[:9], "9"]}, f"{{Query}} 1 has an invalid predicted {{item}} 9 at rank 10, {SCHEMA}"),
    "float found": (
        {"found": [0.5, *TEN[1:]]},
        f"{{Query}} 1 has an invalid predicted {{item}} 0.5 at rank 1, {SCHEMA}",
    ),
    "list found": (
        {"found": [0, [1], *TEN[2:]]},
        f"{{Query}} 1 has an invalid predicted {{item}} [1] at rank 2, {SCHEMA}",
    ),
    "twice": ({"found": [*TEN[:9], 3]}, "{Query} 1 has duplicate topk {items} in your prediction. Pleace check again!"),
    "true is 1": (
        {"found": [True, *TEN[1:]]},
        "{Query} 1 has duplicate topk {items} in your prediction. Pleace check again!",
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_lines(tmp_path, capsys, kind, way):
    query, found, item, items = WAYS[way]
    line, message = WRONG[kind]
    line = row(query, found, **line) if isinstance(line, dict) else line
    names = {"query": query, "found": found, "item": item, "items": items, "Query": query.capitalize()}
    message = message.format(line=line, **names)
    gold = row(query, found, found=[3]) + "\n"
    code, result = evaluate(tmp_path, gold, f"{row(query, found)}\n{line}\n{row(query, found)}\n")
    assert code == 0
    assert result == {"errorDetail": message, "errorMsg": message, "score": 0, "scoreJson": {}, "success": False}
    assert capsys.readouterr().out.splitlines()[2:] == [f"The evaluation failed: {message}"]
    code, again = evaluate(tmp_path, gold, f"{line}\n", "--strict")
    assert code == 3 and again == result


@pytest.mark.parametrize("way", WAYS)
def test_a_query_without_prediction(tmp_path, way):
    query, found, *_ = WAYS[way]
    gold = "".join(row(query, found, query=number) + "\n" for number in (1, 2, 3))
    code, result = evaluate(tmp_path, gold, row(query, found, query=2) + "\n")
    message = f"The following {query}s have no prediction in your submission, please check again: 1, 3"
    assert (code, result["errorMsg"], result["success"]) == (0, message, False)


def test_no_predictions_at_all(tmp_path):
    assert evaluate(tmp_path, row("text_id", "image_ids"), None)[1]["errorMsg"] == "The submission file is not found!"
    missing = "The following text_ids have no prediction in your submission, please check again: 1"
    assert evaluate(tmp_path, row("text_id", "image_ids"), "")[1]["errorMsg"] == missing


def test_what_is_no_utf8(tmp_path):
    code, result = evaluate(tmp_path, row("text_id", "image_ids"), b'{"text_id": 1, "x": "\xff"}\n')
    assert code == 0 and result["errorMsg"] == 'Cannot parse this line into json object: {"text_id": 1, "x": "\\xff"}'


@pytest.mark.parametrize(
    "gold",
    [
        "",
        "\n",
        "[]\n",
        "{}\n",
        '{"text_id": 1}\n',
        '{"text_id": 1, "image_ids": 3}\n',
        '{"text_id": [], "image_ids": []}\n',
    ],
)
def test_wrong_gold_is_a_failure_too(tmp_path, gold):
    code, result = evaluate(tmp_path, gold, row("text_id", "image_ids"))
    assert code == 0 and result["success"] is False and "gold.jsonl" in result["errorMsg"]


def test_what_is_allowed(tmp_path):
    """More predictions than asked for, repeated ones (the last counts), no right item (a miss), windows line ends."""
    gold = '{"text_id": 1, "image_ids": [4, 99]}\r\n{"text_id": 2, "image_ids": []}\r\n'
    lines = [row("text_id", "image_ids", query=n) for n in (7, 2, 1)]
    last = row("text_id", "image_ids", found=[4, *range(20, 29)])
    _, result = evaluate(tmp_path, gold, "\r\n".join([*lines, last]))
    assert result["scoreJson"] == {"score": 50.0, "mean_recall": 50.0, "r1": 50.0, "r5": 50.0, "r10": 50.0}


def test_the_wrong_direction_gets_a_hint(tmp_path, capsys):
    evaluate(tmp_path, row("text_id", "image_ids"), row("image_id", "text_ids"))
    assert "see `invert`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["", "{}", "[1]", '{"text_id": 1, "image_ids": 7}', '{"text_id": 1, "image_ids": [[]]}']
)
def test_annotations_that_cannot_be_inverted(tmp_path, capsys, line):
    (tmp_path / "a.jsonl").write_text(f'{{"text_id": 1, "image_ids": [7]}}\n{line}\n')
    assert main(["invert", "--input", str(tmp_path / "a.jsonl")]) == 3
    assert "a.jsonl:2: " in capsys.readouterr().err and not (tmp_path / "a.tr.jsonl").exists()


def test_a_result_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "gold.jsonl").write_text(row("text_id", "image_ids"))
    gold = str(tmp_path / "gold.jsonl")
    assert main(["recall", gold, gold, str(tmp_path / "none" / "out.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
