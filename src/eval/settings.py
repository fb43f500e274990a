"""Settings of an evaluation; the command line is built from these types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What every evaluation needs."""

    checkpoint: str
    """Run folder, checkpoint folder, .safetensors, released .pt, or open_clip:NAME[:TAG]."""
    model: str | None = None
    """Model name or JSON, where the checkpoint does not say what it holds."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; default: the best that is present."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast dtype; features and metrics stay float32 and exact."""
    batch_size: int = 64
    """Pictures that are kept ready for the model, which takes blocks of a fixed size; no figure depends on it."""
    workers: int = 4
    """Threads that decode pictures."""
    logs: str = "logs/eval"
    """Folder in which the evaluation makes its own folder."""
    cache: str | None = None
    """Folder that keeps image features between runs, and over a kill. Default: LOGS/cache for linear-probe and
    features (pictures) and classification (class embeddings), none for retrieval."""
    name: str | None = None
    """Name of that folder; default: time, task and model. A number is added where it exists already."""

    @property
    def cache_folder(self) -> Path:
        """Where linear-probe and features keep image features."""
        return Path(self.cache or Path(self.logs) / "cache")

    def check(self) -> None:
        """ValueError for a value that no evaluation can have."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size}; use at least 1")
        if self.name is not None and (self.name in ("", "..") or Path(self.name).name != self.name):
            raise ValueError(f"name: {self.name!r} is no folder name; leave out slashes, `logs` sets the place")
        if self.workers < 0:
            raise ValueError(f"workers: {self.workers}; use 0 (decode between the batches) or more")


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings(EvalSettings):
    """Zero-shot retrieval, image to text and text to image: recall at 1, 5 and 10."""

    data: str
    """JSON list, JSON lines, Karpathy's or COCO's JSON, or records (prefix, .rec, glob, comma list)."""
    split: str | None = None
    """Take only entries of this split ("all": every one); needed where the file holds several."""
    image_root: str | None = None
    """Folder of the pictures; default: the data file's folder or its `images` folder."""
    views: tuple[str, ...] | None = None
    """For records: names of the texts that count as captions; default: all."""
    allow_outside: bool = False
    """Take pictures whose names lead out of the pictures' folder (`..`, absolute, links)."""
    dataset: str | None = None
    """Name in the report; flickr30k and coco bring the published rows. Default: from the file."""
    prefix: str = ""
    """Put before every caption; "a photo of " in the published tables of RWKV-CLIP and ALIP."""
    gallery: int = 8
    """Queries shown in retrieval.png with their five best pictures; 0: none."""
    legacy: bool = False
    """Count a second time as the released code does, its defects named; the exact figures stay the result."""

    def check(self) -> None:
        super().check()
        if self.gallery < 0:
            raise ValueError(f"gallery: {self.gallery}; use 0 (no picture) or more")


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings(EvalSettings):
    """Zero-shot classification: top-1, top-5 and mean per class."""

    dataset: tuple[str, ...] = ("imagefolder",)
    """imagefolder (a folder per class) or known sets (cifar10 cifar100 food101 ...), one after the other; all: the
    eleven known ones."""
    data: str = "data"
    """Folder of class folders; for a known set also the root folder in which torchvision looks for it."""
    language: Literal["en", "zh"] = "en"
    """Of ImageNet's names and templates; zh needs the extra clip-benchmark. Other sets: a file for `names`."""
    names: str | None = None
    """JSON {"names": {folder: name}, "templates": ["a photo of a {}."]}; "names" may be a list in the order of the
    sorted folders, by number where all are numbers. Default: names.json in the data folder, else the folders and its
    own templates."""
    legacy: bool = False
    """Count a second time as the released code does, its defects named; the exact figures stay the result."""


