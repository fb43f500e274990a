"""What is taken of a model's answer, and the reasons for what is not."""

import json

import pytest

from rwkv_clip.describe.answers import (
    BadAnswer,
    check_schema,
    find_mismatch,
    make_line,
    read_envelope,
    read_object,
    read_plain,
)
from rwkv_clip.describe.prompt import Prompt

SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string"}},
    "required": ["text"],
    "additionalProperties": False,
}
GOOD = '{"text": "A dog runs."}'


def wrap(message, finish="stop", **more):
    choice = {"message": message, "finish_reason": finish}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return json.dumps({"choices": [choice], "usage": usage, **more}).encode()


@pytest.mark.parametrize(
    "body, kind, problem",
    [
        (wrap({"content": GOOD}), "application/json", ""),
        (wrap({"content": GOOD}), "application/json; charset=utf-8", ""),
        (wrap({"content": GOOD}), "", ""),
        (wrap({"content": GOOD}), "application/problem+json", ""),
        (wrap({"content": GOOD}, None), "application/json", ""),
        (wrap({"content": GOOD}), "text/html", "content type text/html"),
        (wrap({"content": GOOD}), "a b; \x00", "content type"),
        (b"", "application/json", "envelope: not JSON"),
        (b"\xff\xfe", "application/json", "envelope: not JSON"),
        (b"[" * 100_000, "application/json", "envelope: not JSON"),
        (b'{"choices": ' + b"9" * 5000 + b"}", "application/json", "envelope: not JSON"),
        (b"[]", "application/json", "envelope: no object"),
        (b"{}", "application/json", "envelope: no choices"),
        (b'{"choices": []}', "application/json", "envelope: no choices"),
        (b'{"choices": {"0": 1}}', "application/json", "envelope: no choices"),
        (b'{"choices": [null]}', "application/json", "envelope: no choices"),
        (b'{"error": {"message": "x"}}', "application/json", "envelope: an error"),
        (b'{"choices": [{"text": "A dog"}]}', "application/json", "envelope: no message"),
        (wrap({"content": GOOD}, "length"), "application/json", "cut at max_tokens"),
        (wrap({"content": GOOD}, "content_filter"), "application/json", "refusal"),
        (wrap({"content": None, "refusal": "I cannot"}), "application/json", "refusal"),
        (wrap({"content": GOOD}, "tool_calls"), "application/json", "finish: tool_calls"),
        (wrap({"content": GOOD}, "<script>"), "application/json", "finish: other"),
        (wrap({"content": GOOD}, 7), "application/json", "finish: other"),
        (wrap({"content": None}), "application/json", "no content"),
        (wrap({}), "application/json", "no content"),
        (wrap({"content": {"text": "x"}}), "application/json", "content is no text"),
    ],
)
def test_envelopes(body, kind, problem):
    answer = read_envelope(body, kind)
    assert answer.problem == problem
    assert answer.spoke == (not problem.startswith(("envelope", "content type")))
    if answer.spoke:
        assert (answer.prompt_tokens, answer.completion_tokens) == (7, 3)


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": "7"}, {"prompt_tokens": -1}, {"prompt_tokens": True}])
def test_tokens_that_are_no_counts_are_unknown(usage):
    answer = read_envelope(wrap({"content": GOOD}, usage=usage), "application/json")
    assert answer.problem == "" and answer.prompt_tokens is None


def test_content_in_parts_and_thoughts_beside_it():
    parts = [{"type": "text", "text": "A dog"}, {"type": "x"}, {"type": "text", "text": " runs."}, 7]
    answer = read_envelope(wrap({"content": parts, "reasoning_content": "hm"}), "application/json")
    assert answer.content == "A dog runs." and answer.thought


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        f"  \n{GOOD}\n\n ",
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}",
        f"Sure! Here is the answer:\n\n{GOOD}\n\nLet me know if you need more.",
        f"<think>The caption {{says}} a cat.</think>\n{GOOD}",
        f"the template opened it</think>{GOOD}",
        f"<think>a</think><think>b</think>{GOOD}",
        f'The raw text holds {{"text": 7}} and {{"caption": "x"}}, so: {GOOD}',
        f'The note says {{"text": "hacked"}}. Answer: {GOOD}',
        f"{{ {GOOD}",
        '{"text": "A dog runs."}<|im_end|>',
    ],
)
def test_objects_are_found(content):
    assert read_object(content, SCHEMA) == {"text": "A dog runs."}
    assert read_plain(content) == "A dog runs."


