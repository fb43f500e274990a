"""A command line of open_clip's trainer, understood flag by flag: what is the same passes, what has another name is
translated, what is not needed is dropped and what is not there is refused, all in one message before any work.

Nothing that changes what is learned is accepted without a word. Data: open_clip_flags.py.
"""

from __future__ import annotations

import ast
import difflib
import shlex
import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .open_clip_flags import BY_NAME, ROWS, UNSET, Row

EVALUATION = "python -m rwkv_clip.eval.main"


@dataclass(frozen=True)
class Word:
    """A flag as it was given, with its values; name: without dashes in front, - for _, "" for values before a flag."""

    flag: str
    values: tuple[str, ...]
    joined: bool = False  # by =

    @property
    def name(self) -> str:
        return self.flag.lstrip("-").replace("_", "-")

    @property
    def arguments(self) -> list[str]:
        if self.joined:
            return [f"{self.flag}={self.values[0]}", *self.values[1:]]
        return [*([self.flag] if self.flag else []), *self.values]

    def __str__(self) -> str:
        return " ".join([*([self.flag] if self.flag else []), *map(shlex.quote, self.values)])


def split_words(arguments: Sequence[str]) -> list[Word]:
    """Flags with the values that follow them: whatever does not begin with two dashes, so numbers may be negative."""
    words: list[Word] = []
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            flag, equals, value = argument.partition("=")
            words.append(Word(flag, (value,) if equals else (), bool(equals)))
        elif words:
            last = words[-1]
            words[-1] = Word(last.flag, (*last.values, argument), last.joined)
        else:
            words.append(Word("", (argument,)))
    return words


@dataclass
class Understood:
    """What became of a command line."""

    arguments: list[str] = field(default_factory=list)  # ours
    refused: list[tuple[str, str]] = field(default_factory=list)  # what was given, why not and what instead
    answers: list[tuple[str, str, str]] = field(default_factory=list)  # kind, what was given, what is said
    same: list[str] = field(default_factory=list)
    theirs: bool = False  # holds what only open_clip has

    def take(self, word: Word, row: Row, arguments: Sequence[str]) -> None:
        """Accept it as `arguments`."""
        self.arguments += arguments
        if list(arguments) != word.arguments:
            self.theirs = True
            self.answers.append(("renamed", str(word), shlex.join(arguments)))
        elif row.text:
            self.answers.append(("same", str(word), row.text))
        else:
            self.same.append(word.flag)

    def refuse(self, word: Word, text: str) -> None:
        self.refused.append((str(word), text))

    @property
    def problems(self) -> list[str]:
        """A line for each reason."""
        return [f"{', '.join(given)}: {text}" for text, given in _gather(self.refused).items()]


def understand(words: Sequence[Word], own: Collection[str]) -> Understood:
    """own: names of our flags, without dashes."""
    found = Understood()
    for word in words:
        row = BY_NAME.get(word.name)
        found.theirs |= row is not None and (row.answer != "same" or word.name not in own)
        if row is None:
            if not word.flag or word.name in own or word.name.startswith("tyro-"):  # its completion for shells
                found.arguments += word.arguments
            else:
                found.refuse(word, _suggest(word.name, own))
        elif row.answer == "not there":
            found.refuse(word, f"not there; {row.text}")
        elif row.answer == "not needed":
            found.answers.append(("not needed", str(word), row.text))
        elif (ours := row.ours_of(word.name)) not in own:
            found.refuse(word, f"not there in this version{f' (it would be --{ours})' if ours != word.name else ''}")
        elif word.name in _RULES:
            _RULES[word.name](found, word, row, words)
        else:
            _translate(found, word, row)
    return found


def _translate(found: Understood, word: Word, row: Row) -> None:
    value = word.values[0] if len(word.values) == 1 else ""
    if value in row.refused:
        return found.refuse(word, row.refused[value])
    if row.answer == "same" and value not in row.becomes:
        return found.take(word, row, word.arguments)
    name, *fixed = (row.ours or word.name).split()
    if row.becomes and value not in row.becomes and row.answer == "renamed":
        return found.refuse(word, f"not one of {', '.join(row.becomes)}; --{name} has other values, see --help")
    values = fixed or ([row.becomes[value]] if value in row.becomes else list(word.values))
    return found.take(word, row, [f"--{name}", *values])


