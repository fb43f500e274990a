"""The pictures of the documents come from one script, and read the same on light and dark pages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def draw(*arguments: str, expect: int = 0) -> str:
    command = [sys.executable, str(ROOT / "tests" / "bench" / "figures.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == expect, done.stderr[-2000:]
    return done.stdout + done.stderr


def make_run(folder: Path, model: str, seed: int, recall: float) -> Path:
    """What is read of a run folder: its settings and the results of two evaluations, the older one first."""
    for stamp, value in (("20260101-retrieval", 0.0), ("20260102-retrieval", recall)):
        (folder / "eval" / stamp).mkdir(parents=True)
        metrics = {f"{way}_R@{k}": value for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
        result = {"results": [{"metrics": {"images": 500, "captions": 2500, **metrics}}]}
        (folder / "eval" / stamp / "result.json").write_text(json.dumps(result))
    (folder / "settings.json").write_text(json.dumps({"model": model, "seed": seed}))
    return folder


def test_every_figure_is_drawn_on_opaque_white(tmp_path):
    draw("--output", str(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "architecture.png",
        "resolution.png",
        "flickr8k.png",
        "flickr8k_noise.png",
        "alip_weights.png",
        "flickr8k_chinese.png",
        "third_text.png",
        "open_clip_run.png",
    }
    for name in names:
        picture = Image.open(tmp_path / name).convert("RGBA")
        corners = [picture.getpixel((x, y)) for x in (0, picture.width - 1) for y in (0, picture.height - 1)]
        assert corners == [(255, 255, 255, 255)] * 4, name
        assert picture.getchannel("A").getextrema() == (255, 255) and len(picture.getcolors(1 << 24)) > 50, name


def test_figures_in_the_repository_are_those_that_scripts_make():
    made = (ROOT / "shell" / "make_figures.sh").read_text()
    assert all(path.name in made for path in (ROOT / "figure").glob("*.png"))


def test_recalls_of_runs_are_kept_and_drawn(tmp_path):
    runs = [make_run(tmp_path / f"run-{seed}", "RWKV-CLIP-Ti-16", seed, 0.1 * seed) for seed in (2, 1)]
    draw("flickr8k", "--output", str(tmp_path / "out"), "--runs", *map(str, runs))
    table = json.loads((tmp_path / "out" / "flickr8k.json").read_text())
    assert [(run["method"], run["seed"]) for run in table["runs"]] == [("RWKV-CLIP-Ti-16", 1), ("RWKV-CLIP-Ti-16", 2)]
    assert table["runs"][1]["text_to_image_R@10"] == pytest.approx(0.2)  # of the newer evaluation
    assert (tmp_path / "out" / "flickr8k.png").exists()


def test_what_cannot_be_drawn_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    assert "run: holds no eval/" in draw(
        "flickr8k", "--output", str(tmp_path), "--runs", str(tmp_path / "run"), expect=2
    )
    assert "'recall' is not a figure" in draw("recall", "--output", str(tmp_path), expect=2)
