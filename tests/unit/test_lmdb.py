"""Chinese-CLIP's LMDB as records: pairs that are pickled, pictures in base64, the same training as from .rec files."""

import base64
import json
import pickle
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from helpers.chinese_clip import RELEASED, write_split
from helpers.crashes import fork, wait
from helpers.loading import make
from helpers.pictures import picture
from helpers.tiny import STEPS, make_tiny, to_arguments
from rwkv_clip.checkpoint import find_checkpoint, read_weights
from rwkv_clip.data import lmdb as lmdb_file
from rwkv_clip.data.build import build_records
from rwkv_clip.data.lmdb import LmdbSet, find_splits
from rwkv_clip.data.pair_pickle import parse_pair, write_pair
from rwkv_clip.data.records import RecordError, RecordSet, open_records
from rwkv_clip.errors import run_command
from rwkv_clip.tokenizer import Tokenizer, make_tokenizer
from rwkv_clip.training import main, profile_data, trainer

TOKENIZER = make_tokenizer(context=12)
PAIRS = [(7, 1, "a cat"), (8, 2, "a dog"), (7, 3, "a black cat"), (9, 4, " a bird ")]


def encoded(seed: int) -> bytes:
    return base64.b64encode(picture(seed))


@pytest.fixture
def split(tmp_path) -> Path:
    return write_split(tmp_path / "lmdb" / "train", {i: encoded(i) for i in (7, 8, 9)}, PAIRS)


# ---- pickles


NUMBERS = [
    0,
    1,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**63,
    2**64,
    2**2038,
    -1,
    -128,
    -129,
    -(2**31),
    -(2**31) - 1,
]
TEXTS = ["", "a", "猫", "x" * 255, "x" * 256, "猫" * 85 + "x", "\ud800", "“特价”", "\U0001f431", "\0\n'", "x" * 64512]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("pickler", [pickle.dumps, pickle._dumps], ids=["c", "python"])
def test_every_pickle_of_a_pair_is_read(pickler, protocol):
    long = ["x" * size for size in (65500, 65536, 200_000)]
    pairs = [(a, b, text) for a in NUMBERS for b in (5, -(2**40), "id") for text in ("t", "猫")]
    pairs += [(3, 4, text) for text in TEXTS + long] + [("7", "7", "7"), (2**4000, 1, "long"), ("猫", 2, "猫")]
    same = "one object"
    for pair in [*pairs, (same, same, same), (1, same, same)]:
        for data in (pickler(pair, protocol), memoryview(pickler(pair, protocol))):
            assert parse_pair(data) == pair


def test_pickles_are_written_as_cpython_writes_them():
    random.seed(3)
    numbers = NUMBERS + [random.getrandbits(random.randrange(1, 200)) * random.choice((1, -1)) for _ in range(300)]
    for number in numbers:
        pair = (number, random.choice(numbers), random.choice(TEXTS))
        assert write_pair(*pair) == pickle.dumps(pair, 4)


# ---- records


def test_records_are_the_pairs_in_order(split):
    records = open_records(split, TOKENIZER)
    assert isinstance(records, LmdbSet) and len(records) == 4
    assert (records.text_names, records.context, records.tokenizer) == (("raw",), 12, "clip-bpe")
    for i, (image_id, _, text) in enumerate(PAIRS):
        data, tokens = records.sample(i)
        assert data == picture(image_id) and tokens.dtype == np.int64
        assert tokens.tolist() == TOKENIZER([text.strip()]).tolist()
        assert records.name(i) == f"{split} pair {i}"
    for i in (-1, 4):
        with pytest.raises(IndexError):
            records.sample(i)


def test_a_tokenizer_prepares_the_texts(split):
    def encode(texts, context):
        seen.extend(texts)
        return TOKENIZER(texts, context)

    seen: list[str] = []
    LmdbSet(split, Tokenizer("other", encode, 49408, 12, prepare=str.upper)).sample(3)
    assert seen == ["A BIRD"]


@pytest.mark.parametrize("alphabet", [None, b"-_"], ids=["standard", "url-safe"])
def test_both_alphabets_of_base64(alphabet, tmp_path):
    data = picture(1) + bytes(range(256)) * 3
    assert b"+" in base64.b64encode(data) and b"/" in base64.b64encode(data)
    for around in (b"", b"\n", b" \r\n"):
        write_split(tmp_path, {7: base64.b64encode(data, alphabet) + around}, [(7, 1, "a")])
        assert LmdbSet(tmp_path, TOKENIZER).sample(0)[0] == data


