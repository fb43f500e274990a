"""Folders for others and places that name weights: what is written is read back, here and by open_clip, to the bit."""

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch

import rwkv_clip
from helpers.tiny import make_smaller, make_tiny
from rwkv_clip import downloads, pretrained
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.convert import convert
from rwkv_clip.factory import describe
from rwkv_clip.models.openclip import OpenClipConfig
from rwkv_clip.serialization import CheckpointError
from rwkv_clip.training.main import run
from rwkv_clip.training.settings import Settings

VIT = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
TRANSFORMER = {"context_length": 12, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 2}
OPEN_CLIP = {
    "CLIP": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TRANSFORMER},
    "QuickGELU": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TRANSFORMER, "quick_gelu": True},
    "custom text": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TRANSFORMER, "custom_text": True},
    "sigmoid's bias": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TRANSFORMER, "init_logit_bias": -10.0},
    "other pixels": {
        "open_clip": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TRANSFORMER},
        "pixels": [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]],
        "resize_mode": "squash",
        "interpolation": "bilinear",
    },
}
RWKV_IMAGE = {"image_size": [32, 32], "patch": 8, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
RWKV_TEXT = {"context": 12, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
OURS = {
    "RWKV": {"image": RWKV_IMAGE, "text": RWKV_TEXT},
    "projected": {"embed_dim": 24, "image": {**RWKV_IMAGE, "class_token": True}, "text": {**RWKV_TEXT, "width": 48}},
    "BERT": {
        "embed_dim": 24,
        "image": {"kind": "open_clip", **VIT, "quick_gelu": True},
        "text": {"kind": "bert", "context": 12, "width": 48, "depth": 2, "heads": 2, "ffn_width": 64},
        "resize_mode": "squash",
    },
    "mixed": {"embed_dim": 24, "image": RWKV_IMAGE, "text": {"kind": "open_clip", **TRANSFORMER}},
    "biased": {"image": RWKV_IMAGE, "text": RWKV_TEXT, "init_logit_bias": -10.0},
}


def build(model: dict) -> torch.nn.Module:
    """Seed 0, no parameter at its initial zero."""
    torch.manual_seed(0)
    net = rwkv_clip.create_model(model)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 32, 32), torch.randint(1, 20_000, (2, 12))


def check_equal(first: torch.nn.Module, second: torch.nn.Module) -> None:
    batch = inputs()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(first(*batch), second(*batch)))


@pytest.fixture(scope="module")
def finished(new_folder) -> Path:
    """The folder of a run of three steps."""
    folder = new_folder("run")
    settings = make_smaller(make_tiny(folder)) | {"name": "run", "max_steps": 3}
    run(parse(Settings, settings))
    return folder / "logs" / "run"


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_open_clip_opens_what_is_its_own(kind, tmp_path):
    """By open_clip itself: the same features, transform and tokens; and here."""
    model = build(OPEN_CLIP[kind])
    folder = rwkv_clip.save_pretrained(model, tmp_path / "export")
    assert {path.name for path in folder.iterdir()} == {
        *("open_clip_config.json", "open_clip_model.safetensors", "README.md")
    }
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    check_equal(model, theirs.eval())
    for place in (folder, str(folder), f"local-dir:{folder}"):
        loaded = rwkv_clip.load_for_inference(place)
        check_equal(model, loaded.model)
        assert loaded.name == "export"
    assert loaded.model.spec.pixels == model.spec.pixels and loaded.model.spec.resize_mode == model.spec.resize_mode
    ours, other = (one.transforms[-1] for one in (loaded.preprocess, preprocess))
    assert (tuple(ours.mean), tuple(ours.std)) == (tuple(other.mean), tuple(other.std))
    text = ["a dog", "two cats"]
    assert torch.equal(loaded.tokenizer(text), open_clip.get_tokenizer(f"local-dir:{folder}")(text))


