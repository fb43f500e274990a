"""Augmentation policies, whole pictures and bicubic pixels: functions of seed, epoch and sample (promise P6)."""

import io
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.loading import make
from helpers.pictures import encode, photo, write_records
from rwkv_clip.config import ConfigError, check
from rwkv_clip.data.records import RecordSet
from rwkv_clip.training import data as training_data
from rwkv_clip.training.data.augment import crop_windows, draw_flips, draw_policy_seed
from rwkv_clip.training.data.samples import SampleReader
from rwkv_clip.training.data.torch_loader import TorchLoader
from rwkv_clip.training.main import read_command_line
from rwkv_clip.training.policy import Policy
from rwkv_clip.training.settings import DataSettings
from rwkv_clip.transform import CLIP_MEAN

COUNT = 50
POLICIES = ["original", "rand-m9-n3-mstd0.5-inc1", "original-mstd0.5"]


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [encode(photo(i, 60 + i, 110 - i), quality=90) for i in range(COUNT)]


@pytest.fixture(scope="module")
def records(images, new_folder) -> RecordSet:
    return write_records(new_folder("records") / "train", images)


def pixels(records, **settings) -> torch.Tensor:
    return torch.cat([batch.image for batch in make(records, **settings)])


@pytest.mark.parametrize("policy", POLICIES)
def test_pixels_do_not_depend_on_workers_ranks_or_start(records, policy):
    whole = pixels(records, auto_augment=policy, steps=6)
    assert torch.equal(whole, pixels(records, auto_augment=policy, steps=6, workers=2))
    assert torch.equal(whole[36:], pixels(records, auto_augment=policy, steps=3, start=36))
    ranks = [pixels(records, auto_augment=policy, steps=6, rank=rank, world=2).view(6, 6, 3, 32, 32) for rank in (0, 1)]
    assert torch.equal(whole, torch.cat(ranks, 1).flatten(0, 1))
    plain = pixels(records, steps=6)
    changed = (whole != plain).flatten(1).any(1).float().mean()
    assert 0.5 < changed < 1.0 or "inc" in policy


def test_epochs_and_views_differ_and_view_0_is_a_run_with_one(records):
    one = pixels(records, auto_augment="original", steps=9)
    two = pixels(records, auto_augment="original", steps=9, views=2)
    assert torch.equal(two[:, 0], one) and not torch.equal(two[:, 1], one)
    seeds = {draw_policy_seed(0, epoch, sample, view) for epoch in range(5) for sample in range(50) for view in (0, 1)}
    assert len(seeds) == 500


@pytest.mark.parametrize("policy", POLICIES)
def test_global_generators_stay_as_they_were_and_do_not_matter(policy):
    applied, picture = Policy(policy, (32, 32), "bicubic"), torch.from_numpy(np.asarray(photo(0, 32, 32)).copy())
    picture = picture.permute(2, 0, 1)
    found = []
    for start in (1, 2):
        random.seed(start)
        np.random.seed(start)
        expected = random.random(), np.random.rand()
        random.seed(start)
        np.random.seed(start)
        found.append(torch.stack([applied.apply(picture, seed) for seed in range(40)]))
        assert (random.random(), np.random.rand()) == expected
    assert torch.equal(*found) and found[0].dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in found[0]}) > 10
    again = pickle.loads(pickle.dumps(applied))  # as it travels to workers that are not forked
    assert torch.equal(again.apply(picture, 7), applied.apply(picture, 7))


def test_the_generators_are_put_back_after_an_error(monkeypatch):
    applied = Policy("original", (32, 32), "bicubic")
    monkeypatch.setattr(applied, "_transform", lambda _: (random.random(), 1 / 0))
    before = random.getstate()
    with pytest.raises(ZeroDivisionError):
        applied.apply(torch.zeros(3, 4, 4, dtype=torch.uint8), 3)
    assert random.getstate() == before


