"""Damaged pictures in a run: a few are replaced and counted, alike in every run and world; many end it by name."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.loading import make
from helpers.pictures import picture
from helpers.tiny import MODEL, to_arguments
from rwkv_clip.checkpoint import find_checkpoint, read_weights
from rwkv_clip.config import parse
from rwkv_clip.data.records import Header, RecordSet, RecordWriter, checksum, pack
from rwkv_clip.training import main as training
from rwkv_clip.training.data.order import Order
from rwkv_clip.training.settings import Settings

COUNT, BATCH, SEED = 5000, 250, 3
BAD = (17, 1234, 2500, 2501, 4999)


def write(prefix: Path, bad: set[int], count: int = COUNT) -> RecordSet:
    pictures = [picture(i, size=(18, 16)) for i in range(20)]
    with RecordWriter(prefix) as writer:
        for i in range(count):
            labels = np.array([49406, 320 + i % 500, 49407, 0, 0, 0, 0, 0], "<f4")
            image = pictures[i % 20]
            image = image[: len(image) // 2] if i in bad else image
            writer.write(i, pack(Header(0, labels, i, checksum(labels.tobytes() + image)), image))
    side = {"schema": 1, "views": ["raw"], "context": 8, "tokenizer": "clip-bpe", "vocab_size": 49408, "count": count}
    Path(f"{prefix}.json").write_text(json.dumps({**side, "checksum": "crc32"}))
    return RecordSet(prefix)


@pytest.fixture(scope="module")
def data(new_folder):
    folder = new_folder("bad")
    write(folder / "five", set(BAD))
    write(folder / "many", set(range(0, 2000, 16)), 2000)  # 6.25 %
    tower = {"width": 8, "depth": 1, "heads": 1, "ffn_width": 8}
    model = {"image": {**MODEL["image"], **tower, "image_size": [16, 16]}, "text": {**MODEL["text"], **tower}}
    (folder / "model.json").write_text(json.dumps(model))
    return {
        "model": str(folder / "model.json"),
        "train_data": str(folder / "five"),
        "logs": str(folder / "logs"),
        "batch_size": BATCH,
        "epochs": 1,
        "precision": "fp32",
        "workers": 0,
        "loader": "torch",
        "device": "cpu",
        "seed": SEED,
    }


def test_five_of_five_thousand(data, monkeypatch):
    """The run sees every record once; two runs, one with a worker, end with the same bits and counts."""
    loaders, make_loader = [], training.make_loader

    def watched(*arguments, **settings):
        loaders.append(make_loader(*arguments, **settings))
        return loaders[-1]

    monkeypatch.setattr(training, "make_loader", watched)
    digests = []
    for name, workers in (("one", 0), ("two", 1)):
        folder = training.run(parse(Settings, {**data, "name": name, "workers": workers}))
        tensors = read_weights(find_checkpoint(folder))
        digests.append({key: tensor.numpy().tobytes() for key, tensor in tensors.items()})
    assert digests[0] == digests[1]
    assert [loader.skipped for loader in loaders] == [{"image unreadable": 5}] * 2
    assert loaders[0].bad == loaders[1].bad and len(loaders[0].bad) == 5
    assert {int(name.split("key ")[1].split(":")[0]) for name in loaders[0].bad} == set(BAD)


def test_six_percent_end_the_run_within_an_epoch(data):
    settings = {**data, "train_data": data["train_data"].replace("five", "many"), "name": "many", "batch_size": 100}
    command = [sys.executable, "-m", "rwkv_clip.training.main", *to_arguments({**settings, "max_bad": 50})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    said = done.stderr[done.stderr.index("error: ") :]
    order = Order(2000, SEED).at(np.arange(2000))
    first = [i for i in order.tolist() if i % 16 == 0][:10]
    assert [int(line.split("key ")[1].split(":")[0]) for line in said.splitlines()[1:]] == first
    assert "more than max_bad=50 and max_bad_fraction=0.001 allow" in said and "image unreadable" in said
    assert not list(Path(data["logs"]).glob("many/checkpoints/step-*"))


@pytest.mark.parametrize("workers, world", [(1, 1), (3, 1), (0, 2), (1, 2)])
def test_workers_and_ranks_replace_alike(workers, world, data):
    records, settings = RecordSet(data["train_data"]), {"image_size": 16, "global_batch": BATCH, "steps": 20}

    def load(workers, world):
        loaders = [
            make(records, **settings, seed=SEED, workers=workers, rank=rank, world=world) for rank in range(world)
        ]
        batches = zip(*(list(loader) for loader in loaders))
        ids = np.concatenate([batch.ids.numpy() for step in batches for batch in step])
        names = [name for loader in loaders for name in loader.bad]
        return ids, sorted(names), sum(sum(loader.skipped.values()) for loader in loaders)

    (ids, names, count), (others, other_names, other_count) = load(0, 1), load(workers, world)
    assert np.array_equal(ids, others) and names == other_names and count == other_count == 5
    assert not np.isin(ids, BAD).any() and len(ids) == COUNT
