"""Text towers of transformers inside open_clip's models: where their configuration is, and that none brings code.

open_clip builds them from a name, `hf_model_name`, by asking the hub. A folder with a config.json serves as well.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..config import ConfigError, load_json
from ..downloads import fetch_file

FILE = "config.json"
_PLACES = ("cache_dir", "proxies", "token", "use_auth_token", "local_dir", "revision", "subfolder", "code_revision")


def find_text_tower(text: dict[str, Any]) -> dict[str, Any]:
    """open_clip's `text_cfg` with the folder in place of the name of a tower whose weights are not fetched.

    text: as in a model JSON; without `hf_model_name` it is returned as it is. ConfigError where the configuration is
    neither in a folder nor on the hub or in its cache, and for a kind of model that open_clip does not know: those may
    bring code, about which transformers would ask.
    """
    name = text.get("hf_model_name")
    if not name:
        return text
    if not isinstance(name, str):
        raise ConfigError([f"text_cfg.hf_model_name: {name!r} is not a name; give one, or a folder with a {FILE}"])
    path = Path(name) / FILE if os.path.isdir(name) else None
    try:
        path = path or fetch_file(name, FILE)
    except ConfigError as error:
        reason = error.problems[0].partition("; ")[0].removeprefix("hf-hub: ")
        raise ConfigError([f"text_cfg.hf_model_name: {reason}; name a folder with its {FILE}"]) from None
    if path is None or not path.is_file():
        raise ConfigError([f"text_cfg.hf_model_name: {name!r} has no {FILE}; name a folder that has one"])
    from open_clip.hf_configs import arch_dict

    data = load_json(path)
    kind = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in arch_dict:
        known = ", ".join(arch_dict)
        raise ConfigError([f"text_cfg.hf_model_name: {name!r} is a {kind!r}; open_clip has text towers of {known}"])
    return text if text.get("hf_model_pretrained", True) else {**text, "hf_model_name": str(path.parent)}


def check_places(source: dict[str, Any]) -> list[str]:
    """Problems of a model in open_clip's form that would read or write elsewhere than its tokenizer's name says."""
    text, vision = source.get("text_cfg"), source.get("vision_cfg")
    problems = []
    if isinstance(text, dict) and (settings := text.get("tokenizer_kwargs")):
        odd = sorted(settings.keys() & set(_PLACES)) if isinstance(settings, dict) else ["itself"]
        problems += [f"text_cfg.tokenizer_kwargs: {key} says where files are; leave it out" for key in odd]
    name = vision.get("timm_model_name") if isinstance(vision, dict) else None
    if name is not None and (not isinstance(name, str) or ":" in name or "/" in name):
        problems.append(f"vision_cfg.timm_model_name: {name!r} is not the name of a model of timm's; correct it")
    return problems
