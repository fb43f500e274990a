"""Jobs of descriptions in unlucky hands: inputs that change, parts that go, commands in any order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rwkv_clip.describe.__main__ import main
from rwkv_clip.describe.composers.rules import Rules
from rwkv_clip.describe.job import Job
from rwkv_clip.describe.sources import Sources
from rwkv_clip.describe.verify import judge
from tests.helpers.describing import make_rows, read_texts


def write(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(command: str, job: Path, *arguments: object) -> int:
    return main([command, "--output", str(job), *map(str, arguments)])


def ids(job: Path) -> list[str]:
    return [row["id"] for row in read_texts(job)]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A finished job of 20 rows in 4 parts, of rows.jsonl beside it."""
    write(tmp_path / "rows.jsonl", make_rows(20))
    assert run("run", tmp_path / "job", "--input", tmp_path / "rows.jsonl", "--part-rows", 5) == 0
    return tmp_path / "job"


class TestTheInputChanges:
    def test_a_shrunk_input_leaves_the_rows_as_they_were(self, job: Path) -> None:
        file = job.parent / "rows.jsonl"
        whole = file.read_bytes()
        write(file, make_rows(20)[10:])
        assert run("run", job, "--input", file) == 2
        file.write_bytes(whole)
        assert run("run", job, "--input", file) == 0
        assert ids(job) == [f"r{i}" for i in range(20)]

    def test_an_input_that_turns_out_damaged_leaves_the_rows_as_they_were(self, job: Path) -> None:
        file = job.parent / "rows.jsonl"
        before = {part.name: part.read_bytes() for part in (job / "rows").glob("*.parquet")}
        file.write_text("".join(json.dumps({**row, "id": "new"}) + "\n" for row in make_rows(20)) + "{")
        assert run("run", job, "--input", file) == 3
        assert {part.name: part.read_bytes() for part in (job / "rows").glob("*.parquet")} == before
        assert run("export", job) == 0

    @pytest.mark.parametrize("command", ["report", "verify", "dedup", "export", "instruct"])
    @pytest.mark.parametrize("change", ["edited", "grown"])
    def test_a_command_alone_says_which_stage_is_behind(
        self, job: Path, command: str, change: str, capsys: pytest.CaptureFixture
    ) -> None:
        rows = make_rows(23)
        if change == "edited":
            rows = [{**row, "raw": row["raw"].replace("dog", "zebra")} for row in rows[:20]]
        write(job.parent / "rows.jsonl", rows)
        assert run("compose", job, "--input", job.parent / "rows.jsonl", "--shard", "3/4") == 0
        capsys.readouterr()
        more = ["--folder", job.parent / "set"] if command == "instruct" else []
        assert run(command, job, *more) == 2
        told = capsys.readouterr().err
        assert "other rows" in told or "not made yet" in told
        assert "again" in told or "first" in told
        assert run("run", job, "--input", job.parent / "rows.jsonl") == 0
        assert [row["raw"] for row in read_texts(job)] == [row["raw"] for row in rows]


class TestPartsGo:
    @pytest.mark.parametrize("stage", ["rows", "compose", "verify", "dedup"])
    @pytest.mark.parametrize("how", ["deleted", "damaged", "of another place"])
    def test_the_same_command_makes_them_anew(
        self, job: Path, stage: str, how: str, capsys: pytest.CaptureFixture
    ) -> None:
        before = (job / "texts.parquet").read_bytes()
        part = job / stage / "part-00001.parquet"
        command = "run", job, "--input", job.parent / "rows.jsonl"
        if how == "damaged":
            part.write_bytes(part.read_bytes()[:100])
            if stage != "rows":
                assert run(*command) == 3
                assert f"{part}: not a whole Parquet file" in capsys.readouterr().err  # which says what to do:
                part.unlink()
        elif how == "of another place":
            part.write_bytes((job / stage / "part-00002.parquet").read_bytes())
        else:
            part.unlink()
        assert run(*command) == 0
        assert (job / "texts.parquet").read_bytes() == before

    @pytest.mark.parametrize("command", ["compose", "verify", "dedup", "report", "export"])
    def test_rows_that_are_gone_are_never_left_out(
        self, job: Path, command: str, capsys: pytest.CaptureFixture
    ) -> None:
        (job / "rows" / "part-00001.parquet").unlink()
        assert run(command, job) == 3
        assert "is missing; the command with --input reads it anew" in capsys.readouterr().err


