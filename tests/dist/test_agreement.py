"""Ranks that are not to do the same end before the first step, all with one line that names rank and setting; memory
that runs out on one of them is said by that one."""

import os
import sys
from pathlib import Path

import pytest
import torch

from helpers.ranks import free_port, start_ranks
from helpers.tiny import make_smaller, make_tiny, to_arguments
from rwkv_clip.data.build import build_records


@pytest.fixture(scope="module")
def data(new_folder):
    folder = new_folder("tiny")
    settings = make_smaller(make_tiny(folder)) | {"max_steps": 3, "batch_size": 4, "timeout": 30.0}
    del settings["val_data"]
    rows = (folder / "all.jsonl").read_text()
    (folder / "other.jsonl").write_text(rows.replace("stripes 3", "dots 3"))
    build_records(
        str(folder / "other.jsonl"), str(folder / "other"), texts=("raw", "synthetic", "generated"), context=8
    )
    model = Path(settings["model"]).read_text()
    Path(settings["model"]).with_name("narrow.json").write_text(model.replace("64}}", "60}}"))
    return settings


def work(folder: str, settings: dict, other: dict, patch: str) -> None:
    """What a rank does; rank 1 has other settings, or something of its own."""
    import rwkv_clip
    from rwkv_clip.training import checks, main

    rank = os.environ["RANK"]
    os.dup2(os.open(f"{folder}/stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if rank == "1":
        settings = settings | other
        if patch == "version":
            rwkv_clip.__version__ = "0.0.1"
        if patch == "code":
            checks.hash_sources = lambda: "f" * 64
        if patch == "weights":
            main.create_model = lambda *a, make=main.create_model, **k: torch.manual_seed(9) and make(*a, **k)
        if patch == "memory":
            main.Trainer.step = exhausted
    sys.argv = ["train", *to_arguments(settings)]
    main.main()


def exhausted(self, batch):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def end(folder: Path, *arguments) -> tuple[list[int], list[str]]:
    """Exit codes and errors of two ranks."""
    ranks = start_ranks(2, folder, work, str(folder), *arguments)
    for process in ranks:
        process.join(60)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    texts = [(folder / f"stderr{rank}").read_text() for rank in range(2)]
    assert not any("Traceback" in text for text in texts), texts
    return codes, [text.partition("error: ")[2].strip() for text in texts]


CASES = {
    "seed": ({"seed": 5}, "", "seed: rank 1 on "),
    "several": ({"lr": 0.5, "text_choice": "first", "name": "another"}, "", "lr: rank 1 on "),
    "records": ({"train_data": "other"}, "", "train_data: rank 1 on "),
    "description": ({"model": "narrow.json"}, "", "model.text.ffn_width: rank 1 on "),
    "version": ({}, "version", "version: rank 1 on "),
    "code": ({}, "code", "code: rank 1 on "),
    "weights": ({}, "weights", "weights: rank 1 starts with other weights than rank 0 (1 of 2 ranks do)"),
}


@pytest.mark.parametrize("other, patch, words", CASES.values(), ids=CASES)
def test_ranks_that_differ(data, tmp_path, other, patch, words):
    near = {key: str(Path(data[key]).with_name(other[key])) for key in ("train_data", "model") if key in other}
    codes, said = end(tmp_path, data | {"name": tmp_path.name}, other | near, patch)
    assert codes == [2, 2] and said[0] == said[1] and words in said[0], said
    if patch != "weights":
        assert said[0].startswith("ranks: start all with the same settings, records and code")
        assert said[0].count("\n") == (3 if len(other) == 3 else 1) and not Path(data["logs"], tmp_path.name).exists()


def test_what_a_rank_may_have_of_its_own(data, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in Path(data["train_data"]).parent.glob("train.*"):
        os.link(path, moved / path.name.replace("train", "elsewhere"))
    other = {"train_data": str(moved / "elsewhere"), "workers": 1}
    assert end(tmp_path, data | {"name": tmp_path.name}, other, "") == ([0, 0], ["", ""])


def test_too_few_records_for_all_ranks(data, tmp_path):
    codes, said = end(tmp_path, data | {"batch_size": 31}, {}, "")
    assert codes == [2, 2] and said[0] == said[1]
    assert said[0].startswith("batch_size: 31 x accum_freq 1 x 2 ranks is 62 pairs per step, but there are 60 records")


def test_a_folder_that_cannot_be_opened_ends_all_ranks_alike(data, tmp_path):
    (tmp_path / "file").touch()
    codes, said = end(tmp_path, data | {"logs": str(tmp_path / "file")}, {}, "")
    assert codes == [2, 2] and said[0] == said[1] and "cannot be created" in said[0]


def test_memory_that_runs_out_on_one_rank(data, tmp_path):
    codes, said = end(tmp_path, data | {"name": tmp_path.name}, {}, "memory")
    assert codes == [5, 2]
    assert said[1].startswith("out of memory (CUDA out of memory.") and "--accum-freq" in said[1]
    assert said[0].startswith("rank 1 last seen at step 0") and "OutOfMemoryError" in said[0]


def test_a_port_in_use(data, tmp_path, monkeypatch):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr("helpers.ranks.free_port", lambda: taken.getsockname()[1])
        (main, other) = start_ranks(2, tmp_path, work, str(tmp_path), data, {}, "")
        main.join(60)
        other.kill()
    said = (tmp_path / "stderr0").read_text()
    assert main.exitcode == 2 and "another process uses this port" in said and "Traceback" not in said
    assert free_port()
