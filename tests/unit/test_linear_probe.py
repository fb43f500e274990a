"""Logistic regression, its search for a penalty, the feature cache, and the linear probe as a command."""

import inspect
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from helpers.color_model import COLORS, ColorModel, loaded, preprocess, save_color
from helpers.ranks import run_ranks
from rwkv_clip.datasets.benchmarks import BENCHMARKS
from rwkv_clip.eval import cache, logistic
from rwkv_clip.eval.encoder import Encoder
from rwkv_clip.eval.logistic import find_l2, fit, hold_out, l2_at
from rwkv_clip.eval.main import main
from rwkv_clip.eval.tasks.linear_probe import LinearProbeSettings, Samples, choose_and_fit, load_splits

CPU = torch.device("cpu")


def blobs(count: int, width: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes of unit vectors with a large common part, as real features have."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centers = torch.randn(classes, width, generator=generator)
    spread = torch.logspace(0, -2, width)
    x = 3 + centers[labels] * spread + 2 * spread * torch.randn(count, width, generator=generator)
    return torch.nn.functional.normalize(x, dim=1), labels


# ---- the regression --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, width, classes", [(60, 5, 2), (200, 12, 3), (30, 40, 4), (300, 8, 11)])
@pytest.mark.parametrize("l2", [1e-3, 1e-1, 1.0, 30.0, 1e5])
def test_gradient_of_the_objective_is_zero_at_the_solution(count, width, classes, l2):
    """scikit-learn's objective, written down again, with torch's own gradient: it is convex, so that is the minimum."""
    features, labels = blobs(count, width, classes)
    found = fit(features, labels, classes, l2, CPU)
    weights, bias = found.weights.clone().requires_grad_(), found.bias.clone().requires_grad_()
    scores = features.double() @ weights.T + bias
    objective = torch.nn.functional.cross_entropy(scores, labels, reduction="sum") / l2
    objective = objective + weights.square().sum() / 2
    (objective * l2 / count).backward()
    assert found.converged and found.iterations < 400
    assert weights.grad.abs().max() < 1e-6 * max(1, (l2 / count) ** 0.5) and bias.grad.abs().max() < 1e-6


def test_one_sample_a_class_and_a_class_without_samples():
    found = fit(torch.eye(3), torch.tensor([0, 1, 3]), 4, 1.0, CPU)
    assert found.converged and found.ranks(torch.eye(3), torch.tensor([0, 1, 3])).tolist() == [0, 0, 0]
    assert found.bias[2] < found.bias[0]


def test_chunks_change_nothing(monkeypatch):
    features, labels = blobs(301, 9, 5)
    whole = fit(features, labels, 5, 0.1, CPU)
    monkeypatch.setattr(logistic, "_CELLS", 100)
    monkeypatch.setattr(logistic, "_WHOLE", 0)
    parts = fit(features, labels, 5, 0.1, CPU)
    torch.testing.assert_close(parts.weights, whole.weights, rtol=0, atol=1e-5)
    assert parts.ranks(features, labels).tolist() == whole.ranks(features, labels).tolist()


def test_equal_scores_count_against_the_probe():
    same = logistic.Classifier(torch.zeros(4, 2).double(), torch.tensor([0.0, 1, 1, 1]).double(), 0, 0.0)
    assert same.ranks(torch.ones(4, 2), torch.arange(4)).tolist() == [3, 2, 2, 2]


def test_search_finds_every_peak_of_the_scale():
    for peak in range(97):
        asked = []

        def score(l2: float, peak=peak, asked=asked) -> float:
            asked.append(l2)
            return -abs(torch.log10(torch.tensor(l2, dtype=torch.float64)).item() - (-6 + peak / 8))

        assert find_l2(score) == l2_at(peak), peak
        assert asked[:7] == [10.0**e for e in (-6, -4, -2, 0, 2, 4, 6)]
        assert len(asked) <= 15 and len(set(asked)) == len(asked)


def test_of_equally_good_penalties_the_strongest_wins():
    assert find_l2(lambda l2: 1.0) == 1e6
    assert find_l2(lambda l2: float(l2 < 2)) == pytest.approx(10**0.25)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_held_out_are_a_fraction_of_every_class(fraction):
    labels = torch.tensor([0] * 10 + [1] * 31 + [2] + [3] * 2)[torch.randperm(44)]
    kept, held = hold_out(labels, fraction, 0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(44))
    counts = torch.bincount(labels[held], minlength=4).tolist()
    assert counts == [min(max(1, round(fraction * n)), n - 1) for n in (10, 31, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip((kept, held), hold_out(labels, fraction, 0)))
    assert fraction != 0.5 or not torch.equal(held, hold_out(labels, fraction, 1)[1])


def test_penalty_comes_from_the_validation_split_and_weights_from_all():
    names = list("abc")
    train, validation = Samples(*blobs(90, 10, 3, 1)), Samples(*blobs(40, 10, 3, 2))
    found, probe = choose_and_fit(train, validation, names, "top1", CPU)
    by_hand = {}
    for entry in probe["tried"]:
        trial = fit(train.features, train.labels, 3, entry["strength"], CPU)
        by_hand[entry["strength"]] = (trial.ranks(validation.features, validation.labels) < 1).double().mean().item()
        assert entry["validation"] == pytest.approx(by_hand[entry["strength"]])
    assert probe["strength"] == max(by_hand, key=lambda s: (by_hand[s], s))
    both = train + validation
    assert torch.equal(found.weights, fit(both.features, both.labels, 3, probe["strength"], CPU).weights)
    assert (probe["train_samples"], probe["validation_samples"]) == (130, 40)
    # Without an official split it is drawn from the training pictures; the weights come from all of these.
    found, probe = choose_and_fit(train, None, names, "top1", CPU, fraction=0.3)
    assert probe["validation_samples"] == sum(round(0.3 * n) for n in torch.bincount(train.labels).tolist())
    assert torch.equal(found.weights, fit(train.features, train.labels, 3, probe["strength"], CPU).weights)


# ---- the cache -------------------------------------------------------------------------------------------------------

COUNT = 50


def pictures(opened: list[int] | None = None):
    def open_one(index: int) -> Image.Image:
        if opened is not None:
            opened.append(index)
        return Image.new("RGB", (8, 8), (5 * index, 250 - 4 * index, index))

    return open_one


def encode(root, open_one=None, count=COUNT, batch_size=64, workers=0, key="set"):
    encoder = Encoder.of(loaded(), CPU, root and Path(root), batch_size=batch_size, workers=workers)
    return cache.encode_cached(encoder, lambda: {"set": key, "count": count}, open_one or pictures())


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 16)


def test_a_cache_changes_no_bit_and_is_read_instead(small_chunks, tmp_path):
    plain, opened = encode(None), []
    assert torch.equal(encode(tmp_path, pictures(opened), batch_size=7, workers=2), plain)
    assert sorted(opened) == list(range(COUNT))
    assert torch.equal(encode(tmp_path, pictures(opened)), plain) and len(opened) == COUNT
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 4 and not list(tmp_path.glob("*/*.part"))
    assert encode(tmp_path, count=0, key="nothing").shape[0] == 0


def _die(root: str, at: int) -> None:
    show = pictures()

    def open_one(index: int) -> Image.Image:
        if index == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return show(index)

    cache.CHUNK = 16
    encode(root, open_one)


@pytest.mark.parametrize("at", [0, 20, 49])
def test_a_killed_extraction_goes_on(small_chunks, tmp_path, at):
    process = multiprocessing.get_context("fork").Process(target=_die, args=(str(tmp_path), at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    opened = []
    assert torch.equal(encode(tmp_path, pictures(opened)), encode(None))
    assert sorted(opened) == list(range(at // 16 * 16, COUNT))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other file", "no checksum"])
def test_a_damaged_chunk_is_made_again(small_chunks, tmp_path, damage):
    encode(tmp_path)
    path, other = sorted(tmp_path.glob("*/*.safetensors"))[1:3]
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-5]
    elif damage == "flip":
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        content[start + header["features"]["data_offsets"][0]] ^= 1
    elif damage == "other file":
        content = other.read_bytes()
    elif damage == "no checksum":
        content = b"".join(cache.encode_tensors({"features": torch.zeros(16, 3)}))
    path.write_bytes(content if damage != "empty" else b"")
    opened = []
    assert torch.equal(encode(tmp_path, pictures(opened)), encode(None)) and sorted(opened) == list(range(16, 32))


def test_keys_tell_models_transforms_and_precisions_apart():
    first = cache.model_key(loaded())
    assert first == cache.model_key(loaded(ColorModel().train()))
    other = ColorModel()
    with torch.no_grad():
        other.table[3, 1] += 1e-3
    changed = [loaded(other), loaded(), loaded(), loaded()]
    changed[1].digest = "1" * 64
    changed[2].precision = "bf16"
    changed[3].preprocess = lambda picture: preprocess(picture.resize((150, 150)))
    for model in changed:
        assert cache.model_key(model) != first


def test_keys_tell_sets_apart(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"x")
    first = cache.data_key("set", "test", 5, pictures(), [file])
    assert first == cache.data_key("set", "test", 5, pictures(), [file])
    other = [("tes", "test", 5, pictures()), ("set", "val", 5, pictures()), ("set", "test", 6, pictures())]
    other += [("set", "test", 5, lambda i: pictures()(i + (i == 4)))]
    keys = [cache.data_key(*arguments, [file]) for arguments in other]
    keys += [cache.data_key("set", "test", 5, pictures(), names) for names in ([], ["b"])]
    os.utime(file, ns=(1, 1))
    keys += [cache.data_key("set", "test", 5, pictures(), [file])]
    assert first not in keys and len({json.dumps(key) for key in keys}) == len(keys)


def _probe_on_ranks(folder: str, name: str) -> None:
    sys.modules["rwkv_clip.factory"] = SimpleNamespace(load_for_inference=lambda *a, **n: loaded())
    cache.CHUNK = 32  # two blocks: one for each of two ranks
    os.environ["OMP_NUM_THREADS"] = "1"
    places = ["--data", f"{folder}/set", "--logs", f"{folder}/{name}", "--device", "cpu", "--name", "run"]
    if main(["linear-probe", "--checkpoint", "run", "--dataset", "imagefolder", *places]):
        raise AssertionError("the command failed")


def test_ranks_make_the_same_cache_and_the_same_hits(tmp_path):
    save_shades(tmp_path / "set")
    run_ranks(1, tmp_path, _probe_on_ranks, str(tmp_path), "one")
    run_ranks(2, tmp_path, _probe_on_ranks, str(tmp_path), "two")
    one, two = (json.loads((tmp_path / n / "run" / "result.json").read_text())["results"] for n in ("one", "two"))
    for key in ("metrics", "probe"):
        assert one[0][key] == two[0][key]
    files = [sorted((tmp_path / name / "cache").rglob("*.safetensors")) for name in ("one", "two")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    assert len(files[0]) > 3 and all(a.read_bytes() == b.read_bytes() for a, b in zip(*files))


def _probe_without_data_on_rank_1(folder: str) -> None:
    sys.modules["rwkv_clip.factory"] = SimpleNamespace(load_for_inference=lambda *a, **n: loaded())
    data = f"{folder}/set" if os.environ["RANK"] == "0" else f"{folder}/nowhere"
    places = ["--data", data, "--logs", f"{folder}/logs", "--device", "cpu", "--name", "run"]
    code = main(["linear-probe", "--checkpoint", "run", "--dataset", "imagefolder", *places])
    assert code == 2


def test_what_one_rank_lacks_ends_all(tmp_path):
    save_shades(tmp_path / "set")
    run_ranks(2, tmp_path, _probe_without_data_on_rank_1, str(tmp_path), timeout=300)
    assert not list((tmp_path / "logs").glob("*/result.json"))


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(monkeypatch):
    found = loaded()
    monkeypatch.setitem(sys.modules, "rwkv_clip.factory", SimpleNamespace(load_for_inference=lambda *a, **n: found))
    return found


def save_shades(folder: Path, each: int = 8) -> None:
    """train and test, each with a class for every color, in `each` shades."""
    for shade in range(2 * each):
        for name, color in COLORS.items():
            path = folder / ("train" if shade % 2 else "test") / name / f"{shade}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), tuple(min(255, c + 3 * shade) for c in color)).save(path)


def probe(folder, *more) -> int:
    return main(["linear-probe", "--checkpoint", "run", "--logs", str(folder / "logs"), "--device", "cpu", *more])


def results(folder) -> list[dict]:
    (path,) = folder.glob("logs/*/result.json")
    return json.loads(path.read_text())["results"]


def test_command_writes_result_and_table(tmp_path, model, capsys):
    save_shades(tmp_path)
    assert probe(tmp_path, "--data", str(tmp_path)) == 0
    (entry,) = results(tmp_path)
    assert entry["metrics"]["hits1"] == entry["metrics"]["samples"] == 8 * len(COLORS)
    assert entry["probe"]["train_samples"] == 8 * len(COLORS) and len(entry["probe"]["tried"]) <= 15
    out = capsys.readouterr().out
    assert "penalty" in out and "100.0" in out and "zero-shot" not in out
    # A second run reads the features: the model is not asked again.
    calls = len(model.model.calls)
    assert probe(tmp_path, "--data", str(tmp_path), "--l2", "1", "--name", "again") == 0
    assert len(model.model.calls) == calls


def test_labels_that_say_nothing_are_not_learned_from_the_test_split(tmp_path, model):
    """Test pictures with the labels moved on by one: a probe that saw them would be right."""
    save_shades(tmp_path)
    names = list(COLORS)
    (tmp_path / "test" / names[-1]).rename(tmp_path / "test" / "moved")
    for place in range(len(names) - 1, 0, -1):
        (tmp_path / "test" / names[place - 1]).rename(tmp_path / "test" / names[place])
    (tmp_path / "test" / "moved").rename(tmp_path / "test" / names[0])
    assert probe(tmp_path, "--data", str(tmp_path)) == 0
    assert results(tmp_path)[0]["metrics"]["hits1"] == 0


def test_part_of_the_test_pictures_stands_in_where_asked(tmp_path, model):
    save_shades(tmp_path)
    assert probe(tmp_path, "--data", str(tmp_path / "test"), "--split-test", "0.25") == 0
    (entry,) = results(tmp_path)
    assert (entry["probe"]["train_samples"], entry["metrics"]["samples"]) == (6 * len(COLORS), 2 * len(COLORS))
    assert entry["split"] == "0.25 of -" and "no published protocol" in entry["note"]


def test_a_missing_set_is_skipped_and_the_rest_runs(tmp_path, model, capsys):
    save_shades(tmp_path)
    assert probe(tmp_path, "--data", str(tmp_path), "--dataset", "food101", "imagefolder", "imagenet") == 0
    assert [entry["status"] for entry in results(tmp_path)] == ["skipped", "done", "skipped"]
    assert "food-101.tar.gz" in capsys.readouterr().err


def _single(folder: Path) -> list[str]:
    """One training picture a class: none can be held out."""
    save_shades(folder, each=1)
    return ["--data", str(folder)]


def _other_classes(folder: Path) -> list[str]:
    save_shades(folder)
    save_color(folder / "train" / "brown" / "0.png", "red")
    return ["--data", str(folder)]


def _no_training(folder: Path) -> list[str]:
    save_shades(folder)
    return ["--data", str(folder / "test")]


def _broken_picture(folder: Path) -> list[str]:
    save_shades(folder)
    (folder / "train" / "red" / "1.png").write_bytes(b"no picture")
    return ["--data", str(folder)]


def _train_of_a_known_set(folder: Path) -> list[str]:
    """--train must never make another test split the training split."""
    return ["--data", str(folder), "--dataset", "cifar10", "--train", str(folder)]


SET_MISTAKES = [
    (_train_of_a_known_set, "train: only for imagefolder"),
    (_single, "give --l2"),
    (_other_classes, "'brown' is in one only"),
    (_no_training, "--split-test 0.5"),
    (_broken_picture, "red/1.png"),
]


@pytest.mark.parametrize("make, message", SET_MISTAKES, ids=[make.__name__ for make, _ in SET_MISTAKES])
def test_mistakes_in_a_set_are_named(tmp_path, model, capsys, make, message):
    assert probe(tmp_path, *make(tmp_path)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hold-out", "0"], "hold_out: 0"),
        (["--split-test", "1"], "split_test: 1"),
        (["--split-test", "0.5", "--train", "x"], "leave one of them out"),
        (["--l2", "-1"], "l2: -1"),
        (["--strength", "-1"], "l2: -1"),  # its name until 0.5.0
        (["--l2", "nan"], "l2: nan"),
    ],
)
def test_mistakes_in_settings_are_one_line(tmp_path, model, capsys, more, message):
    assert probe(tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("dataset", [name for name, row in BENCHMARKS.items() if row.loader])
def test_every_benchmark_has_the_splits_of_torchvision(dataset, monkeypatch, tmp_path):
    """Its loaders take our arguments and have splits of these names; no split is the test split again."""
    import torchvision

    loader = getattr(torchvision.datasets, BENCHMARKS[dataset].loader)
    source, wanted = inspect.getsource(loader), dict(BENCHMARKS[dataset].splits)
    for arguments in wanted.values():
        inspect.signature(loader).bind(root="x", **arguments)
        assert "split" not in arguments or f'"{arguments["split"]}"' in source
    assert len({json.dumps(arguments) for arguments in wanted.values()}) == len(wanted) or dataset == "caltech101"
    assert (
        BENCHMARKS[dataset].folder in source or BENCHMARKS[dataset].folder == loader.__name__.lower()
    )  # what the cache looks at
    asked = []

    class Stand:
        classes = categories = ("a", "b")

        def __init__(self, root, **arguments):
            asked.append(arguments)

        def __len__(self):
            return 8677

        def __getitem__(self, index):
            return None, index % 2

    monkeypatch.setattr(torchvision.datasets, loader.__name__, Stand)
    sets = load_splits(dataset, LinearProbeSettings(checkpoint="x", data=str(tmp_path)))
    assert asked == [wanted[split] for split in ("test", "train", "val") if split in wanted]
    assert len(sets) == len(asked)
    if dataset == "caltech101":
        assert [one.count for one in sets] == [5677, 3000]
