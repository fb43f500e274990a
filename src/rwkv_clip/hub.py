"""Weights for others: folders in the layout of the hub, and their upload.

    rwkv_clip.save_pretrained("logs/my-run", "export", license="mit")
    rwkv_clip.push_to_hub("logs/my-run", "me/my-clip", license="mit")

A folder holds a configuration, weights as safetensors and a model card. open_clip's models get open_clip's layout,
which open_clip opens (`local-dir:`, `hf-hub:`); two towers, of any families, a layout of ours. With transformers=True
it also is a folder of transformers: ChineseCLIPModel for a ViT with BERT; for others the code of the model goes along,
and whoever loads it there has to trust it. Here nothing of a folder is ever run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import read_description
from .config import ConfigError
from .downloads import first_line, is_of_the_network, load_client, split_name
from .factory import DESCRIPTION, describe
from .files import write_json, write_whole
from .model_card import Card, write_card
from .models import hugging_face
from .models.released import strip_prefixes
from .models.specification import ModelSpec
from .models.two_tower import ModelConfig
from .pretrained import CONFIG, HUB, OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, TRANSFORMERS_CONFIG, WEIGHTS
from .serialization import encode_tensors
from .tokenizer import BERT_CHINESE, VOCABULARY
from .weights import read_fitting_weights

MODELING = Path(__file__).parent / "models" / "modeling_rwkv_clip.py"  # the code that transformers runs
MOST_LOG = 1 << 28  # bytes of a run's log that are read


@dataclass(frozen=True)
class Export:
    """Weights with what is known about them."""

    name: str
    spec: ModelSpec
    weights: dict[str, Tensor]
    state: Mapping[str, Any] = field(default_factory=dict)  # state.json
    metrics: Mapping[str, float] = field(default_factory=dict)


def save_pretrained(
    model: nn.Module | str | Path,
    folder: str | Path,
    *,
    name: str | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
    metrics: Mapping[str, float] | None = None,
    transformers: bool = False,
    structure: str | None = None,
) -> Path:
    """Write a model of `create_model`, or any checkpoint that `load_for_inference` opens, as a new folder; returns it.

    name: in the model card, org/name or a title; default the checkpoint's or the folder's. license: an identifier of
    the hub (mit, apache-2.0, ..); without one the card says unknown. metrics: numbers for the card, beside the last
    validation of a training run. transformers: see above. structure: preset or JSON of a checkpoint that does not
    describe its model. The folder appears when all of it is written. ConfigError for a folder that is not empty, or a
    model that transformers would not have.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError([f"folder: {folder} exists and is not empty; name a new one"])
    found = _collect(model, (name or folder.name).split("/")[-1], structure)
    if transformers:
        hugging_face.check_code(found.spec)
    chinese = transformers and kinds_of(found.spec) == ("open_clip", "bert")
    with new_folder(folder) as part:
        if chinese:
            assert isinstance(found.spec, ModelConfig)
            write_chinese_clip(part, found.spec, found.weights)
        elif isinstance(found.spec, ModelConfig):
            _write_own(part, found, transformers)
        else:
            write_json(part / OPEN_CLIP_CONFIG, found.spec.to_layout())  # type: ignore[attr-defined]
            write_whole(part / OPEN_CLIP_WEIGHTS, encode_tensors(found.weights, {"format": "pt"}))
        card = _make_card(found, name or found.name, part, transformers)
        numbers = {**found.metrics, **(metrics or {})}
        card = replace(card, license=license, tags=(*card.tags, *tags), metrics=numbers, state=found.state)
        write_whole(part / "README.md", [write_card(card).encode()])
    return folder


def push_to_hub(
    model: nn.Module | str | Path,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Weights",
    api: Any = None,
    **options: Any,
) -> str:
    """Upload what `save_pretrained(model, .., **options)` writes to `org/name[@branch]`, made if it does not exist;
    returns its name as `create_model` takes it. A README.md that is there is kept.

    token: of the hub, default the one that `hf auth login` has stored. api: in place of huggingface_hub's HfApi.
    ConfigError where the hub refuses or cannot be reached.
    """
    name, branch = split_name(repository)
    if api is None:
        api = load_client().HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(model, Path(temporary) / "export", **{"name": name, **options})
        try:
            api.create_repo(name, private=private, exist_ok=True)
            if branch:
                api.create_branch(name, branch=branch, exist_ok=True)
            kept = ["README.md"] if api.file_exists(name, "README.md", revision=branch) else None
            api.upload_folder(
                repo_id=name, folder_path=folder, revision=branch, commit_message=message, ignore_patterns=kept
            )
        except Exception as error:  # of the client, of its library for HTTP, or of the system
            if not is_of_the_network(error):
                raise
            remedy = "look at the network and at your token (hf auth login)"
            raise ConfigError([f"push_to_hub: {name} could not be written ({first_line(error)}); {remedy}"]) from error
    return f"{HUB}{repository}"


# ---- what is exported ------------------------------------------------------------------------------------------------


