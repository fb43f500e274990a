"""report.html and report.json of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkv_clip.files import write_json, write_whole

from .costs import cost_of, count_stages, scale_up
from .gallery import Pictures, read_thumbnails
from .numbers import count, find_examples, plain
from .page import draw_page

REPORT = 1  # version of report.json


def write_report(
    rows: Callable[[], Iterator[Mapping[str, Any]]], about: Mapping[str, Any], pictures: Pictures, folder: Path
) -> Path:
    """Count the rows of a job and write report.json and report.html into `folder`; returns the path of the page.

    rows: gives all rows in their order, each a dict of columns of which any but `id` may be missing or None; called
    twice where there are duplicates. about: what only the job knows, each part optional:

        title     str
        settings  {name: value}, shown as they are: no secrets
        versions  {package: version}
        stages    {stage: {rows, seconds, failed, prompt_tokens, completion_tokens}}, in their order
        prices    {prompt, completion: for a million tokens, currency: "USD"}; None: no cost is shown

    pictures: the encoded picture of a row, asked for in the order of `row`, its number in the source; None where there
    is none; its OSError or ValueError is shown in the place of the picture. Memory does not grow with the rows. OSError
    when a file cannot be written.
    """
    numbers = count(rows())
    results = numbers.results()
    find_examples(rows, results["duplicates"])
    stages = count_stages(_written(about.get("stages") or {}))
    used = {name: results["used"][name] for name in ("prompt_tokens", "completion_tokens")}
    if "compose" in stages and not any(stages["compose"][name] for name in used):
        stages["compose"] |= used  # a job has them in its rows
    prices = about.get("prices")
    results |= {
        "stages": stages,
        "cost": _written(cost_of(stages, results["used"], prices)),
        "scale": scale_up(stages, prices),
        "about": {name: _written(about.get(name)) for name in ("title", "settings", "versions", "prices")},
    }
    worst, random = numbers.worst.list(), numbers.random.list()
    for name, chosen in (("worst", worst), ("random", random)):
        results[name] = [plain(row.get("id"), 200) for row in chosen]
    page = folder / "report.html"
    write_json(folder / "report.json", {"report": REPORT, **results})
    write_whole(page, draw_page(results, worst, random, read_thumbnails([*worst, *random], pictures)))
    return page


def _written(value: Any) -> Any:
    """A setting as JSON can hold it: half characters replaced, paths and the like by their names."""
    if isinstance(value, Mapping):
        return {_written(str(name)): _written(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value).encode("utf-8", "replace").decode()