def _suggest(name: str, own: Collection[str]) -> str:
    """Of flags that nobody has: the nearest that we have, or open_clip has, with our answer."""
    near = difflib.get_close_matches(name, [*own, *BY_NAME], n=1)
    if not near:
        return "unknown flag; --help shows all"
    row = BY_NAME.get(near[0])
    if row is None or row.answer == "same":
        return f"unknown flag; did you mean --{near[0]}?"
    meant = f"--{row.ours}" if row.ours else f"{row.answer}: {row.text}"
    return f"unknown flag; did you mean open_clip's --{near[0]} ({meant})?"


# ---- flags whose values need a look ----------------------------------------------------------------------------------


def _split_commas(found: Understood, word: Word, row: Row, _: Sequence[Word]) -> None:
    values = [row.becomes.get(part, part) for value in word.values for part in value.split(",") if part]
    parts = list(dict.fromkeys(part for value in values for part in value.split()))
    arguments = ["--report-to", *parts] if parts else []
    found.take(word, row, word.arguments if parts == list(word.values) else arguments)


def _name_a_schedule(found: Understood, word: Word, row: Row, words: Sequence[Word]) -> None:
    """open_clip's `const` warms up, which ours, `constant`, does not: it is a cool-down of no epochs."""
    if word.values != ("const",):
        return _translate(found, word, row)
    if any(other.name == "epochs-cooldown" for other in words):
        return found.refuse(word, "has no cool-down; leave --epochs-cooldown out, or use --lr-scheduler const-cooldown")
    return found.take(word, row, ["--schedule", "const-cooldown", "--epochs-cooldown", "0"])


def _crop(found: Understood, word: Word, row: Row, _: Sequence[Word]) -> None:
    """scale=(0.9,1.0) and ratio=(3/4,4/3) are crops; the rest is not there."""
    names = {"scale": "--crop-area", "ratio": "--crop-aspect"}
    given: dict[str, str] = dict(value.partition("=")[::2] for value in word.values)
    arguments: list[str] = []
    for key in (key for key in names if key in given):
        try:
            low, high = map(float, ast.literal_eval(given[key]))
        except (ValueError, TypeError, SyntaxError):
            return found.refuse(word, f"{key} is not a range such as '(0.9, 1.0)'")
        arguments += [names[key], f"{low:g}", f"{high:g}"]
    others = [key for key in given if key not in (*names, "use_timm")]
    if others:
        text = f"{', '.join(others)} not there; --auto-augment has timm's policies, and scale and ratio are read"
        return found.refuse(word, text)
    return found.take(word, row, arguments)


def _weights_follow(found: Understood, word: Word, row: Row, _: Sequence[Word]) -> None:
    if word.values:
        return found.take(word, row, word.arguments)
    text = "needs the path of weights of the image tower; theirs, a switch, fetches timm's from ImageNet"
    return found.refuse(word, text)


def _count_steps(found: Understood, word: Word, row: Row, _: Sequence[Word]) -> None:
    """Before 0.6 it was a fraction."""
    value = "".join(word.values)
    if value.startswith(("0.", ".")):
        return found.refuse(word, f"not a number of steps; use --warmup-fraction {value}")
    return found.take(word, row, word.arguments)


def _resume(found: Understood, word: Word, row: Row, _: Sequence[Word]) -> None:
    path = "".join(word.values)
    if path.endswith((".pt", ".pth", ".bin")):
        text = f"a file of weights starts a new run, --pretrained {shlex.quote(path)}; only runs of ours are resumed"
        return found.refuse(word, text)
    return found.take(word, row, word.arguments)


def _no_pipe(found: Understood, word: Word, row: Row, _: Sequence[Word]) -> None:
    if any(value.startswith("pipe:") for value in word.values):
        return found.refuse(word, "no command of a shell is run; name the files themselves")
    return found.take(word, row, word.arguments)


def _contrastive(found: Understood, word: Word, row: Row, _: Sequence[Word]) -> None:
    name = "".join(word.values)
    if name.lower().startswith("coca"):
        return found.refuse(word, "CoCa's captioning is not trained here; name a model without it, such as ViT-L-14")
    return found.take(word, row, word.arguments)


_RULES = {
    "report-to": _split_commas,
    "lr-scheduler": _name_a_schedule,
    "aug-cfg": _crop,
    "pretrained-image": _weights_follow,
    "warmup": _count_steps,
    "resume": _resume,
    "train-data": _no_pipe,
    "val-data": _no_pipe,
    "model": _contrastive,
}


# ---- what is said ----------------------------------------------------------------------------------------------------