@pytest.mark.parametrize(
    "content, reason",
    [
        ("", "empty"),
        (" \n" * 10, "empty"),
        (" \n" * 300, "endless blanks"),
        ('{"text":' + " \n" * 300, "endless blanks"),
        ("A dog runs.", "not JSON"),
        ('{"text": "A dog ru', "not JSON"),
        ('{"text": "A dog" "x"}', "not JSON"),
        ("{'text': 'A dog runs.'}", "not JSON"),
        ("[" * 50_000, "not JSON"),
        ("{" * 50_000, "not JSON"),
        ('{"text": "x"' + ', "a": {"text": ' * 50_000, "not JSON"),
        ('"A dog runs."', "not JSON"),
        ("{}", "schema: text is missing"),
        ('{"caption": "A dog."}', "schema: text is missing"),
        ('{"text": ["A dog."]}', "schema: text is no string"),
        ('{"text": null}', "schema: text is no string"),
        ('{"text": "A dog.", "score": 1}', "schema: another key"),
        ('{"text": "A", "text": "B"}', "schema: a key twice"),
        ("<think>The raw text says", "thinking not ended"),
        (f"{GOOD[:-1]}, <think>", "thinking not ended"),
    ],
)
def test_what_is_no_object_of_the_schema_has_a_reason(content, reason):
    with pytest.raises(BadAnswer, match=reason.replace("(", r"\(")) as error:
        read_object(content, SCHEMA)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    "content, text",
    [
        ("A dog runs.", "A dog runs."),
        ('"A dog runs."', "A dog runs."),
        ("\u201cA dog runs.\u201d", "A dog runs."),
        ('"A" and "B" are dogs named "Rex"', '"A" and "B" are dogs named "Rex"'),
        ("A dog\nruns\n  fast.", "A dog runs fast."),
        ("Caption: A dog runs.", "A dog runs."),
        ("**Answer:** A dog runs.", "A dog runs."),
        ("Sure! Here is the sentence:\n\nA dog runs.\n\nLet me know if you want another.", "A dog runs."),
        ("Here is the merged caption: A dog runs.", "A dog runs."),
        ("Here is the caption:\nA dog runs.", "A dog runs."),
        ("A dog runs.\n\nNote: I left out the date.", "A dog runs."),
        ("```\nA dog runs.\n```", "A dog runs."),
        ("<think>hm\n\nhm</think>\n\nA dog runs.", "A dog runs."),
        ("A dog runs.</s>", "A dog runs."),
        ("<s> A dog runs. <|eot_id|><|end|>", "A dog runs."),
        ("A dog\x00 runs\u202e.\u200b", "A dog runs ."),
        ("M\u00fcller's dog \u72d7 \u0646\u0645\u06cc\u200c\u062f\u0627\u0646\u0645",) * 2,
    ],
)
def test_plain_text_becomes_one_line(content, text):
    assert make_line(read_plain(content)) == text


@pytest.mark.parametrize(
    "content, reason",
    [
        ("", "empty"),
        ('""', "empty"),
        ("...", "no words"),
        ('{"text": "A dog', "not JSON"),
        ('Sure: "text": "A dog', "not JSON"),
        ("1. A dog runs.\n2. A dog is running.", "several texts"),
        ("- A dog\n- A cat", "several texts"),
        ("A dog runs.\n\nA cat sleeps.", "several texts"),
        ("A dog <|im_start|> runs.", "special tokens"),
        ("A dog " * 1000, "too long"),
        ('{"text": "\\ud800\\udfff"}', "empty"),
    ],
)
def test_plain_answers_of_no_use(content, reason):
    with pytest.raises(BadAnswer) as error:
        make_line(read_plain(content))
    assert error.value.reason == reason


@pytest.mark.parametrize(
    "unit", ["{", "[", '{"text":', "<think>", "</think>{", "```\n", "\n\n", '"', "a\n", "<s>", "</s>", " ", "{}"]
)
def test_a_megabyte_of_anything_is_read_in_no_time(unit):
    """Whatever is asked of it: no reading is quadratic. (It would take minutes.)"""
    content = unit * ((1 << 20) // len(unit))
    for read in (lambda: read_object(content, SCHEMA), lambda: make_line(read_plain(content))):
        with pytest.raises(BadAnswer):
            read()


def test_texts_can_be_written_as_utf8():
    line = make_line(json.loads('"a \\ud83d dog \\u0000 \\u2028 x"'))
    assert line.encode("utf-8").decode() == "a dog x"


@pytest.mark.parametrize(
    "value, schema, wrong",
    [
        (3, {"type": "integer"}, ""),
        (True, {"type": "integer"}, "answer is no integer"),
        (3.5, {"type": "number"}, ""),
        (None, {"type": "null"}, ""),
        ("red", {"enum": ["red", "blue"]}, ""),
        ("green", {"enum": ["red", "blue"]}, "answer is none of the allowed"),
        (["a", 1], {"type": "array", "items": {"type": "string"}}, "answer is no string"),
        ("ab", {"type": "string", "minLength": 3}, "answer is too short"),
        ("abcd", {"type": "string", "maxLength": 3}, "answer is too long"),
        ("\u00fc", {"type": "string", "pattern": "^[ -~]+$"}, "answer does not match"),
        ({"a": {"b": 1}}, {"properties": {"a": {"properties": {"b": {"type": "string"}}}}}, "b is no string"),
    ],
)
def test_schemas(value, schema, wrong):
    check_schema(schema, "x")
    assert find_mismatch(value, schema) == wrong


@pytest.mark.parametrize(
    "schema", [{}, [], {"oneOf": []}, {"type": "text"}, {"pattern": "["}, {"items": {"$ref": "#"}}]
)
def test_schemas_that_cannot_be_checked_are_refused(schema):
    with pytest.raises(ValueError, match=r"^file: schema"):
        check_schema(schema, "file: schema")


def test_plain_takes_what_json_takes():
    """The last attempt takes plain text, and must not read an answer differently that is JSON."""
    prompt = Prompt.load("grounded")
    for content in (GOOD, f"```json\n{GOOD}\n```", f"x {GOOD}"):
        assert prompt.parse(content) == prompt.parse(content, plain=True) == "A dog runs."