@dataclass(frozen=True, kw_only=True)
class LinearProbeSettings(EvalSettings):
    """Linear probe: logistic regression on frozen image features, its penalty chosen on held out training pictures."""

    dataset: tuple[str, ...] = ("imagefolder",)
    """imagefolder (a folder per class) or known sets (cifar10 cifar100 food101 ...), one after the other; all: the
    eleven known ones."""
    data: str = "data"
    """Root in which torchvision looks for a known set, or a folder with `train` and `test`, each of class folders;
    with `train` or `split_test` class folders themselves."""
    train: str | None = None
    """With imagefolder: the folder of class folders to train on; default: DATA/train."""
    hold_out: float = 0.2
    """Part of each class of the training pictures that chooses the penalty; sets with an official validation part
    use that."""
    split_test: float | None = None
    """Where there are no training pictures: test on this part of each class, train on the others, drawn with seed 0.
    No published protocol."""
    strength: float | None = None
    """This L2 penalty (1 / C of scikit-learn) instead of the search from 1e-6 to 1e6."""

    def check(self) -> None:
        super().check()
        for name in ("hold_out", "split_test"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name}: {value}; give a part between 0 and 1")
        if self.split_test is not None and self.train is not None:
            raise ValueError(f"split_test: {self.split_test} and train: {self.train}; leave one of them out")
        if self.strength is not None and not 0 < self.strength < float("inf"):
            raise ValueError(f"strength: {self.strength}; give a positive number, e.g. 1.0")


@dataclass(frozen=True, kw_only=True)
class FeaturesSettings(EvalSettings):
    """Write normalised features of pictures and texts, with their ids, into a folder."""

    data: str
    """JSON list, JSON lines, Karpathy's or COCO's JSON, or records; with `dataset` a folder as in classification."""
    dataset: str | None = None
    """imagefolder or a known set (cifar10 ..): its pictures with their labels, and no texts."""
    split: str | None = None
    """Take only entries of this split ("all": every one); needed where the file holds several. With a known set: test
    (default), train or val."""
    image_root: str | None = None
    """Folder of the pictures; default: the data file's folder or its `images` folder."""
    views: tuple[str, ...] | None = None
    """For records: names of the texts that count as captions; default: all."""
    allow_outside: bool = False
    """Take pictures whose names lead out of the pictures' folder (`..`, absolute, links)."""
    prefix: str = ""
    """Put before every caption."""
    form: Literal["safetensors", "npy", "jsonl"] = "safetensors"
    """How features are written; jsonl is Chinese-CLIP's (images.img_feat.jsonl, texts.txt_feat.jsonl)."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Nearest neighbours, text to image and image to text, in a folder that `features` wrote."""

    features: str
    """Folder with features of images, texts or both; Chinese-CLIP's *_feat.jsonl are read as well."""
    direction: Literal["both", "text_to_image", "image_to_text"] = "both"
    """Which items of the folder search for which, where no query is given."""
    query: tuple[str, ...] = ()
    """Texts to search images for, instead of those of the folder; `checkpoint` encodes them."""
    picture: tuple[str, ...] = ()
    """Picture files to search texts for; `checkpoint` encodes them."""
    k: int = 10
    """Results for each query."""
    index: str = "exact"
    """exact, or a faiss index_factory text: Flat, HNSW32, IVF1024,Flat .. (needs the extra `faiss`)."""
    checkpoint: str | None = None
    """Model for `query` and `picture`. Default: the one that the features came from."""
    model: str | None = None
    """Model name or JSON, where the checkpoint does not say what it holds."""
    prefix: str | None = None
    """Put before every query; default: what `features` was told."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; default: the best that is present."""
    output: str | None = None
    """Folder for text_to_image.jsonl and image_to_text.jsonl; default: `search` in that of the features. A number is
    added where it exists already."""

    def check(self) -> None:
        """ValueError for a value that no search can have."""
        if self.k < 1:
            raise ValueError(f"k: {self.k}; use at least 1")


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """One table of several runs with all published rows, as Markdown, CSV, LaTeX, plots and a page."""

    runs: Positional[tuple[str, ...]]
    """Run folders, folders of run folders, or result.json files."""
    output: str
    """Folder of the report. A number is added where it exists already."""
