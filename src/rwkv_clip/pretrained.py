"""Where weights are: on the hub (`hf-hub:`), in a folder (`local-dir:`), or released by the authors of a method.

A folder of weights has one of the layouts below, told by its configuration file. The released files are named here,
with where each lies; a sha256 is given where their authors published one, and compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import ConfigError, load_json
from .downloads import fetch_first, split_name
from .files import hash_file
from .serialization import CheckpointError

HUB, LOCAL = "hf-hub:", "local-dir:"
CACHE = Path("~/.cache/rwkv_clip/weights")  # where files that are downloaded by hand are looked for
CONFIG, WEIGHTS = "rwkv_clip_config.json", "model.safetensors"
OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TRANSFORMERS_CONFIG = "config.json"
# Configuration -> files of weights, the first that exists; the first configuration that exists decides.
LAYOUTS = {
    CONFIG: (WEIGHTS,),
    OPEN_CLIP_CONFIG: (
        *(OPEN_CLIP_WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
        *("open_clip_pytorch_model.pth", WEIGHTS, "pytorch_model.bin"),
    ),
    TRANSFORMERS_CONFIG: (WEIGHTS, "pytorch_model.bin"),
}
MOST, MOST_LAYERS = 1 << 24, 1 << 10  # of anything in a configuration
_DEPTHS = ("depth", "layers", "num_hidden_layers", "text_num_hidden_layers", "vision_layers")


# ---- released weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Released:
    """A file of weights that others published. It unpacks into (model, tag), open_clip's form."""

    model: str  # preset or open_clip name
    tag: str
    url: str  # of the file, or of the page that offers it
    file: str  # its name there
    repository: str | None = None  # on the hub, from where it is fetched; None: only by hand
    sha256: str | None = None  # None: not published

    @property
    def name(self) -> str:
        """What `load_for_inference` and `--checkpoint` take."""
        return f"{self.model}:{self.tag}"

    @property
    def by_hand(self) -> str:
        """What to do where no client can fetch it."""
        return f"download {self.url} by hand, save it as {CACHE / self.local_name}, or give the path of the file"

    @property
    def local_name(self) -> str:
        """Its name among others, below CACHE."""
        return self.name.replace(":", "-") + Path(self.file).suffix

    def __iter__(self) -> Any:
        return iter((self.model, self.tag))


_FACE = "https://huggingface.co"


def _on_the_hub(model: str, tag: str, repository: str, file: str) -> Released:
    return Released(model, tag, f"{_FACE}/{repository}/resolve/main/{file}", file, repository)


RELEASED = (
    _on_the_hub("RWKV-CLIP-B-32", "yfcc15m", "Kaichengalex/RWKV-CLIP-B32-YFCC15M", "model_31.pt"),
    _on_the_hub("RWKV-CLIP-B-32", "laion10m", "Kaichengalex/RWKV-CLIP-B32-LAION10M", "model_31.pt"),
    _on_the_hub("RWKV-CLIP-B-32", "laion30m", "Kaichengalex/RWKV-CLIP-B32-LAION30M", "model_31.pt"),
    _on_the_hub("RWKV-CLIP-B-16", "laion10m", "Kaichengalex/RWKV-CLIP-B16-LAION10M", "model_31.pt"),
    Released(
        "ViT-B-32",
        "alip-yfcc15m",
        "https://drive.google.com/file/d/1AqSHisCKZOZ16Q3sYguK6zIZIuwwEriE/view",
        "alip.pt",
    ),
    *(
        _on_the_hub(f"CN-CLIP-{tower}", "chinese-clip", f"OFA-Sys/chinese-clip-{name}", f"clip_cn_{tower.lower()}.pt")
        for tower, name in (
            *(("ViT-B-16", "vit-base-patch16"), ("ViT-L-14", "vit-large-patch14")),
            *(("ViT-L-14-336", "vit-large-patch14-336px"), ("ViT-H-14", "vit-huge-patch14"), ("RN50", "rn50")),
        )
    ),
)


def list_pretrained(as_str: bool = False) -> list[Any]:
    """Weights that are known by name: the released files above, then open_clip's tags.

    Each unpacks into (model, tag), or is the text `model:tag` with as_str; the released ones (`Released`) also say
    where they are.
    """
    import open_clip

    pairs = [*RELEASED, *open_clip.list_pretrained()]
    return [f"{model}:{tag}" for model, tag in pairs] if as_str else pairs


def find_released(name: str) -> Released | None:
    """The released file called `model:tag`; None for any other name. ConfigError for an unknown tag of a model of which
    there are such files, unless that is the path of a file."""
    model, _, tag = name.partition(":")
    found = [one for one in RELEASED if one.model == model]
    if not tag or not found or os.path.exists(name):
        return None
    for one in found:
        if one.tag == tag:
            return one
    if model == "ViT-B-32":  # open_clip's, with tags of its own
        return None
    raise ConfigError([f"pretrained: {tag!r} is not a tag of {model}; its tags: {', '.join(one.tag for one in found)}"])


