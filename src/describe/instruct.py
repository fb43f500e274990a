"""The training set of a composer of one's own: sources -> answers that an LLM gave and that were accepted.

Every sample has exactly the messages that a composer with the same prompt sends, and the folder says by a hash which
prompt that was. Rows with many tags are chosen, as for the paper's 70,000; its rule is not published, so this one is
ours: a weighted sample without replacement in which a row counts as much as its rarest tag is rare.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rwkv_clip.config import load_json, ranged, to_dict
from rwkv_clip.files import hash_file, write_json, write_whole

from .select import Selection
from .sources import Sources, find_sources

ABOUT, INFO, YAML, SCRIPT = "about.json", "dataset_info.json", "llama_factory.yaml", "train_composer.py"
STUDENT = Path(__file__).parent / "student"
RULES = "rules"
Message = dict[str, str]


class Template(Protocol):
    """What is asked of a prompt, see `prompt.Prompt`: the messages of a row, a hash of all that decides them, and the
    JSON schema of an answer with its key of the text, or None for plain text."""

    @property
    def sha256(self) -> str: ...

    @property
    def schema(self) -> dict[str, Any] | None: ...

    @property
    def answer(self) -> str: ...

    def messages(self, sources: Sources) -> list[Message]: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """What a composer is given, and the text that it should write."""

    sources: Sources
    text: str


@dataclass(frozen=True, kw_only=True)
class InstructSettings:
    """Which rows become samples, and of which model the written recipes speak."""

    min_tags: int = ranged(5, minimum=0)
    """Fewest tags of a sample."""
    rows: int | None = ranged(70_000, minimum=1)
    """Most samples; rows with rare tags are preferred. As many as the paper has."""
    include_rules: bool = False
    """Take texts of the rules composer, too, which is enriched concatenation and no teacher."""
    seed: int = 0
    """Another one chooses other rows."""
    student: str = "MODEL"
    """Model to fine-tune, as it is written into the recipes."""
    template: str = "TEMPLATE"
    """Its chat template by LLaMA-Factory's name, as it is written into the recipe."""

    def problems(self) -> list[str]:
        """Nothing that the limits do not say."""
        return []


@dataclass
class InstructReport:
    """What became of the rows: rows = samples + all of `dropped`."""

    rows: int = 0
    samples: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    folder: str = ""

    def __str__(self) -> str:
        reasons = "".join(f"\n  {count:>9,} {reason}" for reason, count in self.dropped.most_common())
        dropped = f"{self.dropped.total():,} left out{reasons}"
        return f"{self.rows:,} rows: {self.samples:,} samples in {self.folder}, {dropped}"


Found = Sample | str  # or the reason why there is none
Read = Callable[[], Iterable[Found]]  # from the first one, as often as it is called, always the same


# ---- rows -> samples -------------------------------------------------------------------------------------------------


def find_sample(row: Mapping[str, Any], settings: InstructSettings, selection: Selection) -> Found:
    """The sample of a merged row of a job, or the reason why it is none."""
    composer, engine = row.get("composer"), row.get("engine")
    if engine != composer:
        return f"fell back to {engine}"
    if composer == RULES and not settings.include_rules:
        return "written by rules"
    if not (text := row.get("generated")):
        return "no text"
    return selection.judge(row) or Sample(find_sources(row), text)


# ---- the choice ------------------------------------------------------------------------------------------------------


def choose(read: Read, settings: InstructSettings, report: InstructReport) -> Callable[[], Iterator[Sample]]:
    """Which samples are taken, in their order; what is returned reads them again. Counts all in the report.

    Where there are more than `rows`, a weighted sample without replacement, weight 1 / (samples that have the rarest
    of its tags): the largest of log(u) / weight (Efraimidis and Spirakis 2006), u a hash of seed and id. The memory is
    that of `rows` numbers and of all names of tags.
    """
    counts: Counter[str] = Counter()
    eligible = 0
    for found in read():
        report.rows += 1
        if reason := _find_reason(found, settings):
            report.dropped[reason] += 1
        elif isinstance(found, Sample):
            eligible += 1
            counts.update(_names(found))
    limit = settings.rows if settings.rows is not None else eligible

    def select() -> Iterator[tuple[int, Sample]]:
        for place, found in enumerate(read()):
            if isinstance(found, Sample) and not _find_reason(found, settings):
                yield place, found

    taken: set[int] | None = None
    if eligible > limit:
        keys = ((_key(sample, counts, settings.seed), -place) for place, sample in select())
        taken = {-place for _, place in heapq.nlargest(limit, keys)}
        report.dropped[f"beyond the {limit:,} that are wanted"] = eligible - limit
    report.samples = min(eligible, limit)
    return lambda: (sample for place, sample in select() if taken is None or place in taken)


def _find_reason(found: Found, settings: InstructSettings) -> str:
    if isinstance(found, str):
        return found
    if len(_names(found)) < settings.min_tags:
        return f"fewer than {settings.min_tags} tags"
    return "" if found.text.strip() else "no text"


def _names(sample: Sample) -> set[str]:
    return {tag.name.lower() for tag in sample.sources.tags}