TITLES = {
    "renamed": "has another name",
    "not needed": "not needed",
    "same": "the same name, but",
}


def describe(
    found: Understood, words: Sequence[Word], defaults: Mapping[str, Any] | None, program: str = "train"
) -> str:
    """The message, each flag once. defaults: of our settings by name, to be compared with open_clip's, or None.
    program: what stands before the flags."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines = ["A command of open_clip's. Its flags here:"]
    for kind, title in TITLES.items():
        rows = _gather([(given, said) for answer, given, said in found.answers if answer == kind])
        lines += [f"  {title}"] if rows else []
        for said, given in rows.items():
            text = f"{', '.join(given)}{' -> ' if kind == 'renamed' else ': '}{said}"
            lines += _wrap("    ", text, width)
    if found.same:
        lines += _wrap("  the same: ", " ".join(dict.fromkeys(found.same)), width)
    if defaults and (others := other_defaults(words, defaults)):
        lines += _wrap("  not given, and another default there; to have it, add: ", shlex.join(others), width)
    if found.refused or any(kind == "renamed" for kind, *_ in found.answers):
        title = "in our words, without what is refused below" if found.refused else "in our words"
        lines += [f"  {title}", f"    {program} {shlex.join(found.arguments)}"]
    return "\n".join(lines)


def _gather(rows: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """What is said -> what it is said of."""
    found: dict[str, list[str]] = {}
    for given, said in rows:
        found.setdefault(said, []).append(given)
    return found


def _wrap(title: str, text: str, width: int) -> list[str]:
    indent = " " * (6 if title.isspace() else 4)
    return textwrap.wrap(title + text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def other_defaults(words: Sequence[Word], defaults: Mapping[str, Any]) -> list[str]:
    """Flags of ours, with values, that give what open_clip has where a command says nothing."""
    given = {BY_NAME[word.name].ours_of(word.name) if word.name in BY_NAME else word.name for word in words}
    theirs = {row.ours_of(row.names): row.default for row in ROWS if row.default is not UNSET}
    if "aug-cfg" not in {word.name for word in words}:
        theirs |= {"crop-area": [0.9, 1.0], "crop-aspect": [0.75, 1.3333], "flip": 0.0}
    theirs |= {"val-frequency": 1} if "val-data" in given else {}
    theirs |= {"zeroshot-frequency": 2} if given & {"imagenet-val", "imagenet-v2"} else {}
    model = next(("".join(word.values) for word in words if word.name == "model"), theirs["model"])
    if "vit" not in model.lower():  # open_clip_train.params.get_default_params
        theirs |= {"beta2": 0.999, "eps": 1e-8}
    if any(word.name == "opt" and "timm" in "".join(word.values) for word in words):
        theirs = {name: value for name, value in theirs.items() if name not in ("lr", "beta1", "beta2", "eps")}
    arguments: list[str] = []
    for name, value in theirs.items():
        if name not in given and defaults.get(name.replace("-", "_"), value) != value:
            parts = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *(f"{x:g}" if isinstance(x, float) else str(x) for x in parts)]
    return arguments


def evaluation_commands(words: Sequence[Word]) -> list[str]:
    """Commands that do what open_clip's trainer does without training data."""
    given = {word.name: " ".join(word.values) for word in words}
    model, tag = given.get("model", "RN50"), given.get("pretrained", "")
    weights = given.get("resume") or tag
    if "/" in weights or "." in weights:
        checkpoint = ["--checkpoint", weights] + ([] if weights.startswith("hf-hub:") else ["--model", model])
    else:
        checkpoint = ["--checkpoint", f"open_clip:{model}" + (f":{tag}" if tag else "")]
    options = [part for name in ("batch-size", "workers") if name in given for part in (f"--{name}", given[name])]
    lines = []
    for name, dataset in (("imagenet-val", "imagenet"), ("imagenet-v2", "imagenetv2")):
        if name in given:
            command = ["classification", *checkpoint, "--dataset", dataset, "--data", given[name], *options]
            lines.append(f"{EVALUATION} {shlex.join(command)}")
    if path := given.get("val-data"):
        if not path.endswith((".jsonl", ".json", ".rec")):
            lines.append(f"python data2rec.py {shlex.quote(path)} out/val")
            path = "out/val.rec"
        lines.append(f"{EVALUATION} {shlex.join(['retrieval', *checkpoint, '--data', path, *options])}")
    return lines
