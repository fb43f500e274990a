"""Texts of records and what methods need of them: who takes which records, what reaches the towers, and what is said
where a text is missing."""

import json
import struct

import numpy as np
import pytest
import torch

from helpers.tiny import MODEL, make_tiny
from rwkv_clip.checkpoint import read_weights
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.data.build import build_records
from rwkv_clip.data.records import RecordFile, RecordSet
from rwkv_clip.factory import resolve_spec
from rwkv_clip.losses import make_objective
from rwkv_clip.tokenizer import make_tokenizer
from rwkv_clip.training.gradients import GradientStep
from rwkv_clip.training.loop import Trainer
from rwkv_clip.training.main import check_records, check_texts, run
from rwkv_clip.training.settings import Settings, load_settings

NAMES = ("raw", "synthetic", "generated")
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
MODELS = {  # as small as they get, of the published context
    "rwkv": MODEL | {"text": MODEL["text"] | {"context": 77, "depth": 1}},
    "vit": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": TEXT,
    },
    "resnet": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
}


@pytest.fixture(scope="module")
def data(new_folder):
    """Records of one, two and three texts, with (`side2`) and without (`bare2`) a side file."""
    folder = new_folder("texts")
    settings = make_tiny(folder)
    for texts in (1, 2, 3):
        for kind in ("side", "bare"):
            build_records(str(folder / "all.jsonl"), str(folder / f"{kind}{texts}"), texts=NAMES[:texts])
        (folder / f"bare{texts}.json").unlink()
    for name, model in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(model))
    return settings | {"folder": folder}


def settings(data, records, model="vit", **changes) -> Settings:
    own = {key: value for key, value in data.items() if key not in ("folder", "val_data")}
    paths = {"train_data": str(data["folder"] / records), "model": str(data["folder"] / f"{model}.json")}
    return parse(Settings, own | paths | {"max_steps": 1} | changes)


ALIP = {"objective": "alip", "text_choice": "all", "texts": 2}
NEEDED = {"rwkv-clip-b32-yfcc15m": 3, "alip-b32-yfcc15m": 2, "clip-b32-yfcc15m": 1}


