"""The house keeps its shape: who may import whom, no unpickling, no environment reads outside dist.py."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"
LIBRARY, TRAINING, EVAL = SRC / "rwkv_clip", SRC / "training", SRC / "eval"
FILES = sorted(SRC.rglob("*.py"))

# Rooms of the library, lowest first; a file imports from its own room and lower ones only.
ROOMS = [
    {"errors"},
    {"config", "files"},
    {"processes", "device"},
    {"dist", "tokenizer", "metrics", "serialization", "checkpoint"},
    {"ops", "data", "losses"},
    {"transform"},
    {"models"},
    {"factory", "features", "demo"},
    {"retrieval"},
    {"__init__"},
]


def imports_of(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in it."""
    package = ["rwkv_clip", *path.relative_to(SRC).parent.parts]
    if package[1] == "rwkv_clip":
        package.pop(1)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = (start + (node.module or "")).rstrip(".")
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def room_of(name: str) -> int:
    return next(level for level, room in enumerate(ROOMS) if name in room)


@pytest.mark.parametrize("path", [p for p in FILES if LIBRARY in p.parents], ids=lambda p: str(p.relative_to(SRC)))
def test_library_imports_downwards_only(path):
    parts = path.relative_to(LIBRARY).parts
    own = room_of(parts[0].removesuffix(".py"))
    for name in imports_of(path):
        room = LIBRARY / name.split(".")[1] if name.startswith("rwkv_clip.") else LIBRARY / "nothing"
        if room.is_dir() or room.with_suffix(".py").exists():
            assert room_of(name.split(".")[1]) <= own, f"{path.name} imports {name}"
        assert not name.startswith(("rwkv_clip.training", "rwkv_clip.eval")), f"{path.name} imports {name}"


@pytest.mark.parametrize("folder, other", [(TRAINING, "rwkv_clip.eval"), (EVAL, "rwkv_clip.training")])
def test_training_and_eval_do_not_know_each_other(folder, other):
    for path in folder.rglob("*.py"):
        assert not [name for name in imports_of(path) if name.startswith(other)], path


OPTIONAL = {
    "nvidia.dali": {"dali_loader.py"},
    "pyarrow": {"parquet.py"},
    "wandb": {"log.py"},
    "faiss": {"search.py"},
    "lmdb": set(),
    "transformers": set(),
}


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_packages_stay_in_one_file(package):
    users = {path.name for path in FILES if any(name.startswith(package) for name in imports_of(path))}
    assert users <= OPTIONAL[package]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_no_unpickling_and_no_environment(path):
    text = path.read_text()
    assert "pickle" not in {name.split(".")[0] for name in imports_of(path)}
    called = {
        node.func.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"eval", "exec"} and "weights_only=False" not in text
    assert path.name == "dist.py" or "os.environ" not in text


def test_import_needs_no_heavy_package():
    code = (
        "import sys, rwkv_clip; "
        "heavy = {'open_clip', 'torchvision', 'nvidia.dali', 'pyarrow', 'wandb', 'matplotlib', 'tyro', 'timm'}; "
        "heavy |= {'torch._dynamo', 'torch._inductor', 'safetensors'}; "
        "bad = heavy & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