class TestTheWrongOrder:
    @pytest.mark.parametrize(
        ("done", "command", "missing"),
        [
            (["rows"], "verify", "compose"),
            (["rows"], "dedup", "verify"),
            (["rows", "compose"], "dedup", "verify"),
            (["rows", "compose"], "instruct", "verify"),
            (["rows", "compose", "verify"], "export --duplicates near", "dedup"),
        ],
    )
    def test_names_the_stage_that_is_missing(
        self, tmp_path: Path, done: list[str], command: str, missing: str, capsys: pytest.CaptureFixture
    ) -> None:
        job, file = tmp_path / "job", write(tmp_path / "rows.jsonl", make_rows(6))
        name, *more = command.split()
        assert run("caption", job, "--input", file) == 0  # reads
        for stage in done[1:]:
            assert run(stage, job) == 0
        more += ["--folder", str(tmp_path / "set")] if name == "instruct" else []
        assert run(name, job, *more) == 2
        assert f"run {missing} first" in capsys.readouterr().err

    def test_an_export_between_two_shards_is_refused(self, job: Path, capsys: pytest.CaptureFixture) -> None:
        (job / "verify" / "part-00002.parquet").unlink()
        assert run("export", job) == 2
        assert "verify: part 2" in capsys.readouterr().err

    def test_a_dedup_too_early_does_no_harm_later(self, tmp_path: Path) -> None:
        job, file = tmp_path / "job", write(tmp_path / "rows.jsonl", make_rows(6))
        assert run("dedup", job, "--input", file) == 2
        assert run("run", job, "--input", file) == 0
        assert len(ids(job)) == 6


