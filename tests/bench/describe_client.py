"""Rows per second through the openai composer: prompts, requests, answers parsed and checked; and rows under faults.

python tests/bench/describe_client.py [--rows 4000] [--concurrency 64] [--fault-rows 2000]

A server that answers at once runs in a process of its own. The faults are those of the acceptance table: errors of
three kinds, hangs (cut off after a second), cut JSON, resets, empty answers, wrong schemas.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import harness  # noqa: F401  makes the checkout importable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.fault_server import FaultServer
from rwkv_clip.describe.client import Client, Limits
from rwkv_clip.describe.composers.composer import Composed
from rwkv_clip.describe.composers.openai import Asking, OpenAI
from rwkv_clip.describe.prompt import Prompt
from rwkv_clip.describe.sources import Sources, Tag

FAULTS = {"500_html": 0.05, "500_json": 0.03, "429": 0.02, "hang": 0.02, "cut_json": 0.03, "reset": 0.01}
FAULTS |= {"empty": 0.01, "wrong_schema": 0.01}
WORDS = ("man", "dog", "beach", "river", "bicycle", "street", "table", "pie", "kite", "tower", "horse", "snow")


def make_row(number: int) -> Sources:
    one, two, three = (WORDS[number // step % len(WORDS)] for step in (1, 12, 144))
    tags = tuple(Tag(word, 0.9) for word in (one, two, three))
    return Sources(str(number), f"row {number}: {one} at the {two} in Brighton 2014", f"a {one} near a {three}", tags)


def serve(pipe: Connection, faults: dict[str, float]) -> None:
    with FaultServer(faults) as server:
        pipe.send(server.url)
        pipe.recv()
        pipe.send(
            (
                sum(server.requests.values()),
                max(Counter(row for row, fault in server.log if fault != "429").values()),
                server.usage,
            )
        )


def run(
    rows: int, limits: Limits, faults: dict[str, float]
) -> tuple[float, list[Composed], OpenAI, tuple[int, int, list[int]]]:
    """(seconds, texts, composer, what the server counted: requests, most for one row, tokens)."""
    pipe, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(other, faults), daemon=True)
    process.start()
    client = Client(pipe.recv(), None, limits)
    composer = OpenAI(client, Prompt.load("grounded"), Asking("tiny"))

    async def work() -> list[Composed]:
        found = [composed async for _, composed in composer.compose([make_row(number) for number in range(rows)])]
        await composer.close()
        return found

    begun = time.perf_counter()
    found = asyncio.run(work())
    seconds = time.perf_counter() - begun
    pipe.send(None)
    counted = pipe.recv()
    process.join(10)
    return seconds, found, composer, counted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--fault-rows", type=int, default=2000)
    parser.add_argument("--device", help="not used: all of this runs on the CPU")
    args = parser.parse_args()
    speeds = []
    for _ in range(args.repeats):
        seconds, found, _, _ = run(args.rows, Limits(concurrency=args.concurrency), {})
        if {composed.status for composed in found} != {"ok"} or len(found) != args.rows:
            print("rows are missing or not ok: no speed is printed")
            return 1
        speeds.append(args.rows / seconds)
    print(
        f"null server   {args.rows:6,} rows  {statistics.median(speeds):7,.0f} rows/s "
        f"({min(speeds):,.0f} to {max(speeds):,.0f}), {args.concurrency} at once"
    )

    limits = Limits(concurrency=args.concurrency, read=1, total=5, back_off=0.1)
    seconds, found, composer, (requests, most, usage) = run(args.fault_rows, limits, FAULTS)
    statuses = Counter(composed.status for composed in found)
    reasons = Counter(composed.reason for composed in found if composed.status != "ok")
    good = len(found) == args.fault_rows and statuses["ok"] >= 0.995 * len(found) and most <= 4
    counted = usage == [composer.prompt_tokens, composer.completion_tokens]
    turned_away = composer.client.problems["http 429"]
    good &= counted and sum(c.attempts for c in found) + turned_away == requests
    print(
        f"fault server  {args.fault_rows:6,} rows  {args.fault_rows / seconds:7,.0f} rows/s, {dict(statuses)}, "
        f"{requests:,} requests, most for a row {most}, others: {dict(reasons)}, limit at the end "
        f"{composer.client.gate.limit:.0f}, halved {composer.client.gate.halved} times; tokens {usage}, "
        f"{'as' if counted else 'NOT as'} the server counted"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
