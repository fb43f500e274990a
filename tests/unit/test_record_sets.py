"""Which records a name means, what tells a set from another, and how many files may be open."""

import json
import os
import pickle
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkv_clip.data.records import Header, RecordError, RecordSet, RecordWriter, find_record_files, pack
from rwkv_clip.errors import run_command

CONTENT = "ab" * 32


def write(prefix: Path, count: int = 6, side: dict | None = None, change: dict | None = None, order=None) -> Path:
    """Records of one text of 77 ids; change: {record: (label, picture)} that it has instead."""
    with RecordWriter(prefix) as writer:
        for key in range(count) if order is None else order:
            labels, image = np.full(77, key, np.float32), b"picture %04d" % key
            if key in (change or {}):
                label, image = change[key]
                labels[3] = label
            writer.write(key, pack(Header(label=labels, id=key), image))
    if side:
        heading = {"schema": 1, "views": ["raw"], "context": 77, "tokenizer": "clip-bpe", "vocab_size": 49408}
        Path(f"{prefix}.json").write_text(json.dumps(heading | side))
    return prefix


# ---- digest


OTHERS = {
    "a text": dict(change={3: (7, b"picture 0003")}),
    "a picture of the same length": dict(change={3: (3, b"gerbils 0003")}),
    "a longer picture": dict(change={3: (3, b"picture of 0003")}),
    "one more": dict(count=7),
    "one less": dict(count=5),
    "another order": dict(order=[1, 0, 2, 3, 4, 5]),
    "another tokenizer": dict(side={"tokenizer": "wordpiece"}),
    "another vocabulary": dict(side={"vocab_size": 50000}),
    "said to be of other content": dict(side={"content": CONTENT}),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_records_have_another_digest(other, tmp_path):
    one = RecordSet(write(tmp_path / "one", **({"side": {"count": 6}} if "side" in other else {}))).digest
    assert len(one) == 64 and RecordSet(write(tmp_path / "two", **other)).digest != one


def test_the_same_records_have_the_same_digest_everywhere(tmp_path):
    digest = RecordSet(write(tmp_path / "one")).digest
    assert digest.startswith("0d8b1f03a8db"), "of version 0.5: checkpoints hold it"
    (tmp_path / "far").mkdir()
    for ending in (".rec", ".idx"):
        shutil.copy(f"{tmp_path / 'one'}{ending}", f"{tmp_path / 'far' / 'moved'}{ending}")
        os.utime(f"{tmp_path / 'far' / 'moved'}{ending}", (1, 1))
    records = RecordSet(tmp_path / "far")
    records.limit_vocab(999)  # what a model reads of them does not change them
    assert records.digest == digest == pickle.loads(pickle.dumps(records)).digest


def test_a_digest_reads_little_of_many_records_unless_the_builder_said_it_all(tmp_path):
    """Without a word of the builder one changed id among 2000 records may be missed; with one it may not."""
    seen = 0
    one = RecordSet(write(tmp_path / "one", 2000)).digest
    for record in range(0, 2000, 250):
        two = write(tmp_path / "two", 2000, change={record: (7000, b"picture %04d" % record)})
        seen += RecordSet(two).digest != one
    assert 1 <= seen < 8
    said = [write(tmp_path / f"said{i}", 2000, side={"content": f"{i}" * 64}) for i in range(2)]
    assert RecordSet(said[0]).digest != RecordSet(said[1]).digest


def test_content_that_is_no_hash_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"one\.json: content is 7, should be a hash"):
        RecordSet(write(tmp_path / "one", side={"content": 7}))


# ---- names


def names(spec, folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_record_files(spec)]


def test_commas_in_names(tmp_path):
    for name in ("a,b/train", "a", "b", "c,d", "e,f-00000", "e,f-00001"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, 1)
    here = str(tmp_path)
    assert names(f"{here}/a,b/train", tmp_path) == ["a,b/train.rec"]
    assert names(f"{here}/a,b", tmp_path) == ["a,b/train.rec"]
    assert names(f"{here}/a,b/*.rec", tmp_path) == ["a,b/train.rec"]
    assert names(f"{here}/c,d.rec", tmp_path) == names(f"{here}/c,d", tmp_path) == ["c,d.rec"]
    assert names(f"{here}/e,f", tmp_path) == ["e,f-00000.rec", "e,f-00001.rec"]
    assert names(f"{here}/a, {here}/b", tmp_path) == ["a.rec", "b.rec"]
    assert names([f"{here}/c,d", f"{here}/a"], tmp_path) == ["a.rec", "c,d.rec"]
    assert len(find_record_files(",".join([f"{here}/a"] * 500))) == 1, "a list that is longer than a name can be"
    with pytest.raises(ValueError, match=r"'nowhere' names no \.rec"):
        find_record_files(f"{here}/a,nowhere")


@pytest.mark.parametrize(
    "name, words",
    [
        ("rows.csv", "is a file, but no .rec; make records of it first: python data2rec.py"),
        ("rows.jsonl", "python data2rec.py"),
        ("shard.tar", "python data2rec.py"),
        ("train.idx", "give their prefix"),
        ("train.json", "give their prefix"),
        (".", "names no .rec file; give a prefix"),
        ("absent", "which data2rec.py makes"),
    ],
)
def test_what_is_no_record_file_is_told_the_way(name, words, tmp_path):
    write(tmp_path / "records" / "train", side={"count": 6})
    for file in ("rows.csv", "rows.jsonl", "shard.tar"):
        (tmp_path / file).write_text("x")
    folder = tmp_path / "records" if name.startswith("train.") else tmp_path
    with pytest.raises(ValueError, match=r"^records: '.*' ") as caught:
        find_record_files(str(folder / name))
    assert words in str(caught.value)


def test_a_side_file_nested_too_deeply(tmp_path):
    write(tmp_path / "one")
    (tmp_path / "one.json").write_text("[" * 100_000)
    with pytest.raises(RecordError, match=r"one\.json: JSON nested too deeply"):
        RecordSet(tmp_path / "one")


# ---- many files


def read_limited(folder: Path, limit: int) -> tuple[int, str]:
    """Exit code and words of a command that reads the records, in a process that may have `limit` files open at most
    and 64 at first."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 2)
        sys.stderr = os.fdopen(2, "w")
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(64, limit), limit))
        code = run_command(lambda: print(RecordSet(folder).digest[:4], len(RecordSet(folder)), file=sys.stderr))
        sys.stderr.flush()
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def test_more_files_than_may_be_open(tmp_path):
    first = write(tmp_path / "shard-00000", 1)
    for number in range(1, 100):
        for ending in (".rec", ".idx"):
            os.link(f"{first}{ending}", tmp_path / f"shard-{number:05d}{ending}")
    code, said = read_limited(tmp_path, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert code == 0 and said.endswith(" 100\n"), said
    code, said = read_limited(tmp_path, 90)
    assert code == 2 and "Too many open files; raise the limit of open files (ulimit -n" in said
    assert said.count("\n") == 1
