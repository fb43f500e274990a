"""Prompts are data: a JSON file says what a language model is told about a row, and what it has to answer.

The fixed part comes first and the row last, so that a server keeps the beginning of all prompts (prefix caching). A
row's texts are untrusted: cleaned, cut, without the signs of fences, and put in once, never searched.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rwkv_clip.files import parse_json, read_bytes

from .answers import Answer, BadAnswer, check_schema, make_line, read_object, read_plain
from .cleaning import untrusted
from .sources import Sources
from .tokens import CONTEXT, fits

SHIPPED = Path(__file__).parent / "prompts"
RENDERING = 1  # raise when the code changes what messages are made of the same file
MOST_TEXT, MOST_TAG, MOST_FILE = 512, 64, 1 << 20  # characters of a text and of a tag, bytes of a file
# ASCII without the two characters that JSON has to escape: llama.cpp's grammars then cannot end in an invalid answer.
ASCII = r"^[A-Za-z0-9 ,.;:'()&%/-]{20,300}$"
_HINTS = ("repair", "plain", "long")
_PLACE = re.compile(r"\{(raw|caption|tags|ocr|reason)\}")
_KEYS = ("name", "version", "about", "system", "user", "none", "most_tags", "schema", "answer", "hints")


@dataclass(frozen=True)
class Prompt:
    """One prompt. system, user: templates, in which {raw}, {caption}, {tags} and {ocr} are places; other braces are
    themselves. none: what stands for a source that is missing. schema: of the JSON to be answered, None for plain text;
    answer: its key of the text. hints: what is said after an answer that could not be used (`repair`, `plain`, `long`).
    """

    name: str
    version: int
    system: str
    user: str
    none: str
    most_tags: int
    schema: dict[str, Any] | None
    answer: str
    hints: Mapping[str, str]

    @classmethod
    def load(cls, name_or_path: str | Path) -> Prompt:
        """A shipped prompt by its name (`grounded`, `paper`) or one of a JSON file in the same form.

        ValueError or DamagedError with file, key and remedy for what is none.
        """
        shipped = {path.stem: path for path in SHIPPED.glob("*.json")}
        path = shipped.get(str(name_or_path), Path(name_or_path))
        if not path.is_file():
            raise ValueError(f"prompt: {name_or_path} is no file and none of {', '.join(sorted(shipped))}")
        return _build(parse_json(read_bytes(path, MOST_FILE), str(path)), str(path))

    def ascii(self) -> Prompt:
        """The same, whose schema allows text in plain ASCII only: for servers that fail on free text. Names such as
        Müller lose their accents."""
        if self.schema is None or not isinstance(self.schema.get("properties", {}).get(self.answer), dict):
            return self
        schema = copy.deepcopy(self.schema)
        schema["properties"][self.answer]["pattern"] = ASCII
        return replace(self, schema=schema)

    @property
    def sha256(self) -> str:
        """Of all that decides messages and what is taken of an answer."""
        what = {key: getattr(self, key) for key in _KEYS if key not in ("about", "name", "version")}
        what |= {"rendering": RENDERING, "most": [MOST_TEXT, MOST_TAG]}
        return hashlib.sha256(json.dumps(what, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def messages(self, sources: Sources, hint: str | None = None) -> list[dict[str, str]]:
        """Chat messages about a row: [system,] user. hint: said after the row, where an answer was of no use."""
        values = {
            "raw": untrusted(sources.raw, MOST_TEXT),
            "caption": untrusted(sources.caption, MOST_TEXT),
            "tags": ", ".join(filter(None, (untrusted(tag.name, MOST_TAG) for tag in sources.tags[: self.most_tags]))),
            "ocr": untrusted(sources.ocr, MOST_TEXT),
        }
        user = _fill(self.user, {key: value or self.none for key, value in values.items()})
        user = f"{user}\n\n{hint}" if hint else user
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": user}]

    def hint(self, reason: str, plain: bool = False) -> str:
        """What to say after an answer that was of no use. reason: as of BadAnswer. plain: JSON is wanted no more."""
        kind = "plain" if plain else "long" if reason in (_TOO_LONG, "too long", "cut at max_tokens") else "repair"
        return _fill(self.hints[kind], {"reason": reason})

    def parse(self, content: str, plain: bool = False) -> str:
        """The text in a model's words. plain: JSON is no longer asked for. BadAnswer with the reason where none is."""
        if self.schema is None or plain:
            return make_line(read_plain(content, self.answer))
        return make_line(read_object(content, self.schema)[self.answer])

    def read(self, answer: Answer, plain: bool = False, context: int = CONTEXT) -> str:
        """The text of an answer, which fits `context` CLIP tokens. BadAnswer with the reason where there is none."""
        if answer.problem:
            raise BadAnswer(answer.problem)
        text = self.parse(answer.content, plain)
        if not fits(text, context):
            raise BadAnswer(_TOO_LONG)
        return text


_TOO_LONG = "over the context"


def _fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its places filled; what is filled in is not looked at again."""
    return _PLACE.sub(lambda match: values.get(match[1], match[0]), template)


def _build(content: Any, where: str) -> Prompt:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: no object; see {SHIPPED / 'grounded.json'} for the form")
    if unknown := sorted(content.keys() - set(_KEYS)):
        raise ValueError(f"{where}: {unknown[0]!r} is no key of a prompt; use {', '.join(_KEYS)}")
    texts = {
        key: _join(content.get(key, ""), f"{where}: {key}") for key in ("name", "system", "user", "none", "answer")
    }
    if not {"{raw}", "{caption}"} & set(re.findall(r"\{\w+\}", texts["user"])):
        raise ValueError(f"{where}: user has no {{raw}} and no {{caption}}; say where the texts of a row stand")
    if places := set(_PLACE.findall(texts["system"])):
        raise ValueError(
            f"{where}: system has {{{min(places)}}}; the texts of a row stand in user, after all that is fixed"
        )
    schema, answer = content.get("schema"), texts["answer"] or "text"
    if schema is not None:
        check_schema(schema, f"{where}: schema")
        inner = schema.get("properties", {}).get(answer, {})
        if inner.get("type") != "string" or answer not in schema.get("required", ()):
            raise ValueError(f"{where}: schema does not require a string {answer!r}, the key that `answer` names")
    hints = content.get("hints", {})
    if not isinstance(hints, dict) or set(hints) != set(_HINTS):
        raise ValueError(f"{where}: hints are to have the keys {', '.join(_HINTS)}")
    numbers = content.get("version", 1), content.get("most_tags", 20)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise ValueError(f"{where}: version and most_tags are to be whole numbers from 0 on")
    return Prompt(
        name=texts["name"] or Path(where).stem,
        version=numbers[0],
        system=texts["system"],
        user=texts["user"],
        none=texts["none"] or "none",
        most_tags=numbers[1],
        schema=schema,
        answer=answer,
        hints={key: _join(value, f"{where}: hints.{key}") for key, value in hints.items()},
    )


def _join(value: Any, where: str) -> str:
    """A text, or the lines of one."""
    lines = [value] if isinstance(value, str) else value
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{where} is neither a text nor a list of lines")
    return "\n".join(lines)