@pytest.mark.parametrize("kind", ["side", "bare"])
@pytest.mark.parametrize("held", [1, 2, 3])
@pytest.mark.parametrize("preset", NEEDED)
def test_who_takes_which_records(data, preset, held, kind):
    recipe, path = load_settings(preset), str(data["folder"] / f"{kind}{held}")
    records = RecordSet(path)
    assert records.text_names == NAMES[:held] and records.layout.width == 77 * held

    def begin():
        check_records(records, resolve_spec(recipe.model.model)[1], path, recipe.data.texts)
        check_texts(records, recipe, make_objective(recipe.loss))

    if held >= NEEDED[preset]:
        return begin()
    with pytest.raises(ConfigError) as error:
        begin()
    for part in (path, ", ".join(NAMES[:held]), f"asks for {NEEDED[preset]}", "build records with more"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"records": "bare1", **ALIP},
            r"bare1: texts per image: 1 \(raw\), --texts asks for 2; build records with more",
        ),
        ({"records": "bare1", **ALIP, "texts": None}, r"alip compares 2 texts per image, but .* raw give it 1; use"),
        (
            {"records": "side3", **ALIP, "texts": None},
            r"raw, synthetic, generated give it 3; use --text-choice all --texts 2",
        ),
        (
            {"records": "side2", **ALIP, "text_choice": "first"},
            r"choice first and texts raw, synthetic give it 1",
        ),
        ({"records": "side2", "texts": 3}, r"side2: texts per image: 2 \(raw, synthetic\), --texts asks for 3"),
    ],
)
def test_a_missing_text_ends_the_run_before_it_begins(data, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(settings(data, **changes, name="missing"))
    assert not (data["folder"] / "logs" / "missing").exists()


@pytest.mark.parametrize(
    ("records", "changes", "expected"),
    [
        ("bare2", ALIP, (0, 1)),
        ("side3", ALIP, (0, 1)),
        ("side3", {"text_choice": "all"}, (0, 1, 2)),
        ("side3", {"text_choice": "first"}, 0),
        ("bare1", {"text_choice": "first"}, 0),
        ("bare1", {}, 0),
        ("side3", {"text_choice": "one", "texts": 2, "batch_size": 16}, {0, 1}),
        ("bare3", {"text_choice": "one", "batch_size": 16}, {0, 1, 2}),
    ],
)
def test_tokens_that_reach_the_towers(data, monkeypatch, records, changes, expected):
    """All texts (a tuple), one and the same, or drawn ones (a set), of the records that the batch names."""
    seen, step, compute = [], Trainer.step, GradientStep.run

    def note_ids(self, batch):
        seen.append(batch.ids.tolist())
        return step(self, batch)

    def note_texts(self, number, inputs, scale):
        seen.append(inputs.text.clone())
        return compute(self, number, inputs, scale)

    monkeypatch.setattr(Trainer, "step", note_ids)
    monkeypatch.setattr(GradientStep, "run", note_texts)
    chosen = settings(data, records, **changes)
    run(chosen)
    stored, (ids, texts) = RecordSet(chosen.data.train_data), seen
    tokens = torch.stack([torch.from_numpy(stored.sample(i)[1]) for i in ids])
    assert len(ids) == chosen.parallel.batch_size and len(set(ids)) == len(ids)
    if isinstance(expected, set):
        which = (tokens == texts[:, None]).all(2).int().argmax(1)
        assert torch.equal(texts, tokens[torch.arange(len(ids)), which]) and set(which.tolist()) == expected
    else:
        assert torch.equal(texts, tokens[:, list(expected) if isinstance(expected, tuple) else expected])


@pytest.mark.parametrize("model", MODELS)
def test_any_towers_train_with_two_texts(data, model):
    steady = {"schedule": "constant", "cycle_beta1": False, "max_steps": 3}
    steady |= {"save_every_n_steps": 1, "keep_checkpoints": 3}
    folder = run(settings(data, "side2", model, **ALIP, **steady, name=f"alip-{model}"))
    first, second, _ = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    assert first["loss"] == pytest.approx(first["raw_loss"] + first["caption_loss"]) and first["loss"] > 0
    assert first["momentum_text_sim"] == pytest.approx(0.99 + 0.01 * first["current_text_sim"])
    assert second["weight_text_mean"] < 1 and second["loss"] != first["loss"]
    before, after = (read_weights(folder / "checkpoints" / f"step-0000000{step}") for step in (1, 3))
    still = [key for key, value in after.items() if torch.equal(value, before[key])]
    assert not still


# ---- the released layout, and data2rec ------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [1, 2, 3])
def test_records_of_the_released_data2rec_are_known_by_their_width(tmp_path, texts):
    """Bytes as the specification has them: frame, header (flag = number of labels, label 0, id 1, id2 0), labels, JPEG,
    padding; index lines of key and offset."""
    images, rows, rec, index = [], [], b"", ""
    for key, size in enumerate((5, 8, 2)):
        labels = [float(49406 - 1000 * key - i) for i in range(77 * texts)]
        image = b"\xff\xd8" + b"x" * size
        record = struct.pack("<IfQQ", 77 * texts, 0.0, 1, 0) + struct.pack(f"<{77 * texts}f", *labels) + image
        index += f"{key}\t{len(rec)}\n"
        rec += struct.pack("<II", 0xCED7230A, len(record)) + record + b"\0" * (-len(record) % 4)
        images.append(image), rows.append(labels)
    (tmp_path / "yfcc.rec").write_bytes(rec)
    (tmp_path / "yfcc.idx").write_text(index)
    records = RecordSet(tmp_path / "yfcc")
    assert (len(records), records.text_names, records.context) == (3, NAMES[:texts], 77)
    assert (records.tokenizer, records.vocab_size) == (None, None)
    for i in range(3):
        image, tokens = records.sample(i)
        assert image == images[i] and tokens.dtype == np.int64 and tokens.shape == (texts, 77)
        assert tokens.reshape(-1).tolist() == rows[i]


def build(tmp_path, rows, **options):
    """Records of rows without pictures of their own."""
    make_picture(tmp_path / "0.jpg")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"image": "0.jpg"} | row) + "\n" for row in rows))
    return build_records(str(tmp_path / "c.jsonl"), str(tmp_path / "out"), overwrite=True, **options)


