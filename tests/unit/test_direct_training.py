"""Training on data as they are: the samples, bits, resumption and counting of faults that records have."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers.direct import KINDS, TEXTS, rows_of, save_kind, write_csv, write_tar
from helpers.loading import make
from helpers.pictures import picture
from helpers.tiny import STEPS, make_tiny, to_arguments
from rwkv_clip.checkpoint import find_checkpoint, read_weights
from rwkv_clip.config import check
from rwkv_clip.data.build import build_records
from rwkv_clip.data.direct.direct_set import DirectSet, draw_captions
from rwkv_clip.data.direct.reading import Reading
from rwkv_clip.data.mixture import open_mixture
from rwkv_clip.data.records import RecordError, RecordSet, open_records
from rwkv_clip.data.rows import Row
from rwkv_clip.errors import run_command
from rwkv_clip.tokenizer import make_tokenizer
from rwkv_clip.training import main, profile_data, trainer
from rwkv_clip.training.data.augment import draw_caption
from rwkv_clip.training.settings import DataSettings

TOKENIZER = make_tokenizer(context=8)


@pytest.fixture(scope="module")
def tiny(new_folder) -> tuple[Path, dict]:
    folder = new_folder("tiny")
    return folder, {**make_tiny(folder), "workers": 2}


@pytest.fixture(scope="module")
def saved(tiny, new_folder) -> dict[str, Path]:
    """The tiny run's rows as every kind; those that need a package that is missing are left out."""
    folder, found = tiny[0], {}
    for kind in KINDS:
        place = new_folder(kind)
        if kind in ("jsonl", "csv", "tsv"):
            shutil.copytree(folder / "images", place / "images")
        try:
            found[kind] = save_kind(kind, place, rows_of(folder), folder)
        except pytest.skip.Exception:
            continue
    return found


def choose(saved: dict[str, Path], kind: str) -> Path:
    if kind not in saved:
        pytest.skip("pip install -e '.[parquet]'")
    return saved[kind]


def train(settings: dict, name: str, **more) -> Path:
    return main.run(main.read_command_line(to_arguments({**settings, "name": name, **more})))