@pytest.mark.parametrize("kind", OURS)
def test_towers_of_ours_come_back(kind, tmp_path):
    model = build(OURS[kind])
    folder = rwkv_clip.save_pretrained(model, tmp_path / "export", name="mine")
    assert {path.name for path in folder.iterdir()} == {"rwkv_clip_config.json", "model.safetensors", "README.md"}
    loaded = rwkv_clip.load_for_inference(folder)
    assert loaded.model.spec == model.spec
    check_equal(model, loaded.model)
    check_equal(model, rwkv_clip.create_model(f"local-dir:{folder}"))
    check_equal(model, rwkv_clip.create_model(OURS[kind], pretrained=f"local-dir:{folder}"))
    alone = rwkv_clip.load_for_inference(folder / "model.safetensors")  # without the configuration
    check_equal(model, alone.model)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_weights_stay_narrow(precision, tmp_path):
    model = rwkv_clip.create_model(OURS["RWKV"], precision=precision)
    folder = rwkv_clip.save_pretrained(model, tmp_path / "export")
    again = rwkv_clip.create_model(folder, precision=precision)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_a_run_is_exported_with_what_is_known_about_it(finished, tmp_path):
    folder = rwkv_clip.save_pretrained(
        finished, tmp_path / "export", license="mit", tags=["demo"], metrics={"imagenet_top1": 0.125}
    )
    check_state = rwkv_clip.load_for_inference(finished).model.state_dict()
    found = rwkv_clip.load_for_inference(folder).model.state_dict()
    assert all(torch.equal(check_state[key], found[key]) for key in found)
    card = (folder / "README.md").read_text()
    front = dict(line.split(": ", 1) for line in card.split("---")[1].strip().splitlines())
    assert json.loads(front["license"]) == "mit" and json.loads(front["library_name"]) == "rwkv_clip"
    assert json.loads(front["pipeline_tag"]) == "zero-shot-image-classification"
    assert {"clip", "demo"} <= set(json.loads(front["tags"]))
    state = json.loads(next(finished.rglob("state.json")).read_text())
    assert f"`{state['records']['digest']}`" in card and f"| training pairs | {state['records']['count']} |" in card
    assert "| steps | 3 |" in card and '"lr": 0.01' in card
    assert "| imagenet_top1 | 0.125 |" in card and "mean_recall" in card
    assert str(finished.parent.parent) not in card, "the card names folders of this machine"


def test_a_card_makes_nothing_up(tmp_path):
    card = (rwkv_clip.save_pretrained(build(OURS["BERT"]), tmp_path / "export") / "README.md").read_text()
    assert 'license: "unknown"' in card and 'language: "zh"' in card
    assert "## Training" not in card and "## Evaluation" not in card


def test_folders_that_are_there_are_kept(tmp_path):
    (tmp_path / "empty").mkdir()
    model = build(OURS["RWKV"])
    assert rwkv_clip.save_pretrained(model, tmp_path / "empty") == tmp_path / "empty"
    before = {path: path.read_bytes() for path in (tmp_path / "empty").iterdir()}
    with pytest.raises(ConfigError, match="exists and is not empty; name a new one"):
        rwkv_clip.save_pretrained(model, tmp_path / "empty")
    assert before == {path: path.read_bytes() for path in (tmp_path / "empty").iterdir()}


