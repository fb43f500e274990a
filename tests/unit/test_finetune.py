"""The bench of fine-tuning: its flags are settings, all ways start from one checkpoint, rows tell what each took."""

import json

import finetune
import numpy as np
import pytest
from PIL import Image

from rwkv_clip.checkpoint import find_checkpoint, read_description
from rwkv_clip.config import flat_names
from rwkv_clip.training.settings import Settings


def test_flags_are_settings():
    names = {name.replace("_", "-") for name in flat_names(Settings)}
    assert {flag for flags in finetune.WAYS.values() for flag in flags} <= names


def test_every_way_runs_once_and_is_kept(tmp_path, capsys):
    pytest.importorskip("peft", reason="pip install -e '.[lora]'")
    rows, draw = [], np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(draw.integers(0, 255, (50, 60, 3), np.uint8)).save(tmp_path / f"{i}.jpg")
        captions = [f"picture {i} by {k}" for k in range(5)]
        rows.append({"image": f"{i}.jpg", "captions": captions, "split": "train" if i < 16 else "test"})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    work, output = tmp_path / "work", tmp_path / "result.json"
    command = ["--data", tmp_path / "captions.jsonl", "--work", work, "--output", output, "--commit", "x"]
    command += ["--base-epochs", 1, "--epochs", 1, "--batch-size", 4]
    finetune.main([*map(str, command)])
    first = json.loads(output.read_text())
    made = {row["contender"]: row["figures"] for row in first["rows"]}
    assert list(made) == ["chance", "before", *finetune.WAYS]
    trained = [made[way]["trained"] for way in ("before", *finetune.WAYS)]
    assert trained[1] == trained[0] < trained[4], "a larger picture has more positions"
    assert trained[2] < trained[0] / 20 and trained[3] < trained[0]
    assert made["LoRA, rank 16"]["checkpoint_mib"] < made["full"]["checkpoint_mib"] / 10
    larger = read_description(find_checkpoint(work / "runs" / f"full-at-{finetune.LARGER}-px-0"))
    assert larger["spec"]["image"]["image_size"] == [finetune.LARGER] * 2
    finetune.main([*map(str, command)])
    assert json.loads(output.read_text())["runs"] == first["runs"], "nothing ran again"
