"""The comparison on noisy texts: what is planted, what is measured, and its recipe from records to pictures."""

import json
from collections import Counter
from pathlib import Path

import noise
import numpy as np
import pytest
from PIL import Image

from helpers.recipes import needs_installation, script

SETS = ["red bus street", "dog grass ball", "girl swing park", "boat lake sky", "man guitar stage", "snow hill sled"]


def make_rows(count: int) -> list[dict]:
    return [{"image": f"{i}.jpg", "captions": [f"sentence {k} of {i}" for k in range(5)]} for i in range(count)]


@pytest.mark.parametrize("count, share", [(50, 0.3), (7, 0.3), (20, 1.0), (9, 0.0)])
def test_the_planted_share_goes_to_others_and_all_else_is_own(count, share):
    rows = make_rows(count)
    planted = noise.plant_noise(rows, share, seed=1)
    assert [row["image"] for row in planted] == [row["image"] for row in rows]
    assert sum(row["raw_of"] != row["image"] for row in planted) == round(share * count)
    assert Counter(row["raw_of"] for row in planted) == Counter(row["image"] for row in rows)  # each text once
    sentences = {row["image"]: row["captions"] for row in rows}
    for row in planted:
        assert row["raw"] in sentences[row["raw_of"]] and row["synthetic"] in sentences[row["image"]]
        assert row["raw"] != row["synthetic"]
    assert noise.plant_noise(rows, share, seed=1) == planted != noise.plant_noise(rows, share, seed=2)


def test_one_text_alone_has_nobody_to_go_to():
    with pytest.raises(ValueError, match=r"share: 0\.2 of 5 pictures is one"):
        noise.plant_noise(make_rows(5), 0.2, seed=0)


def test_area_is_the_chance_that_clean_is_larger():
    draw = np.random.default_rng(0)
    clean, swapped = draw.integers(0, 9, 40) / 8, draw.integers(0, 7, 25) / 8  # many ties
    wins = [(a > b) + (a == b) / 2 for a in clean for b in swapped]
    assert noise.area_of(clean, swapped) == pytest.approx(np.mean(wins), abs=1e-12)
    assert noise.area_of(np.array([2.0]), np.array([1.0])) == 1 and noise.area_of(clean, clean) == 0.5


def test_chance_agrees_with_a_random_order():
    draw = np.random.default_rng(0)
    best = [draw.permutation(40)[:5].min() for _ in range(20000)]  # ranks of a picture's captions, 8 pictures x 5
    chance = noise.chance(images=8, captions=40)
    assert chance["i2t_R5"] == pytest.approx(100 * np.mean(np.array(best) < 5), abs=1.5)
    assert chance["t2i_R1"] == pytest.approx(12.5) and chance["t2i_R10"] == 100


def test_without_the_data_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        noise.main(["--data", str(tmp_path / "captions.jsonl")])
    assert ended.value.code == 2 and "nothing was measured; Flickr8k cannot be shipped" in capsys.readouterr().err


def make_set(folder: Path) -> None:
    """60 training and 6 test pictures; the words of a picture's sentences are its own."""
    (folder / "images").mkdir(parents=True)
    draw, rows = np.random.default_rng(0), []
    for i in range(66):
        Image.fromarray(draw.integers(0, 255, (24, 24, 3), np.uint8)).save(folder / "images" / f"{i}.jpg")
        words = SETS[i % 6].split() * 3
        captions = [" ".join(words[k : k + 6]) for k in range(3)]
        rows.append({"image": f"{i}.jpg", "captions": captions, "split": "test" if i >= 60 else "train"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.skipif(**needs_installation.kwargs, condition=needs_installation.args[0])
def test_recipe_compares_all_methods_once(tmp_path, capsys):
    make_set(tmp_path / "set")
    small = ["--max-steps", "2", "--batch-size", "8", "--repeats", "1", "--jobs", "1", "--share", "0.4"]
    small += ["--output", str(tmp_path / "out"), "--figures", str(tmp_path / "figure"), "--commit", "abc"]
    places = {"FLICKR8K": str(tmp_path / "set"), "OUTPUT": str(tmp_path / "work")}
    out = script("compare_ALIP_Flickr8k.sh", *small, **places)
    assert "0 runs are finished, 5 to do" in out
    (path,) = (tmp_path / "out").glob("noise-*.json")
    result = json.loads(path.read_text())
    tested = [row for row in result["rows"] if "mean_recall" in row["figures"]]
    assert [row["contender"] for row in tested] == ["chance", *noise.METHODS]
    assert all(run["images"] == 6 and run["captions"] == 18 for run in result["runs"])
    areas = {(row["case"], row["contender"]): row["figures"].get("area") for row in result["rows"]}
    gated = [area for (case, name), area in areas.items() if case.startswith("gates") and name == "S_tc"]
    assert len(gated) == len(result["gates"]) == 2
    untrained = [area for (case, _), area in areas.items() if case == "without training"]
    assert (
        len(untrained) == 3 and min(gated + untrained) > 0.8
    )  # before any learning a text is nearest to one of the same words
    assert not any(word in path.read_text() for word in (".jpg", "guitar", str(tmp_path)))
    assert {file.name for file in (tmp_path / "figure").iterdir()} == {"alip_weights.png", "flickr8k_noise.png"}

    logs = {log: log.read_bytes() for log in (tmp_path / "work").glob("runs/*/log.jsonl")}
    place = ["--data", str(tmp_path / "set" / "captions.jsonl"), "--work", str(tmp_path / "work")]
    noise.main([*place, *small])
    assert "5 runs are finished, 0 to do" in capsys.readouterr().out and len(logs) == 5
    assert all(log.read_bytes() == content for log, content in logs.items())
    with pytest.raises(SystemExit, match=r"was made with share 0\.4; take another --work"):
        noise.main([*place, *small, "--share", "0.5"])
