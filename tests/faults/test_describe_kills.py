"""A describing job that is killed at any time and started again gives the same bytes, and asks for no row twice but
those that were under way."""

import json
import random

import pytest

pytest.importorskip("aiohttp", reason="pip install -e '.[describe]'")

from helpers.describing import RESULTS, Forker, hash_job, make_rows, read_texts, write_rows
from helpers.fault_server import FaultServer

ROWS, CONCURRENCY = 400, 8


def write_answers(folder):
    """Recorded answers: most are good, some only at the second attempt, some never, some rows have none."""
    lines = []
    for i, row in enumerate(make_rows(ROWS)):
        good = json.dumps({"text": f"{row['synthetic']} and a {row['tags'][1]}."})
        for content in {7: ["{", good], 8: ["no", "{}", "{}", ""], 9: []}.get(i % 10, [good]):
            lines.append({"id": row["id"], "content": content, "finish_reason": "stop", "prompt_tokens": 9})
    file = folder / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def command(source, job, *more):
    return ["run", "--input", source, "--output", job, "--part-rows", 100, "--workers", 1, *more]


def kill_and_finish(forker, arguments, kills, longest, seed):
    """Kill that many runs at random times, then let one end; returns how many were killed indeed."""
    draw, killed = random.Random(seed), 0
    for _ in range(kills):
        killed += forker.run(arguments, kill_after=draw.uniform(0, longest)) == -9
    assert forker.run(arguments) == 0
    return killed


def test_twenty_kills_with_recorded_answers_leave_the_same_bytes(tmp_path):
    source, answers = write_rows(tmp_path, ROWS), write_answers(tmp_path)
    with Forker() as forker:
        replay = ("--composer", "replay", "--answers", answers, "--no-retry-failed")
        assert forker.run(command(source, tmp_path / "whole", *replay)) == 0
        killed = kill_and_finish(forker, command(source, tmp_path / "job", *replay), 20, 0.4, seed=1)
    assert killed >= 5
    whole = hash_job(tmp_path / "whole", *RESULTS)
    assert len(whole) == 4 * 4 + 1 and hash_job(tmp_path / "job", *RESULTS) == whole
    texts = read_texts(tmp_path / "job")
    assert [row["id"] for row in texts] == [f"r{i}" for i in range(ROWS)]
    engines = {i % 10: row["engine"] for i, row in enumerate(texts[:10])}
    assert engines[0] == engines[7] == "replay" and engines[8] == engines[9] == "rules"


def test_twenty_kills_ask_again_only_for_what_was_under_way(tmp_path):
    source = write_rows(tmp_path, ROWS)
    with FaultServer(delay=0.01) as server, Forker() as forker:
        asks = ("--composer", "openai", "--base-url", server.url, "--model", "tiny", "--concurrency", CONCURRENCY)
        killed = kill_and_finish(forker, command(source, tmp_path / "job", *asks), 20, 0.5, seed=2)
        assert forker.run(command(source, tmp_path / "whole", *asks)) == 0
        asked = server.requests
    assert killed >= 5 and len(asked) == ROWS
    again = sum(asked.values()) - 2 * ROWS  # each row once for either job
    assert 0 <= again <= CONCURRENCY * killed
    assert hash_job(tmp_path / "job", "texts.parquet") == hash_job(tmp_path / "whole", "texts.parquet")