def end_of(folder: Path) -> tuple[dict, list]:
    """The last weights, and the losses of all steps."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return read_weights(find_checkpoint(folder)), [(row["step"], row["loss"]) for row in log if "loss" in row]


@pytest.fixture(scope="module")
def of_records(tiny) -> tuple[dict, list]:
    return end_of(train(tiny[1], "records"))


# ---- the same as records


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_records_built_from_them(kind, tiny, saved, tmp_path):
    path = choose(saved, kind)
    direct = open_records(str(path), TOKENIZER)
    assert isinstance(direct, DirectSet) and direct.text_names == TEXTS
    if kind == "datasets":  # which data2rec.py does not read
        records = open_records(tiny[0] / "train", TOKENIZER)
    else:
        build_records(str(path), str(tmp_path / "built"), context=8)
        records = open_records(tmp_path / "built", TOKENIZER)
    assert isinstance(records, RecordSet) and len(records) == len(direct) == 60
    assert records.layout.text_names == direct.layout.text_names
    for i in range(60):
        (image, tokens), (other, texts) = records.sample(i), direct.sample(i)
        assert image == other and tokens.dtype == texts.dtype and np.array_equal(tokens, texts)


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_the_same_bits_as_from_records(kind, tiny, saved, of_records):
    weights, losses = of_records
    others, their = end_of(train(tiny[1], kind, train_data=str(choose(saved, kind))))
    assert losses == their and len(losses) == STEPS
    assert weights.keys() == others.keys() and all(weights[key].equal(others[key]) for key in weights)


@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_a_run_resumes_with_the_same_bits_and_with_its_own_data_only(kind, tiny, saved, of_records, monkeypatch):
    settings = {**tiny[1], "train_data": str(choose(saved, kind))}
    step = trainer.Trainer.step

    def stop(self, batch):
        if self.state.progress.step == 4:
            raise RuntimeError("power cut")
        return step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(trainer.Trainer, "step", stop)
        train(settings, f"cut {kind}")
    again, _ = end_of(train(settings, f"cut {kind}", resume="latest"))
    assert all(again[key].equal(value) for key, value in of_records[0].items())
    with pytest.raises(ValueError, match="records"):
        train(tiny[1], f"cut {kind}", resume="latest")


@pytest.mark.parametrize("kind", KINDS)
def test_a_digest_is_of_the_content(kind, tiny, saved, tmp_path):
    folder, rows = tiny[0], rows_of(tiny[0])
    digest = open_records(str(choose(saved, kind)), TOKENIZER).digest
    assert len(digest) == 64
    found = []
    for name, content in (
        ("same", rows),
        ("less", rows[:-1]),
        ("text", [*rows[:-1], {**rows[-1], "raw": rows[-1]["raw"].upper()}]),
    ):
        place = tmp_path / name
        shutil.copytree(folder / "images", place / "images")
        found.append(open_records(str(save_kind(kind, place, content, folder)), TOKENIZER).digest)
    assert found[0] == digest and len({*found}) == 3
    assert open_records(str(saved[kind]), make_tokenizer(context=9)).digest != digest


@pytest.mark.parametrize("kind", KINDS)
def test_copies_for_workers_are_small(kind, saved):
    records = open_records(str(choose(saved, kind)), TOKENIZER)
    copy = pickle.dumps(records)
    again = pickle.loads(copy)
    assert len(copy) < 4000 and again.digest == records.digest and again.name(59) == records.name(59)
    assert again.sample(59)[0] == records.sample(59)[0]


# ---- several captions


def test_a_caption_is_drawn_for_each_sample_and_epoch(tmp_path):
    captions = {i: [f"picture {i} {word}" for word in ("one", "two", "three", "four")[: 1 + i % 4]] for i in range(12)}
    rows = [{"image": f"{i}.jpg", "captions": captions[i]} for i in captions]
    for i in captions:
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = open_records(tmp_path / "a.jsonl", TOKENIZER)
    ids = {i: [tuple(row) for row in TOKENIZER(texts).tolist()] for i, texts in captions.items()}
    seen, expected = {}, {}
    for workers in (0, 2):
        for batch in make(records, global_batch=6, steps=40, workers=workers):
            for i, epoch, text in zip(batch.ids.tolist(), batch.epochs.tolist(), batch.text[:, 0].tolist()):
                assert seen.setdefault((i, epoch), tuple(text)) == tuple(text)
                expected[i, epoch] = ids[i][int(draw_caption(3, epoch, i) * len(ids[i]))]
    assert seen == expected and len(seen) == 240
    for i in captions:
        assert {text for (j, _), text in seen.items() if j == i} == set(ids[i])
    firsts = make(records, global_batch=12, steps=1, text_choice="first")
    for batch in firsts:
        assert [tuple(text[0]) for text in batch.text.tolist()] == [ids[i][0] for i in batch.ids.tolist()]


def test_captions_of_a_mixture_are_drawn_by_the_pass_of_their_source(tmp_path):
    for name, many in (("a", 1), ("b", 3)):
        rows = [{"image": f"{name}{i}.jpg", "captions": [f"{name} {i} {k}" for k in range(many)]} for i in range(4)]
        for i, row in enumerate(rows):
            (tmp_path / row["image"]).write_bytes(picture(i))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = f"{tmp_path}/a.jsonl::{tmp_path}/b.jsonl"
    records = open_mixture(spec, "1::2", None, lambda name: open_records(name, TOKENIZER))
    ids = {row: TOKENIZER([f"{'ab'[row // 4]} {row % 4} {k}" for k in range(3)]).tolist() for row in range(8)}
    drawn = set()
    for batch in make(records, global_batch=12, steps=10):
        for i, turn, text in zip(batch.ids.tolist(), batch.epochs.tolist(), batch.text[:, 0].tolist()):
            assert text == ids[i][int(draw_caption(3, turn, i) * 3) if i >= 4 else 0]
            drawn.add((i, *text))
    assert len(drawn) == 4 + 12


def test_ranks_see_what_one_process_sees(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    row = json.dumps({"image": "a.jpg", "captions": [f"caption {i}" for i in range(9)]}) + "\n"
    (tmp_path / "a.jsonl").write_text(row * 12)
    records = open_records(tmp_path / "a.jsonl", TOKENIZER)
    whole = [batch.text for batch in make(records, steps=3)]
    halves = [[batch.text for batch in make(records, steps=3, rank=rank, world=2)] for rank in (0, 1)]
    for one, *two in zip(whole, *halves):
        assert np.array_equal(one, np.concatenate(two))


def test_texts_of_one_row_are_drawn_together():
    fields = {"raw": ["a", "", None, "b"], "meta": {"long": ["x", "y"]}, "title": "t", "none": [], "blank": [" "]}
    row = Row("", fields, None)
    for drawn, (raw, long) in {0.0: ("a", "x"), 0.49: ("a", "x"), 0.5: ("b", "y"), 0.999: ("b", "y")}.items():
        found = draw_captions(row, ("raw", "meta.long", "title", "none", "blank"), drawn).fields
        assert (found["raw"], found["meta.long"], found["title"]) == (raw, long, "t")
        assert found["none"] == [] and found["blank"] == [" "]
    assert draw_captions(row, ("title",), 0.5) is row


def test_numbered_texts_in_a_tar_are_captions(tmp_path):
    write_tar(tmp_path / "a.tar", [{"key": "0", "jpg": picture(1), "0.txt": "one", "1.txt": "two"}] * 1)
    records = open_records(tmp_path / "a.tar", TOKENIZER)
    for drawn, text in ((0.1, "one"), (0.9, "two"), (None, "one")):
        assert records.draw_sample(0, drawn)[1].tolist() == TOKENIZER([text]).tolist()


# ---- what the user says


@pytest.fixture
def table(tmp_path) -> Path:
    """A table as open_clip's users have it, with names of pictures from the folder above."""
    (tmp_path / "pictures").mkdir()
    rows = []
    for i in range(8):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(picture(i))
        rows.append({"filepath": f"pictures/{i}.jpg", "title": f"title {i}", "alt": f"alt {i}"})
    return write_csv(tmp_path / "a.csv", rows, "\t")