def fetch_released(released: Released, cache: str | Path | None = None) -> Path:
    """The path of its file: one saved by hand (in CACHE or `cache`), or from the hub's cache, downloaded once.

    ConfigError that says what to download where neither works; CheckpointError where the sha256 differs."""
    homes = [CACHE.expanduser(), *([Path(cache)] if cache else [])]
    path = next((home / released.local_name for home in homes if (home / released.local_name).is_file()), None)
    if path is None and released.repository is None:
        raise ConfigError([f"pretrained: {released.name} cannot be fetched by a program; {released.by_hand}"])
    if path is None:
        try:
            path = fetch_first(str(released.repository), (released.file,), cache)
        except ConfigError as error:
            reason = error.problems[0].partition("; ")[0].removeprefix("hf-hub: ")
            raise ConfigError([f"pretrained: {released.name}: {reason}; {released.by_hand}"]) from None
        if path is None:
            raise ConfigError([f"pretrained: {released.name} is no longer at {released.url}; give the path of a copy"])
    if released.sha256 and hash_file(path) != released.sha256:
        raise CheckpointError(f"{path}: is not the released file (its sha256 differs); download it again")
    return path


# ---- folders ---------------------------------------------------------------------------------------------------------


def locate(place: str | Path, cache: str | Path | None = None) -> Path:
    """The file or folder that a name stands for: `hf-hub:org/name[@revision]`, `local-dir:path`, `model:tag` of a
    released file; anything else is a path. ConfigError for what cannot be found or fetched."""
    name = str(place)
    if name.startswith(HUB):
        return _fetch_folder(name.removeprefix(HUB), cache)
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL))
        if not name.removeprefix(LOCAL) or not folder.is_dir():
            raise ConfigError([f"{name}: no such folder; give local-dir: and the path of a folder"])
        if layout_of(folder) is None:
            raise ConfigError([f"{name}: has none of {', '.join(LAYOUTS)}; give a file's path without local-dir:"])
        return folder
    released = find_released(name)
    return fetch_released(released, cache) if released else Path(place)


def _fetch_folder(name: str, cache: str | Path | None) -> Path:
    """The folder of a repository's files in the cache of huggingface_hub: its configuration and weights."""
    split_name(name)
    config = fetch_first(name, tuple(LAYOUTS), cache)
    if config is None:
        raise ConfigError([f"hf-hub: {name!r} has none of {', '.join(LAYOUTS)}; download its weights as a file"])
    if fetch_first(name, LAYOUTS[config.name], cache) is None:
        raise ConfigError(
            [f"hf-hub: {name!r} has {config.name}, but none of {', '.join(LAYOUTS[config.name])}; ask its owner"]
        )
    return config.parent


def layout_of(folder: Path) -> str | None:
    """The configuration file that tells a folder's layout; None where there is none."""
    return next((name for name in LAYOUTS if os.path.isfile(folder / name)), None)  # False for names too long


def find_weights(place: str | Path, cache: str | Path | None = None) -> Path:
    """The file of weights that a name or a folder of one of the LAYOUTS stands for; any other path as it is.

    CheckpointError for a folder with a configuration and no weights in one file; ConfigError as `locate`."""
    path = locate(place, cache)
    layout = layout_of(path)
    if layout is None:
        return path
    files = [path / name for name in LAYOUTS[layout]]
    found = next((file for file in files if file.is_file()), None)
    if found is None and any(path.glob("*.index.json")):
        raise CheckpointError(
            f"{path}: its weights are in several files, which are not read; save it whole with transformers: "
            "ChineseCLIPModel.from_pretrained(FOLDER).save_pretrained(NEW, max_shard_size='100GB')"
        )
    if found is None:
        listed = f"neither {files[0].name} nor {files[1].name}" if len(files) == 2 else f"no {files[0].name}"
        raise CheckpointError(f"{path}: has a {layout}, but {listed}")
    return found


def read_layout(folder: Path) -> tuple[str, dict[str, Any]]:
    """The layout of a folder and the content of its configuration. ConfigError unless that is a JSON object, of numbers
    that a model may have."""
    layout = layout_of(folder)
    assert layout, "find_weights tells"
    data = load_json(folder / layout)
    if not isinstance(data, dict):
        raise ConfigError([f"{folder / layout}: expected a JSON object that describes a model"])
    if large := next(_find_large(data), None):
        raise ConfigError([f"{folder / layout}: {large} is more than any model has; ask its owner"])
    return layout, data


def _find_large(data: Any, name: str = "") -> Iterator[str]:
    """Settings that would be built for hours: whole numbers, and numbers of layers, beyond limits."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _find_large(value, str(key))
    elif isinstance(data, list):
        for value in data:
            yield from _find_large(value, name)
    elif isinstance(data, int) and abs(data) > (MOST_LAYERS if name in _DEPTHS else MOST):
        yield f"{name} {str(data)[:20]}"
