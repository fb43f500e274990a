"""Saving while training continues: a step pays for a copy of the tensors, a thread writes that copy.

At most one write is in progress. A save that finds the previous one still running waits up to LONGEST_WAIT seconds for
it and is skipped, with a warning, if that is not enough: slow storage costs a checkpoint, not time. A failed write
leaves the older checkpoints as they are, training continues, and the next save tries again; three failures in a row end
the run.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from rwkv_clip.checkpoint import CheckpointError, clean_folder, save_checkpoint
from rwkv_clip.errors import STORAGE

LONGEST_WAIT = 2.0  # seconds that a save waits for the previous one
DEADLINE = 300.0  # seconds after which a write counts as stuck
ATTEMPTS = 3  # failed writes in a row that end the run
log = logging.getLogger(__name__)


class StorageError(RuntimeError):
    """Checkpoints cannot be written; the message says why."""

    exit_code = STORAGE


class Saver:
    """Writes the checkpoints of one run; only the rank that saves has one.

    with Saver(folder, keep) as saver:
        saver.save(step, weights, optim, state)               # every interval
        saver.check()                                         # every step, costs nothing
        saver.save(step, weights, optim, state, last=True)    # at the end, or before an exit: waits
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._weights: dict[str, Tensor] = {}  # the copies; pinned where tensors come from a GPU
        self._optim: dict[str, Tensor] = {}
        self._average: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._step, self._started = 0, 0.0
        self._failures = 0  # in a row
        self._problem: BaseException | None = None  # why the latest write failed
        clean_folder(folder)

    def save(
        self,
        step: int,
        weights: dict[str, Tensor],
        optim: dict[str, Tensor],
        state: dict[str, Any],
        last: bool = False,
        average: dict[str, Tensor] | None = None,
        best: bool = False,
    ) -> None:
        """Copy everything and write it in the background; `last`: return when it is on disk, StorageError if that
        fails. average: averaged weights, if there are any. `best`: this checkpoint stays as the best; it is not
        skipped, and returns when it is written or failed.

        The tensors may change as soon as this returns; `state` must be JSON data.
        """
        self.check()
        self._join(DEADLINE if last or best else LONGEST_WAIT)
        self.check()
        if self._thread is not None:
            if last or time.monotonic() - self._started > DEADLINE:
                raise self._stuck()
            log.warning("saving step %d is skipped: step %d is still being written", step, self._step)
            return
        self._weights = _copy(weights, self._weights)
        self._optim = _copy(optim, self._optim)
        self._average = _copy(average or {}, self._average)
        self._step, self._started = step, time.monotonic()
        copied = torch.cuda.Event() if any(tensor.is_cuda for tensor in weights.values()) else None
        if copied:
            copied.record()
        # A daemon: a hanging write must not keep the process alive; one that is cut off does no harm.
        thread = threading.Thread(target=self._write, args=(copy.deepcopy(state), copied, best), daemon=True)
        thread.start()
        self._thread = thread
        if last:
            self.wait()
        elif best:
            self._join(DEADLINE)

    def check(self) -> None:
        """StorageError after three failed writes in a row; any other error of the writing thread is raised
        unchanged."""
        if self._problem is None:
            return
        if not isinstance(self._problem, (OSError, CheckpointError)):
            problem, self._problem = self._problem, None
            raise problem
        if self._failures >= ATTEMPTS:
            raise self._failed(f"{self._failures} saves in a row failed, the last one of")

    def wait(self) -> None:
        """Wait until the current write is on disk; StorageError when it, or the latest one, has failed."""
        self._join(DEADLINE)
        if self._thread is not None:
            raise self._stuck()
        self.check()
        if self._problem is not None:
            raise self._failed("saving failed at")

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """`wait`, but only briefly when an error is already being raised: a write that is cut off does no harm."""
        if kind is None:
            self.wait()
        self._join(LONGEST_WAIT)

    def _write(self, state: dict[str, Any], copied: torch.cuda.Event | None, best: bool) -> None:
        try:
            if copied:
                copied.synchronize()
            save_checkpoint(self.folder, self._step, self._weights, self._optim, state, self.keep, self._average, best)
            self._failures, self._problem = 0, None
        except (OSError, CheckpointError) as error:
            self._failures, self._problem = self._failures + 1, error
            log.error(
                "saving step %d failed (%s); older checkpoints are unchanged; failure %d, %d in a row end the run",
                *(self._step, error, self._failures, ATTEMPTS),
            )
        except BaseException as error:  # raised in the main thread by its next call
            self._problem = error

    def _join(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None

    def _stuck(self) -> StorageError:
        seconds = time.monotonic() - self._started
        return StorageError(f"{self.folder}: step {self._step} is still being written after {seconds:.0f} s")

    def _failed(self, what: str) -> StorageError:
        remedy = "free space or repair the storage; the same command resumes from the newest checkpoint"
        return StorageError(f"{self.folder}: {what} step {self._step} ({self._problem}); {remedy}")


@torch.no_grad()
def _copy(tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors in host memory, in `buffers` where these fit. Copies from a GPU are queued, not waited
    for."""
    copies = {}
    for key, tensor in tensors.items():
        buffer = buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[key] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
    return copies
