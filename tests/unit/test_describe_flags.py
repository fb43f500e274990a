"""Flags of the commands: none is lost or renamed by their groups, every one is explained, and values arrive."""

from __future__ import annotations

import dataclasses

import pytest

from rwkv_clip.describe.commands import COMMANDS
from rwkv_clip.describe.flags import group, parse_flags

KINDS = {name: command.settings for name, command in COMMANDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_every_setting_is_a_flag_with_a_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_flags(KINDS, [name, "--help"], "describe", "")
    told = capsys.readouterr().out
    assert ended.value.code == 0
    for setting in dataclasses.fields(KINDS[name]):
        assert f"--{setting.name.replace('_', '-')} " in told.replace(",", " ")


@pytest.mark.parametrize(
    ("name", "needed"), [("run", {"output": "o"}), ("instruct", {"folder": "f"}), ("demo", {"output": "o"})]
)
def test_defaults_are_those_of_the_settings(name, needed):
    flags = [part for key, value in needed.items() for part in (f"--{key}", value)]
    assert parse_flags(KINDS, [name, *flags], "describe", "") == KINDS[name](**needed)


def test_values_arrive_whichever_group_a_flag_is_in():
    flags = "--output o --caption-model b --device cpu --texts raw=alt synthetic=blip --to jsonl --no-schema --limit 3"
    found = parse_flags(KINDS, ["run", *flags.split()], "describe", "")
    expected = {"caption_model": "b", "device": "cpu", "texts": ("raw=alt", "synthetic=blip"), "to": ("jsonl",)}
    assert found == KINDS["run"](output="o", schema=False, limit=3, **expected)


def test_a_setting_without_a_help_is_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Settings:
        silent: int = 1

    with pytest.raises(AssertionError, match="silent"):
        group(Settings)
