"""Tags and scores by a model that compares pictures and texts: calibrated by name, missing where they are missing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.color_model import COLORS, ColorModel, ColorTokenizer
from helpers.pictures import encode, paint
from helpers.tiny import MODEL
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.describe import tagger as tagging
from rwkv_clip.describe.pictures import Found
from rwkv_clip.describe.scores import score
from rwkv_clip.describe.tagger import LEAST, Tagger, TaggerSettings, calibrate, choose_tags, read_names
from rwkv_clip.describe.towers import CheckpointSettings, Towers
from rwkv_clip.factory import create_model
from rwkv_clip.features import FeatureExtractor
from rwkv_clip.files import DamagedError


def color_towers(digest: str = "0" * 64) -> Towers:
    model = ColorModel()

    def preprocess(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.resize((4, 4))).copy()).permute(2, 0, 1).float() / 127.5 - 1

    loaded = SimpleNamespace(
        model=model, preprocess=preprocess, tokenizer=ColorTokenizer(), name="colors", digest=digest, precision="fp32"
    )
    return Towers(loaded, FeatureExtractor(model, preprocess, loaded.tokenizer, workers=0), "colors:0000")


def picture(color: str, number: int = 0) -> Found:
    return Found(number, encode(Image.new("RGB", (16, 16), COLORS[color]), "PNG"))


BROKEN = (Found(7, b"no picture"), Found(8, reason="missing image"))


@pytest.fixture(scope="module")
def tiny(new_folder):
    """A checkpoint of random weights, and settings that name it."""
    from safetensors.torch import save_file

    folder = new_folder("tiny")
    (folder / "model.json").write_text(json.dumps(MODEL))
    torch.manual_seed(0)
    model = create_model(MODEL)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "weights.safetensors")
    return {"checkpoint": str(folder / "weights.safetensors"), "checkpoint_model": str(folder / "model.json")}


# ---- calibration -----------------------------------------------------------------------------------------------------


def made_up(pictures: int = 500, names: int = 20, seed: int = 0) -> np.ndarray:
    """Cosines in which every name has its own level and spread."""
    random = np.random.default_rng(seed)
    return random.normal(random.uniform(0, 0.3, names), random.uniform(0.01, 0.05, names), (pictures, names))


def settings(**changes) -> TaggerSettings:
    return parse(TaggerSettings, changes)


def test_a_name_is_judged_by_its_own_mean_and_spread():
    cosines = made_up()
    known = calibrate(cosines, 2.5, {})
    picture = known.mean.copy()[None]
    picture[0, 3] += 3.1 * known.std[3]  # a rare thing with a small cosine
    picture[0, 8] += 2.6 * known.std[8]
    picture[0, 9] += 2.4 * known.std[9]
    highest = int(np.argmax(known.mean))
    assert highest not in (3, 8)
    [found] = choose_tags(picture, known, settings())
    assert [name for name, _ in found] == [3, 8]
    assert found[0][1] == pytest.approx(3.1) and found[1][1] == pytest.approx(2.6)


def test_tags_do_not_depend_on_level_and_spread_of_a_name():
    cosines = made_up()
    moved = cosines * np.linspace(0.5, 4, 20) + np.linspace(-1, 1, 20)
    first, second = (choose_tags(c[:50], calibrate(c, 2.0, {}), settings(min_z=2.0)) for c in (cosines, moved))
    assert [[name for name, _ in one] for one in first] == [[name for name, _ in one] for one in second]


def test_the_calibration_is_that_of_its_formulas():
    cosines = made_up()
    known = calibrate(cosines.astype(np.float32), 1.0, {})
    assert np.allclose(known.mean, cosines.mean(0), atol=1e-6) and np.allclose(known.std, cosines.std(0), atol=1e-6)
    for name in range(20):
        z = (cosines[:, name] - cosines[:, name].mean()) / cosines[:, name].std()
        assert known.share[name] == pytest.approx((z >= 1.0).mean(), abs=0.01)


def test_most_tags_and_ties():
    known = calibrate(made_up(), 2.5, {})
    z = np.array([[3.0] * 10 + [4.0] * 10])
    [found] = choose_tags(known.mean + z * known.std, known, settings(most_tags=13, max_share=1.0))
    assert [name for name, _ in found] == [*range(10, 20), 0, 1, 2] or len(found) == 13
    exact = tagging.Calibration({}, np.zeros(6), np.ones(6), np.zeros(6))
    [found] = choose_tags(np.array([[3.0, 4, 3, 4, 3, 2]]), exact, settings(most_tags=4))
    assert found == [(1, 4.0), (3, 4.0), (0, 3.0), (2, 3.0)]


def test_names_that_fit_too_many_pictures_are_left_out():
    cosines = made_up()
    cosines[:, 5] = np.where(np.arange(500) % 3 == 0, 0.3, 0.1)  # a third of the pictures, z = 1.41
    known = calibrate(cosines, 1.2, {})
    assert known.share[5] == pytest.approx(1 / 3, abs=0.01)
    for max_share, kept in ((0.2, False), (0.4, True)):
        found = choose_tags(cosines[:3], known, settings(min_z=1.2, max_share=max_share))
        assert (5 in [name for name, _ in found[0]]) == kept


def test_cantelli_bounds_the_share():
    """Why the share matters only where min_z is small, and common things get no tag, as the settings say."""
    worst = 0.0
    for fraction in np.linspace(0.01, 0.5, 50):
        cosines = np.zeros((1000, 1))
        cosines[: int(1000 * fraction)] = 1.0
        worst = max(worst, float(calibrate(cosines, 2.0, {}).share[0]))
    assert 0.15 < worst <= 0.2
    common = np.repeat([[1.0], [0.0]], [150, 850], axis=0)  # a clear sign of a thing that 15 % of the pictures show
    rare = np.repeat([[1.0], [0.0]], [130, 870], axis=0)
    assert calibrate(common, 2.5, {}).share[0] == 0 and calibrate(rare, 2.5, {}).share[0] == 0.13


@pytest.mark.parametrize("value", [0.3, np.nan, np.inf])
def test_a_name_without_spread_or_with_broken_numbers_is_never_a_tag(value):
    cosines = made_up()
    cosines[:, 4] = value
    with np.errstate(invalid="ignore"):
        known = calibrate(cosines, 2.5, {})
        found = choose_tags(cosines + (np.arange(20) == 4), known, settings(max_share=1.0))
    assert all(4 not in [name for name, _ in one] for one in found)


def test_too_few_pictures_are_refused():
    with pytest.raises(ValueError, match=f"{LEAST - 1} pictures can be read, too few"):
        calibrate(made_up(LEAST - 1), 2.5, {})
    with pytest.raises(ConfigError):
        settings(background=LEAST - 1)


# ---- the tagger ------------------------------------------------------------------------------------------------------


def color_tagger(**changes) -> Tagger:
    return Tagger(color_towers(), list(COLORS), settings(background=60, min_z=1.0, max_share=1.0, **changes))


def background(count: int = 60) -> list[Found]:
    return [picture(list(COLORS)[number % len(COLORS)], number) for number in range(count)]


def test_pictures_get_the_names_of_what_they_show(tmp_path):
    tagger = color_tagger()
    tagger.calibrate(background(), tmp_path)
    results = tagger.tag([picture("red"), *BROKEN, picture("blue")])
    assert results[0]["tags"][0] == "red" and results[3]["tags"][0] == "blue" and "red" not in results[3]["tags"]
    assert results[0]["tag_source"] == "colors:0000" and results[0]["tag_status"] == "ok"
    assert len(results[0]["tags"]) == len(results[0]["tag_scores"]) and min(results[0]["tag_scores"]) >= 1.0
    nothing = {"tags": None, "tag_scores": None, "tag_source": None}
    assert results[1:3] == [{**nothing, "tag_status": "unreadable image"}, {**nothing, "tag_status": "missing image"}]


def test_a_later_run_takes_the_calibration_of_the_first(tmp_path):
    tagger, saved = color_tagger(), tmp_path / "job"
    first = tagger.calibrate(iter(background()), saved)
    [file] = saved.iterdir()
    expected, before = tagger.tag(background(20)), file.read_bytes()
    again = color_tagger()
    second = again.calibrate(iter(()), saved)  # no picture is asked for
    assert all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("mean", "std", "share"))
    assert again.tag(background(20)) == expected and file.read_bytes() == before
    alone = [again.tag([one])[0] for one in background(20)]
    assert alone == expected


def test_only_the_first_pictures_are_the_background(tmp_path):
    seen = []

    def pictures():
        for found in background(100):
            seen.append(found.row)
            yield found

    color_tagger().calibrate(pictures(), tmp_path)
    assert seen == list(range(60))


def test_other_settings_have_a_calibration_of_their_own(tmp_path):
    """Whether a job may go on with them is the job's question."""
    common = {"background": 60, "min_z": 1.0, "max_share": 1.0}
    others = [
        color_tagger(),
        *(
            Tagger(color_towers(), list(COLORS), settings(**common | change))
            for change in ({"min_z": 2.0}, {"background": 50})
        ),
        Tagger(color_towers("1" * 64), list(COLORS), settings(**common)),
        Tagger(color_towers(), list(COLORS)[1:], settings(**common)),
    ]
    for number, tagger in enumerate(others, 1):
        known = tagger.calibrate(background(), tmp_path)
        assert len(list(tmp_path.iterdir())) == number
        assert known.about == {**tagger.decides, "pictures": tagger.settings.background}


