"""What a language model answered, and whether it can be used: an HTTP status of 200 proves nothing.

Reasons are few and stable, so that a report can count them: they never hold a word of the model's.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rwkv_clip.files import DamagedError, parse_json

MOST_TEXT = 2000  # characters of a usable text; a text of 77 tokens has about 400
_ENDED = frozenset({"", "stop", "eos", "eos_token", "stop_sequence", "end_turn"})  # by the model itself
_CUT = frozenset({"length", "max_tokens", "model_length"})
_OBJECTS = 32  # places of an answer where an object is looked for


class BadAnswer(ValueError):
    """An answer that cannot be used. reason: why, one of a few."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one question. content: the model's words as they came. finish: why it ended, "" if unsaid.

    problem: why no content can be used, "" where there is some. lost: no answer came (no connection, an HTTP status),
    and asking again did not help. spoke: there was an answer of a model in it. requests: how many were sent for it.
    Tokens are those of the server's `usage`. thought: whether it thought aloud in a field beside the content.
    """

    content: str = ""
    finish: str = ""
    problem: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    requests: int = 1
    lost: bool = False
    spoke: bool = False
    thought: bool = False


# ---- the envelope ----------------------------------------------------------------------------------------------------


def read_envelope(body: bytes, content_type: str) -> Answer:
    """The answer in the body of a chat completion with status 200, its `problem` where it is none; never raises."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        return Answer(
            problem=f"content type {kind[:40]}" if re.fullmatch(r"[\w.+-]+/[\w.+-]+", kind) else "content type"
        )
    try:
        envelope = parse_json(body, "answer")
    except DamagedError:
        return Answer(problem="envelope: not JSON")
    if not isinstance(envelope, dict):
        return Answer(problem="envelope: no object")
    usage = envelope.get("usage")
    prompt, completion = (_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
    content, finish, problem, thought = _read_choice(envelope)
    spoke = not problem.startswith("envelope")
    return Answer(content, finish, problem, prompt, completion, spoke=spoke, thought=thought)


def judge_finish(finish: str) -> str:
    """What is wrong with an answer that ended so, "" for nothing."""
    if finish in _CUT:
        return "cut at max_tokens"
    if finish == "content_filter":
        return "refusal"
    return "" if finish in _ENDED else f"finish: {finish}"


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40 else None


def _read_choice(envelope: dict[str, Any]) -> tuple[str, str, str, bool]:
    """(content, finish, problem, thought aloud) of the first choice."""
    choices = envelope.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return "", "", "envelope: an error" if envelope.get("error") else "envelope: no choices", False
    message = choices[0].get("message")
    if not isinstance(message, dict):
        return "", "", "envelope: no message", False
    finish = choices[0].get("finish_reason")
    finish = (
        finish if isinstance(finish, str) and re.fullmatch(r"[a-z_]{0,20}", finish) else ("" if not finish else "other")
    )
    content = message.get("content")
    thought = bool(message.get("reasoning_content") or message.get("reasoning"))
    if isinstance(content, list):  # parts, as some servers give them
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    text = content if isinstance(content, str) else ""
    problem = "refusal" if message.get("refusal") else judge_finish(finish)
    if problem:
        return text, finish, problem, thought
    if content is None:
        return "", finish, "no content", thought
    return (text, finish, "", thought) if isinstance(content, str) else ("", finish, "content is no text", thought)


# ---- the words -------------------------------------------------------------------------------------------------------

_THINKING = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_FENCE = re.compile(r"```[a-zA-Z]{0,10}[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>")
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb", "`": "`"}
_LABEL = re.compile(
    r"(?:\*\*)?(?:(?:final|merged|new|rewritten|combined|improved)\s+)?"
    r"(?:answer|caption|text|sentence|description|output|response|result)(?:\*\*)?\s*:\s*(?:\*\*)?\s*",
    re.I,
)
_CHATTER = re.compile(
    r"(?:sure|certainly|of course|okay|ok|here(?:'s| is| are)|note|\(note|let me know|i hope|explanation|"
    r"this (?:sentence|caption|description|text) |i (?:have )?(?:combined|merged))\b",
    re.I,
)
_ITEM = re.compile(r"(?:[-*\u2022]|\d{1,2}[.)])\s")


def read_object(content: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The last JSON object in an answer that `schema` allows, out of fences, thoughts and chatter round it.

    schema: of JSON Schema type, enum, properties, required, additionalProperties, items, lengths and pattern.
    BadAnswer: `empty`, `endless blanks`, `thinking not ended`, `not JSON`, `schema: ..`.
    """
    problem, found = "not JSON", None
    for value in _find_objects(content):
        wrong = "a key twice" if isinstance(value, _Doubled) else find_mismatch(value, schema)
        if not wrong:
            found = value
        elif problem == "not JSON":
            problem = f"schema: {wrong}"
    if found is not None:
        return found
    raise BadAnswer(problem if problem != "not JSON" else _why_no_json(content))


def read_plain(content: str, key: str = "text") -> str:
    """The text of an answer in plain words. An object that has it under `key` is taken, too; cut JSON never.

    BadAnswer: as of `read_object`, and `several texts` for lists and paragraphs.
    """
    objects = [value for value in _find_objects(content) if isinstance(value.get(key), str)]
    if objects:
        return objects[-1][key]
    words = _after_thoughts(content)
    fences = _FENCE.findall(words)
    words = (fences[-1] if fences else words).strip()
    if not words:
        raise BadAnswer(_why_no_json(content))
    if words[0] in "{[" or f'"{key}"' in words:
        raise BadAnswer("not JSON")
    return _leave_out_chatter(words)


def make_line(text: str) -> str:
    """One clean line: quotes round it, control characters, marks of direction, chat tokens at its ends are left out.

    BadAnswer: `empty`, `no words`, `special tokens`, `too long`.
    """
    kept = "".join(
        c if (c >= " " and unicodedata.category(c) not in _DROPPED) or c in _JOINERS else " " for c in text[: 1 << 16]
    )
    line = _strip_special(" ".join(kept.split()))
    while (
        len(line) > 1 and _QUOTES.get(line[0]) == line[-1] and line[0] not in line[1:-1] and line[-1] not in line[1:-1]
    ):
        line = line[1:-1].strip()
    if not line:
        raise BadAnswer("empty")
    if len(line) > MOST_TEXT:
        raise BadAnswer("too long")
    if _SPECIAL.search(line):
        raise BadAnswer("special tokens")
    if not any(c.isalpha() for c in line):
        raise BadAnswer("no words")
    return line


_DROPPED = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"  # part of the spelling of some languages


def _strip_special(line: str) -> str:
    while match := _SPECIAL.match(line):
        line = line[match.end() :].lstrip()
    while line.endswith((">", "]")) and (
        ends := [m for m in _SPECIAL.finditer(line[-64:]) if m.end() == len(line[-64:])]
    ):
        line = line[: len(line) - (ends[0].end() - ends[0].start())].rstrip()
    return line


class _Doubled(dict):
    """An object that names a key twice: which one counts is anybody's guess."""


def _pair(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    return value if len(value) == len(pairs) else _Doubled(value)


_DECODER = json.JSONDecoder(object_pairs_hook=_pair)


def _find_objects(content: str) -> Iterator[dict[str, Any]]:
    """JSON objects of an answer, in order: the whole answer, else those in it that are in no other."""
    try:
        value = _DECODER.decode(content.strip())
        if isinstance(value, dict):
            yield value
        return
    except (ValueError, RecursionError):
        pass
    try:
        words = _after_thoughts(content)
    except BadAnswer:
        return
    place = words.find("{")
    for _ in range(_OBJECTS):
        if place < 0:
            return
        try:
            value, end = _DECODER.raw_decode(words, place)
            yield value
        except (ValueError, RecursionError):
            end = place + 1
        place = words.find("{", end)


def _after_thoughts(content: str) -> str:
    """What comes after the last thought. BadAnswer where a thought has no end."""
    marks = list(_THINKING.finditer(content))
    if not marks:
        return content
    if not marks[-1][1]:
        raise BadAnswer("thinking not ended")
    return content[marks[-1].end() :]


def _why_no_json(content: str) -> str:
    words = _after_thoughts(content)
    if not words.strip():
        return "endless blanks" if len(words) > 64 else "empty"
    return "endless blanks" if re.search(r"\s{64}", words) else "not JSON"


def _leave_out_chatter(words: str) -> str:
    paragraphs = [
        lines for part in re.split(r"\n\s*\n", words) if (lines := [x.strip() for x in part.splitlines() if x.strip()])
    ]
    if paragraphs and len(paragraphs[0]) > 1 and paragraphs[0][0].endswith(":"):  # "Here is the caption:"
        paragraphs[0] = paragraphs[0][1:]
    while len(paragraphs) > 1 and (paragraphs[0][-1].endswith(":") or _CHATTER.match(paragraphs[0][0])):
        paragraphs = paragraphs[1:]
    while len(paragraphs) > 1 and _CHATTER.match(paragraphs[-1][0]):
        paragraphs = paragraphs[:-1]
    lines = paragraphs[0] if paragraphs else []
    if len(paragraphs) > 1 or (len(lines) > 1 and sum(bool(_ITEM.match(line)) for line in lines) > 1):
        raise BadAnswer("several texts")
    text = " ".join(lines)
    if (
        sure := re.match(r"(?:sure|certainly|of course|here(?:'s| is))\b[^:.]{0,80}:\s+(?=\S)", text, re.I)
    ) is not None:
        text = text[sure.end() :]
    label = _LABEL.match(text)
    return text[label.end() :] if label else text


# ---- the schema ------------------------------------------------------------------------------------------------------

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
_LENGTHS = ("minLength", "maxLength", "pattern")
_CHECKED = ("type", "enum", "properties", "required", "additionalProperties", "items", *_LENGTHS)
_REMARKS = ("$schema", "title", "description", "default", "examples")


def check_schema(schema: Any, where: str) -> None:
    """ValueError that begins with `where` for a schema that `find_mismatch` could not check completely."""
    if not isinstance(schema, dict) or not schema:
        raise ValueError(f"{where}: {schema!r} is no JSON schema; give an object with type and properties")
    for key, value in schema.items():
        if key not in _CHECKED + _REMARKS:
            raise ValueError(f"{where}: {key} is not checked here; use {', '.join(_CHECKED)}")
        if key == "type" and (not isinstance(value, str) or value not in _TYPES):
            raise ValueError(f"{where}: type {value!r} is none of {', '.join(_TYPES)}")
        if key == "properties":
            for name, inner in value.items():
                check_schema(inner, f"{where}.{name}")
        if key == "items":
            check_schema(value, f"{where}.items")
        if key == "pattern":
            try:
                re.compile(value)
            except (re.error, TypeError) as error:
                raise ValueError(f"{where}: pattern {value!r}: {error}") from None


def find_mismatch(value: Any, schema: Mapping[str, Any], name: str = "answer") -> str:
    """What in `value` the schema does not allow, "" for nothing. Names are those of the schema, never of the value."""
    kind = schema.get("type")
    if kind is not None and (not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return f"{name} is no {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{name} is none of the allowed"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for key in schema.get("required", ()):
            if key not in value:
                return f"{key} is missing"
        if schema.get("additionalProperties", True) is False and value.keys() - properties.keys():
            return "another key"
        inner = ((value[key], properties[key], key) for key in properties if key in value)
        return next((wrong for item in inner if (wrong := find_mismatch(*item))), "")
    if isinstance(value, list) and "items" in schema:
        return next((wrong for item in value if (wrong := find_mismatch(item, schema["items"], name))), "")
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            return f"{name} is too long" if len(value) > schema.get("minLength", 0) else f"{name} is too short"
        if "pattern" in schema and not re.search(schema["pattern"], value):
            return f"{name} does not match"
    return ""
