"""Tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from .tables import Table

_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first row is its header."""
    cells = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in cells)
    return "".join(f"| {line} |\n" for line in lines)


def markdown_notes(table: Table) -> str:
    """The notes as a Markdown list."""
    return "".join(f"- {_plain(note)}\n" for note in table.notes)


def markdown_section(table: Table) -> str:
    """Title, table and notes as Markdown."""
    return f"## {table.title}\n\n{markdown([table.header, *table.rows])}\n{markdown_notes(table)}"


def csv_text(table: Table) -> str:
    """Comma-separated values, quoted where needed, one line per row."""
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([table.header, *table.rows])
    return lines.getvalue()


def latex(table: Table) -> str:
    """A table for a paper (needs the package booktabs): best figures bold, published rows above ours."""
    text_columns = len([name for name in table.header if name in ("model", "data set", "split")])
    columns = "l" * text_columns + "r" * (len(table.header) - text_columns)
    lines = [" & ".join(map(_latex, table.header)), r"\midrule"]
    previous = None
    for number, row in enumerate(table.rows):
        group = row[0] if table.by_set else number in table.published
        if previous is not None and group != previous:
            lines.append(r"\midrule")
        previous = group
        cells = (rf"\textbf{{{_latex(c)}}}" if (number, i) in table.best else _latex(c) for i, c in enumerate(row))
        lines.append(" & ".join(cells))
    body = "".join(f"{line}\n" if line == r"\midrule" else f"{line} \\\\\n" for line in lines)
    notes = " ".join(note.rstrip(".") + "." for note in table.notes)
    return (
        "\\begin{table}\n\\centering\\small\n"
        f"\\caption{{{_latex(table.title)}. {_latex(notes)}}}\n"
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )


def _plain(text: str) -> str:
    """A text (a name from a user's data) as part of a Markdown table on a terminal: no markup, no control
    characters."""
    text = text.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _latex(text: str) -> str:
    return text.translate(_LATEX).replace(r"-\textgreater{}", r"$\to$")
