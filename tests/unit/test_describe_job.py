"""A job of descriptions: parts that are whole, journals that a kill may tear, settings that are refused by name."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="jobs are kept in Parquet: pip install -e '.[describe]'")

from rwkv_clip.describe.job import ROWS, Changed, Job, Stage, parse_shard
from rwkv_clip.describe.parquet import read_metadata, read_parquet, write_parquet
from rwkv_clip.describe.work import Task, make_parts
from rwkv_clip.files import DamagedError, InUse

STAGE = Stage("compose", {"text": "str", "status": "str"}, (ROWS,), ("raw",), {"shout": 1}, "status", True)


def make_job(folder: Path, texts: list[str], part_rows: int = 4) -> Job:
    """A job whose rows have been read."""
    job = Job(folder, None if (folder / "job.json").exists() else part_rows)
    rows = [{"id": f"r{i}", "inputs": "", "raw": text} for i, text in enumerate(texts)]
    (folder / ROWS).mkdir(exist_ok=True)
    parts = [rows[k : k + job.part_rows] for k in range(0, len(rows), job.part_rows)]
    for number, part in enumerate(parts):
        write_parquet(job.part(ROWS, number), {"id": "str", "inputs": "str", "raw": "str"}, [part])
    job.note_input({"parts": len(parts), "rows": len(rows), "fingerprint": texts})
    return job


class Shouter:
    """Asks for each row once and counts; fails for rows named in `failing`, dies after `left` rows."""

    def __init__(self, failing=(), left=10**9):
        self.asked, self.failing, self.left = [], set(failing), left

    async def __call__(self, rows):
        for place in reversed(range(len(rows))):  # not in their order
            await asyncio.sleep(0)
            if self.left == 0:
                raise RuntimeError("died")
            self.left -= 1
            row = rows[place]
            self.asked.append(row["id"])
            failed = row["id"] in self.failing
            yield place, {"text": None if failed else row["raw"].upper(), "status": "failed" if failed else "ok"}


def finish(job: Job, shouter: Shouter, **options) -> list:
    job.agree(STAGE)
    make_parts(job, Task(STAGE, ask=shouter), range(job.count_parts()), **options)
    return [row["text"] for row in job.read()]


def test_rows_come_out_in_order_and_are_asked_for_once(tmp_path):
    job, first, second = make_job(tmp_path / "job", list("abcdefghij")), Shouter(), Shouter()
    assert finish(job, first) == list("ABCDEFGHIJ") and len(first.asked) == 10
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "job").rglob("*.parquet")}
    assert finish(job, second) == list("ABCDEFGHIJ") and second.asked == []
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "job").rglob("*.parquet")}
    assert not list((tmp_path / "job").rglob("*.journal")) and not list((tmp_path / "job").rglob("*.part"))


@pytest.mark.parametrize("left", [0, 1, 3, 4, 5, 9])
def test_rows_that_were_finished_are_not_asked_for_again(tmp_path, left):
    job, first, second = make_job(tmp_path / "job", list("abcdefghij")), Shouter(left=left), Shouter()
    with pytest.raises(RuntimeError, match="died"):
        finish(job, first)
    assert finish(job, second) == list("ABCDEFGHIJ")
    assert sorted(first.asked + second.asked) == sorted(f"r{i}" for i in range(10))
    whole = make_job(tmp_path / "whole", list("abcdefghij"))
    finish(whole, Shouter())
    for number in range(3):
        assert job.part("compose", number).read_bytes() == whole.part("compose", number).read_bytes()


def test_failed_rows_keep_their_place_and_are_tried_again(tmp_path):
    job = make_job(tmp_path / "job", list("abcdef"))
    assert finish(job, Shouter(failing={"r1", "r5"})) == ["A", None, "C", "D", "E", None]
    assert [read_metadata(job.part("compose", k))["failed"] for k in range(2)] == ["1", "1"]
    kept = Shouter()
    assert finish(job, kept, retry_failed=False) == ["A", None, "C", "D", "E", None] and kept.asked == []
    again = Shouter(failing={"r5"})
    assert finish(job, again) == ["A", "B", "C", "D", "E", None] and sorted(again.asked) == ["r1", "r5"]
    assert finish(job, Shouter()) == list("ABCDEF")


def test_the_input_may_grow_and_change(tmp_path):
    job = make_job(tmp_path / "job", list("abcdef"))
    finish(job, Shouter())
    grown = Shouter()
    assert finish(make_job(tmp_path / "job", list("abcdefghi")), grown) == list("ABCDEFGHI")
    assert sorted(grown.asked) == ["r6", "r7", "r8"]
    changed = Shouter()
    assert finish(make_job(tmp_path / "job", list("abXdefghi")), changed) == list("ABXDEFGHI") and changed.asked == [
        "r2"
    ]


@pytest.mark.parametrize("torn", ["", "{", '{"id": "r3", "inputs"', '{"id": "r3"}\n', "null\n", "\0\0\0\n", "[1]\n5"])
def test_a_torn_journal_costs_its_last_line_only(tmp_path, torn):
    job = make_job(tmp_path / "job", list("abcd"))
    with pytest.raises(RuntimeError):
        finish(job, Shouter(left=2))
    journal = job.part("compose", 0).with_suffix(".journal")
    journal.write_text(journal.read_text() + torn)
    second = Shouter(left=1)
    with pytest.raises(RuntimeError):
        finish(job, second)
    third = Shouter()
    assert finish(job, third) == list("ABCD") and len(second.asked + third.asked) == 2


def test_a_setting_that_changed_is_refused_by_name_and_its_rows_can_be_put_aside(tmp_path):
    job = make_job(tmp_path / "job", list("ab"))
    finish(job, Shouter())
    other = Stage(STAGE.name, STAGE.columns, STAGE.reads, STAGE.inputs, {"shout": 2}, "status", True)
    with pytest.raises(Changed, match=r"compose: shout: was 1, now 2; .*--new-run"):
        job.agree(other)
    more = Stage(STAGE.name, STAGE.columns, STAGE.reads, STAGE.inputs, {"shout": 1, "tone": "low"}, "status", True)
    with pytest.raises(Changed, match="tone: was null, now"):
        job.agree(more)
    old = job.part("compose", 0).read_bytes()
    job.agree(other, new_run=True)
    assert (tmp_path / "job" / "before-1" / "compose" / "part-00000.parquet").read_bytes() == old
    assert job.find_settings("compose") == {"shout": 2} and not job.has("compose")


def test_a_part_has_one_owner(tmp_path):
    job = make_job(tmp_path / "job", list("ab"))
    job.agree(STAGE)
    code = (
        "import sys; from rwkv_clip.files import hold\n"
        "with hold(__import__('pathlib').Path(sys.argv[1]), 'it', 'wait'):\n    print('mine', flush=True); input()"
    )
    lock = job.part("compose", 0).with_suffix(".lock")
    other = subprocess.Popen(
        [sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(InUse, match="part 0 of compose"):
        finish(job, Shouter())
    other.communicate("\n")
    assert finish(job, Shouter()) == ["A", "B"]


def test_a_damaged_part_is_named(tmp_path):
    job = make_job(tmp_path / "job", list("abcd"))
    finish(job, Shouter())
    file = job.part("compose", 0)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DamagedError, match=r"part-00000.parquet.*remove it"):
        finish(job, Shouter())


def test_a_folder_of_something_else_is_no_job(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match="holds other files"):
        Job(tmp_path, 5)
    with pytest.raises(ValueError, match="holds no job"):
        Job(tmp_path)
    make_job(tmp_path / "job", ["a"], 4)
    with pytest.raises(Changed, match="part_rows: was 4, now 5"):
        Job(tmp_path / "job", 5)


@pytest.mark.parametrize("text, wanted", [(None, (0, 1)), ("0/1", (0, 1)), ("3/16", (3, 16)), ("015/16", (15, 16))])
def test_shards(text, wanted):
    assert parse_shard(text) == wanted


@pytest.mark.parametrize("text", ["", "3", "16/16", "-1/4", "1/0", "a/b", "1/4/2", "1.0/4"])
def test_no_shards(text):
    with pytest.raises(ValueError, match="shard"):
        parse_shard(text)


def test_parquet_keeps_types_and_what_utf8_cannot(tmp_path):
    columns = {"a": "str", "b": "int", "c": "float", "d": "bool", "e": "str list", "f": "float list"}
    rows = [
        {"a": "\ud800 ok \0", "b": 1 << 40, "c": 0.1, "d": True, "e": ["x", "\udfff"], "f": [1.5], "more": 1},
        {"a": None, "e": [], "f": None},
        {},
    ]
    path = tmp_path / "x.parquet"
    assert write_parquet(path, columns, [rows[:1], [], rows[1:]], {"made": "ä"}) == 3
    first, second, third = read_parquet(path)
    assert first == {"a": "? ok \0", "b": 1 << 40, "c": 0.1, "d": True, "e": ["x", "?"], "f": [1.5]}
    assert second == {"a": None, "b": None, "c": None, "d": None, "e": [], "f": None} and set(third.values()) == {None}
    assert read_metadata(path)["made"] == "ä" and [row["b"] for row in read_parquet(path, ["b"])] == [
        1 << 40,
        None,
        None,
    ]
    other = tmp_path / "y.parquet"
    write_parquet(other, columns, [[row] for row in rows], {"made": "ä"})
    assert other.read_bytes() == path.read_bytes()


def test_a_write_that_fails_leaves_the_former_file(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, {"a": "str"}, [[{"a": "good"}]])

    def batches():
        yield [{"a": "half"}] * 5000
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        write_parquet(path, {"a": "str"}, batches())
    assert [row["a"] for row in read_parquet(path)] == ["good"] and os.listdir(tmp_path) == ["x.parquet"]
