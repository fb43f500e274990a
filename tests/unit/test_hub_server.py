"""The real client against a hub on this machine: fetching, uploading, interruptions, no network, hostile names."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rwkv_clip
from helpers.hub_server import HubServer, serve_hub

pytest.importorskip("huggingface_hub", reason="comes with open_clip_torch")
MODEL = {
    "image": {"image_size": [32, 32], "patch": 16, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
    "text": {"context": 12, "vocab": 49408, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
}
SOON = 60  # seconds for a whole process, most of them for imports; the client's own way takes 23 for each file


@pytest.fixture
def hub():
    with serve_hub() as server:
        yield server


@pytest.fixture
def model():
    torch.manual_seed(3)
    return rwkv_clip.create_model(MODEL)


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return rwkv_clip.save_pretrained(model, tmp_path / "export")


def offer(hub: HubServer, folder: Path, repository: str = "me/mine", revision: str = "main") -> None:
    for path in folder.iterdir():
        hub.files[repository, revision, path.name] = path.read_bytes()


def run(code: str, home: Path, endpoint: str, **more: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, with an empty cache in `home` and a hub at `endpoint`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(home / "hf"), "HOME": str(home), "HF_ENDPOINT": endpoint, **more}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", "import sys, torch, rwkv_clip\n" + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def load(place: str, target: Path) -> str:
    return f"model = rwkv_clip.create_model({place!r})\ntorch.save(model.state_dict(), {str(target)!r})\n"


def check(model: torch.nn.Module, path: Path) -> None:
    found = torch.load(path, weights_only=True)
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


def test_weights_are_fetched_once_and_kept_without_a_network(hub, folder, model, tmp_path):
    offer(hub, folder)
    offer(hub, folder, "me/mine", "v1")
    code = load("hf-hub:me/mine", tmp_path / "a.pt") + load("hf-hub:me/mine@v1", tmp_path / "b.pt")
    done = run(code, tmp_path, hub.endpoint)
    assert done.returncode == 0, done.stderr
    check(model, tmp_path / "a.pt")
    check(model, tmp_path / "b.pt")
    # v1 has other commits and the same files.
    fetched = [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]
    assert [line.rsplit("/", 1)[1] for line in fetched] == ["rwkv_clip_config.json", "model.safetensors"]
    # Again, and no hub is there: from the cache, soon and without a word.
    start = time.monotonic()
    done = run(load("hf-hub:me/mine", tmp_path / "c.pt"), tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 0 and "Retry" not in done.stderr, done.stderr
    assert time.monotonic() - start < SOON
    check(model, tmp_path / "c.pt")


def test_a_download_that_breaks_off_goes_on(hub, folder, model, tmp_path):
    offer(hub, folder)
    hub.cut_at = 1000
    done = run(load("hf-hub:me/mine", tmp_path / "a.pt"), tmp_path, hub.endpoint)
    if done.returncode:  # a client that does not go on by itself says so in one line, and goes on when asked again
        assert "must be downloaded once, which failed" in done.stderr.strip().splitlines()[-1]
        done = run(load("hf-hub:me/mine", tmp_path / "a.pt"), tmp_path, hub.endpoint)
    assert done.returncode == 0 and hub.broken >= {"model.safetensors"}, done.stderr
    check(model, tmp_path / "a.pt")


def test_half_a_file_is_not_taken_for_weights(hub, folder, tmp_path):
    """What the hub itself has damaged."""
    offer(hub, folder)
    key = "me/mine", "main", "model.safetensors"
    hub.files[key] = hub.files[key][:-100]
    done = run("rwkv_clip.create_model('hf-hub:me/mine')", tmp_path, hub.endpoint)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode and "CheckpointError" in last and "model.safetensors" in last


def test_uploads_are_read_back(hub, folder, model, tmp_path):
    code = (
        f"print(rwkv_clip.push_to_hub({str(folder)!r}, 'me/new', license='mit', token='hf_x'))\n"
        f"print(rwkv_clip.push_to_hub({str(folder)!r}, 'me/new@v2', token='hf_x'))\n"
    ) + load("hf-hub:me/new@v2", tmp_path / "a.pt")
    done = run(code, tmp_path, hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["hf-hub:me/new", "hf-hub:me/new@v2"]
    check(model, tmp_path / "a.pt")
    assert hub.names("me/new") == {"rwkv_clip_config.json", "model.safetensors", "README.md"}
    assert b'license: "mit"' in hub.files["me/new", "main", "README.md"]
    assert hub.files["me/new", "main", "model.safetensors"] == hub.files["me/new", "v2", "model.safetensors"]


@pytest.mark.parametrize("obstacle", ["refused", "no hub", "unreachable proxy"])
def test_an_upload_that_fails_is_one_line(obstacle, hub, folder, tmp_path):
    hub.refuse = 401
    endpoint = "http://127.0.0.1:9" if obstacle == "no hub" else hub.endpoint
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""} if "proxy" in obstacle else {}
    done = run(f"rwkv_clip.push_to_hub({str(folder)!r}, 'me/new', token='hf_x')", tmp_path, endpoint, **proxy)
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigError: push_to_hub: me/new could not be written (" in last and "hf auth login" in last
    assert not hub.files and "hf_x" not in done.stderr


PLACES = {
    "hf-hub:me/mine": "hf-hub: 'me/mine' must be downloaded once, which failed",
    "RWKV-CLIP-B-32:yfcc15m": "download https://huggingface.co/Kaichengalex",
    "open_clip:ViT-B-32:laion2b_s34b_b79k": "'laion2b_s34b_b79k' must be downloaded once, which failed",
}


@pytest.mark.parametrize("proxy", [{}, {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}])
def test_no_network_is_said_soon(proxy, tmp_path):
    """Every kind of place in one process: seconds in all, each one line that says what to do."""
    code = f"""
