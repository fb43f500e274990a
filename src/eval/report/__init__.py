"""Reports: tables, pictures and page of a run, and of several runs together."""

from .comparison import collect
from .confusion import worst_classes
from .files import check_place, keep, new_folder, place_of
from .formats import markdown, markdown_section
from .plots import drawable, png_of
from .run import Report, start_report

__all__ = [
    "Report",
    "check_place",
    "collect",
    "drawable",
    "keep",
    "markdown",
    "markdown_section",
    "new_folder",
    "place_of",
    "png_of",
    "start_report",
    "worst_classes",
]
