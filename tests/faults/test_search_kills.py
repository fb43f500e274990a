"""A run of the index that dies at any call that changes its files: what is there stays whole, the next ends alike."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from helpers.pictures import paint

TESTS = Path(__file__).resolve().parents[1]

# Imports everything once, and forks a child for each death: no torch operator runs in the parent.
SCRIPT = """
import os, shutil, sys, traceback
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from helpers.color_model import COLORS, loaded, preprocess
from helpers.pictures import paint
sys.modules["rwkv_clip.factory"] = type(sys)("factory")
found = loaded()
found.preprocess = lambda picture: preprocess(picture.resize((8, 8)))
sys.modules["rwkv_clip.factory"].load_for_inference = lambda *a, **n: found
from rwkv_clip.search import indexing
from rwkv_clip.search.collection import Collection
indexing.PART = 16
torch.set_num_threads(1)
folder, spec = Path(sys.argv[2]), sys.argv[3]
CALLS = [(os, "replace"), (os, "unlink"), (os, "fsync"), (os, "mkdir"), (os, "rmdir")]

def index(output, die_at=None):
    counted = [0]
    def counting(real):
        def call(*a, **n):
            counted[0] += 1
            if counted[0] == die_at:
                os._exit(9)
            return real(*a, **n)
        return call
    for owner, name in CALLS:
        setattr(owner, name, counting(getattr(owner, name)))
    encoding = indexing.Encoding(checkpoint="run", device="cpu", progress=False, workers=0)
    indexing.index_pictures(str(folder / spec), encoding, output)
    return counted[0]

def fork(work):
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def whole(output, rows):
    found = Collection.open(output)
    assert len(found) == rows, len(found)
    for row in range(len(found)):
        found.describe(row), found.picture(row)
    found.vectors.search(found.vectors.take([0]), 5)

first, second, at = folder / "first", folder / "second", 0
rows = int(sys.argv[4])
while True:
    at += 1
    output = folder / "index"
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(first, output)
    ended = fork(lambda: index(output, at))
    assert ended in (0, 9), ended
    before = (first / "about.json").read_bytes() == (output / "about.json").read_bytes()
    assert fork(lambda: whole(output, rows if before else rows + 33)) == 0, f"not whole after call {at}"
    if ended == 0:
        break
    assert fork(lambda: index(output)) == 0
    left, wanted = (
        {str(p.relative_to(top)): p.read_bytes() for p in top.rglob("*") if p.is_file()} for top in (output, second)
    )
    assert left.keys() == wanted.keys() and left == wanted, f"differs after call {at}: {left.keys() ^ wanted.keys()}"
print("calls", at - 1)
"""


def paint_all(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        paint(9, 8, number).save(folder / f"{number:03d}.png")


def pack_all(folder: Path, spec: Path) -> None:
    with tarfile.open(spec, "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_death_at_every_call(tmp_path, kind):
    """An index of 20 pictures that is brought up to 53."""
    spec = "p" if kind == "folder" else "p.tar"
    head, body = SCRIPT.split("first, second, at = ")

    def run(code: str) -> str:
        arguments = [sys.executable, "-c", code, str(TESTS), str(tmp_path), spec, "20"]
        done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    paint_all(tmp_path / "p", range(20))
    if kind == "tar":
        pack_all(tmp_path / "p", tmp_path / spec)
    run(head + "index(folder / 'first')")
    paint_all(tmp_path / "p", range(53))
    if kind == "tar":
        pack_all(tmp_path / "p", tmp_path / spec)
    run(head + "import shutil; shutil.copytree(folder / 'first', folder / 'second'); index(folder / 'second')")
    assert int(run(head + "first, second, at = " + body).split()[1]) > 15