def test_keys_of_open_clip(table):
    def text_of(*names: str, **more) -> list:
        records = open_records(table, TOKENIZER, Reading(text_fields=names, **more))
        assert records.sample(3)[0] == picture(3)
        return records.sample(3)[1].tolist()

    assert text_of() == TOKENIZER(["title 3"]).tolist()
    assert text_of("alt") == TOKENIZER(["alt 3"]).tolist()
    assert text_of("alt", "title", image_field="filepath", separator="\\t") == TOKENIZER(["alt 3", "title 3"]).tolist()
    assert open_records(table, TOKENIZER, Reading(text_fields=("alt", "title"))).text_names == ("raw", "synthetic")


@pytest.mark.parametrize(
    "reading, words",
    [
        (Reading(text_fields=("titel",)), r"csv_caption_key: 'titel' is in no row of .*a\.csv; did you mean 'title'\?"),
        (Reading(image_field="path"), r"csv_img_key: 'path' is in no row of .*; did you mean 'filepath'\? they have f"),
        (Reading(separator=";"), r"csv_separator: ';' separates nothing in the first line, filepath"),
        (
            Reading(images="/nowhere"),
            r"none of 8 rows has its picture; they are looked up in /nowhere: .*--image-folder",
        ),
        (Reading(kind="webdataset"), r"a\.csv: byte 260 of the tar, .* cut short"),
    ],
)
def test_mistakes_are_one_line_before_any_work(reading, words, table):
    with pytest.raises(ValueError, match=words) as error:
        open_records(table, TOKENIZER, reading)
    assert "\n" not in str(error.value)


