"""A long run stays flat: memory, open files and threads after 2,000 steps and 50 saves are those of the beginning."""

import gc
import json
import os
import threading
from pathlib import Path

import numpy as np

from helpers.pictures import picture
from helpers.tiny import MODEL
from rwkv_clip.config import parse
from rwkv_clip.data.records import Header, RecordWriter, pack
from rwkv_clip.training import main as training
from rwkv_clip.training.settings import Settings

STEPS, SAVES, EVERY, WARM = 2000, 50, 20, 500


def now() -> tuple[int, int, int]:
    """Resident memory in bytes, open files, threads."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    threads = len(os.listdir("/proc/self/task"))
    return pages * os.sysconf("SC_PAGESIZE"), len(os.listdir("/proc/self/fd")), threads


def write_records(prefix: Path) -> None:
    with RecordWriter(prefix) as writer:
        for i in range(64):
            writer.write(i, pack(Header(0, np.arange(8) % (2 + i % 14), i, 0), picture(i)))
    side = {"schema": 1, "views": ["raw"], "context": 8, "vocab_size": 16}
    Path(f"{prefix}.json").write_text(json.dumps(side))


def test_two_thousand_steps(tmp_path, monkeypatch):
    write_records(tmp_path / "train")
    tower = {"width": 8, "depth": 1, "heads": 1, "ffn_width": 8}
    model = {"image": {**MODEL["image"], **tower, "image_size": [16, 16]}}
    model["text"] = {**MODEL["text"], **tower, "vocab": 16}
    (tmp_path / "model.json").write_text(json.dumps(model))
    seen, make = [], training.make_loader

    def watched(*arguments, **settings):
        loader = make(*arguments, **settings)
        run = loader.run

        def measured():
            for step, item in enumerate(run()):
                if step % EVERY == EVERY - 1:  # in the middle between two saves
                    gc.collect()
                    seen.append((step, *now()))
                yield item

        loader.run = measured
        return loader

    monkeypatch.setattr(training, "make_loader", watched)
    settings = {
        "model": str(tmp_path / "model.json"),
        "train_data": str(tmp_path / "train"),
        "logs": str(tmp_path / "logs"),
        "name": "long",
        "max_steps": STEPS,
        "batch_size": 2,
        "precision": "fp32",
        "workers": 0,
        "loader": "torch",
        "device": "cpu",
        "save_every_n_steps": STEPS // SAVES,
        "log_every_n_steps": 50,
    }
    training.run(parse(Settings, {**settings, "name": "first", "max_steps": 60}))  # imports, kernels, fonts, pools
    gc.collect()
    gc.freeze()  # so that the collections below look at this run only
    before = {thread.name for thread in threading.enumerate()}, now()[1:]
    seen.clear()
    training.run(parse(Settings, settings))
    gc.collect()  # the run's records, a file, are in cycles
    assert ({thread.name for thread in threading.enumerate()}, now()[1:]) == before
    steps, memory, files, threads = np.array([row for row in seen if row[0] >= WARM]).T
    slope = np.polyfit(steps, memory, 1)[0]
    print(f"{slope:.0f} bytes a step, {set(files)} files, {set(threads)} threads, {memory[-1] / 1e6:.0f} MB")
    assert slope < 1000
    assert set(threads[:5]) >= set(threads[-5:]) and set(files[:5]) >= set(files[-5:])
