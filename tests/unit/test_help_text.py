"""--help of training: every flag once, in its group, in any width, and quickly."""

import re
import subprocess
import sys
from collections import Counter

import pytest

from rwkv_clip.training.command_line import list_flags, parse_flags, read_command_line
from rwkv_clip.training.help_text import EXAMPLES, list_groups, show_help
from rwkv_clip.training.settings import Settings

FLAG = re.compile(r"^  (--[\w.-]+)", re.M)


def test_every_flag_is_shown_once_and_preset_with_them():
    shown = Counter(flag.name for _, flags in list_groups().values() for flag in flags)
    assert set(shown.values()) == {1} and shown["--preset"] == 1
    names = {name.removeprefix("no-") for name in list_flags(Settings)}
    assert {name.removeprefix("--").removeprefix("no-") for name in shown} == names | {"preset"}
    assert FLAG.findall(show_help()) == list(shown)


def test_what_is_shown_is_read():
    """The name of each flag, with a value of the kind that it shows."""
    values = {"N": "1", "X": "1", "TEXT": "x", "..": ""}
    for _, flags in list_groups().values():
        for flag in flags:
            if flag.name != "--preset":
                given = [values.get(part, part.split("|")[0]) for part in flag.metavar.split()]
                parse_flags([flag.name, *filter(None, given)], Settings())


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_lines_fit(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = show_help().splitlines()
    assert columns < 80 or max(map(len, lines)) <= min(columns, 120)
    first = lines[: next(i for i, line in enumerate(lines) if line.startswith("run: "))]
    assert columns < 80 or len(first) <= 32, "usage, examples and groups on one screen"
    assert all(f"  {name} " in "\n".join(first) for name in list_groups())


def test_groups_can_be_asked_for(capsys):
    groups = list_groups()
    assert [*groups][:8] == ["run", "data", "model", "objective", "optimizer", "parallel", "safety", "log"]
    with pytest.raises(SystemExit) as end:
        read_command_line(["--preset", "demo", "--help", "safety"])
    assert end.value.code == 0
    assert FLAG.findall(capsys.readouterr().out) == [flag.name for flag in groups["safety"][1]]
    with pytest.raises(SystemExit):
        read_command_line(["--help", "model", "--preset=demo"])
    assert "[RWKV-CLIP-Ti-8]" in capsys.readouterr().out, "the preset's values"
    with pytest.raises(ValueError, match=r"help: 'saftey' is no group; there are run, data"):
        read_command_line(["--help", "saftey"])


def test_examples_are_read():
    for _, command in EXAMPLES:
        settings = read_command_line(command.split("rwkv_clip.training.main ")[1].split())
        assert settings.data.train_data == "out/train"


def test_help_loads_little():
    """Without what training imports besides torch; and a reader that has gone is no error."""
    code = (
        "import runpy, sys; sys.argv = ['main', '--help']\n"
        "try: runpy.run_module('rwkv_clip.training.main', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torchvision', 'open_clip', 'timm', 'torch.distributed.fsdp', 'torch._dynamo', 'safetensors'}\n"
        "bad = heavy & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m rwkv_clip.training.main"), done.stderr
    command = f"{sys.executable} -m rwkv_clip.training.main --help | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done
