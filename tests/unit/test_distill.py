"""Distillation in chunks is the plain formula; teachers: a second model on the same crops, or stored features found by
content; both in micro-batches and resumed runs, and what does not fit is refused by name."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rwkv_clip
from helpers.dense_loss import dense_soft_losses
from helpers.tiny import MODEL, make_smaller, make_tiny
from helpers.toy_objective import Toy
from rwkv_clip.checkpoint import find_checkpoint, read_tensors
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.data.records import RecordSet
from rwkv_clip.dist import World
from rwkv_clip.files import hash_bytes
from rwkv_clip.losses import ALIP, InfoNCE, LossSettings, pairs
from rwkv_clip.losses.distill import Distilled, score_softly, soft_losses
from rwkv_clip.training.data.augment import hash_rows
from rwkv_clip.training.data.samples import DataError
from rwkv_clip.training.deterministic import DeterministicStep
from rwkv_clip.training.gradients import GradientStep, Inputs
from rwkv_clip.training.main import read_command_line, run
from rwkv_clip.training.settings import ParallelSettings, Settings
from rwkv_clip.training.teachers import FrozenModel, StoredFeatures

BATCH, WIDTH, THEIRS = 12, 5, 7
ONE = World(0, 1, torch.device("cpu"))


def features(*texts: int, dtype=torch.float64, scale=14.0) -> tuple[list[torch.Tensor], list]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1).to(dtype)

    student = [draw(BATCH, WIDTH), draw(BATCH, *texts, WIDTH), torch.tensor(scale, dtype=dtype)]
    return [x.requires_grad_() for x in student], [draw(BATCH, THEIRS), draw(BATCH, *texts, THEIRS), 50.0]


def weigh(losses) -> torch.Tensor:
    """A weight of its own for every loss."""
    return sum((torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) * x).sum() for x in losses)


@pytest.mark.parametrize("rows", [1, 3, 5, 12])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("texts", [(), (3,)], ids=str)
def test_every_chunk_height_is_the_dense_formula(rows, scale, texts, monkeypatch):
    monkeypatch.setattr(pairs, "CPU_ROWS", rows)
    student, teacher = features(*texts, scale=scale)
    found, expected = soft_losses(*student, *teacher), dense_soft_losses(*student, *teacher)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
    for x, y in zip(torch.autograd.grad(weigh(found), student), torch.autograd.grad(weigh(expected), student)):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_gradcheck_and_registration(monkeypatch):
    monkeypatch.setattr(pairs, "CPU_ROWS", 5)
    student, teacher = features(scale=2.0)
    assert torch.autograd.gradcheck(lambda *x: soft_losses(*x, *teacher), student)
    (image, text, scale), (other_image, other_text, _) = features(dtype=torch.float32)
    torch.library.opcheck(score_softly, (image, text, scale, other_image, other_text, 0))


def test_a_student_that_scores_as_its_teacher_does_has_nothing_to_learn():
    student, _ = features()
    losses = soft_losses(*student, student[0].detach(), student[1].detach(), student[2].item())
    gradients = torch.autograd.grad(sum(x.sum() for x in losses), student)
    assert all(float(x.abs().max()) < 1e-12 for x in gradients)


def test_misuse():
    student, (image, text, scale) = features()
    with pytest.raises(ValueError, match=r"the teacher's .* should be as many"):
        soft_losses(*student, image[:5], text[:5], scale)
    with pytest.raises(ValueError, match=r"soft_losses: .* first 1"):
        score_softly(*student, image, text, 1)


# ---- steps -----------------------------------------------------------------------------------------------------------

TEACHER = {**MODEL, "image": {**MODEL["image"], "image_size": [48, 48], "width": 64}, "embed_dim": 16}
TEACHER["text"] = {**MODEL["text"], "context": 11}


def build(description, dtype=torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    model = rwkv_clip.create_model(description)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def normalize(pixels):
    return pixels.double() / 255 - 0.5


def draw_batch(*texts: int) -> Inputs:
    g = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=g, dtype=torch.uint8)
    return Inputs(image, torch.randint(1, 1000, (BATCH, *texts, 8), generator=g), None)


@pytest.mark.parametrize("texts, inner", [((), InfoNCE), ((2,), ALIP)], ids=["infonce", "alip"])
@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 12},
        {"batch_size": 3, "accum_freq": 4},
        {"batch_size": 12, "deterministic": True, "max_ranks": 4},
    ],
    ids=str,
)
def test_gradients_in_micro_batches(changes, texts, inner):
    """The teacher wants larger pictures, longer texts and has features of another width."""
    model, data = build(MODEL), draw_batch(*texts)
    objective = Distilled(inner(), FrozenModel(build(TEACHER, torch.float32), model.spec, ONE.device)).double()
    teacher = objective.observe(data.image, data.text)
    assert teacher["teacher_image"].shape == (BATCH, 16) and teacher["teacher_text"].shape == (BATCH, *texts, 16)
    found = model(normalize(data.image), data.text.flatten(0, -2), needs=("image", "text"))
    student = found["image"], found["text"].unflatten(0, data.text.shape[:-1]), found["logit_scale"]
    of_images, of_texts = dense_soft_losses(*student, *(x.double() for x in teacher.values()), objective.teacher.scale)
    own = sum(inner().double()(*student)[0].values())
    expected_loss = own + (of_images.mean() + of_texts.mean()) / 2
    parameters = dict(model.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(expected_loss, list(parameters.values()))))
    settings = parse(ParallelSettings, {"precision": "fp32", **changes})
    kind = DeterministicStep if settings.deterministic else GradientStep
    computed = kind(model, model, objective, settings, ONE, normalize, 0).run(3, data, lambda loss: loss)
    # In float32, as the teacher is: its rows are encoded in other blocks.
    torch.testing.assert_close(sum(computed.losses.values()), expected_loss, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        assert float((parameters[name].grad - gradient).abs().max()) <= 1e-6, name
    assert not any(p.requires_grad or p.grad is not None for p in objective.teacher.model.parameters())


def test_a_teacher_is_no_part_of_the_objective():
    """It is neither trained, nor sharded, nor saved."""
    objective = Distilled(ALIP(), FrozenModel(build(TEACHER, torch.float32), build(MODEL).spec, ONE.device))
    assert list(objective.state_dict()) == ["objective.mean_similarity"] and not list(objective.parameters())
    objective.train()
    assert not objective.teacher.model.training and objective.texts == 2


def test_a_teacher_gets_what_its_own_tokenizer_makes():
    student, teacher = build(MODEL).spec, build(TEACHER, torch.float32)
    seen, call = [], teacher.forward
    teacher.forward = lambda image, text, needs: (seen.append((image, text)), call(image, text, needs=needs))[1]
    texts = ["a dog", "one two three four five six seven"]
    FrozenModel(teacher, student, ONE.device).observe(
        torch.full((2, 3, 32, 32), 255, dtype=torch.uint8), student.tokenizer()(texts)
    )
    image, text = seen[0]
    assert torch.equal(text[0], teacher.spec.tokenizer()(texts)[0]) and text.shape == (2, 11)
    assert image.shape == (2, 3, 48, 48)
    mean, std = (torch.tensor(x) for x in teacher.spec.pixels)
    torch.testing.assert_close(image[0, :, 5, 5], (1 - mean) / std)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(new_folder):
    """Settings of a run, with a teacher that has been trained and its features of the records."""
    folder = new_folder("distill")
    data = make_smaller(make_tiny(folder)) | {"val_data": None, "batch_size": 12, "lr": 1e-3, "save_every_n_steps": 3}
    teacher = run(parse(Settings, data | {"name": "teacher", "max_steps": 4}))
    write_features(folder, teacher, data["train_data"], "records")
    rows = map(json.loads, (folder / "all.jsonl").read_text().splitlines())
    found = [{"image": row["image"], "captions": [row[x] for x in ("raw", "synthetic", "generated")]} for row in rows]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    write_features(folder, teacher, folder / "captions.jsonl", "files")
    return data | {"max_steps": 6, "teacher": str(teacher), "folder": str(folder)}


def write_features(folder: Path, teacher, data, name: str) -> None:
    command = [sys.executable, "-m", "rwkv_clip.eval.main", "features", "--checkpoint", str(teacher)]
    more = ["--data", str(data), "--name", name, "--logs", str(folder / "features")]
    subprocess.run([*command, *more], check=True, capture_output=True)


@pytest.fixture
def data(begun, tmp_path):
    return {key: value for key, value in begun.items() if key not in ("teacher", "folder")} | {"logs": str(tmp_path)}


@pytest.fixture
def teachers(begun):
    stored = Path(begun["folder"]) / "features"
    return {
        "run": {"distill_model": begun["teacher"]},
        "weights": {"distill_model": begun["model"], "distill_pretrained": begun["teacher"]},
        "records": {"distill_features": str(stored / "records")},
        "files": {"distill_features": str(stored / "files")},
    }


def start(data, **changes):
    return run(parse(Settings, data | changes))


def tensors_of(folder) -> dict[str, torch.Tensor]:
    path = find_checkpoint(folder)
    return {**read_tensors(path / "model.safetensors"), **read_tensors(path / "optim.safetensors")}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "teacher, changes",
    [
        ("run", {}),
        ("run", {"objective": "siglip", "positives": "mask", "batch_size": 3, "accum_freq": 4}),
        ("records", {"text_choice": "all", "objective": "siglip"}),
        ("records", {"deterministic": True}),
        ("run", {"objective": "alip", "text_choice": "all", "texts": 2, "deterministic": True}),
    ],
    ids=str,
)
def test_a_run_is_taught_and_resumes(data, teachers, teacher, changes):
    changes = {**teachers[teacher], **changes}
    whole = start(data, name="whole", **changes)
    first = min((whole / "checkpoints").iterdir())
    found = tensors_of(whole)
    assert first.name == "step-00000003" and not any("teacher" in key for key in found)
    assert same(tensors_of(start(data, name="again", resume=str(first), **changes)), found)
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert all(0 < row["distill"] < row["loss"] for row in log)


def test_ways_to_name_a_teacher(data, teachers):
    """The same model by its run or by structure and weights; the same features from records or from the files that
    those were made from, with one view of each image: the whole."""
    plain = data | {"max_steps": 2, "crop": "whole", "flip": 0.0}
    found = {name: tensors_of(start(plain, name=name, **teacher)) for name, teacher in teachers.items()}
    assert same(found["run"], found["weights"])
    for name, value in found["records"].items():
        torch.testing.assert_close(found["files"][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_stored_features_are_those_of_the_model(begun, data):
    """Each record's image and texts get the features that the teacher computes from them."""
    folder, records = Path(begun["folder"]) / "features" / "records", RecordSet(data["train_data"])
    loaded = rwkv_clip.load_for_inference(begun["teacher"])
    stored = StoredFeatures(folder, loaded.model.spec)
    picked = [3, 0, 41, 3]
    samples = [records.sample(i) for i in picked]
    texts = np.stack([tokens for _, tokens in samples])
    keys = torch.tensor([hash_bytes(image) for image, _ in samples])
    found = stored.recall({"image_keys": keys, "text_keys": torch.from_numpy(hash_rows(texts))})
    with torch.no_grad():
        expected = loaded.model.encode_text(torch.from_numpy(texts).flatten(0, 1), normalize=True).view(4, 3, -1)
    torch.testing.assert_close(found["teacher_text"], expected, rtol=1e-4, atol=1e-5)
    assert found["teacher_image"].shape == (4, 32) and torch.equal(*found["teacher_image"][[0, 3]])
    assert stored.scale == pytest.approx(loaded.model.logit_scale.exp().item())
    blank = stored.recall({"image_keys": torch.tensor([-1, -2]), "text_keys": torch.zeros(2, dtype=torch.int64)})
    assert not blank["teacher_image"].any() and not blank["teacher_text"].any()
    with pytest.raises(DataError, match=r"lacks 1 images of a batch; write them with"):
        stored.recall({"image_keys": torch.tensor([1, -2]), "text_keys": torch.zeros(2, dtype=torch.int64)})