@pytest.mark.parametrize("content", ["{}", "[]", '{"mean": [1], "std": [1, 2], "share": [1], "about": {}}', "x"])
def test_a_damaged_calibration_is_named(tmp_path, content):
    color_tagger().calibrate(background(), tmp_path)
    [saved] = tmp_path.iterdir()
    saved.write_text(content)
    with pytest.raises(DamagedError, match=saved.name):
        color_tagger().calibrate(background(), tmp_path)


def test_tagging_without_calibration_is_an_error():
    with pytest.raises(ValueError, match="calibrate first"):
        color_tagger().tag([picture("red")])


def test_any_checkpoint_tags(tmp_path, tiny):
    (tmp_path / "list.txt").write_text("dog\nred car\nold house\ntree\n")
    made = settings(**tiny, tag_list=str(tmp_path / "list.txt"), background=40, min_z=1.0, max_share=1.0, device="cpu")
    pictures = [Found(number, encode(paint(40, 30, number))) for number in range(40)]
    results = []
    for name in ("a", "b"):
        tagger = Tagger.load(made)
        tagger.calibrate(pictures, tmp_path / name)
        results.append(tagger.tag(pictures))
    assert results[0] == results[1] and any(result["tags"] for result in results[0])
    [first], [second] = ((tmp_path / name).iterdir() for name in ("a", "b"))
    assert first.name == second.name and first.read_bytes() == second.read_bytes()
    assert {tag for result in results[0] for tag in result["tags"]} <= {"dog", "red car", "old house", "tree"}


