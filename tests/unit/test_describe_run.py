"""The command that describes: whole jobs by rules and by a server, on one machine, in shards and with Ray."""

import json

import pytest

pytest.importorskip("aiohttp", reason="pip install -e '.[describe]'")

from helpers.describing import RESULTS, describe, hash_job, make_rows, read_texts, write_rows
from helpers.fault_server import FaultServer
from rwkv_clip.describe.__main__ import main


def run(source, job, *more, **options):
    return describe("run", "--input", source, "--output", job, *more, **options)


def test_a_hundred_demo_rows_twice_are_the_same_bytes(tmp_path):
    describe("demo", "--output", tmp_path, "--rows", 100, "--size", 32)
    for job in ("a", "b"):
        done = run(tmp_path / "rows.jsonl", tmp_path / job, "--images", tmp_path / "images")
        assert done.stdout.startswith("rows: 100 rows, "), done.stdout
    assert hash_job(tmp_path / "a", *RESULTS) == hash_job(tmp_path / "b", *RESULTS)
    texts = read_texts(tmp_path / "a")
    assert (
        len(texts) == 100 and all(row["generated"] for row in texts) and {row["engine"] for row in texts} == {"rules"}
    )
    assert (tmp_path / "a" / "report.html").stat().st_size > 10_000


def test_a_run_that_is_done_does_nothing_again(tmp_path):
    source = write_rows(tmp_path, 30)
    run(source, tmp_path / "job", "--part-rows", 10)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "job").glob("*/*.parquet")}
    run(source, tmp_path / "job")
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "job").glob("*/*.parquet")}
    told = describe("status", "--output", tmp_path / "job").stdout
    assert "30 rows in 3 parts of 10" in told and "compose: 3 of 3 parts" in told


def test_shards_workers_and_ray_make_the_same_rows(tmp_path):
    """A6: also with a server that answers 500 in HTML for one row."""
    source = write_rows(tmp_path, 60)
    with FaultServer(faults=lambda row, before: "500_html" if row == "row 17" else None) as server:
        asks = ("--composer", "openai", "--base-url", server.url, "--model", "tiny", "--part-rows", 8, "--attempts", 2)
        run(source, tmp_path / "local", *asks)
        for shard in range(4):
            done = run(source, tmp_path / "shards", *asks, "--shard", f"{shard}/4")
            assert not (tmp_path / "shards" / "texts.parquet").exists() and "without --shard" in done.stdout
            parts = {int(file.stem[-5:]) for file in (tmp_path / "shards" / "compose").glob("*.parquet")}
            assert parts == {k for k in range(8) if k % 4 <= shard}
        run(source, tmp_path / "shards", *asks)
        asked = server.requests.copy()
        pytest.importorskip("ray", reason="pip install -e '.[ray]'")
        run(source, tmp_path / "ray", *asks, "--executor", "ray", "--workers", 2)
    local = read_texts(tmp_path / "local")
    assert local[17]["engine"] == "rules" and {row["engine"] for row in local} == {"rules", "openai:tiny"}
    assert [row["id"] for row in local] == [f"r{i}" for i in range(60)]
    assert read_texts(tmp_path / "shards") == local == read_texts(tmp_path / "ray")
    assert all(count == 2 for row, count in asked.items() if row != "row 17")


def test_a_changed_setting_is_refused_by_name(tmp_path):
    """A13."""
    source = write_rows(tmp_path, 20)
    run(source, tmp_path / "job")
    done = run(source, tmp_path / "job", "--variant", "short", check=False)
    assert done.returncode == 2 and 'compose: variant: was "full", now "short"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    run(source, tmp_path / "job", "--variant", "short", "--new-run")
    assert (tmp_path / "job" / "before-1" / "compose" / "part-00000.parquet").exists()
    assert len(read_texts(tmp_path / "job")) == 20


@pytest.mark.parametrize(("command", "before"), [("verify", "compose"), ("dedup", "verify"), ("export", "verify")])
def test_a_stage_before_its_turn_is_refused(tmp_path, capsys, command, before):
    job = tmp_path / "job"
    assert main([command, "--input", str(write_rows(tmp_path, 3)), "--output", str(job)]) == 2
    told = capsys.readouterr().err.strip()
    assert f"run {before} first" in told and len(told.splitlines()) == 1
    assert not (job / command / "part-00000.parquet").exists() and not (job / "texts.parquet").exists()


def test_texts_that_are_not_found_are_told(tmp_path):
    """Fields under other names would otherwise give a job of empty texts that looks well."""
    source = tmp_path / "rows.jsonl"
    source.write_text('{"image": "1.jpg", "alt": "a red bike"}\n' * 2)
    told = run(source, tmp_path / "job").stdout
    assert "rows: 2 rows, with raw text 0, caption 0, tags 0" in told
    assert "they have image, alt; say where it is, --texts raw=FIELD" in told and "nothing to train on" in told
    assert "python data2rec.py" not in told
    assert (
        "rows: 2 rows, with raw text 2, caption 0, tags 0" in run(source, tmp_path / "b", "--texts", "raw=alt").stdout
    )