def make_picture(path):
    from PIL import Image

    Image.new("RGB", (16, 16), "red").save(path)


def texts_of(prefix, row=0):
    """Its texts, each as ids without padding."""
    return [tuple(ids[ids > 0].tolist()) for ids in RecordSet(prefix).sample(row)[1]]


def ids_of(*texts):
    return [tuple(ids[ids > 0].tolist()) for ids in make_tokenizer()(list(texts))]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"raw": "alt", "synthetic": "made"}, ("alt", "made")),
        ({"raw": "alt", "caption": "made"}, ("alt", "made")),
        ({"raw_caption": "alt", "caption": "made"}, ("alt", "made")),
        ({"raw": "alt", "ofa": "made"}, ("alt", "made")),
        ({"caption": "alt", "ofa": "made"}, ("alt", "made")),
        ({"raw": "alt", "caption": ["made", "other"]}, ("alt", "made")),
        ({"raw": "alt", "synthetic": "made", "caption": "other"}, ("alt", "made")),
        ({"raw": "alt", "caption": "made", "generated": "long"}, ("alt", "made", "long")),
        ({"caption": "alt"}, ("alt",)),
        ({"caption": "alt", "text": "other"}, ("alt",)),
        ({"txt": "alt", "caption": "alt"}, ("alt",)),  # what img2dataset writes
        ({"raw": "alt", "caption": ""}, ("alt",)),
    ],
)
def test_texts_by_their_usual_names(tmp_path, row, expected):
    report = build(tmp_path, [row])
    assert report.texts.names == NAMES[: len(expected)] and report.fallbacks == {}
    assert texts_of(tmp_path / "out") == ids_of(*expected)
    if len(expected) == 2:
        build(tmp_path, [row], texts=("raw", "synthetic"))
        assert texts_of(tmp_path / "out") == ids_of(*expected)


def test_a_text_that_no_row_has_is_refused_before_building(tmp_path):
    rows = [{"raw": "alt", "blip": "made"}] * 3
    message = (
        r"no row has a text 'synthetic' \(nor ofa, caption\); they have image, raw, blip; .* synthetic=FIELD, or leave"
    )
    with pytest.raises(ValueError, match=message):
        build(tmp_path, rows, texts=("raw", "synthetic"))
    assert not (tmp_path / "out.rec").exists()
    build(tmp_path, rows, texts=("raw", "synthetic=blip"))
    assert texts_of(tmp_path / "out", 2) == ids_of("alt", "made")
    report = build(tmp_path, [{"raw": "only"}, *rows], texts=("raw", "synthetic=blip"))
    assert report.fallbacks == {"synthetic": 1} and texts_of(tmp_path / "out") == ids_of("only", "only")


@pytest.mark.parametrize("texts", [2, 3])
@pytest.mark.parametrize("kind", ["jsonl", "npy", "parquet"])
def test_two_and_three_texts_from_every_kind_of_input(tmp_path, kind, texts):
    names, values = NAMES[:texts], ("alt", "made", "long")[:texts]
    make_picture(tmp_path / "0.jpg")
    options = {}
    if kind == "npy":  # as ALIP's authors give it: (n, 154), raw first
        np.save(tmp_path / "c.npy", np.stack([make_tokenizer()(list(values)).numpy().reshape(-1)] * 2))
        (tmp_path / "list.txt").write_text("0.jpg\n0.jpg\n")
        options = {"images": str(tmp_path / "list.txt")}
    elif kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        rows = [{"image": (tmp_path / "0.jpg").read_bytes(), **dict(zip(names, values))}] * 2
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    else:
        rows = [{"image": "0.jpg", **dict(zip(names, values))}] * 2
        (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for chosen in ((), names):
        report = build_records(
            str(tmp_path / f"c.{kind}"), str(tmp_path / "out"), texts=chosen, overwrite=True, **options
        )
        assert report.texts.names == names and report.count == 2
        assert texts_of(tmp_path / "out", 1) == ids_of(*values)
        assert struct.unpack_from("<I", RecordFile(tmp_path / "out").read(0))[0] == 77 * texts
        side = json.loads((tmp_path / "out.json").read_text())
        assert (side["views"], side["context"], side["tokenizer"]) == (list(names), 77, "clip-bpe")