def test_a_full_disk_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rwkv_clip.hub.write_card", fail)
    with pytest.raises(OSError, match="No space left"):
        rwkv_clip.save_pretrained(build(OURS["RWKV"]), tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_what_was_not_made_here_is_not_exported(tmp_path):
    with pytest.raises(ConfigError, match="a Linear was not made by create_model"):
        rwkv_clip.save_pretrained(torch.nn.Linear(1, 1), tmp_path / "export")


def test_convert_reads_an_export(tmp_path):
    model = build(OURS["BERT"])
    folder = rwkv_clip.save_pretrained(model, tmp_path / "export")
    convert(folder, tmp_path / "released.pt", "chinese-clip")
    assert torch.load(tmp_path / "released.pt", weights_only=True)["state_dict"]
    check_equal(model, rwkv_clip.create_model(OURS["BERT"], pretrained=tmp_path / "released.pt"))


def test_the_command_writes_an_export(finished, tmp_path):
    said = convert(finished, tmp_path / "export", "hub", license="mit")
    assert "README.md, model.safetensors, rwkv_clip_config.json" in said
    assert 'license: "mit"' in (tmp_path / "export" / "README.md").read_text()
    with pytest.raises(ConfigError, match="exists; name a new folder"):
        convert(finished, tmp_path / "export", "hub")
    with pytest.raises(ConfigError, match="license: 'mit' has no effect in safetensors"):
        convert(finished, tmp_path / "x.safetensors", "safetensors", license="mit")


# ---- damaged and hostile folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "content", "message"),
    [
        ("open_clip_config.json", "[]", "expected a JSON object"),
        ("open_clip_config.json", "{", "not JSON"),
        ("open_clip_config.json", "{}", "model_cfg and preprocess_cfg are tables"),
        ("open_clip_config.json", '{"model_cfg": {"text_cfg": {}}}', "vision_cfg: missing"),
        (
            "open_clip_config.json",
            '{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": {"resize_mode": "longest"}}',
            "resize_mode: 'longest' is not one of",
        ),
        ("rwkv_clip_config.json", "{}", "has no table spec"),
        ("rwkv_clip_config.json", '{"spec": {"image": {"widht": 8}}}', "did you mean 'width'"),
        ("config.json", '{"model_type": "llama"}', "model_type is 'llama'"),
    ],
)
def test_damaged_configurations_are_named(config, content, message, tmp_path):
    folder = rwkv_clip.save_pretrained(build(OURS["RWKV"]), tmp_path / "export")
    (folder / "rwkv_clip_config.json").unlink()
    (folder / config).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        rwkv_clip.load_for_inference(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", pretrained.LAYOUTS)
def test_a_configuration_without_weights_is_named(config, tmp_path):
    (tmp_path / config).write_text("{}")
    with pytest.raises(CheckpointError, match=f"has a {config}, but "):
        rwkv_clip.load_for_inference(tmp_path)


def test_nothing_of_a_folder_is_run(tmp_path):
    """Code beside the weights, named in the configuration, as transformers would run it; and pickled weights."""
    folder = rwkv_clip.save_pretrained(build(OURS["RWKV"]), tmp_path / "export", transformers=True)
    mark = tmp_path / "ran"
    for code in folder.glob("*.py"):
        code.write_text(f"open({str(mark)!r}, 'w')\n" + code.read_text())
    rwkv_clip.load_for_inference(folder)
    rwkv_clip.create_model(folder)
    (folder / "rwkv_clip_config.json").unlink()  # what is left is a folder of transformers
    rwkv_clip.load_for_inference(folder)
    assert not mark.exists()
    other = rwkv_clip.save_pretrained(build(OPEN_CLIP["CLIP"]), tmp_path / "theirs")
    (other / "open_clip_model.safetensors").rename(tmp_path / "away")
    torch.save({"text": Evil(mark)}, other / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="plain tensors"):
        rwkv_clip.load_for_inference(other)
    assert not mark.exists()


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return builtins.open, (str(self.path), "w")


def test_weights_of_towers_are_not_fetched_for_a_folder():
    """A configuration may ask for a tower's own weights; those of the whole follow."""
    data = {
        "model_cfg": {
            "embed_dim": 8,
            "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": True},
            "text_cfg": {"hf_model_name": "bert", "hf_model_pretrained": True, "hf_tokenizer_name": "bert"},
        }
    }
    source = OpenClipConfig.from_layout(data, "x").source
    assert source["vision_cfg"]["timm_model_pretrained"] is False is source["text_cfg"]["hf_model_pretrained"]
    assert data["model_cfg"]["vision_cfg"]["timm_model_pretrained"] is True, "the caller's table has changed"


# ---- places ----------------------------------------------------------------------------------------------------------


class Hub:
    """In place of huggingface_hub: repositories are folders, `org--name` or `org--name@revision`."""

    class errors:
        class EntryNotFoundError(Exception):
            pass

        class LocalEntryNotFoundError(EntryNotFoundError, FileNotFoundError):
            pass

    def __init__(self, root: Path, offline: bool = False):
        self.root, self.offline, self.asked = root, offline, []

    def hf_hub_download(self, repository, file, revision=None, cache_dir=None):
        self.asked.append((repository, file, revision, cache_dir))
        path = self.root / (repository.replace("/", "--") + (f"@{revision}" if revision else "")) / file
        if path.is_file():
            return str(path)
        raise (self.errors.LocalEntryNotFoundError if self.offline else self.errors.EntryNotFoundError)("not here")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr(downloads, "load_client", lambda: stand_in)
    monkeypatch.setattr(downloads, "find_obstacle", lambda client: None)
    monkeypatch.setattr(pretrained, "CACHE", tmp_path / "by-hand")
    return stand_in


