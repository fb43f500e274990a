"""Zero-shot tags of pictures: the names of a list that fit a picture much better than they fit others.

Cosines of different names cannot be compared: some names are near to every picture. So each name is calibrated by the
mean and standard deviation of its cosine over a background sample, the first pictures of the job, and a picture gets
the names whose z-score is high. The calibration is kept with the job, so that a later run gives the same tags.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn.functional import normalize

from rwkv_clip.files import DamagedError, parse_json, read_bytes, write_json

from .pictures import Found
from .settings import TaggerSettings
from .towers import Towers
from .words import article

COLUMNS = {"tags": "str list", "tag_scores": "float list", "tag_source": "str", "tag_status": "str"}
LIST = Path(__file__).parent / "lexicon" / "tags.txt"
# Prompts are averaged as in zero-shot classification (Radford et al. 2021, section 3.1.4); {} is the name with a or an.
TEMPLATES = ("a photo of {}.", "a picture that shows {}.", "there is {} in the scene.")
LEAST = 32  # pictures of a background; of n pictures no z-score is above (n - 1) / sqrt(n)
CHUNK = 256  # pictures at a time
MOST_LIST, MOST_NAMES, MOST_NAME = 1 << 24, 100_000, 100
MOST_SAVED = 1 << 27
VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """For each name: mean and standard deviation of its cosine, and the fraction of pictures that would get it.

    about: what it was made of. All arrays float64, in the order of the list.
    """

    about: dict[str, Any]
    mean: np.ndarray
    std: np.ndarray
    share: np.ndarray


def calibrate(cosines: np.ndarray, min_z: float, about: dict[str, Any]) -> Calibration:
    """From the cosines (pictures, names). ValueError for fewer than LEAST pictures."""
    if len(cosines) < LEAST:
        raise ValueError(
            f"tags: {len(cosines)} pictures can be read, too few to calibrate names; use at least {LEAST}, or take the "
            f"tags from a file"
        )
    values = cosines.astype(np.float64)
    mean, std = values.mean(0), values.std(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = ((values - mean) / std >= min_z).mean(0)
    return Calibration(about, mean, std, share)


def choose_tags(cosines: np.ndarray, known: Calibration, settings: TaggerSettings) -> list[list[tuple[int, float]]]:
    """(number of the name, z-score) of each picture's tags, best first; of equal ones the first in the list."""
    usable = (known.std > 1e-6) & (known.share <= settings.max_share) & np.isfinite(known.mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (cosines.astype(np.float64) - known.mean) / known.std
    z = np.where(usable & np.isfinite(z), z, -np.inf)
    order = np.argsort(-z, axis=1, kind="stable")[:, : settings.most_tags]
    return [[(int(i), float(row[i])) for i in best if row[i] >= settings.min_z] for row, best in zip(z, order)]


class Tagger:
    """Tags of pictures. decides: every setting that decides a tag, for the stage of a job; the calibration is one."""

    def __init__(self, towers: Towers, names: Sequence[str], settings: TaggerSettings):
        self.towers, self.names, self.settings = towers, tuple(names), settings
        prompts = [template.replace("{}", _phrase(name)) for name in self.names for template in TEMPLATES]
        features = towers.encode_texts(prompts).view(len(self.names), len(TEMPLATES), -1).mean(1)
        self._names = normalize(features, dim=-1).double().numpy()
        digest = hashlib.sha256("\n".join([*TEMPLATES, *self.names]).encode()).hexdigest()
        rule = {name: getattr(settings, name) for name in ("background", "min_z", "most_tags", "max_share")}
        self.decides = {**towers.decides, "tag_list": digest, **rule, "tagger_version": VERSION}
        self._known: Calibration | None = None

    @classmethod
    def load(cls, settings: TaggerSettings) -> Tagger:
        """ValueError for a list or a checkpoint that cannot be used."""
        names = read_names(settings.tag_list)
        return cls(Towers.load(settings), names, settings)

    def calibrate(self, pictures: Iterable[Found], folder: Path) -> Calibration:
        """Take the calibration for these settings from the folder, or make it of the first pictures and keep it there.

        ValueError where pictures are too few, DamagedError for a file that holds no calibration.
        """
        digest = hashlib.sha256(json.dumps(self.decides, sort_keys=True).encode()).hexdigest()
        saved = folder / f"calibration-{digest[:12]}.json"
        if saved.exists():
            self._known = _load(saved, len(self.names))
            return self._known
        chosen, parts = islice(pictures, self.settings.background), []
        while chunk := list(islice(chosen, CHUNK)):
            cosines, reasons = self._compare(chunk)
            parts.append(cosines[[not reason for reason in reasons]])
        values = np.concatenate(parts) if parts else np.zeros((0, len(self.names)), np.float32)
        self._known = calibrate(values, self.settings.min_z, {**self.decides, "pictures": len(values)})
        _save(saved, self._known)
        return self._known

    def tag(self, pictures: Sequence[Found]) -> list[dict[str, Any]]:
        """The columns of each picture's row; no tags and the reason as status where there is no picture."""
        if self._known is None:
            raise ValueError("tags: calibrate first; cosines of different names cannot be compared")
        results: list[dict[str, Any]] = []
        for chunk in _chunks(pictures):
            cosines, reasons = self._compare(chunk)
            for found, reason in zip(choose_tags(cosines, self._known, self.settings), reasons):
                results.append(self._columns([] if reason else found, reason))
        return results

    def _columns(self, found: list[tuple[int, float]], reason: str) -> dict[str, Any]:
        return {
            "tags": None if reason else [self.names[place] for place, _ in found],
            "tag_scores": None if reason else [round(z, 3) for _, z in found],
            "tag_source": None if reason else self.towers.name,
            "tag_status": reason or "ok",
        }

    def _compare(self, pictures: Sequence[Found]) -> tuple[np.ndarray, list[str]]:
        """(cosines (pictures, names), why a picture has none)."""
        features, reasons = self.towers.encode_pictures(pictures)
        return (features.double().numpy() @ self._names.T).astype(np.float32), reasons


def _chunks(pictures: Sequence[Found]) -> Iterator[Sequence[Found]]:
    for start in range(0, len(pictures), CHUNK):
        yield pictures[start : start + CHUNK]


def _phrase(name: str) -> str:
    return f"{article(name)} {name}"


def read_names(path: str | Path | None) -> list[str]:
    """The names of a list, one a line; blank lines and those that begin with # are none. ValueError, DamagedError."""
    file = LIST if path is None else Path(path)
    if not file.is_file():
        raise ValueError(f"tag_list: {file} is no file; give a text file of names, one a line")
    try:
        text = read_bytes(file, MOST_LIST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{file}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    lines = [" ".join(line.partition("\t")[0].split()) for line in text.splitlines()]
    names = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not names or len(names) > MOST_NAMES or max(map(len, names)) > MOST_NAME:
        raise ValueError(
            f"tag_list: {file} has {len(names):,} names, the longest of {max(map(len, names), default=0)} characters; "
            f"use 1 to {MOST_NAMES:,} of at most {MOST_NAME}"
        )
    return names


def _save(path: Path, known: Calibration) -> None:
    lists = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in asdict(known).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, lists)


def _load(path: Path, count: int) -> Calibration:
    content = parse_json(read_bytes(path, MOST_SAVED), str(path))
    try:
        arrays = [np.array(content[name], np.float64) for name in ("mean", "std", "share")]
        about = content["about"]
        if any(array.shape != (count,) for array in arrays) or not isinstance(about, dict):
            raise ValueError("shapes")
    except (KeyError, TypeError, ValueError):
        raise DamagedError(
            f"{path}: not a calibration of tags; remove it, and the same command makes it anew"
        ) from None
    return Calibration(about, *arrays)