def _collect(model: nn.Module | str | Path, title: str, structure: str | None) -> Export:
    """title: the name of a model that has none."""
    if isinstance(model, nn.Module):
        if not hasattr(model, "spec"):
            raise ConfigError([f"model: a {type(model).__name__} was not made by create_model; save its state_dict()"])
        spec: Any = model.spec
        return Export(title, spec, strip_prefixes(model.state_dict()))
    name, spec, path = describe(model, structure)
    with torch.device("meta"):  # for names and shapes
        frame = spec.build()
    weights = read_fitting_weights(frame, path)
    state = read_description(path) or {}
    return Export(Path(name).stem if name.endswith(".json") else name, spec, weights, state, _read_metrics(path, state))


def _read_metrics(path: Path, state: Mapping[str, Any]) -> dict[str, float]:
    """The last validation in the log of a checkpoint's run, up to its step; empty where there is none."""
    log = path.parent.parent / "log.jsonl"
    found: dict[str, float] = {}
    if not state or not log.is_file() or log.stat().st_size > MOST_LOG:
        return {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and row.get("step", math.inf) <= state["step"]:
                values = {key.removeprefix("val_"): value for key, value in row.items() if key.startswith("val_")}
                found = {key: value for key, value in values.items() if isinstance(value, float)} or found
    return found


def kinds_of(spec: ModelSpec) -> tuple[str, ...]:
    """The families of both towers, or of the whole model."""
    if not isinstance(spec, ModelConfig):
        return (spec.name,)
    return tuple(tower.to_json().get("kind", "rwkv") for tower in (spec.image, spec.text))


# ---- layouts ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, which gets its name when the block has ended well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        yield part
        os.rename(part, folder)  # an empty folder is replaced
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_own(part: Path, found: Export, transformers: bool) -> None:
    """Ours; the weights also describe themselves, without the configuration."""
    spec = found.spec.to_json()
    preprocess = _preprocessing(found.spec)
    write_json(part / CONFIG, {"model": found.name, "spec": spec, "preprocess_cfg": preprocess})
    about = {"format": "pt", DESCRIPTION: json.dumps({"model": found.name, "spec": spec})}
    write_whole(part / WEIGHTS, encode_tensors(found.weights, about))
    if transformers:
        code = MODELING.stem
        config = {
            **{"model_type": "rwkv_clip", "architectures": ["RWKVCLIPModel"]},
            "auto_map": {"AutoConfig": f"{code}.RWKVCLIPConfig", "AutoModel": f"{code}.RWKVCLIPModel"},
            **{"image": spec["image"], "text": spec["text"], "embed_dim": spec.get("embed_dim")},
            **{"tokenizer": spec["tokenizer"], "preprocess_cfg": preprocess},
            **{key: spec[key] for key in ("init_logit_bias",) if key in spec},
        }
        write_json(part / TRANSFORMERS_CONFIG, config)
        write_whole(part / MODELING.name, [MODELING.read_bytes()])


def _preprocessing(spec: ModelSpec) -> dict[str, Any]:
    """What a picture goes through, in open_clip's words. For readers: `spec` says it, too."""
    (mean, std), size = spec.pixels, spec.image_size
    return {"size": size, "mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": spec.resize_mode}


def write_chinese_clip(part: Path, spec: ModelConfig, weights: dict[str, Tensor]) -> None:
    """The files of transformers' ChineseCLIPModel. ConfigError for a model that transformers does not have."""
    config = hugging_face.write_configuration(spec)
    write_whole(part / WEIGHTS, encode_tensors(hugging_face.to_state(weights), {"format": "pt"}))
    write_whole(part / "vocab.txt", [VOCABULARY.read_bytes()])
    write_json(part / TRANSFORMERS_CONFIG, config)


# ---- the card --------------------------------------------------------------------------------------------------------

_OURS = """
import rwkv_clip
loaded = rwkv_clip.load_for_inference("{ours}")
image = loaded.model.encode_image(loaded.preprocess(picture)[None], normalize=True)
text = loaded.model.encode_text(loaded.tokenizer(["a dog", "a cat"]), normalize=True)
"""
_THEIRS = """
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("{theirs}")
tokenizer = open_clip.get_tokenizer("{theirs}")
"""
_TRANSFORMERS = """
from transformers import AutoModel  # this runs the code in modeling_rwkv_clip.py, which trust_remote_code allows
model = AutoModel.from_pretrained("{place}", trust_remote_code=True)
"""
_CHINESE = """
from transformers import ChineseCLIPModel
model = ChineseCLIPModel.from_pretrained("{place}")
"""


def _make_card(found: Export, name: str, part: Path, transformers: bool) -> Card:
    own, usage, library = isinstance(found.spec, ModelConfig), _OURS, "rwkv_clip"
    tags = ["image-text-retrieval"]
    if not own:
        usage, library = _THEIRS + _OURS, "open_clip"
    elif transformers:
        code = (part / MODELING.name).exists()
        usage, library = _OURS + (_TRANSFORMERS if code else _CHINESE), "transformers"
        tags += ["custom_code"] if code else ["chinese_clip"]
    language = "zh" if own and found.spec.tokenizer().name == BERT_CHINESE else None
    description = found.spec.to_json()
    count = sum(value.numel() for value in found.weights.values())
    hub = f"{HUB}{name}" if "/" in name else ""
    usage = usage.format(ours=hub or "FOLDER", theirs=hub or "local-dir:FOLDER", place=name if hub else "FOLDER")
    return Card(name, library, description, count, usage, tags=tags, language=language)
