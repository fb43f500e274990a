"""One page about a job: what came in, what was written, how good, how fast, and rows to look at."""

from .run import write_report

__all__ = ["write_report"]
