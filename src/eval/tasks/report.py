"""One table of several runs with all published rows."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from ..report.comparison import collect
from ..report.formats import markdown_section


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """One table of several runs with all published rows, as Markdown, CSV, LaTeX, plots and a page."""

    runs: Positional[tuple[str, ...]]
    """Run folders, folders of run folders, or result.json files."""
    output: str
    """Folder of the report. A number is added where it exists already."""

    def problems(self) -> list[str]:
        """Problems that no report may have."""
        return [] if self.runs else ["runs: none given; name run folders, or the folder that holds them"]


def run(settings: ReportSettings) -> int:
    """Write the report and print its tables."""
    folder, tables = collect(settings.runs, settings.output)
    print("\n".join(map(markdown_section, tables)), end="")
    print(f"results: {folder}")
    return 0
