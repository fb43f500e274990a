"""Keys of servers, and what other tools keep in the environment: read there, and written nowhere."""

from __future__ import annotations

import os


def find_key(variable: str) -> str | None:
    """The value of an environment variable, stripped; None where it is not set or empty."""
    return os.environ.get(variable, "").strip() or None
