"""One process at a time writes a run folder. The file `run.lock` stays, to say who owned it last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rwkv_clip.dist import World
from rwkv_clip.files import hold


@contextlib.contextmanager
def hold_run(folder: Path, world: World) -> Iterator[None]:
    """Own a run folder while inside; the lead rank does. InUse, at once, when another run does."""
    if not world.is_lead:
        yield
        return
    with hold(folder / "run.lock", str(folder), "wait for it, end it, or take another --name", keep=True):
        yield