def test_another_teacher_is_another_run(data, teachers, begun, tmp_path):
    folder = start(data, name="one", max_steps=3, **teachers["run"])
    again = {"name": "two", "resume": str(folder), "max_steps": 3}
    moved = tmp_path / "moved"
    shutil.copytree(begun["teacher"], moved)
    start(data, **again, distill_model=str(moved))  # the same teacher in another place
    other = start(data, name="other", max_steps=1)
    for changes in ({"distill_model": str(other)}, teachers["records"], {}):
        with pytest.raises(ConfigError, match=r"resume: .* --allow-change distill_"):
            start(data, **again | {"name": f"three {len(str(changes))}"}, **changes)
    start(data, **again | {"name": "four"}, distill_model=str(other), allow_change=["distill_model"])


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"distill_pretrained": "x"}, "distill_pretrained: has no effect without distill_model"),
        ({"distill_model": "x", "distill_features": "y"}, "distill_features: there is a distill_model, too"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    assert [problem for problem in LossSettings(**settings).problems() if problem.startswith(message)]
    with pytest.raises(ConfigError, match=message):
        read_command_line(["--train-data", "x", *(f"--{k.replace('_', '-')}={v}" for k, v in settings.items())])


def test_teachers_that_cannot_read_the_texts(data):
    with pytest.raises(ConfigError, match=r"distill_model: .* 8 tokens of 'clip-bpe', the model 11 of 'clip-bpe'"):
        FrozenModel(build(MODEL, torch.float32), build(TEACHER).spec, ONE.device)
    chinese = rwkv_clip.create_model("CN-CLIP-Ti-8")
    with pytest.raises(ConfigError, match=r"distill_model: .* the same tokenizer .*or its features"):
        FrozenModel(chinese, build(MODEL).spec, ONE.device)


def test_an_objective_of_several_views_has_no_teacher():
    with pytest.raises(ConfigError, match="Toy sees 2 views of an image, a teacher one"):
        Distilled(Toy(), FrozenModel(build(TEACHER, torch.float32), build(MODEL).spec, ONE.device))


@pytest.mark.parametrize("name", ["nothing", "RWKV-CLIP-Ti-8", "open_clip:RN50"])
def test_a_model_without_weights_is_no_teacher(data, name, tmp_path):
    with pytest.raises(ConfigError, match=f"distill_model: '{name}' names no weights; give them by --distill-pretr"):
        start(data, name="refused", distill_model=name)
    assert not (tmp_path / "refused").exists(), "nothing was begun"


def damage(folder: Path, what: str) -> None:
    about = json.loads((folder / "about.json").read_text())
    if what == "no scale":
        del about["logit_scale"]
        (folder / "about.json").write_text(json.dumps(about))
    elif what == "unfinished":
        (folder / "about.json").unlink()
    elif what == "no texts":
        (folder / "texts.safetensors").unlink()
    elif what == "no keys":
        rows = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
        lines = (json.dumps({"image_id": row["image_id"]}) + "\n" for row in rows)
        (folder / "images.jsonl").write_text("".join(lines))
    elif what == "other images":
        text = (folder / "images.jsonl").read_text()
        (folder / "images.jsonl").write_text(re.sub(r'"key": (\d+)', lambda m: f'"key": {int(m[1]) // 2}', text))
    elif what == "other texts":
        text = (folder / "texts.jsonl").read_text()
        (folder / "texts.jsonl").write_text(text.replace("49407", "5, 49407"))
    elif what == "tokens that are none":
        text = (folder / "texts.jsonl").read_text()
        (folder / "texts.jsonl").write_text(text.replace("49407", '"end"'))
    elif what == "keys that are none":
        text = (folder / "images.jsonl").read_text()
        (folder / "images.jsonl").write_text(text.replace('"key": ', '"key": 1000000000'))


@pytest.mark.parametrize(
    "what, message",
    [
        ("no scale", "has no logit_scale; write them with"),
        ("unfinished", "holds no about.json"),
        ("no texts", "lacks images or texts of one width"),
        ("no keys", "has no keys of the images; write them with"),
        ("other images", r"lacks the image of .*train.rec key 0 \(60 of 60 records\); write them with"),
        ("other texts", r"lacks a text of .*train.rec key 0 \(60 of 60 records\)"),
        ("tokens that are none", "tokens of a stored text are no ids"),
        ("keys that are none", "has no keys of the images; write them with"),
        ("gone", "no such folder"),
    ],
)
def test_folders_that_are_no_features_of_these_records(data, begun, tmp_path, what, message):
    folder = tmp_path / "stored"
    if what != "gone":
        shutil.copytree(Path(begun["folder"]) / "features" / "records", folder)
        damage(folder, what)
    with pytest.raises(ConfigError, match=f"distill_features: .*{message}"):
        start(data, name="refused", distill_features=str(folder))
    assert not (tmp_path / "refused").exists(), "nothing was begun"