@pytest.mark.parametrize("model", [OPEN_CLIP["CLIP"], OURS["RWKV"], OURS["BERT"]], ids=["open_clip", "RWKV", "BERT"])
@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_a_repository_is_a_folder(hub, model, revision):
    net, suffix = build(model), f"@{revision}" if revision else ""
    rwkv_clip.save_pretrained(net, hub.root / f"me--mine{suffix}")
    place = f"hf-hub:me/mine{suffix}"
    loaded = rwkv_clip.load_for_inference(place)
    check_equal(net, loaded.model)
    check_equal(net, rwkv_clip.create_model(place, cache_dir="elsewhere"))
    assert {one[2] for one in hub.asked} == {revision} and hub.asked[-1][3] == "elsewhere"
    check_equal(net, rwkv_clip.create_model(model, pretrained=place))
    assert torch.equal(rwkv_clip.get_tokenizer(place)("a dog"), loaded.tokenizer("a dog"))
    assert rwkv_clip.get_model_config(place)


@pytest.mark.parametrize(
    "name", ["mine", "me/", "/mine", "me/mine/more", "me/..", "../mine", "me/mine@", "me/a b", "a/b\n"]
)
def test_names_that_no_repository_has(hub, name):
    with pytest.raises(ConfigError, match="is not of the form org/name"):
        rwkv_clip.create_model(f"hf-hub:{name}")
    assert not hub.asked


def test_repositories_without_weights(hub):
    (hub.root / "me--mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"'me/mine' has none of rwkv_clip_config.json, open_clip_config.json"):
        rwkv_clip.create_model("hf-hub:me/mine")
    (hub.root / "me--mine" / "open_clip_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has open_clip_config.json, but none of open_clip_model.safetensors"):
        rwkv_clip.create_model("hf-hub:me/mine")


def test_without_a_network_the_cache_is_used(hub):
    net = build(OPEN_CLIP["CLIP"])
    rwkv_clip.save_pretrained(net, hub.root / "me--mine")
    hub.offline = True
    check_equal(net, rwkv_clip.create_model("hf-hub:me/mine"))
    with pytest.raises(ConfigError, match="'me/other' must be downloaded once, which failed") as caught:
        rwkv_clip.create_model("hf-hub:me/other")
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        rwkv_clip.create_model("hf-hub:me/mine")


def test_training_starts_from_a_folder(tmp_path):
    """--pretrained, and --model, which then brings weights of its own."""
    settings = make_smaller(make_tiny(tmp_path)) | {"max_steps": 1, "val_data": None}
    settings = {key: value for key, value in settings.items() if value is not None}
    net = build(json.loads(Path(settings["model"]).read_text()))
    rwkv_clip.save_pretrained(net, tmp_path / "export")
    done = []
    for change in ({"pretrained": f"local-dir:{tmp_path / 'export'}"}, {"model": f"local-dir:{tmp_path / 'export'}"}):
        run(parse(Settings, settings | change | {"name": f"run{len(done)}"}))
        done.append(rwkv_clip.load_for_inference(tmp_path / "logs" / f"run{len(done)}").model.state_dict())
    assert all(torch.equal(done[0][key], done[1][key]) for key in done[0])
    moved = [key for key, value in net.state_dict().items() if value.dim() > 1 and "emb" not in key]
    assert all((done[0][key] - net.state_dict()[key]).abs().max() < 0.02 for key in moved)


# ---- released weights ------------------------------------------------------------------------------------------------


def test_the_list_names_what_was_released_and_open_clips_tags():
    rows = rwkv_clip.list_pretrained()
    assert all(len(tuple(row)) == 2 for row in rows)
    assert [tuple(row) for row in rows[len(pretrained.RELEASED) :]] == open_clip.list_pretrained()
    models = [model for model, _ in pretrained.RELEASED]
    assert sum(model.startswith("RWKV-CLIP") for model in models) == 4
    assert sum(model.startswith("CN-CLIP") for model in models) == 5 and models.count("ViT-B-32") == 1
    assert len({one.name for one in pretrained.RELEASED}) == len({one.local_name for one in pretrained.RELEASED}) == 10
    assert "RWKV-CLIP-B-32:yfcc15m" in rwkv_clip.list_pretrained(as_str=True)
    for one in pretrained.RELEASED:
        assert one.model in (*rwkv_clip.list_models(), *open_clip.list_models())
        assert one.url.startswith("https://") and (one.sha256 is None or len(one.sha256) == 64)
        assert one.url in one.by_hand


def test_released_weights_by_name(hub, monkeypatch):
    """With the file of a tiny model in place of the real one."""
    one = pretrained.Released("RWKV-CLIP-Ti-8", "made-up", "https://x", "model_31.pt", "org/released")
    monkeypatch.setattr(pretrained, "RELEASED", (one,))
    monkeypatch.setattr("rwkv_clip.factory.RELEASED", (one,))
    torch.manual_seed(0)
    net = rwkv_clip.create_model("RWKV-CLIP-Ti-8")
    home = hub.root / "org--released"
    home.mkdir(parents=True)
    torch.save({f"module.{key}": value for key, value in net.state_dict().items()}, home / "model_31.pt")
    loaded = rwkv_clip.load_for_inference("RWKV-CLIP-Ti-8:made-up")
    assert loaded.name == "RWKV-CLIP-Ti-8" and describe("RWKV-CLIP-Ti-8:made-up")[2] == home / "model_31.pt"
    for model in (loaded.model, rwkv_clip.create_model("RWKV-CLIP-Ti-8", pretrained="made-up")):
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), model.state_dict().values()))
    with pytest.raises(ConfigError, match="'other' is not a tag of RWKV-CLIP-Ti-8; its tags: made-up"):
        rwkv_clip.load_for_inference("RWKV-CLIP-Ti-8:other")
    asked = len(hub.asked)
    pretrained.CACHE.mkdir()
    (home / "model_31.pt").rename(pretrained.CACHE / "RWKV-CLIP-Ti-8-made-up.pt")
    rwkv_clip.load_for_inference("RWKV-CLIP-Ti-8:made-up")
    assert len(hub.asked) == asked, "a file saved by hand was not found"
    wrong = pretrained.Released(*one, "https://x", "model_31.pt", "org/released", "0" * 64)
    with pytest.raises(CheckpointError, match="its sha256 differs"):
        pretrained.fetch_released(wrong)