class TestSeveralCommandsBeginAtOnce:
    def test_what_another_has_begun_is_no_folder_of_something_else(self, tmp_path: Path) -> None:
        """The first of several has made the folder, and is about to name job.json (or was killed then)."""
        job = tmp_path / "job"
        job.mkdir()
        (job / "job.json.1.part").write_text("{")
        assert run("run", job, "--input", write(tmp_path / "rows.jsonl", make_rows(6)), "--shard", "0/2") == 0

    def test_another_folder_is(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        (tmp_path / "photo.jpg").write_text("x")
        assert run("run", tmp_path, "--input", "rows.jsonl") == 2
        assert "holds other files and no job" in capsys.readouterr().err


class TestNames:
    def test_a_named_field_of_pictures_is_taken(self, tmp_path: Path) -> None:
        rows = [{"photo": "0.jpg", "raw": "a dog at home", "image": "wrong.jpg"}, {"photo": "1.jpg"}]
        file, job = write(tmp_path / "rows.jsonl", rows), tmp_path / "job"
        assert run("run", job, "--input", file, "--image-field", "photo") == 0
        assert [row["image"] for row in read_texts(job)] == ["0.jpg", "1.jpg"]

    @pytest.mark.parametrize("setting", ["tags-field", "ocr-field", "id-field", "image-field"])
    def test_a_name_that_no_row_has_is_refused(
        self, tmp_path: Path, setting: str, capsys: pytest.CaptureFixture
    ) -> None:
        file = write(tmp_path / "rows.jsonl", make_rows(3))
        assert run("run", tmp_path / "job", "--input", file, f"--{setting}", "tagz") == 2
        told = capsys.readouterr().err
        assert setting.replace("-", "_") in told and "'tagz'" in told and "synthetic" in told


class TestRecordedAnswers:
    def test_other_answers_are_never_taken_for_the_former(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        rows, job, answers = write(tmp_path / "rows.jsonl", make_rows(3)), tmp_path / "job", tmp_path / "answers.jsonl"
        command = "run", job, "--input", rows, "--composer", "replay", "--answers", answers
        write(answers, [{"id": f"r{i}", "content": json.dumps({"text": "A dog near a ball."})} for i in range(3)])
        assert run(*command) == 0
        write(answers, [{"id": f"r{i}", "content": json.dumps({"text": "A ball near a dog."})} for i in range(3)])
        assert run(*command) == 2
        assert "answers: was" in capsys.readouterr().err
        assert run(*command, "--new-run") == 0
        assert read_texts(job)[0]["generated"] == "A ball near a dog."


class TestFilesOfColumns:
    @pytest.mark.parametrize(("command", "what"), [("captions", "caption"), ("tags", "tags")])
    def test_a_file_with_other_ids_is_told(
        self, tmp_path: Path, command: str, what: str, capsys: pytest.CaptureFixture
    ) -> None:
        rows = write(tmp_path / "rows.jsonl", [{"id": row["id"], "raw": row["raw"]} for row in make_rows(4)])
        file = write(tmp_path / "more.jsonl", [{"id": f"x{i}", what: "a dog"} for i in range(3)])
        assert run("run", tmp_path / "job", "--input", rows, f"--{command}", file) == 0
        told = capsys.readouterr().out
        assert "0 rows found; 4 rows that are not in the file; 3 entries that no row asked for" in told

    def test_an_empty_one_too(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        rows = write(tmp_path / "rows.jsonl", [{"id": "a", "raw": "a dog at home"}])
        file = write(tmp_path / "more.jsonl", [{"id": "a", "caption": ""}])
        assert run("run", tmp_path / "job", "--input", rows, "--captions", file) == 0
        assert "0 rows found; " in capsys.readouterr().out


def test_long_texts_are_kept_in_part_only(tmp_path: Path) -> None:
    """5,000 rows of a part are in memory at once."""
    row = {
        "id": "a",
        "raw": "a dog " * 100_000,
        "synthetic": "a cat " * 100_000,
        "ocr": "x " * 10**6,
        "url": "u" * 10**6,
    }
    assert run("run", tmp_path / "job", "--input", write(tmp_path / "rows.jsonl", [row])) == 0
    (found,) = Job(tmp_path / "job").read("rows")
    assert max(len(value) for value in found.values() if isinstance(value, str)) <= 1 << 14
    assert "cut" in found["flags"]


class TestNotesOfTheJob:
    @pytest.mark.parametrize("text", ['{"parts": "x", "rows": null}', "[]", "{", '{"parts": 0, "rows": 0}', ""])
    def test_a_damaged_note_of_the_input_says_what_to_do(
        self, job: Path, text: str, capsys: pytest.CaptureFixture
    ) -> None:
        note = job / "rows" / "input.json"
        note.write_text(text)
        for command in ("status", "export", "report"):
            assert run(command, job) == 3
            assert str(note) in capsys.readouterr().err
        note.unlink()
        assert run("run", job, "--input", job.parent / "rows.jsonl") == 0
        assert len(ids(job)) == 20

    @pytest.mark.parametrize("line", ['{"seconds": "x", "rows": "y"}', '{"rows": [1]}', "5", "{"])
    def test_the_log_of_times_decides_nothing(self, job: Path, line: str) -> None:
        with open(job / "compose" / "times.jsonl", "a") as file:
            file.write(line + "\n")
        assert run("status", job) == 0
        assert run("report", job) == 0


class TestWhatNoSourceSays:
    sources = Sources("a", raw="the dog at the lake", caption="a dog stands near a lake")

    @pytest.mark.parametrize(
        "text",
        [
            "No dog stands near a lake.",
            "A dog without a lake.",
            "A dog does not stand near a lake.",
            "A dog doesn't stand near a lake.",
            "A dog doesn’t stand near a lake.",
            "Neither a dog nor a lake.",
        ],
    )
    def test_denials_are_rejected(self, text: str) -> None:
        assert any(reason.startswith("negation: ") for reason in judge(self.sources, text).rejects)

    def test_those_of_a_source_are_not(self) -> None:
        for raw in ("no dog at the lake", "NOT a dog", "a lake w/o dogs", "dogs don’t swim"):
            assert not judge(Sources("a", raw, self.sources.caption), "A lake without a dog.").rejects
        assert not judge(Sources("a", "#5 dog at the lake"), "Dog No. 5 at the lake.").rejects

    @pytest.mark.parametrize("name", ["paris", "tahoe", "rex", "zürich"])
    @pytest.mark.parametrize("before", ["named", "in", "near"])
    def test_names_in_lower_case_are_names(self, name: str, before: str) -> None:
        text = f"A dog stands near a lake {before} {name}."
        assert f"names: {name}" in judge(self.sources, text).rejects
        assert not judge(Sources("a", f"{name.title()} dog", self.sources.caption), text).rejects


class TestWhatWeWriteOurselves:
    def test_passes_all_checks(self) -> None:
        words = "no dog without IMG_1.JPG in zzyzx of qwert, not a lake named rex"
        for raw in (words, words.upper(), words.title()):
            for caption in ("a dog in xyzzy", "nothing in here", ""):
                sources = Sources("a", raw, caption)
                assert not judge(sources, Rules().write(sources)).rejects
