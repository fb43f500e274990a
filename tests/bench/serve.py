"""The search server: milliseconds per query over HTTP and where they go, and what twenty users at once wait.

python tests/bench/serve.py [--rows 100000 1000000 --width 640 --users 20 --queries 10]

Random unit vectors, memory-mapped as an index has them, and an encoder that takes no time: a model's own is
added (tests/bench/encode.py). The parts are those that the server says (encode, search, describe) and, as `HTTP`, the
rest of what the client waits: the request, its parsing, JSON, the answer. The plain product is numpy's in float32 with
the vectors in memory. Twenty users: each sends its next query when the answer to its last one is there. The server
runs in this process, so clients and server share its cores. The answers to three queries are compared with those of
the exact search before any time is printed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from harness import Report, argument_parser, clock

from rwkv_clip.metrics import nearest_items
from rwkv_clip.search.vectors import Vectors, write_vectors

K = 40  # results, as the page asks for
GOAL = 0.2  # seconds a query at a million rows
BLOCK = 65536


class Encoder:
    """Texts -> random unit vectors, the same for the same text."""

    checkpoint = "none"

    def __init__(self, width: int):
        self.width = width

    def encode_text(self, text: str) -> np.ndarray:
        vector = np.random.default_rng(list(text.encode())).standard_normal(self.width)
        return (vector / np.linalg.norm(vector)).astype(np.float32)


class Collection:
    """What the server needs of a collection of vectors."""

    name = "random"

    def __init__(self, vectors: Vectors):
        self.vectors, self.model = vectors, Encoder(vectors.width)

    def __len__(self) -> int:
        return len(self.vectors)

    def picture(self, row: int, max_side: int = 0) -> bytes:
        raise LookupError(row)

    def describe(self, row: int) -> dict:
        return {"id": f"{row:08d}.jpg", "text": f"the caption of picture {row}", "fields": {"year": 2000 + row % 20}}

    def filters(self) -> dict:
        return {}


def make_blocks(rows: int, width: int) -> Iterator[np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, BLOCK):
        block = torch.randn(min(BLOCK, rows - start), width, generator=generator)
        yield torch.nn.functional.normalize(block, dim=-1).numpy()


@contextlib.contextmanager
def running(collection: Collection) -> Iterator[int]:
    """The server in a thread, and its port."""
    import uvicorn

    from rwkv_clip.search.server import LOOPBACK, build_app, configure, listen

    server = uvicorn.Server(configure(build_app(collection)))
    with listen(LOOPBACK, 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(30)


class User:
    """A client with a connection of its own."""

    def __init__(self, port: int):
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(self, text: str) -> tuple[float, dict]:
        """Seconds until the answer is there and read, and the answer."""
        start = time.perf_counter()
        self._connection.request("GET", f"/api/search?k={K}&q={quote(text)}")
        response = self._connection.getresponse()
        content = json.loads(response.read())
        if response.status != 200:
            raise SystemExit(f"the server answers {response.status}: {content}")
        return time.perf_counter() - start, content


def check(report: Report, case: str, collection: Collection, user: User, matrix: np.ndarray) -> None:
    """The server's answers are those of the exact search, ties included."""
    texts = [f"check {number}" for number in range(3)]
    queries = torch.from_numpy(np.stack([collection.model.encode_text(text) for text in texts]))
    places, _ = nearest_items(queries, torch.from_numpy(matrix), K)
    found = [[result["row"] for result in user.ask(text)[1]["results"]] for text in texts]
    report.gate(f"{case}: rows that differ from the exact search", float(found != places.tolist()), 0.0)


def measure_one(report: Report, case: str, user: User, matrix: np.ndarray, args) -> None:
    """One user: the whole and its parts, beside a plain product."""
    encoder, waits, parts = Encoder(matrix.shape[1]), [], []
    plain = []
    for number in range(args.repeats * 4):
        seconds, content = user.ask(f"one {number}")
        waits.append(seconds)
        parts.append(content["milliseconds"])
        query = encoder.encode_text(f"one {number}")

        def product(query=query) -> np.ndarray:
            scores = matrix @ query
            best = np.argpartition(-scores, K)[:K]
            return best[np.argsort(-scores[best], kind="stable")]

        plain.append(clock(product)[0])
    product_name, whole = "plain float32 product, best 40", "a query over HTTP"
    report.add(case, product_name, seconds=plain)
    report.add(case, whole, seconds=waits, baseline=product_name)
    for name in ("encode", "search", "describe"):
        report.add(case, f"  {name}", seconds=[part[name] / 1e3 for part in parts])
    report.add(case, "  HTTP", seconds=[wait - part["total"] / 1e3 for wait, part in zip(waits, parts)])
    if len(matrix) >= 1_000_000:
        report.ratio(case, f"{1e3 * GOAL:.0f} ms / a query", GOAL / float(np.median(waits)), goal=1.0)


def measure_many(report: Report, case: str, port: int, args) -> None:
    """Twenty users at once."""

    def work(number: int) -> list[float]:
        user = User(port)
        return [user.ask(f"user {number} {turn}")[0] for turn in range(args.queries)]

    start = time.perf_counter()
    with ThreadPoolExecutor(args.users) as pool:
        waits = [seconds for found in pool.map(work, range(args.users)) for seconds in found]
    rate = len(waits) / (time.perf_counter() - start)
    slowest = sorted(waits)[max(0, int(0.95 * len(waits)) - 1)]
    report.add(case, f"{args.users} users at once", seconds=waits, per_second=rate, p95_ms=1e3 * slowest)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="pictures")
    parser.add_argument("--width", type=int, default=640, help="numbers in a vector")
    parser.add_argument("--users", type=int, default=20, help="users at once")
    parser.add_argument("--queries", type=int, default=10, help="queries of each of them")
    args = parser.parse_args()
    report = Report("serve", args.device, commit=args.commit)
    for rows in args.rows:
        folder = Path(tempfile.mkdtemp(prefix="serve-"))
        try:
            write_vectors(folder, make_blocks(rows, args.width), rows, args.width)
            collection = Collection(Vectors.open(folder))
            matrix = np.load(folder / "vectors.npy")
            case = f"{rows:,} x {args.width}"
            with running(collection) as port:
                user = User(port)
                check(report, case, collection, user, matrix)
                measure_one(report, case, user, matrix, args)
                measure_many(report, case, port, args)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    report.finish(args.output)


if __name__ == "__main__":
    main()