def _key(sample: Sample, counts: Counter[str], seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\0{sample.sources.id}".encode("utf-8", "surrogatepass")).digest()
    u = (int.from_bytes(digest[:8], "big") + 0.5) / 2**64
    return math.log(u) * min((counts[name] for name in _names(sample)), default=1)


# ---- files -----------------------------------------------------------------------------------------------------------


def write_training_set(
    read: Read, folder: Path, prompt: Template, settings: InstructSettings, prompt_name: str = ""
) -> InstructReport:
    """Write alpaca.jsonl, sharegpt.jsonl, messages.jsonl (all the same samples), dataset_info.json, llama_factory.yaml
    and train_composer.py into `folder`; about.json last, with the hash of the prompt.

    ValueError where no sample is left, and OSError when a file cannot be written.
    """
    report = InstructReport(folder=str(folder))
    chosen = choose(read, settings, report)
    if not report.samples:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.most_common()) or "no rows"
        raise ValueError(
            f"instruct: no sample is left of {report.rows:,} rows ({reasons}); compose first, or lower --min-tags"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    forms = {"alpaca": to_alpaca, "sharegpt": to_sharegpt, "messages": to_messages}
    for name, form in forms.items():
        lines = (_to_line(form(to_chat(one, prompt))) for one in chosen())
        write_whole(folder / f"{name}.jsonl", lines)
    examples = "history" in to_alpaca(to_chat(next(chosen()), prompt))
    write_json(folder / INFO, describe_files(prompt.sha256, examples))
    for name in (YAML, SCRIPT):
        text = (STUDENT / f"{name}.txt").read_text(encoding="utf-8")
        values = {"@FOLDER@": shlex.quote(str(folder)), "@MODEL@": settings.student, "@TEMPLATE@": settings.template}
        for mark, value in values.items():
            text = text.replace(mark, value)
        write_whole(folder / name, [text.encode()])
    about = {
        "prompt": prompt_name,
        "prompt_sha256": prompt.sha256,
        "rows": report.rows,
        "samples": report.samples,
        "dropped": dict(report.dropped),
        "settings": to_dict(settings),
        "sha256": {f"{name}.jsonl": hash_file(folder / f"{name}.jsonl") for name in forms},
    }
    write_json(folder / ABOUT, about)
    return report


def to_chat(sample: Sample, prompt: Template) -> list[Message]:
    """What is sent about the sample, and the answer as the prompt wants it: the text, or JSON with it alone.

    ValueError where the prompt's schema wants more than a text.
    """
    text = _read_text(sample.text, prompt.answer)
    if prompt.schema is not None:
        if set(prompt.schema.get("required", [prompt.answer])) != {prompt.answer}:
            raise ValueError(f"prompt: its schema wants more than {prompt.answer!r}, which samples do not have")
        text = json.dumps({prompt.answer: text}, ensure_ascii=False)
    return [*prompt.messages(sample.sources), {"role": "assistant", "content": text}]


def _read_text(text: str, key: str) -> str:
    """The text of an answer of others that is JSON already."""
    if text.startswith("{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if isinstance(value, dict) and isinstance(value.get(key), str):
            return value[key]
    return text


def _to_line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def to_messages(messages: list[Message]) -> dict[str, Any]:
    """As OpenAI's files and TRL have them: {messages: [{role, content}]}."""
    return {"messages": messages}


def to_sharegpt(messages: list[Message]) -> dict[str, Any]:
    """{conversations: [{from: human or gpt, value}], system}."""
    system, turns = _split(messages)
    names = {"user": "human", "assistant": "gpt"}
    return {
        "conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns],
        "system": system,
    }


def to_alpaca(messages: list[Message]) -> dict[str, Any]:
    """{instruction, input, output, system}; history [[question, answer]] where the prompt has examples.

    All of a question is the instruction: LLaMA-Factory would put a line end before an input.
    """
    system, turns = _split(messages)
    sample: dict[str, Any] = {"instruction": turns[-2]["content"], "input": "", "output": turns[-1]["content"]}
    sample["system"] = system
    if turns[:-2]:
        sample["history"] = [[a["content"], b["content"]] for a, b in zip(turns[:-2:2], turns[1:-2:2])]
    return sample


def _split(messages: list[Message]) -> tuple[str, list[Message]]:
    """(system prompt, questions and answers in turn). ValueError for other orders, which the formats cannot hold."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2) or not turns:
        order = ", ".join(message["role"] for message in messages[:-1])
        raise ValueError(f"prompt: its messages are {order}; use one system message, then user and assistant in turn")
    return system, turns


def describe_files(prompt_sha256: str, examples: bool = False) -> dict[str, Any]:
    """LLaMA-Factory's dataset_info.json, with the hash of the prompt, which it does not read. examples: whether the
    prompt has some, so that alpaca's samples have a history.

    The messages are also in its sharegpt formatting, by tags: what it calls openai has rules for system prompts and
    tools of its own.
    """
    roles = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    columns |= {"history": "history"} if examples else {}
    infos: dict[str, dict[str, Any]] = {
        "composer_alpaca": {"file_name": "alpaca.jsonl", "formatting": "alpaca", "columns": columns},
        "composer_sharegpt": {
            "file_name": "sharegpt.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "system": "system"},
            "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
        },
        "composer_messages": {
            "file_name": "messages.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {**roles, "system_tag": "system"},
        },
    }
    return {name: {**info, "prompt_sha256": prompt_sha256} for name, info in infos.items()}


def check_template(folder: str | Path, prompt: Template) -> None:
    """ValueError unless `prompt` is the one that the training set in `folder` was written with; names both hashes."""
    path = Path(folder) / ABOUT
    about = load_json(path)
    known = about.get("prompt_sha256") if isinstance(about, dict) else None
    if not isinstance(known, str):
        raise ValueError(f"student_of: {path} has no prompt_sha256; give the folder that `instruct` wrote")
    if known != prompt.sha256:
        name = about.get("prompt") or "another prompt"
        raise ValueError(
            f"student_of: the student of {folder} was trained with {name}, sha256 {known}; this run's prompt has "
            f"{prompt.sha256}; give the same --prompt"
        )