@pytest.mark.parametrize("name", ["ViT-B-32:alip-yfcc15m", "RWKV-CLIP-B-32:laion30m", "CN-CLIP-RN50:chinese-clip"])
def test_what_to_download_by_hand(hub, name):
    hub.offline = True
    one = pretrained.find_released(name)
    assert one
    with pytest.raises(ConfigError) as caught:
        rwkv_clip.load_for_inference(name)
    assert one.url in str(caught.value) and one.local_name in str(caught.value) and "\n" not in str(caught.value)
    model, tag = one
    with pytest.raises(ConfigError, match="by hand"):
        rwkv_clip.create_model(model, pretrained=tag)


@pytest.mark.parametrize(
    "place", ["hf-hub:me/mine", "ViT-B-32:alip-yfcc15m", "local-dir:nowhere", "open_clip:ViT-B-32:openai"]
)
def test_commands_end_with_one_line(place, tmp_path):
    """Without a network: exit code 2, no traceback."""
    (tmp_path / "c.jsonl").write_text('{"image": "a.jpg", "caption": "a"}\n')
    from PIL import Image

    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    command = [sys.executable, "-m", "rwkv_clip.eval.main", "retrieval", "--checkpoint", place, "--data", "c.jsonl"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr and last.startswith("error: ")


# ---- upload ----------------------------------------------------------------------------------------------------------


class Api:
    """In place of HfApi: what it is asked for, and the files of the last upload."""

    def __init__(self, readme: bool = False, error: Exception | None = None):
        self.calls, self.files, self.readme, self.error = [], {}, readme, error

    def create_repo(self, name, private, exist_ok):
        self.calls.append(("create_repo", name, private))
        if self.error:
            raise self.error

    def create_branch(self, name, branch, exist_ok):
        self.calls.append(("create_branch", name, branch))

    def file_exists(self, name, file, revision):
        return self.readme

    def upload_folder(self, repo_id, folder_path, revision, commit_message, ignore_patterns):
        self.calls.append(("upload_folder", repo_id, revision, commit_message))
        left = set(ignore_patterns or ())
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.name not in left}


