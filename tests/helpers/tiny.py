"""The smallest run that has everything: 60 pictures with three texts, two tiny towers, ten steps."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from rwkv_clip.data.build import build_records

MODEL = {
    "image": {
        "image_size": [32, 32],
        "patch": 16,
        "width": 32,
        "depth": 2,
        "heads": 2,
        "ffn_width": 64,
        "drop_path": 0.2,
    },
    "text": {"context": 8, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64},
}
COUNT, STEPS, BATCH = 60, 10, 8


def make_tiny(folder: Path) -> dict[str, str]:
    """Write records, a retrieval set and a model description; returns settings that train on them."""
    images = folder / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(COUNT):
        pixels = np.full((40, 36, 3), rng.integers(0, 255, 3), np.uint8)
        pixels[:: 1 + i % 5] = rng.integers(0, 255, 3)
        Image.fromarray(pixels).save(images / f"{i}.jpg", quality=95)
        texts = {
            "raw": f"picture {i}.jpg",
            "synthetic": f"stripes {i % 5}",
            "generated": f"a picture, stripes {i % 5}",
        }
        rows.append({"image": f"images/{i}.jpg", **texts})
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [{"image": row["image"], "caption": row["generated"]} for row in rows[:20]]
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    (folder / "model.json").write_text(json.dumps(MODEL))
    build_records(
        str(folder / "all.jsonl"),
        str(folder / "train"),
        texts=("raw", "synthetic", "generated"),
        context=8,
        workers=1,
    )
    return {
        "model": str(folder / "model.json"),
        "train_data": str(folder / "train"),
        "val_data": str(folder / "val.jsonl"),
        "logs": str(folder / "logs"),
        "batch_size": BATCH,
        "max_steps": STEPS,
        "precision": "fp32",
        "workers": 0,
        "loader": "torch",
        "device": "cpu",
        "log_every_n_steps": 1,
        "save_every_n_steps": 3,
        "lr": 1e-2,
        "schedule": "onecycle",
        "cycle_beta1": True,
    }


def make_smaller(settings: dict[str, str]) -> dict[str, str]:
    """The model of `make_tiny` with a block and a token of image: for tests of hundreds of steps."""
    model = json.loads(Path(settings["model"]).read_text())
    model["image"] |= {"depth": 1, "image_size": [16, 16]}
    model["text"]["depth"] = 1
    Path(settings["model"]).write_text(json.dumps(model))
    return settings


def to_arguments(settings: dict[str, object]) -> list[str]:
    """Settings as command-line arguments."""
    arguments = []
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        arguments += [flag] if value is True else [flag, str(value)]
    return arguments