def test_several_folders_are_one_set_after_the_other(split):
    other = write_split(split.with_name("valid"), {1: encoded(1)}, [(1, 1, "x"), (1, 2, "y")])
    for spec in (f"{split},{other}", f"{split.parent}/*", [str(split), str(other)], f"{split.parent}/[tv]*"):
        records = open_records(spec, TOKENIZER)
        assert len(records) == 6 and records.name(4) == f"{other} pair 0"
        assert records.sample(5)[0] == picture(1) and records.sample(0)[0] == picture(7)


@pytest.mark.parametrize(
    "name, words",
    [
        ("lmdb", "holds several parts; give one or more of .*lmdb/train"),
        (".", "holds several parts; give one or more of .*lmdb/train"),
        ("lmdb/train/imgs", "is one half of a split; give the folder above it, .*lmdb/train"),
        ("lmdb/train,records", "is no folder with imgs and pairs"),
    ],
)
def test_names_beside_it(name, words, split, tmp_path):
    spec = ",".join(str(tmp_path / part) for part in name.split(","))
    with pytest.raises(ValueError, match=words):
        open_records(spec, TOKENIZER)


def test_what_is_no_lmdb_is_a_record(tmp_path):
    with pytest.raises(ValueError, match=r"names no \.rec file"):
        open_records(tmp_path, TOKENIZER)
    assert find_splits(RELEASED / "lmdb/train") == [RELEASED / "lmdb/train"]


def test_threads_open_it_once(split, monkeypatch):
    original = lmdb_file.Split.__init__

    def slowly(self, folder):
        time.sleep(0.05)  # so that all threads are in there
        original(self, folder)

    monkeypatch.setattr(lmdb_file.Split, "__init__", slowly)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: lmdb_file.open_split(split), range(8)))
    assert len({id(one) for one in found}) == 1


def test_copies_and_forks_open_their_own(split):
    records = open_records(split, TOKENIZER)
    expected = [records.sample(i)[0] for i in range(4)]
    copy = pickle.loads(pickle.dumps(records))
    assert copy.digest == records.digest and [copy.sample(i)[0] for i in range(4)] == expected

    def read():
        for some in (records, copy, open_records(split, TOKENIZER)):
            assert [some.sample(i)[0] for i in range(4)] == expected

    assert [wait(fork(read)) for _ in range(2)] == [0, 0]
    read()


def test_a_set_and_another_may_be_open_at_once_and_the_folder_replaced_afterwards(split):
    first, second = open_records(split, TOKENIZER), open_records(split, TOKENIZER)
    del first
    assert len(second) == 4 and second.sample(1)[1].any()
    del second
    write_split(split, {7: encoded(3)}, PAIRS[:1])
    assert LmdbSet(split, TOKENIZER).sample(0)[0] == picture(3)


def test_a_read_only_folder_is_left_alone(split):
    for file in split.glob("*/lock.mdb"):
        file.unlink()
    before = sorted(split.rglob("*"))
    assert LmdbSet(split, TOKENIZER).sample(0)[1].any() and sorted(split.rglob("*")) == before


# ---- digest


