"""The house keeps its shape: who may import whom, no circles, sizes, no unpickling, the environment in one file."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from helpers.tiers import SLOW

SRC = Path(__file__).resolve().parents[2] / "src"
LIBRARY = SRC / "rwkv_clip"
SEPARATE = ("training", "eval", "describe", "search")  # rooms beside the library, which do not know each other
FILES = sorted(SRC.rglob("*.py"))

# Rooms of the library, lowest first; a file imports from its own room and lower ones only.
ROOMS = [
    {"errors", "keys"},
    {"config", "files", "fonts"},
    {"processes", "device", "downloads"},
    {"dist", "tokenizer", "metrics", "nearest", "serialization", "feature_lines", "feature_files", "checkpoint"}
    | {"pretrained"},
    {"ops", "data", "losses"},
    {"transform", "datasets"},
    {"models"},
    {"factory", "features", "demo", "overrides", "weights", "base_weights", "recognition"},
    {"retrieval", "classification", "convert", "hub", "model_card", "exporting"},
    {"export"},
    {"__init__"},
]


def module_name(path: Path) -> str:
    """src/training/loop.py -> rwkv_clip.training.loop; of an __init__.py the package."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(("rwkv_clip", *parts[parts[0] == "rwkv_clip" :])).removesuffix(".__init__")


def imports_of(path: Path, nodes: Iterable[ast.AST] | None = None) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in it (or in `nodes`)."""
    package = module_name(path.with_name("__init__.py")).split(".")
    names = set()
    for node in ast.walk(ast.parse(path.read_text())) if nodes is None else nodes:
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
        assert not name.startswith(tuple(f"rwkv_clip.{room}" for room in SEPARATE)), f"{path.name} imports {name}"


@pytest.mark.parametrize("room", SEPARATE)
def test_commands_do_not_know_each_other(room):
    others = tuple(f"rwkv_clip.{other}" for other in SEPARATE if other != room)
    for path in (SRC / room).rglob("*.py"):
        assert not [name for name in imports_of(path) if name.startswith(others)], path


def nodes_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a file is imported: all but the bodies of functions and what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not typing_only and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from nodes_at_import(child)


def test_no_circles():
    """No file imports another that imports it, on whatever way, while they are loaded."""
    modules, graph = {module_name(path) for path in FILES}, {}
    for path in FILES:
        names = imports_of(path, nodes_at_import(ast.parse(path.read_text()))) & modules
        # `from .package import module` names both; only the module's file is needed
        graph[module_name(path)] = {n for n in names if not any(other.startswith(f"{n}.") for other in names)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_ARGUMENTS = 420, 60, 8


def count_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Named ones, without self."""
    named = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return len(named) - (bool(named) and named[0].arg in ("self", "cls"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_and_functions_are_read_in_one_sitting(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < MOST_LINES_OF_A_FUNCTION, node.name
            assert count_arguments(node) <= MOST_ARGUMENTS, node.name


OPTIONAL = {
    "nvidia.dali": {"dali_loader.py"},
    "pyarrow": {"parquet.py", "clip_retrieval.py", "lancedb.py"},
    "aiohttp": {"client.py"},
    "ray": {"executors.py"},
    "vllm": {"vllm.py"},
    "wandb": {"log.py"},
    "trackio": {"log.py"},
    "faiss": {"search.py", "approximate.py"},
    "lmdb": {"lmdb.py"},
    "pybase64": {"lmdb.py"},
    "transformers": {"transformers_captioner.py", "modeling_rwkv_clip.py"},
    "huggingface_hub": {"downloads.py"},
    "onnx": {"graphs.py"},  # and onnxscript, onnxruntime
    "tokenizers": set(),
    "starlette": {"application.py"},
    "uvicorn": {"server.py"},
    "qdrant_client": {"qdrant.py"},
    "lancedb": {"lancedb.py"},
    "peft": {"adapters.py"},
    "usearch": {"approximate.py"},
    "fsspec": {"storage.py"},
    "datasets": set(),  # its folders are read by pyarrow
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
    assert path.name in ("dist.py", "device.py", "keys.py") or "os.environ" not in text


@pytest.mark.parametrize("module", ["rwkv_clip", "rwkv_clip.data.build", "rwkv_clip.describe.commands"])
def test_import_needs_no_heavy_package(module):
    if "describe" in module:
        pytest.importorskip("aiohttp", reason="pip install -e '.[describe]'")
    code = (
        f"import sys, {module}; "
        "heavy = {'torch', 'open_clip', 'torchvision', 'nvidia.dali', 'pyarrow', 'wandb', 'matplotlib', 'tyro'}; "
        "heavy |= {'timm', 'torch._dynamo', 'torch._inductor', 'safetensors'}; "
        f"bad = heavy & set(sys.modules) - { ({'tyro'} if 'describe' in module else set())!r}; "
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_fast_tier_leaves_out_what_exists():
    for entry in SLOW:
        file, *name = entry.removesuffix("[1:]").split("::")
        path = SRC.parent / "tests" / file
        assert path.is_file() and (not name or f"def {name[-1]}(" in path.read_text()), f"helpers/tiers.py: {entry}"