def test_a_kind_is_told_or_said(table, tmp_path):
    other = Path(shutil.copy(table, tmp_path / "rows.txt"))
    with pytest.raises(ValueError, match="make records of it first"):
        open_records(other, TOKENIZER)
    assert len(open_records(other, TOKENIZER, Reading(kind="csv"))) == 8
    with pytest.raises(ValueError, match=r"is a file, but no \.rec"):
        open_records(table, TOKENIZER, Reading(kind="rec"))
    write_tar(tmp_path / "b.tar", [{"key": "0", "jpg": picture(1), "txt": "one"}])
    with pytest.raises(ValueError, match=r"dataset_type: csv, but .*b\.tar is webdataset"):
        open_records(f"{tmp_path}/b*", TOKENIZER, Reading(kind="csv"))
    for name in ("none.csv", "none-*.tar", "none-{0..3}.tar"):
        with pytest.raises(ValueError, match=r"train_data: '.*/none.* names no file"):
            open_records(tmp_path / name, TOKENIZER)
    with pytest.raises(ValueError, match=r"no state\.json"):
        open_records(tmp_path, TOKENIZER, Reading(kind="datasets"))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"holds several parts; give one of .*/train, .*/test"):
        open_records(tmp_path, TOKENIZER)


def test_a_folder_with_records_is_records(tiny):
    assert isinstance(open_records(tiny[0], TOKENIZER), RecordSet)  # all.jsonl and val.jsonl are there as well


def test_names_lead_out_of_a_folder_only_if_it_is_said(table, tmp_path):
    inner = tmp_path / "tables"
    inner.mkdir()
    rows = [{"image": str(tmp_path / "pictures/1.jpg"), "caption": "a"}, {"image": "../pictures/2.jpg", "caption": "b"}]
    write_csv(inner / "a.csv", rows)
    with pytest.raises(ValueError, match=r"image outside the image folder; say where .* --image-folder"):
        open_records(inner / "a.csv", TOKENIZER)
    records = open_records(inner / "a.csv", TOKENIZER, Reading(images="/"))
    assert records.sample(0)[0] == picture(1)
    with pytest.raises(RecordError, match=r"a\.csv line 3: missing image"):
        records.sample(1)


def test_flags_reach_the_data(table, tiny, capsys):
    settings = {**tiny[1], "train_data": str(table), "max_steps": 2, "texts": 1, "text_choice": "first"}
    settings = {**settings, "batch_size": 4, "csv_caption_key": "alt", "dataset_type": "csv", "csv_img_key": "filepath"}
    folder = train(settings, "flags")
    assert json.loads((folder / "settings.json").read_text())["csv_caption_key"] == ["alt"]
    assert run_command(lambda: train({**settings, "csv_img_key": "file"}, "none") and 0) == 2
    assert "csv_img_key: 'file' is in no row" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(csv_separator=", "), "csv_separator: ', ' is not one character"),
        (dict(csv_caption_key=("a", "a")), "has no name, or one twice"),
        (dict(csv_caption_key=()), "has no name, or one twice"),
    ],
)
def test_settings_are_checked(settings, words):
    assert any(words in problem for problem in check(DataSettings(**settings)))
    assert not check(DataSettings(csv_separator="\\t", csv_caption_key=("a", "b"), dataset_type="csv"))


# ---- bad rows


def test_bad_rows_are_replaced_and_counted(table, tmp_path):
    (tmp_path / "pictures/1.jpg").unlink()
    (tmp_path / "pictures/2.jpg").write_bytes(b"no picture")
    text = table.read_text().splitlines()
    table.write_text("\n".join([*text[:4], "pictures/3.jpg\t \talt", "pictures/4.jpg", *text[6:]]) + "\n")
    records = open_records(table, TOKENIZER)
    loader = make(records, global_batch=8, steps=3, max_bad=100)
    ids = {i for batch in loader for i in batch.ids.tolist()}
    assert ids == {0, 5, 6, 7}
    reasons = {"missing image": 3, "image unreadable": 3, "empty text": 3, "record damaged": 3}
    assert loader.skipped == reasons and any("a.csv line 3: missing image" in words for words in loader.bad)
    with pytest.raises(ValueError, match="records are bad"):
        for _ in make(records, global_batch=8, steps=3, max_bad=3):
            pass