CHANGES = {
    "a text": dict(p_1=pickle.dumps((8, 2, "a fox"), 4)),
    "an id": dict(p_1=pickle.dumps((9, 2, "a dog"), 4)),
    "one less": dict(num_samples=b"3"),
    "a picture": dict(i_8=encoded(5)),
    "one more picture": dict(i_11=encoded(5)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_contents_have_another_digest(change, split, tmp_path):
    same = Path(shutil.copytree(split, tmp_path / "same"))
    digest = LmdbSet(split, TOKENIZER).digest
    assert len(digest) == 64 and LmdbSet(same, TOKENIZER).digest == digest
    other = write_split(tmp_path / "other", {i: encoded(i) for i in (7, 8, 9)}, PAIRS, **change)
    assert LmdbSet(other, TOKENIZER).digest != digest
    assert LmdbSet(split, make_tokenizer(context=13)).digest != digest


def test_a_smaller_vocabulary_is_found_out(split):
    records = LmdbSet(split, TOKENIZER)
    ids = TOKENIZER([text for _, _, text in PAIRS])
    assert records.limit_vocab(49408) == 0 and records.sample(0)
    assert records.limit_vocab(400) == ids.max() and records.vocab_size == 400
    with pytest.raises(RecordError, match=r"pair 0: token ids must be below 400, found 49407"):
        records.sample(0)


def test_without_the_package(split, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert run_command(lambda: open_records(split, TOKENIZER) and 0) == 2
    assert "pip install -e '.[chinese]'" in capsys.readouterr().err


# ---- training


@pytest.fixture(scope="module")
def two(new_folder) -> tuple[dict, dict]:
    """Settings of a tiny run on .rec files, and on an LMDB of the same pairs."""
    folder = new_folder("two")
    settings = make_tiny(folder)
    rows = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    images = {i: base64.b64encode((folder / row["image"]).read_bytes()) for i, row in enumerate(rows)}
    pairs = [(i, i, row["generated"]) for i, row in enumerate(rows)]
    split = write_split(folder / "lmdb", images, pairs)
    build_records(str(folder / "all.jsonl"), str(folder / "one"), texts=("raw=generated",), context=8)
    common = {**settings, "texts": 1, "text_choice": "first", "workers": 2}
    return {**common, "train_data": str(folder / "one")}, {**common, "train_data": str(split)}


def test_samples_are_those_of_the_records(two):
    records, pairs = (open_records(settings["train_data"], make_tokenizer(context=8)) for settings in two)
    assert isinstance(records, RecordSet) and len(records) == len(pairs) == 60
    for i in range(60):
        (image, tokens), (other, texts) = records.sample(i), pairs.sample(i)
        assert image == other and (tokens == texts).all() and tokens.dtype == texts.dtype


def train(settings: dict, name: str, **more) -> Path:
    return main.run(main.read_command_line(to_arguments({**settings, "name": name, **more})))


def end_of(folder: Path) -> tuple[dict, list]:
    """The last weights, and the losses of all steps."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return read_weights(find_checkpoint(folder)), [(row["step"], row["loss"]) for row in log if "loss" in row]


def test_training_gives_the_same_bits_as_from_records_also_resumed(two, monkeypatch):
    (weights, losses), (others, their) = (end_of(train(settings, name)) for settings, name in zip(two, ("rec", "mdb")))
    assert losses == their and len(losses) == STEPS
    assert weights.keys() == others.keys() and all(weights[key].equal(others[key]) for key in weights)

    step = trainer.Trainer.step

    def stop(self, batch):
        if self.state.progress.step == 4:
            raise RuntimeError("power cut")
        return step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(trainer.Trainer, "step", stop)
        train(two[1], "cut")
    again, _ = end_of(train(two[1], "cut", resume="latest"))
    assert all(weights[key].equal(again[key]) for key in weights)


def test_a_run_resumes_with_its_own_pairs_only(two, tmp_path):
    train(two[1], "own")
    with pytest.raises(ValueError, match="records"):
        train(two[0], "own", resume="latest")


def test_faulty_pairs_are_replaced_and_counted(split):
    images = {i: encoded(i) for i in (7, 8)} | {9: b"%%%%", 10: base64.b64encode(b"no picture")}
    pairs = [(7, 1, "a"), (8, 2, "b"), (9, 3, "c"), (10, 4, "d"), (11, 5, "e"), (8, 6, "  "), ("x" * 600, 7, "f")]
    write_split(split, images, pairs, p_1=b"cposix\nsystem\n")
    loader = make(LmdbSet(split, TOKENIZER), global_batch=7, steps=2, max_bad=100)
    ids = [batch.ids.tolist() for batch in loader]
    assert {i for batch in ids for i in batch} == {0} and loader.skipped == {
        "record damaged": 10,
        "image unreadable": 2,
    }


def test_profile_data_reads_it(two, capsys):
    settings = profile_data.ProfileSettings(two[1]["train_data"], image_size=16, batch_size=8, workers=0, seconds=0.05)
    assert profile_data.run(settings).loader > 0 and "60 records" in capsys.readouterr().out


def test_the_command_says_what_it_is():
    done = subprocess.run([sys.executable, "-m", "rwkv_clip.data.lmdb", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--lmdb-dir" in done.stdout
