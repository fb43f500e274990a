"""What a run logs: log.jsonl always, a progress bar on a terminal (else lines), TensorBoard, wandb and trackio on
request."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rwkv_clip.config import to_dict
from rwkv_clip.files import write_whole
from rwkv_clip.keys import find_key

from .settings import Settings

log = logging.getLogger(__name__)


class RunLog:
    """Writes the records of one run. Only the main rank has one."""

    def __init__(self, folder: Path, settings: Settings, first_step: int, total_steps: int):
        from tqdm import tqdm

        self.path = folder / "log.jsonl"
        self._drop_future(first_step)
        self._file = self.path.open("ab", buffering=0)  # unbuffered: it is known to the byte what a full disk took
        self._unwritten = b""
        self._terminal = sys.stderr.isatty()
        self._total = total_steps
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=not self._terminal, leave=True)
        self._writers: dict[str, Callable[[int | None, dict[str, float]], None]] = {}
        for name in settings.log.report_to:
            make = _WRITERS[name]()
            with self._guarding(name):
                self._writers[name] = make(folder, settings)

    def _drop_future(self, first_step: int) -> None:
        """Remove lines after the step that the run resumes from, which will be written again, and a line that was cut
        off (by a full disk or a kill)."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _step_of(line) <= first_step]
        write_whole(self.path, [f"{line}\n".encode() for line in kept])

    def advance(self) -> None:
        """Count one finished step."""
        self._bar.update()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one record of JSON data; reports get only its numbers."""
        self._append(json.dumps({"step": step, **values}) + "\n")
        self._report(step, {key: value for key, value in values.items() if isinstance(value, (int, float))})
        if "loss" in values:
            shown = {"loss": f"{values['loss']:.3f}", "samples/s": f"{values['samples_per_second']:.0f}"}
            self._bar.set_postfix(shown)
            if not self._terminal:
                text = " ".join(f"{key} {value}" for key, value in shown.items())
                self.say(f"step {step}/{self._total} {text} ETA {_clock(values['eta_seconds'])}")

    def _append(self, line: str) -> None:
        """Write, or keep for the next time: a full disk does not end a run."""
        self._unwritten += line.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            log.error("%s: not written (%s); %d bytes wait for the next record", self.path, error, len(self._unwritten))

    def _report(self, step: int | None, values: dict[str, float]) -> None:
        for name, writer in list(self._writers.items()):
            with self._guarding(name):
                writer(step, values)

    @contextlib.contextmanager
    def _guarding(self, name: str) -> Iterator[None]:
        """A report that fails, because of a full disk or the network, is dropped; log.jsonl has everything."""
        try:
            yield
        except Exception as error:
            self._writers.pop(name, None)
            log.warning("report_to: %s failed (%s: %s) and gets no more records", name, type(error).__name__, error)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._report(None, {})


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


Write = Callable[[int | None, dict[str, float]], None]  # of (step, values); ends the report when the step is None
Start = Callable[[Path, Settings], Write]  # opens a report in the run folder
# Each imports its package, ValueError where it is missing, and returns what opens a report.


def _tensorboard() -> Start:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("report_to: tensorboard is not installed; pip install -e .[tensorboard]") from None

    def start(folder: Path, settings: Settings) -> Write:
        writer = SummaryWriter(folder / "tensorboard")

        def write(step: int | None, values: dict[str, float]) -> None:
            if step is None:
                writer.close()
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return write

    return start


def _wandb() -> Start:
    try:
        import wandb
    except ImportError:
        raise ValueError("report_to: wandb is not installed; pip install -e .[wandb]") from None

    def start(folder: Path, settings: Settings) -> Write:
        # The folder's name is the run's identity, so that a resumed run goes on in the same chart.
        run = wandb.init(
            project=_project(settings),
            name=folder.name,
            id=folder.name,
            dir=folder,
            resume="allow",
            notes=settings.log.wandb_notes,
            tags=settings.log.wandb_tags or None,
            config=to_dict(settings),
        )
        return _writing(run)

    return start


def _trackio() -> Start:
    try:
        import trackio
    except ImportError:
        raise ValueError("report_to: trackio is not installed; pip install -e .[trackio]") from None

    def start(folder: Path, settings: Settings) -> Write:
        # Here the name is the identity. Of notes and tags it knows nothing: they are among the settings.
        project = _project(settings) or find_key("WANDB_PROJECT")
        run = trackio.init(project=project, name=folder.name, resume="allow", config=to_dict(settings))
        return _writing(run)

    return start


def _project(settings: Settings) -> str | None:
    """The project that a report belongs to; None where wandb finds it in the environment."""
    return settings.log.wandb_project_name or (None if find_key("WANDB_PROJECT") else "rwkv-clip")


def _writing(run: Any) -> Write:
    """Writes into a run of wandb, or of what has its interface."""

    def write(step: int | None, values: dict[str, float]) -> None:
        if step is None:
            run.finish()
        else:
            run.log(values, step=step)

    return write


_WRITERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