@pytest.mark.parametrize("branch", [None, "v2"])
@pytest.mark.parametrize("readme", [False, True])
def test_what_is_uploaded_loads(branch, readme, hub):
    net, api = build(OURS["RWKV"]), Api(readme)
    name = "me/mine" + (f"@{branch}" if branch else "")
    place = rwkv_clip.push_to_hub(net, name, private=True, message="first", license="mit", api=api)
    assert place == f"hf-hub:{name}" and api.calls[0] == ("create_repo", "me/mine", True)
    assert (("create_branch", "me/mine", branch) in api.calls) == bool(branch)
    assert api.calls[-1] == ("upload_folder", "me/mine", branch, "first")
    assert ("README.md" in api.files) != readme
    assert readme or b'load_for_inference("hf-hub:me/mine")' in api.files["README.md"]
    home = hub.root / name.replace("/", "--")
    home.mkdir(parents=True)
    for file, content in api.files.items():
        (home / file).write_bytes(content)
    check_equal(net, rwkv_clip.create_model(place))


def test_an_upload_that_fails_is_one_line():
    api = Api(error=OSError("401 Client Error\nInvalid username or password."))
    with pytest.raises(ConfigError, match=r"me/mine could not be written \(401 Client Error\); .*hf auth login"):
        rwkv_clip.push_to_hub(build(OURS["RWKV"]), "me/mine", api=api)


def test_the_client_gets_the_token(monkeypatch):
    made = []
    monkeypatch.setattr(
        "rwkv_clip.hub.load_client", lambda: SimpleNamespace(HfApi=lambda token: made.append(token) or Api())
    )
    rwkv_clip.push_to_hub(build(OURS["RWKV"]), "me/mine", token="secret")
    assert made == ["secret"]


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RWKV", "projected", "biased"])
def test_rwkv_towers_in_transformers(kind, transformers, tmp_path):
    """The code that goes along computes what the library does; saved and loaded there, to the bit."""
    net = build(OURS[kind])
    folder = rwkv_clip.save_pretrained(net, tmp_path / "export", transformers=True)
    check_equal(net, rwkv_clip.create_model(folder))
    theirs = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert theirs.state_dict().keys() == net.state_dict().keys()
    image, text = torch.randn(2, 3, 40, 52), torch.randint(1, 20_000, (2, 12))
    with torch.no_grad():
        found, expected = theirs(pixel_values=image, input_ids=text), net(image, text)
        torch.testing.assert_close(found.image_embeds, expected[0], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(found.text_embeds, expected[1], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(found.logits_per_image, net.get_logits(image, text)[0], rtol=1e-4, atol=1e-4)
        assert theirs(input_ids=text).image_embeds is None
        theirs.save_pretrained(tmp_path / "again")
        again = transformers.AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
        both = again(pixel_values=image, input_ids=text)
        assert all(torch.equal(both[key], found[key]) for key in found)
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), again.state_dict().values()))


def test_code_of_a_folder_needs_consent(transformers, tmp_path):
    folder = rwkv_clip.save_pretrained(build(OURS["RWKV"]), tmp_path / "export", transformers=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModel.from_pretrained(folder, trust_remote_code=False)


def test_gradients_in_transformers(transformers, tmp_path):
    """The same gradient of every weight, as far as float32 goes."""
    net = build(OURS["projected"])
    folder = rwkv_clip.save_pretrained(net, tmp_path / "export", transformers=True)
    theirs = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    image, text = inputs()
    net.get_logits(image, text)[0].square().mean().backward()
    theirs(pixel_values=image, input_ids=text).logits_per_image.square().mean().backward()
    expected = dict(net.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4)


def test_chinese_clip_is_native_in_transformers(transformers, tmp_path):
    net = build(OURS["BERT"])
    folder = rwkv_clip.save_pretrained(net, tmp_path / "export", transformers=True)
    assert {"config.json", "vocab.txt", "model.safetensors", "README.md"} == {p.name for p in folder.iterdir()}
    theirs = transformers.ChineseCLIPModel.from_pretrained(folder).eval()
    assert theirs.config.projection_dim == 24
    check_equal(net, rwkv_clip.load_for_inference(folder).model)