import time, traceback
start = time.monotonic()
for place in {list(PLACES)!r}:
    try:
        rwkv_clip.load_for_inference(place)
    except ValueError as error:
        print(str(error))
print(time.monotonic() - start)
"""
    endpoint = "http://hub.invalid" if proxy else "http://127.0.0.1:9"
    *lines, seconds = run(code, tmp_path, endpoint, **proxy).stdout.strip().splitlines()
    assert len(lines) == len(PLACES) and float(seconds) < SOON
    for line, message in zip(lines, PLACES.values()):
        assert message in line and ("127.0.0.1:9" in line or "hub.invalid" in line), line


def test_a_hub_that_does_not_know_the_name(hub, tmp_path):
    done = run("rwkv_clip.create_model('hf-hub:me/nothing')", tmp_path, hub.endpoint)
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigError: hf-hub: 'me/nothing' must be downloaded once, which failed (" in last


def test_text_towers_of_the_hub(hub, tmp_path):
    """By name from the hub, whose configuration alone is fetched; one that brings code of its own is refused."""
    bert = {"model_type": "bert", "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 1}
    bert |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 20}
    code = {"AutoConfig": "other/code--configuration.Evil", "AutoModel": "other/code--modeling.Evil"}
    hub.files["they/bert", "main", "config.json"] = json.dumps(bert).encode()
    hub.files["old-bert", "main", "config.json"] = json.dumps(bert).encode()
    hub.files["they/evil", "main", "config.json"] = json.dumps({**bert, "model_type": "odd", "auto_map": code}).encode()
    mark = tmp_path / "ran"
    for name in ("configuration.py", "modeling.py"):
        hub.files["other/code", "main", name] = f"open({str(mark)!r}, 'w')\n".encode()
    vit = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}
    text = {"hf_model_pretrained": False, "hf_proj_type": "linear", "hf_pooler_type": "cls_pooler"}
    done = run(
        f"""
for name in ("they/bert", "old-bert", "they/evil", "they/none", "../../x"):
    source = {{"embed_dim": 24, "vision_cfg": {vit!r}, "text_cfg": {{**{text!r}, "hf_model_name": name}}}}
    try:
        print(rwkv_clip.create_model(source).encode_text(torch.ones(2, 5, dtype=torch.int64)).shape)
    except ValueError as error:
        print(error)
""",
        tmp_path,
        hub.endpoint,
    )
    first, second, evil, none, outside = done.stdout.strip().splitlines()
    assert first == second == "torch.Size([2, 24])", done.stderr
    assert evil.startswith("text_cfg.hf_model_name: 'they/evil' is a 'odd'; open_clip has text towers of roberta")
    assert "they/none" in none and "name a folder with its config.json" in none
    assert "is not of the form" in outside
    assert not mark.exists() and not [line for line in hub.asked if "other/code" in line]