@pytest.mark.parametrize("policy", [*POLICIES, "v0"])
def test_parameters_are_those_of_timms_recipe(policy):
    """Chinese-CLIP's: create_transform(R, scale=(0.9, 1.0), auto_augment="original", interpolation="bicubic", ..)."""
    from timm.data import create_transform

    recipe = {"is_training": True, "color_jitter": None, "auto_augment": policy, "interpolation": "bicubic"}
    steps = create_transform(224, scale=(0.9, 1.0), mean=CLIP_MEAN, separate=True, **recipe)[1].transforms
    own = Policy(policy, (224, 224), "bicubic")._transform
    picture = photo(0, 224, 224)
    errors = 0
    for seed in range(60):
        results = []
        for transform in (own, steps[0]):
            random.seed(seed)
            np.random.seed(seed)
            try:
                results.append(np.asarray(transform(picture)))
            except ValueError as error:  # of timm's, with a Pillow that refuses to posterize to 0 bits
                assert "bits must be between" in str(error) and results
                errors += 1
                results.append(results[0])
        assert (results[0] == results[1]).all()
    assert len(steps) == 1 and errors < 30 and not (errors and policy == "original")


def test_a_sample_is_cropped_flipped_then_augmented(records, images):
    settings = {"auto_augment": "original", "crop_area": (0.9, 1.0), "crop_aspect": (3 / 4, 4 / 3)}
    batch = next(iter(make(records, global_batch=COUNT, steps=1, **settings)))
    plain = next(iter(make(records, global_batch=COUNT, steps=1, **(settings | {"auto_augment": None}))))
    applied = Policy("original", (32, 32), "bilinear")
    for row, (sample, epoch) in enumerate(zip(batch.ids.tolist(), batch.epochs.tolist())):
        assert torch.equal(batch.image[row], applied.apply(plain.image[row], draw_policy_seed(3, epoch, sample)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", ["random", "whole"])
def test_pixels_are_those_of_pil(records, images, crop, interpolation):
    settings = DataSettings(crop=crop)
    arguments = {"global_batch": COUNT, "steps": 1, "image_size": (40, 48), "crop": crop}
    batch = next(iter(make(records, interpolation=interpolation, **arguments)))
    ids, epochs = batch.ids.numpy(), batch.epochs.numpy()
    windows = crop_windows(60 + ids, 110 - ids, 3, epochs, ids, settings)
    for row, (x, y, width, height) in enumerate(windows.tolist()):
        picture = Image.open(io.BytesIO(images[ids[row]]))
        assert crop == "random" or (x, y, width, height) == (0, 0, *picture.size)
        cut = picture.crop((x, y, x + width, y + height))
        expected = np.asarray(cut.resize((48, 40), getattr(Image.Resampling, interpolation.upper()))).transpose(2, 0, 1)
        if draw_flips(3, epochs, ids)[row]:
            expected = expected[..., ::-1]
        assert np.abs(batch.image[row].numpy().astype(int) - expected).max() <= 2


def test_a_large_picture_is_reduced_with_the_same_filter(tmp_path):
    """libjpeg decodes it at a fraction of its size; the rest is the filter that is asked for."""
    records = write_records(tmp_path / "large", [encode(photo(0, 1600, 1200), quality=95)])
    reduced = {}
    for interpolation in ("bilinear", "bicubic"):
        settings = DataSettings(crop="whole", flip=0.0, interpolation=interpolation)
        reader = SampleReader(records, 0, (64, 64), settings)
        image = torch.empty(reader.shape, dtype=torch.uint8)
        reader.decode(reader.read(np.arange(1))[0], image)
        reduced[interpolation] = image
    assert not torch.equal(reduced["bilinear"], reduced["bicubic"])
    assert (reduced["bilinear"].int() - reduced["bicubic"].int()).abs().float().mean() < 8


@pytest.mark.parametrize("name", ["", "orignal", "augmix-m3", "random", "rand-x9", "original-m9", "rand-m9.5"])
def test_what_is_no_policy_is_refused_in_words(name):
    (problem,) = check(DataSettings(auto_augment=name))
    assert (
        problem.startswith(f"auto_augment: {name!r} is no policy") and "use original" in problem and "\n" not in problem
    )


@pytest.mark.parametrize("changes", [{"auto_augment": "original"}, {"interpolation": "bicubic"}], ids=str)
def test_dali_is_refused_in_words_and_auto_takes_torch(records, changes, monkeypatch):
    (name, value), monkey = *changes.items(), monkeypatch
    with pytest.raises(ConfigError, match=f"{name}: '?{value}'? is nothing that .* dali does; use --loader torch"):
        read_command_line(["--train-data", "x", "--loader", "dali", f"--{name.replace('_', '-')}", value])
    monkey.setattr(training_data, "_has_dali", lambda: True)
    plan = training_data.Plan(global_batch=4, steps=1)
    loader = training_data.make_loader(records, plan, 32, DataSettings(**changes), device="cuda")
    assert isinstance(loader, TorchLoader)
