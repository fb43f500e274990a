"""README and its neighbours are true: what they link to and show is there, and the commands that they give exist."""

import contextlib
import importlib.util
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import rwkv_clip

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
CURRENT = [
    README,
    ROOT / "shell" / "README.md",
    ROOT / "src" / "README.md",
    *(ROOT / "src" / room / "README.md" for room in ("describe", "search")),
]
DOCUMENTS = [*CURRENT, ROOT / "tests" / "README.md", ROOT / "src" / "CHANGELOG.md"]  # a history may name what is gone
RUN = ROOT / "tests" / "parity" / "golden_ckpt" / "v1-0.5.0"

# Flags that are not ours to check: torchrun's, sbatch's, clip_benchmark's, pip's.
FOREIGN = {"--nproc_per_node", "--logs-specs", "--shutdown-timeout", "--signals-to-handle", "--max-restarts", "--nodes"}
FOREIGN |= {"--model_type", "--dataset_root", "--task", "--recall_k", "--ntasks", "--structured-outputs-config"}
FOREIGN |= {"--embeddings", "--embeddings_folder", "--index_folder"}
TASKS = ("retrieval", "classification", "linear-probe", "features", "search", "report")
COMMANDS = [
    ("rwkv_clip.training.main",),
    ("rwkv_clip.training.profile_data",),
    ("rwkv_clip.demo",),
    *(("rwkv_clip.eval.main", task) for task in TASKS),
    *(("rwkv_clip.describe", command) for command in ("run", "caption", "tag", "instruct", "doctor", "demo")),
    *(("rwkv_clip.search", command) for command in ("index", "serve", "query", "export")),
    ("data2rec",),
]

by_name = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def test_readme_is_short():
    assert 120 <= len(README.read_text().splitlines()) <= 150


@by_name
def test_links_and_pictures_are_there(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith("http"):
            file, _, heading = target.partition("#")
            linked = path.parent / file
            assert linked.exists(), f"{path.name} links to {target}"
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.M) if heading else []
            assert not heading or heading in [title.lower().replace(" ", "-") for title in titles], target


def test_every_picture_is_shown():
    shown = "".join(path.read_text() for path in DOCUMENTS)
    assert all(f"figure/{path.name})" in shown for path in (ROOT / "figure").glob("*.png"))


def test_example_in_python_runs(tmp_path, monkeypatch, capsys):
    """With a small model in the place of the large one."""
    (code,) = re.findall(r"```python\n(.+?)```", README.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    torch.save(rwkv_clip.create_model("RWKV-CLIP-Ti-8").state_dict(), "rwkv_clip_b32.pt")
    Image.new("RGB", (80, 60), "brown").save("dog.jpg")
    code = code.replace("RWKV-CLIP-B-32", "RWKV-CLIP-Ti-8").replace("logs/b32", str(RUN))
    exec(compile(code, "README.md", "exec"), {})
    assert "tensor([[" in capsys.readouterr().out


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_files_that_are_named_exist(path):
    text = path.read_text()
    for script in re.findall(r"(?:bash|sbatch.*?|python) ([\w./-]+\.(?:sh|py))\b", text):
        assert (ROOT / script).exists(), script
    for module in set(re.findall(r"-m (rwkv_clip[\w.]*)", text)):
        assert importlib.util.find_spec(module), module
    for name in set(re.findall(r"`((?:rwkv_clip|training|eval)/[\w./-]*[\w/])`", text)):
        assert "NAME" in name or (ROOT / "src" / name).exists(), name
    for name in set(re.findall(r"`((?:unit|faults|dist|parity)/test_\w+\.py)", text)):
        assert (ROOT / "tests" / name).exists(), name


def test_rooms_that_are_drawn_exist():
    drawn = (ROOT / "src" / "README.md").read_text().split("```")[1]
    room = ""
    for line in drawn.strip().splitlines():
        name = line.split()[0]
        room = name if not line.startswith(" ") else room
        place = ROOT / "src" / (name if name == room else room + name)
        assert place.exists(), place


def help_of(command: tuple[str, ...], monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", [command[0], *command[1:], "--help"])
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        if command[0] == "data2rec":
            runpy.run_path(str(ROOT / "data2rec.py"), run_name="__main__")
        else:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    return shown.getvalue()


def test_flags_that_are_named_exist(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    flags = set()
    for command in COMMANDS:
        own = set(re.findall(r"--[a-z][\w.-]*\w", help_of(command, monkeypatch)))
        assert len(own) > 1, command
        flags |= own
    for bench in [*(ROOT / "tests" / "bench").glob("*.py"), ROOT / "tests" / "conftest.py"]:
        flags |= set(re.findall(r'"(--[a-z][\w-]*)"', bench.read_text()))
    for path in CURRENT:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", path.read_text()))
        assert named - FOREIGN <= flags, f"{path.relative_to(ROOT)}: {sorted(named - FOREIGN - flags)}"
