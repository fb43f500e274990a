"""Folders of weights from strangers: nothing is run, nothing outside is read or written, each mistake is one line."""

import builtins
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rwkv_clip
from rwkv_clip.config import ConfigError
from rwkv_clip.models.hugging_text import find_text_tower

VIT = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
CLIP = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}
RWKV = {
    "image": {"image_size": [32, 32], "patch": 16, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
    "text": {"context": 12, "vocab": 49408, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
}
CONFIGS = {"rwkv_clip_config.json": RWKV, "open_clip_config.json": CLIP}


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return builtins.open, (str(self.path), "w")


def make(folder: Path, config: str) -> Path:
    return rwkv_clip.save_pretrained(rwkv_clip.create_model(CONFIGS[config]), folder)


def change(path: Path, keys: str, value: Any) -> None:
    """Set the value at `a.b.c` in a JSON file."""
    data = json.loads(path.read_text())
    *way, last = keys.split(".")
    table = data
    for key in way:
        table = table[key]
    table[last] = value
    path.write_text(json.dumps(data))


def check_refused(place: Any, *, say: str | None = None) -> None:
    """ValueError, of few words."""
    with pytest.raises(ValueError) as caught:
        rwkv_clip.load_for_inference(place)
    message = str(caught.value)
    assert len(message) < 3000 and (say is None or say in message), message


ODD: list[Any] = [None, [], {}, "", "x" * 50, -1, 0, 1e400, True, [[[]]], {"a": {"b": []}}, 10**12]
RWKV_KEYS = "image text image.width image.image_size image.depth text.vocab text.context tokenizer image.kind"
CLIP_KEYS = "embed_dim vision_cfg text_cfg vision_cfg.width vision_cfg.layers text_cfg.heads vision_cfg.image_size"
CLIP_KEYS += " text_cfg.hf_model_name vision_cfg.timm_model_name text_cfg.tokenizer_kwargs"
KEYS = {
    "rwkv_clip_config.json": ["spec", *(f"spec.{key}" for key in RWKV_KEYS.split())],
    "open_clip_config.json": [
        *("model_cfg", "preprocess_cfg", "preprocess_cfg.mean", "preprocess_cfg.resize_mode"),
        *(f"model_cfg.{key}" for key in CLIP_KEYS.split()),
    ],
}


@pytest.mark.parametrize(("config", "key"), [(config, key) for config in KEYS for key in KEYS[config]])
def test_values_of_any_type(config, key, tmp_path, monkeypatch):
    """Loads as before where the value means nothing, else is refused as a mistake of the file; no other error."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = make(tmp_path / "model", config)
    whole = (folder / config).read_text()
    refused = 0
    for value in ODD:
        (folder / config).write_text(whole)
        change(folder / config, key, value)
        try:
            rwkv_clip.load_for_inference(folder)
        except (ValueError, OSError) as error:
            assert len(str(error)) < 3000
            refused += 1
    assert refused >= 3 or "kwargs" in key


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"null",
        b'"text"',
        b"NaN",
        b"1" * 5000,
        b"{" + b" " * (1 << 27),
    ],
    ids=["empty", "UTF-16", "deep list", "deep table", "null", "text", "NaN", "number", "huge"],
)
def test_configurations_that_are_no_json(config, content, tmp_path):
    folder = make(tmp_path / "model", config)
    (folder / config).write_bytes(content)
    check_refused(folder, say=str(folder))


@pytest.mark.parametrize(
    ("config", "width"), [("rwkv_clip_config.json", "ffn_width"), ("open_clip_config.json", "width")]
)
def test_a_model_that_its_weights_cannot_fill_is_not_built(config, width, tmp_path):
    """Terabytes, of numbers that are each possible."""
    folder = make(tmp_path / "model", config)
    change(folder / config, f"spec.image.{width}" if "rwkv" in config else f"model_cfg.vision_cfg.{width}", 1 << 22)
    check_refused(folder, say="parameters; correct its description")
    with pytest.raises(ConfigError, match="correct its description"):
        rwkv_clip.create_model(f"local-dir:{folder}")


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_with_a_wrong_header(config, tmp_path):
    folder = make(tmp_path / "model", config)
    path = next(folder.glob("*.safetensors"))
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    first = next(name for name in header if name != "__metadata__")

    def pack(table: Any, body: bytes = whole[8 + size :]) -> bytes:
        text = json.dumps(table).encode()
        return struct.pack("<Q", len(text)) + text + body

    wrong = [
        b"",
        whole[:7],
        struct.pack("<Q", 1 << 62) + whole[8:],
        struct.pack("<Q", size + 5) + whole[8:],
        whole[: len(whole) // 2],
        whole + b"more",
        pack([]),
        pack({**header, first: {**header[first], "data_offsets": [-4, 10]}}),
        pack({**header, first: {**header[first], "data_offsets": [0, 1 << 60]}}),
        pack({**header, first: {**header[first], "shape": [1 << 40, 1 << 40]}}),
        pack({**header, first: {**header[first], "dtype": "OBJECT"}}),
        pack({name: about for name, about in header.items() if name != first}),
        pack({**header, "../../outside": header[first]}),
        b"\x80\x04\x95" + whole,
        b"PK\x03\x04" + whole,
    ]
    for content in wrong:
        path.write_bytes(content)
        check_refused(folder)
    path.write_bytes(whole)
    rwkv_clip.load_for_inference(folder)


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "pytorch_model.bin", "open_clip_pytorch_model.pth"])
@pytest.mark.parametrize("inside", ["alone", "beside tensors", "as safetensors"])
def test_pickles_are_not_run(name, inside, tmp_path):
    folder = make(tmp_path / "model", "open_clip_config.json")
    weights, mark = folder / "open_clip_model.safetensors", tmp_path / "ran"
    evil: Any = Evil(mark) if inside == "alone" else {**rwkv_clip.create_model(CLIP).state_dict(), "more": Evil(mark)}
    if inside != "as safetensors":
        weights.unlink()
    torch.save(evil, weights if inside == "as safetensors" else folder / name)
    check_refused(folder)
    assert not mark.exists()


def test_code_beside_weights_is_not_run(tmp_path):
    """`auto_map` of our own and of Chinese-CLIP's layout, to a file of the folder and to a stranger's repository."""
    code = {"AutoConfig": "stranger/code--evil.Evil", "AutoModel": "evil.Evil"}
    mark = tmp_path / "ran"
    folder = rwkv_clip.save_pretrained(rwkv_clip.create_model(RWKV), tmp_path / "model", transformers=True)
    (folder / "rwkv_clip_config.json").unlink()
    for name in ("evil.py", "modeling_rwkv_clip.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')\n")
    change(folder / "config.json", "auto_map", code)
    rwkv_clip.load_for_inference(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code}))
    check_refused(folder, say="model_type is 'evil'")
    assert not mark.exists() and "evil" not in sys.modules


def test_a_text_tower_with_code_is_not_asked_about(tmp_path, monkeypatch):
    """transformers would ask on the terminal whether to run it."""
    tower = tmp_path / "tower"
    tower.mkdir()
    code = {"AutoConfig": "stranger/code--evil.Evil", "AutoModel": "stranger/code--evil.Evil"}
    (tower / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code}))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("somebody was asked"))
    source = {**CLIP, "text_cfg": {**TEXT, "hf_model_name": str(tower), "hf_model_pretrained": False}}
    with pytest.raises(ConfigError, match="is a 'evil'; open_clip has text towers of roberta"):
        rwkv_clip.create_model(source)
    (tower / "config.json").unlink()
    with pytest.raises(ConfigError, match="; name a folder that has one"):
        find_text_tower(source["text_cfg"])


def test_a_text_tower_from_a_folder_without_a_network(tmp_path, monkeypatch):
    """Built, saved and opened again, here and by open_clip, to the bit."""
    import open_clip

    monkeypatch.setattr("rwkv_clip.downloads.load_client", lambda: pytest.fail("the hub was asked"))
    tower = tmp_path / "tower"
    tower.mkdir()
    settings = {"model_type": "bert", "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 20}
    (tower / "config.json").write_text(json.dumps(settings))
    text = {"hf_model_name": str(tower), "hf_model_pretrained": False, "hf_tokenizer_name": str(tower)}
    text |= {"hf_proj_type": "linear", "hf_pooler_type": "cls_pooler", "context_length": 12}
    model = rwkv_clip.create_model({**CLIP, "text_cfg": text})
    folder = rwkv_clip.save_pretrained(model, tmp_path / "model")
    ids = torch.randint(1, 600, (2, 12))
    with torch.no_grad():
        expected = model.encode_text(ids)
        assert torch.equal(rwkv_clip.create_model(f"local-dir:{folder}").encode_text(ids), expected)
        theirs = open_clip.create_model(f"local-dir:{folder}").eval()
        assert torch.equal(theirs.encode_text(ids), expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("text_cfg.hf_model_name", "../../x", "is not of the form org/name"),
        ("text_cfg.hf_model_name", "a/b/c", "is not of the form org/name"),
        ("text_cfg.hf_model_name", "http://x/y", "is not of the form org/name"),
        ("vision_cfg.timm_model_name", "hf-hub:stranger/model", "is not the name of a model of timm's"),
        ("vision_cfg.timm_model_name", "local-dir:/etc", "is not the name of a model of timm's"),
        ("text_cfg.tokenizer_kwargs", {"cache_dir": "/tmp/x", "proxies": {}}, "cache_dir says where files are"),
    ],
)
def test_names_in_a_configuration_that_lead_elsewhere(key, value, message, tmp_path):
    folder = make(tmp_path / "model", "open_clip_config.json")
    change(folder / "open_clip_config.json", f"model_cfg.{key}", value)
    check_refused(folder, say=message)


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".", "a/..", "../a", "/etc/passwd", "a/b@../../c", "a\\b/c", "a/b\0", "a/b?c", "C:/x"]
)
def test_places_that_lead_elsewhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rwkv_clip.downloads.load_client", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(ConfigError, match="is not of the form org/name") as caught:
        rwkv_clip.create_model(f"hf-hub:{name}")
    assert "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)


def test_links_are_followed_to_weights_only(tmp_path):
    """A link is read as what it leads to, which must be weights all the same; circles and devices end."""
    folder = make(tmp_path / "model", "rwkv_clip_config.json")
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "kept")
    weights.symlink_to(tmp_path / "kept")  # as in the cache of huggingface_hub
    rwkv_clip.load_for_inference(folder)
    for target in ("/etc/passwd", "/dev/zero", "/proc/self/mem", str(weights), str(tmp_path)):
        weights.unlink()
        weights.symlink_to(target)
        check_refused(folder)
    weights.unlink()
    (tmp_path / "kept").rename(weights)
    config = folder / "rwkv_clip_config.json"
    for target in ("/dev/zero", "/etc/passwd", str(config)):
        config.unlink()
        config.symlink_to(target)
        with pytest.raises((ValueError, OSError)):
            rwkv_clip.load_for_inference(folder)
