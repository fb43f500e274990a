"""README.md of this folder, made of open_clip_flags.py: `python -m rwkv_clip.training.open_clip_page > README.md`."""

from __future__ import annotations

from collections.abc import Iterator

from rwkv_clip.config import to_dict

from .open_clip_command import Word, other_defaults
from .open_clip_flags import ROWS, Answer, Row
from .settings import Settings

BEGIN = """# From open_clip

A training command of open_clip's may be pasted after ours: put `python -m rwkv_clip.training.main`, or `torchrun
--nproc_per_node 8 -m rwkv_clip.training.main --`, in the place of `python -m open_clip_train.main`. Before any work one
message says what becomes of each flag; nothing that changes what is learned is taken without a word. Where there is no
`--train-data`, but `--imagenet-val` or `--val-data`, the message has the command of our evaluation.

Flags are those of open_clip 3.3.0; others have their version. This page is made of `open_clip_flags.py`, by
`python -m rwkv_clip.training.open_clip_page`.
"""


def make_page() -> str:
    """The whole page."""
    return "\n".join([BEGIN, *_list_same(), "", *_list_others(), "", *_list_defaults()]) + "\n"


def _list_same() -> Iterator[str]:
    plain = [_name(row) for row in ROWS if row.answer == "same" and not _say(row)]
    yield f"**The same**: {', '.join(plain)}."


def _list_others() -> Iterator[str]:
    titles: dict[Answer, str] = {
        "same": "the same name, but",
        "renamed": "has another name",
        "not needed": "not needed, and left out",
        "not there": "not there, and refused",
    }
    for answer, title in titles.items():
        yield from (f"| {title} | |", "|---|---|") if answer == "same" else (f"| **{title}** | |",)
        for row in ROWS:
            if row.answer == answer and (answer != "same" or _say(row)):
                yield f"| {_name(row)} | {_say(row)} |"


def _say(row: Row) -> str:
    ours = f"`--{row.ours}`" if row.ours else ""
    values = [f"`{value}` is `{own}`" for value, own in row.becomes.items() if value != own]
    refused: dict[str, list[str]] = {}
    for value, why in row.refused.items():
        refused.setdefault(why, []).append(f"`{value}`")
    reasons = [f"{', '.join(given)}: {why}" for why, given in refused.items()]
    return "; ".join(filter(None, (ours, row.text, *values, *reasons))).replace("|", "\\|")


def _name(row: Row) -> str:
    return ", ".join(f"`--{name}`" for name in row.names.split()) + (f" ({row.versions})" if row.versions else "")


def _list_defaults() -> Iterator[str]:
    vit = " ".join(other_defaults([Word("--model", ("ViT-B-32",))], to_dict(Settings())))
    yield "**Other defaults.** What open_clip does where a command says nothing, in our flags:"
    yield f"`{vit}`; of a ResNet `--beta2 0.999 --eps 1e-8`. Its `--model` is RN50, and `--val-frequency` 1."


if __name__ == "__main__":
    print(make_page(), end="")
