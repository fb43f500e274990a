"""ImageNet in RecordIO files, and its names and templates from open_clip, in Chinese from clip_benchmark."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
from PIL.Image import Image

from ..data.image import open_picture
from ..data.recordio import RecordFile, unpack
from .benchmarks import BENCHMARKS, TRAIN
from .labelled import ClassificationSet, MissingData


def imagenet_prompts(language: str) -> tuple[list[str], tuple[str, ...]]:
    """The 1000 names in the order of the sorted folder names, and 80 templates. ValueError where they are not
    installed."""
    if language == "en":
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

        return list(IMAGENET_CLASSNAMES), tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    package = importlib.util.find_spec("clip_benchmark")
    if package is None:
        raise ValueError("language: zh takes its names from clip-benchmark; pip install -e .[clip-benchmark]")
    folder = Path(package.origin).parent / "datasets"
    names, templates = (
        json.loads((folder / f"cn_{kind}.json").read_text(encoding="utf-8"))["imagenet1k"]
        for kind in ("classnames", "zeroshot_classification_templates")
    )
    return names, tuple(template.replace("{c}", "{}") for template in templates)


def load_imagenet_records(root: Path, split: str, language: str) -> tuple[ClassificationSet, list[str]]:
    """The set, and its classes: the number of each (in the order of the sorted folder names) is the record's label."""
    benchmark, stem = BENCHMARKS["imagenet"], "train" if split == TRAIN else "val"
    places = [root / "imagenet" / f"{stem}.rec", root / f"{stem}.rec", *([root] if root.suffix == ".rec" else [])]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise MissingData(f"not found; download {benchmark.source.format(root=root)}")
    records = RecordFile(path)
    names, templates = imagenet_prompts(language)

    def label_of(index: int) -> int:
        header = unpack(records.view(index))[0]
        label = float(header.label) if header.flag == 0 else -1.0
        if label not in range(len(names)):
            place = f"{path}: record {records.key(index)}"
            raise ValueError(f"{place}: its label is {header.label}, should be one number from 0 to {len(names) - 1}")
        return int(label)

    def open_one(index: int) -> Image:
        return open_picture(bytes(unpack(records.view(index))[1]), f"{path}: record {records.key(index)}")

    data = ClassificationSet(
        path=str(path),
        labels=torch.tensor([label_of(index) for index in range(len(records))], dtype=torch.int64),
        open=open_one,
        class_names=names,
        files=(records.path, records.index_path),
        **(benchmark.about(split) | {"templates": templates}),
    )
    return data, [str(label) for label in range(len(names))]
