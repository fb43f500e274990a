"""Instruction files of others -> samples: alpaca, sharegpt, OpenAI messages, or plain fields with an answer.

The file of 70,000 samples that the paper's authors released has not been seen here; its form is unknown. What is read:

    alpaca     {"instruction": .., "input": .., "output": ..}
    sharegpt   {"conversations": [{"from": "human", "value": ..}, {"from": "gpt", "value": ..}]}
    messages   {"messages": [{"role": "user", "content": ..}, {"role": "assistant", "content": ..}]}
    fields     {"raw": .., "synthetic" or "caption": .., "tags": [..], "answer" or "generated" or "output": ..}

In the first three the sources are found in the last question by the labels of the paper's figure (Raw Text, Syn Cap,
Det Tag) or of its follow-up's prompt (Raw caption, synthetic caption, detection tags), each before a colon, or in the
fences of our own prompt `grounded`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_clip.data.rows import Row
from rwkv_clip.data.sources import Source

from .instruct import Found, Sample
from .sources import Sources, Tag

RAW = re.compile(r"\braw[ _]?(?:text|caption)s?\s*:", re.IGNORECASE)
CAPTION = re.compile(r"\bsyn(?:thetic|\.)?[ _]?cap(?:tion)?s?\s*:", re.IGNORECASE)
TAGS = re.compile(r"\bdet(?:ection|ected|\.)?[ _]?tags?\s*:", re.IGNORECASE)
FENCES = re.compile(r"<(raw|caption|tags)>\n(.*)\n</\1>")  # of the prompt `grounded`
JOINTS = re.compile(r"[\s,;]*(?:\band\s+)?(?:(?:\bthe\s+)?\bhighly\s+relevant\s+)?$", re.IGNORECASE)
PAIRS = {"<": ">", "[": "]", '"': '"', "'": "'", "{": "}", "`": "`"}
MOST = 1 << 16  # characters of a question that are searched
QUESTIONS, ANSWERS = ("human", "user"), ("gpt", "assistant")
NO_SOURCES, NO_ANSWER = "sources not found in the question", "no answer"
UNKNOWN = "neither alpaca, sharegpt, messages nor fields"
ANSWER_FIELDS = ("answer", "generated", "output", "response")
CAPTION_FIELDS = ("synthetic", "caption", "syn_cap")
TAG_FIELDS = ("tags", "det_tags", "detection_tags")


def read_samples(path: str | Path) -> Iterator[Found]:
    """Every entry of a JSON or JSON lines file: its sample, or the reason why it gives none.

    SourceError where the file cannot be read.
    """
    source = Source(path)
    for row in source.rows():
        yield _find_sample(row)


def _find_sample(row: Row) -> Found:
    fields = row.fields
    ident = next((str(fields[name]) for name in ("id", "key", "uid") if fields.get(name) is not None), row.name)
    turns = fields.get("conversations") or fields.get("messages")
    if isinstance(turns, list):
        return _from_turns(ident, turns)
    if isinstance(fields.get("instruction"), str):
        question = "\n".join(filter(None, (fields["instruction"], _text(fields.get("input")))))
        return _from_question(ident, question, _text(fields.get("output")))
    answer = next((_text(fields[name]) for name in ANSWER_FIELDS if fields.get(name)), "")
    raw, caption = _text(fields.get("raw")), next((_text(fields[n]) for n in CAPTION_FIELDS if fields.get(n)), "")
    tags = _tags(next((fields[name] for name in TAG_FIELDS if fields.get(name)), ()))
    if not (raw or caption or tags):
        return UNKNOWN
    return Sample(Sources(ident, raw, caption, tags, _text(fields.get("ocr"))), answer) if answer else NO_ANSWER


def _from_turns(ident: str, turns: list[Any]) -> Found:
    said = [
        (turn.get("from", turn.get("role")), _text(turn.get("value", turn.get("content"))))
        for turn in turns
        if isinstance(turn, dict)
    ]
    if len(said) < 2 or said[-1][0] not in ANSWERS or said[-2][0] not in QUESTIONS:
        return NO_ANSWER
    return _from_question(ident, said[-2][1], said[-1][1])


def _from_question(ident: str, question: str, answer: str) -> Found:
    if not answer:
        return NO_ANSWER
    found = find_sources(question)
    return Sample(Sources(ident, *found), answer) if found else NO_SOURCES


def find_sources(question: str) -> tuple[str, str, tuple[Tag, ...]] | None:
    """(raw text, synthetic caption, tags) in a question, by our fences or by labels: the last of each, in this order;
    None where one is missing."""
    question = question[-MOST:]
    fenced = dict(FENCES.findall(question))
    if fenced.keys() >= {"raw", "caption", "tags"}:
        raw, caption, tags = ("" if fenced[name] == "none" else fenced[name] for name in ("raw", "caption", "tags"))
        return raw, caption, _tags(tags)
    tags = _last(TAGS, question, len(question))
    caption = tags and _last(CAPTION, question, tags.start())
    raw = caption and _last(RAW, question, caption.start())
    if not (tags and caption and raw):
        return None
    return (
        _unwrap(question[raw.end() : caption.start()]),
        _unwrap(question[caption.end() : tags.start()]),
        _tags(_unwrap(question[tags.end() :])),
    )


def _last(label: re.Pattern[str], text: str, end: int) -> re.Match[str] | None:
    found = list(label.finditer(text, 0, end))
    return found[-1] if found else None


def _unwrap(text: str) -> str:
    """Without what joins it to the next label, and without brackets or quotes around all of it."""
    if joint := JOINTS.search(text, max(0, len(text) - 100)):
        text = text[: joint.start()]
    text = text.strip()
    while len(text) > 1 and PAIRS.get(text[0]) == text.rstrip(".")[-1:]:
        text = text.rstrip(".")[1:-1].strip()
    return text


def _tags(value: Any) -> tuple[Tag, ...]:
    names = re.split(r"[,;|\n]", value) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        return ()
    texts = [_text(name).strip(" .'\"") for name in names]
    return tuple(Tag(name) for name in dict.fromkeys(filter(None, texts)))


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""