def test_a_trial_of_the_first_rows_grows_to_all_and_asks_for_none_again(tmp_path):
    source, job = write_rows(tmp_path, 30), tmp_path / "job"
    with FaultServer() as server:
        asks = ("--composer", "openai", "--base-url", server.url, "--model", "tiny", "--part-rows", "8")
        run(source, job, *asks, "--limit", "12")
        assert len(read_texts(job)) == 12
        told = run(source, job, *asks).stdout
        assert "compose: 30 rows, 18 made, 12 as before" in told and len(read_texts(job)) == 30
        run(source, tmp_path / "whole", *asks)
        assert read_texts(job) == read_texts(tmp_path / "whole")
        refused = run(source, job, *asks, "--limit", "5", check=False)
    assert refused.returncode == 2 and "has 5 rows, the job was begun with 30" in refused.stderr


def test_an_input_that_has_shrunk_is_refused_and_changes_nothing(tmp_path):
    source, job = write_rows(tmp_path, 30), tmp_path / "job"
    run(source, job, "--part-rows", "8")
    before = {file: file.read_bytes() for file in (job / "rows").iterdir()}
    whole = source.read_text()
    source.write_text("".join(whole.splitlines(keepends=True)[:5]))
    refused = run(source, job, check=False)
    assert refused.returncode == 2 and "has 5 rows, the job was begun with 30" in refused.stderr
    assert {file: file.read_bytes() for file in (job / "rows").iterdir()} == before
    source.write_text(whole)
    assert "compose: 30 rows, 30 as before" in run(source, job).stdout


def test_why_rows_failed_is_told(tmp_path):
    asks = ("--composer", "openai", "--base-url", "http://127.0.0.1:9/v1", "--model", "m")
    told = run(write_rows(tmp_path, 3), tmp_path / "job", *asks).stdout
    assert "failed: 3 (no connection: 3); the same command tries them again" in told and "3 rules" in told


def test_no_secret_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-verysecret123")
    source = write_rows(tmp_path, 12)
    with FaultServer(faults={"500_json": 0.3}, key="sk-verysecret123") as server:
        asks = ("--composer", "openai", "--base-url", server.url, "--model", "tiny", "--key-variable", "MY_KEY")
        done = run(source, tmp_path / "job", *asks)
        assert "Bearer sk-verysecret123" in server.authorizations
        monkeypatch.setenv("MY_KEY", "sk-wrong")
        refused = run(source, tmp_path / "other", *asks, check=False)
    assert refused.returncode == 2 and "sk-wrong" not in refused.stderr + refused.stdout and "401" in refused.stderr
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"verysecret" not in written and "verysecret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--composer", "openai"], "base_url: not set"),
        (["--composer", "openai", "--base-url", "http://x"], "model: not set"),
        (["--composer", "openai", "--base-url", "ftp://x", "--model", "m"], "base_url: 'ftp://x'"),
        (["--composer", "replay"], "answers: not set"),
        (["--composer", "replay", "--answers", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--shard", "4/4"], "shard: '4/4'"),
        (["--shard", "0/4", "--executor", "ray"], "shard: not with --executor ray"),
        (["--max-cost", "3"], "max_cost: needs --price-in"),
        (["--prompt", "nothing"], "prompt: nothing"),
        (
            ["--composer", "openai", "--base-url", "http://x", "--model", "m", "--extra-body", "["],
            "extra_body: not JSON",
        ),
        (["--context", "2"], "context: 2 must be at least 8"),
        (["--drop-flags", "pi"], "drop_flags: 'pi' is no flag; there are pii, "),
        (["--min-clip", "0.2"], "min_clip: the job has no CLIP scores"),
        (["--where", "color=red"], "no row has a field 'color'"),
        (["--texts", "raw=alt"], "no row has a text 'alt'"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, arguments, message):
    source = write_rows(tmp_path, 3)
    assert main(["run", "--input", str(source), "--output", str(tmp_path / "job"), *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told and len(told.splitlines()) == 1


@pytest.mark.parametrize("content", ["", "\n\n", '{"image": ""}\n', '{"other": 5}\n'])
def test_an_input_without_rows(tmp_path, capsys, content):
    source = tmp_path / "rows.jsonl"
    source.write_text(content)
    assert main(["run", "--input", str(source), "--output", str(tmp_path / "job")]) == 2
    assert "has no row with a text or a picture" in capsys.readouterr().err


def test_rows_of_other_kinds(tmp_path):
    """CSV with RAM's separator, Parquet of an earlier job, and a row with half a surrogate pair."""
    table = tmp_path / "rows.csv"
    table.write_text("key,alt,blip,ram\n1,Red bike,a bike,bike | wall\n2,,a dog,\n3,,,\n")
    named = ("--texts", "raw=alt", "synthetic=blip", "--tags-field", "ram")
    done = run(table, tmp_path / "csv", *named)
    first, second = read_texts(tmp_path / "csv")
    assert first["id"] == "1" and first["synthetic"] == "a bike" and "wall" in first["generated"]
    assert second["raw"] is None and second["generated"].rstrip(".").lower() == "a dog"
    assert "1 skipped (neither a text nor a picture)" in done.stdout
    run(tmp_path / "csv" / "texts.parquet", tmp_path / "again")
    assert [row["synthetic"] for row in read_texts(tmp_path / "again")] == ["a bike", "a dog"]
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"id": "x", "raw": "a \\ud800 dog", "tags": "dog, \\udfff"}\n' + json.dumps(make_rows(1)[0]) + "\n")
    run(odd, tmp_path / "odd")
    assert len(read_texts(tmp_path / "odd")) == 2