@pytest.mark.parametrize(
    "text, names",
    [
        ("dog\n cat \n\n# comment\nred  car\tn.01\ndog\n", ["dog", "cat", "red car"]),
        ("\ufeffdog\r\ncat", ["dog", "cat"]),
    ],
)
def test_lists_of_names(tmp_path, text, names):
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    assert read_names(tmp_path / "list.txt") == names


def test_the_shipped_list_is_one_of_things():
    names = read_names(None)
    assert 1000 < len(names) < 20_000
    shown = "person dog cat car tree house building table chair food train church forest field sign dress computer"
    assert set(shown.split()) <= set(names)
    assert names == sorted(set(names)) and all(name == name.strip().lower() for name in names)


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"x" * 101, b"\xff\xfe"])
def test_lists_that_cannot_be_used_are_named(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"list\.txt"):
        read_names(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="tag_list"):
        read_names(tmp_path / "none.txt")


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_scores_are_cosines_of_each_text_with_the_picture():
    rows = [
        {"raw": "red", "caption": "green", "generated": "blue"},
        {"raw": "green", "caption": None, "generated": "  "},
        {"raw": "red", "caption": "red", "generated": "red"},
        {"raw": "red", "caption": "red", "generated": "red"},
        {"raw": None, "caption": "", "generated": None},
    ]
    towers = color_towers()
    results = score(rows, [picture("red"), picture("green"), *BROKEN, picture("red")], towers)
    assert results[0]["clip_raw"] == pytest.approx(1, abs=1e-5)
    expected = torch.nn.functional.cosine_similarity(*(torch.tensor(COLORS[c]) / 127.5 - 1 for c in ("red", "blue")), 0)
    assert results[0]["clip_generated"] == pytest.approx(float(expected), abs=1e-5)
    assert results[1] == {"clip_raw": pytest.approx(1, abs=1e-5), "clip_caption": None, "clip_generated": None}
    missing = dict.fromkeys(("clip_raw", "clip_caption", "clip_generated"))
    assert results[2:] == [missing] * 3
    assert score([], [], towers) == [] and score(rows[4:], [BROKEN[0]], towers) == [missing]


def test_a_score_that_is_no_number_is_missing(monkeypatch):
    towers = color_towers()
    monkeypatch.setattr(towers, "encode_texts", lambda texts: torch.full((len(texts), 3), torch.nan))
    assert set(score([{"raw": "red"}], [picture("red")], towers)[0].values()) == {None}


def test_any_checkpoint_scores(tiny):
    towers = Towers.load(CheckpointSettings(**tiny, device="cpu"))
    rows = [{"raw": f"text {n}", "caption": "a dog", "generated": "a dog " * 100} for n in range(5)]
    pictures = [Found(number, encode(paint(40, 30, number))) for number in range(5)]
    results = score(rows, pictures, towers)
    assert all(-1 <= value <= 1 for result in results for value in result.values())
    assert score(rows[2:3], pictures[2:3], towers) == results[2:3]
    assert towers.decides["checkpoint"] and "text" not in towers.decides


def test_a_checkpoint_is_asked_for():
    with pytest.raises(ValueError, match="checkpoint: not set"):
        Towers.load(CheckpointSettings())
