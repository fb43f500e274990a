"""What pip installs: every file of src/ at its place, typed, and commands that exist."""

import importlib
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOMES = {
    "rwkv_clip": "",
    "training": "training",
    "eval": "eval",
    "describe": "describe",
    "search": "search",
}  # folder of src -> folder below rwkv_clip


def test_every_file_of_the_sources_is_installed(tmp_path):
    steps = ["build", "--build-base", str(tmp_path / "base"), "build_py", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run([sys.executable, "setup.py", "-q", *steps], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installed = {path.relative_to(tmp_path / "lib") for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    expected = set()
    for folder, home in HOMES.items():
        for path in (ROOT / "src" / folder).rglob("*"):
            if path.is_file() and (path.suffix not in (".pyc", ".md") or path.parent.name == "bert-chinese"):
                expected.add(Path("rwkv_clip", home, path.relative_to(ROOT / "src" / folder)))
    assert installed == expected and Path("rwkv_clip/py.typed") in installed


def test_commands_exist(monkeypatch):
    given: dict = {}
    monkeypatch.setattr("setuptools.setup", lambda **settings: given.update(settings))
    runpy.run_path(str(ROOT / "setup.py"))
    scripts = given["entry_points"]["console_scripts"]
    names = ("train", "eval", "data", "describe", "search")
    assert [line.split(" = ")[0] for line in scripts] == [f"rwkv-clip-{name}" for name in names]
    for line in scripts:
        module, _, function = line.split(" = ")[1].partition(":")
        assert callable(getattr(importlib.import_module(module), function))
