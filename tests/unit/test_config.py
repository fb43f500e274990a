import json

import pytest

from rwkv_clip.config import CONFIGS, ConfigError, flat_names, list_presets, parse, to_dict
from rwkv_clip.factory import resolve_spec
from rwkv_clip.models.two_tower import ModelConfig
from rwkv_clip.training.settings import Settings, load_settings


def problems(data):
    with pytest.raises(ConfigError) as error:
        parse(Settings, data)
    return error.value.problems


def test_every_mistake_is_reported_at_once_with_the_nearest_name():
    found = problems({"batchsize": 3, "lr": "fast", "epochs": 0.5, "schedule": "linear", "torchcompile": 1})
    assert len(found) == 5
    assert "batchsize: unknown setting; did you mean 'batch_size'?" in found
    assert "lr: 'fast' is not of type float" in found
    assert "schedule: 'linear' is not one of 'onecycle', 'cosine', 'constant', 'const-cooldown'" in found


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": 0}, "lr: 0.0 must be more than 0"),
        ({"lr": float("nan")}, "lr: nan is not a finite number"),
        ({"beta2": 1.0}, "beta2: 1.0 must be less than 1"),
        ({"flip": 1.5}, "flip: 1.5 must be at most 1"),
        ({"keep_checkpoints": 1}, "keep_checkpoints: 1 must be at least 2"),
        ({"max_steps": 0}, "max_steps: 0 must be at least 1"),
        ({"crop_area": [0.9, 0.7]}, "crop_area: (0.9, 0.7) is not an increasing range"),
        ({"crop_area": [0.9]}, "crop_area: [0.9] is not a list of 2 values"),
        ({"report_to": ["mlflow"]}, "report_to: 'mlflow' is not one of"),
        ({"cycle_beta1": True}, "cycle_beta1: needs schedule onecycle"),
    ],
)
def test_limits(change, message):
    assert any(message in problem for problem in problems(change))


def test_nested_model_settings():
    def model_problems(data):
        with pytest.raises(ConfigError) as error:
            ModelConfig.parse(data)
        return error.value.problems

    found = model_problems({"image": {"depth": 0, "heads": 7}, "text": 3})
    assert found == ["image.depth: 0 must be at least 1", "text: expected a table of settings, got 3"]
    assert model_problems({"image": {"heads": 7}})[0].startswith("image.heads: 7 heads of width 640")
    assert "text.width: 320 differs" in model_problems({"text": {"width": 320, "heads": 5}})[0]


def test_settings_survive_json():
    settings = parse(Settings, {"lr": 1, "crop_area": [0.5, 1], "report_to": ["wandb"], "max_steps": 3})
    assert settings.optimizer.lr == 1.0 and isinstance(settings.optimizer.lr, float)
    assert parse(Settings, json.loads(json.dumps(to_dict(settings)))) == settings


@pytest.mark.parametrize("name", list_presets("training"))
def test_every_shipped_recipe_parses(name):
    settings = load_settings(name)
    assert resolve_spec(settings.model.model)[0] == settings.model.model


def test_recipes_by_path_and_wrong_name(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"lr": 0.5}')
    assert load_settings(str(path)).optimizer.lr == 0.5
    path.write_text("{lr: 0.5}")
    with pytest.raises(ConfigError, match=r"mine\.json: not JSON"):
        load_settings(str(path))
    with pytest.raises(ConfigError, match="did you mean 'rwkv-clip-b32-yfcc15m'"):
        load_settings("rwkv-clip-b32-yfcc")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(str(tmp_path / "absent.json"))


def test_presets_hold_known_fields_only():
    names = set(flat_names(Settings))
    for path in (CONFIGS / "training").glob("*.json"):
        assert set(json.loads(path.read_text())) <= names


@pytest.mark.parametrize("method", ["alip", "clip"])
def test_the_published_settings_of_alip_and_its_baseline(method):
    """The released code's and its script's; the batch is 8 ranks of 512."""
    optimizer = {"lr": 1e-3, "wd": 0.2, "decay": "all", "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "grad_clip_norm": 1.0}
    schedule = {"epochs": 32, "schedule": "onecycle", "cycle_beta1": True, "warmup_fraction": 0.1, "batch_size": 512}
    pictures = {"crop_area": (0.7, 1.0), "crop_aspect": (0.8, 1.25), "flip": 0.5}
    gates = {"init": 1.0, "momentum": 0.99, "sample_gamma": 2.0, "pair_gamma": 2.0}
    texts = {
        "alip": {"objective": "alip", "text_choice": "all", "texts": 2, "gates": gates},
        "clip": {"objective": "infonce", "text_choice": "first"},
    }
    rest = {"model": "ViT-B-32", "precision": "amp", "accum_freq": 1, "val_prefix": "a photo of "}
    published = parse(Settings, {**optimizer, **schedule, **pictures, **texts[method], **rest})
    assert load_settings(f"{method}-b32-yfcc15m") == published
