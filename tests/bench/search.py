"""One query among many vectors: what `search` and `eval.main search` do, the former way, and plain products.

python tests/bench/search.py [--rows 100000 1000000] [--width 640] [--queries 1]

Vectors are random, of length 1. `half on disk` is `search`'s way: a memory-mapped float16 matrix in the page cache, and
float32 rows for what comes near; `float32 in memory` is eval's. The former way is metrics.nearest_items, a float64
product of everything (left out above --former rows); `numpy product` is the float32 product alone, without choosing the
best; the floor is one pass over the half-precision matrix that only takes a maximum. All answers are compared with the
former way's on a part of the rows before any time is printed.

Approximate engines (--engines faiss:HNSW32 faiss:IVF1024,SQfp16 usearch: minutes, as their indexes are made first) are
asked one query after the other, up to --former rows, with the share of the exact ten best that they find; their vectors
have LATENT directions and little noise, as those of models are near a surface of few dimensions, and random ones are
near nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import Report, alternate, argument_parser

from rwkv_clip.metrics import nearest_items
from rwkv_clip.nearest import Gallery, search
from rwkv_clip.search.engines import attach_engine
from rwkv_clip.search.vectors import Vectors, write_vectors

COUNT = 10
CHECKED = 20_000  # rows
BLOCK = 10_000
LATENT, NOISE = 64, 0.1  # dimensions of what engines search in; noise beside length 1
ASKED = 200  # queries of each engine
GOAL_MS = {1_000_000: 200.0}


def make_blocks(count: int, width: int, seed: int = 0) -> Iterator[np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, BLOCK):
        vectors = torch.randn(min(BLOCK, count - start), width, generator=generator)
        yield torch.nn.functional.normalize(vectors).numpy()


def make_latent(count: int, width: int, seed: int) -> np.ndarray:
    """Vectors near a surface of LATENT dimensions, the same one for each seed."""
    plane = torch.randn(LATENT, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + seed)
    found = torch.nn.functional.normalize(torch.randn(count, LATENT, generator=generator) @ plane)
    found += torch.randn(count, width, generator=generator) * (NOISE / width**0.5)
    return torch.nn.functional.normalize(found).numpy()


def check(report: Report, vectors: Vectors, queries: np.ndarray) -> None:
    """The same rows and the same bits of similarity."""
    items = vectors.take(np.arange(min(CHECKED, len(vectors))))
    wanted = nearest_items(torch.from_numpy(queries), torch.from_numpy(items), COUNT)
    for gallery in (Gallery.of(items), Vectors.of([items])._gallery):
        rows, scores = search(gallery, queries, COUNT)
        wrong = (rows != wanted[0].numpy()).sum() + (scores != wanted[1].numpy()).sum()
        report.gate(f"{len(vectors)} rows: answers that differ from the exact search's", wrong, 0)


def measure(report: Report, args, count: int, folder: Path) -> None:
    write_vectors(folder, make_blocks(count, args.width), count, args.width)
    vectors, queries = Vectors.open(folder), next(make_blocks(args.queries, args.width, seed=1))
    check(report, vectors, queries)
    half = vectors._gallery.coarse[0]
    contenders = {"half on disk": partial(vectors.search, queries, COUNT)}
    bits = torch.from_numpy(half.view(np.int32))
    contenders["floor: half.npy read once"] = partial(torch.amax, bits)
    if count <= args.former:
        items = vectors.take(np.arange(count))
        gallery = Gallery.of(items)
        contenders["float32 in memory"] = partial(search, gallery, queries, COUNT)
        contenders["numpy product"] = lambda: items @ queries.T
        pair = torch.from_numpy(queries), torch.from_numpy(items)
        contenders["former way"] = partial(nearest_items, *pair, COUNT)
        try:
            import faiss
        except ImportError:
            report.missing(f"{count} x {args.width}", "faiss Flat", "pip install -e '.[faiss]'")
        else:
            index = faiss.IndexFlatIP(args.width)
            index.add(items)
            contenders["faiss Flat"] = partial(index.search, queries, COUNT)
    times = alternate(contenders, repeats=args.repeats, device=args.device)
    case = f"{count} x {args.width}, {args.queries} queries"
    baseline = "former way" if "former way" in times else "floor: half.npy read once"
    for name, seconds in times.items():
        report.add(case, name, seconds=seconds, baseline=baseline if name != baseline else None)
    if count in GOAL_MS and args.queries == 1:
        median = float(np.median(times["half on disk"]))
        report.ratio(case, f"{GOAL_MS[count]:.0f} ms over ours", GOAL_MS[count] / 1e3 / median, goal=1.0)


def measure_engines(report: Report, args, count: int) -> None:
    """Seconds of a query and the share of the exact ten best that are found."""
    vectors, queries = Vectors.of([make_latent(count, args.width, 0)]), make_latent(ASKED, args.width, 1)
    case = f"{count} x {args.width} near {LATENT} dimensions"
    wanted, _ = vectors.search(queries, COUNT)
    for engine in ("exact", *args.engines):
        start = time.perf_counter()
        try:
            searched = attach_engine(vectors, engine, "")
        except ImportError as error:
            report.missing(case, engine, str(error))
            continue
        made, times, right = time.perf_counter() - start, [], 0
        for query, best in zip(queries, wanted):
            start = time.perf_counter()
            found = searched.search(query[None], COUNT)[0][0]
            times.append(time.perf_counter() - start)
            right += len(np.intersect1d(found, best))
        share = right / wanted.size
        baseline = None if engine == "exact" else "exact"
        report.add(case, engine, seconds=times, baseline=baseline, recall=share, seconds_to_make=made)


def main() -> None:
    parser = argument_parser(__doc__, repeats=15)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="vectors (100000 1000000)")
    parser.add_argument("--width", type=int, default=640, help="numbers per vector (640)")
    parser.add_argument("--queries", type=int, default=1, help="asked at once (1)")
    parser.add_argument("--former", type=int, default=200_000, help="rows up to which all ways are timed (200000)")
    parser.add_argument("--engines", nargs="*", default=[], help="approximate ones, e.g. usearch faiss:HNSW32")
    args = parser.parse_args()
    args.device = torch.device("cpu")
    report = Report("search", args.device, commit=args.commit)
    for count in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            measure(report, args, count, Path(folder))
        if count <= args.former and args.engines:
            measure_engines(report, args, count)
    report.finish(args.output)


if __name__ == "__main__":
    main()