def test_a_smaller_vocabulary_is_found_out(table):
    records = open_records(table, TOKENIZER)
    assert records.limit_vocab(49408) == 0 and records.limit_vocab(400) == 49407 and records.vocab_size == 400
    with pytest.raises(RecordError, match=r"a\.csv line 2: token ids must be below 400, found 49407"):
        records.sample(0)


def test_an_empty_table_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\n")
    with pytest.raises(ValueError, match=r"a\.csv: no rows"):
        open_records(tmp_path / "a.csv", TOKENIZER)


def test_urls(saved, tiny, tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="pip install -e '.[fsspec]'")
    system = fsspec.filesystem("memory")
    (tmp_path / "indices").mkdir()
    reading = Reading(index=str(tmp_path / "indices"))
    for path in saved["webdataset"].parent.glob("*.tar"):
        system.pipe(f"/urls/{path.name}", path.read_bytes())
    here = open_records(str(saved["webdataset"]), TOKENIZER)
    braces, pattern = "memory://urls/rows-{000..001}.tar", "memory://urls/*.tar"
    for spec in (braces, pattern, f"file://{saved['webdataset']}"):
        records = open_records(spec, TOKENIZER, reading)
        assert records.digest == here.digest and records.sample(50)[0] == here.sample(50)[0]
        assert records.name(50).endswith("urls/rows-001.tar 0050") or "file" in spec
    loader = make(open_records(braces, TOKENIZER, reading), workers=2, steps=2, global_batch=8)
    expected = make(here, workers=0, steps=2, global_batch=8)
    assert all(one.text.equal(two.text) and one.image.equal(two.image) for one, two in zip(loader, expected))
    for spec, words in (
        (braces, "is read through a URL; say where its index goes, --index FOLDER"),
        ("memory://urls/none-*.tar", "names nothing"),
        ("memory://urls/none.tar", "no such file"),
        ("memory://urls/none.zip", "not a known kind of data; say --dataset-type"),
        ("nowhere://urls/none.tar", "Protocol not known"),
    ):
        with pytest.raises(ValueError, match=words):
            open_records(spec, TOKENIZER)


def test_folders_that_datasets_saves(tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install -e '.[datasets]'")
    columns = {
        "image": [{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(9)],
        "captions": [[f"one {i}", f"two {i}"] for i in range(9)],
        "label": list(range(9)),
    }
    whole = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    whole.save_to_disk(str(tmp_path / "whole"), num_shards=2)
    whole.select([8, 1, 5]).save_to_disk(str(tmp_path / "some"))
    datasets.DatasetDict({"train": whole}).save_to_disk(str(tmp_path / "parts"))
    for name, numbers in (("whole", range(9)), ("some", [8, 1, 5]), ("parts/train", range(9))):
        records = open_records(tmp_path / name, TOKENIZER)
        assert len(records) == len(numbers) and records.text_names == ("raw",)
        for row, i in enumerate(numbers):
            image, tokens = records.draw_sample(row, 0.7)
            assert image == picture(i) and tokens.tolist() == TOKENIZER([f"two {i}"]).tolist()
    with pytest.raises(ValueError, match=r"holds several parts; give one of .*/parts/train"):
        open_records(tmp_path / "parts", TOKENIZER)


def test_profile_data_reads_it(saved, capsys):
    settings = profile_data.ProfileSettings(str(saved["csv"]), image_size=16, batch_size=8, workers=0, seconds=0.05)
    assert profile_data.run(settings).loader > 0 and "60 records" in capsys.readouterr().out
