"""Reports: what stands in tables, pictures and the page; several runs in one; damaged results; --legacy in files."""

import base64
import csv
import html.parser
import io
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from helpers.color_model import COLORS, loaded, save_color
from rwkv_clip.eval.main import main
from rwkv_clip.eval.report import formats, published, tables
from rwkv_clip.eval.report.comparison import collect
from rwkv_clip.eval.report.confusion import worst_classes
from rwkv_clip.eval.report.plots import draw_bars, draw_confusion

METHODS = ["CLIP", "SLIP", "DeCLIP", "UniCLIP", "HiCLIP", "HiDeCLIP", "FILIP", "DeFILIP", "ALIP", "RWKV-CLIP"]


def class_result(dataset="cifar10", top1=0.5, samples=None, headline="top1", **more) -> dict:
    samples = samples or published.published_samples("classification").get(dataset, 100)
    metrics = {"top1": top1, "top5": 0.9, "mean_per_class": 0.4, "samples": samples, "classes": 10}
    metrics["classes_without_samples"] = []
    result = {"dataset": dataset, "status": "done", "split": "test", "headline": headline, "note": ""}
    return result | {"metrics": metrics} | more


def pair_result(dataset="coco", recall=0.5, images=5000, **more) -> dict:
    metrics = {key: recall for key in published.RECALLS} | {"mean_recall": recall}
    place = {"dataset": dataset, "status": "done", "split": "test", "images": images, "captions": 5 * images}
    return place | {"prefix": "a photo of ", "metrics": metrics} | more


def run_of(task: str, *results: dict, model="ours", digest="0" * 64, **more) -> dict:
    return {"schema": 1, "task": task, "model": model, "checkpoint_sha256": digest, "results": list(results)} | more


def save(folder, run) -> None:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(run if isinstance(run, str) else json.dumps(run))


def rows_by_name(table: tables.Table) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in table.rows}


def test_every_method_has_its_figures_or_is_named_as_absent():
    assert published._content()["methods"] == METHODS
    for task in ("retrieval", "classification"):
        present = {row.method for row in published.published_rows() if getattr(row, task)}
        absent = published.not_at_hand(task)
        assert present | set(absent) == set(METHODS) and not present & set(absent)
        run = run_of("retrieval", pair_result()) if task == "retrieval" else run_of("classification", class_result())
        (note,) = [note for note in tables.compare(task, [run]).notes if "not available" in note] or [""]
        assert set(re.findall(r"[A-Z][\w-]+", note.partition(": ")[2])) == set(absent)


def test_published_figures_are_plausible_and_have_a_source():
    """A slip of a digit shows: recalls rise with k, and printed averages are those of the figures."""
    sets = set(published.published_samples("classification"))
    for row in published.published_rows():
        assert "arXiv" in row.source and row.classification.keys() <= sets
        for recalls in row.retrieval.values():
            assert len(recalls) == 6 and recalls[:3] == sorted(recalls[:3]) and recalls[3:] == sorted(recalls[3:])
        if row.average is not None:
            assert sum(row.classification.values()) / len(sets) == pytest.approx(row.average, abs=0.11)


def test_specified_rows_are_printed_as_they_are():
    found = rows_by_name(tables.compare("classification", [run_of("classification", class_result("imagenet"))]))
    assert found["RWKV-CLIP B/32, YFCC15M (published)"] == ["44.3"]
    assert found["ALIP B/32, YFCC15M (published)"] == ["40.3"]
    table = tables.compare("retrieval", [run_of("retrieval", pair_result())])
    recalls = {row[1]: row[5:11] for row in table.rows}
    assert recalls["ALIP B/32, YFCC15M (published)"] == ["46.8", "72.4", "81.8", "29.3", "54.4", "65.4"]
    assert recalls["RWKV-CLIP B/32, YFCC15M (published)"] == ["50.3", "76.2", "85.2", "34.0", "60.9", "71.7"]


def test_sets_of_one_model_join_in_one_row_with_its_average():
    sets = list(published.published_samples("classification"))
    runs = [run_of("classification", class_result(name, top1=(i + 1) / 100)) for i, name in enumerate(sets)]
    table = tables.compare("classification", list(reversed(runs)))
    assert table.header == ["model", *sets, "average of the eleven"]
    assert rows_by_name(table)["ours"] == [f"{i + 1}.0" for i in range(11)] + ["6.0"]
    assert rows_by_name(table)["RWKV-CLIP B/32, YFCC15M (published)"][-1] == "44.4"
    part = tables.compare("classification", [*runs[:-1], run_of("classification", class_result(sets[-1], samples=9))])
    assert rows_by_name(part)["ours"][-2:] == ["50.0*", "-"]  # no average over another set
    assert f"Starred, {sets[-1]}: 9 of 50000 pictures, not the published set" in part.notes


def test_models_are_told_apart():
    runs = [run_of("classification", class_result(), digest=c * 64) for c in "ab"]
    runs.append(run_of("classification", class_result("mine"), model="other"))
    names = [row[0] for row in tables.compare("classification", runs).rows]
    assert names[-3:] == ["ours (aaaaaaaa)", "ours (bbbbbbbb)", "other"]
    twice = [run_of("classification", class_result(top1=v)) for v in (0.1, 0.2)]
    assert [row[1] for row in tables.compare("classification", twice).rows][-2:] == ["10.0", "20.0"]
    types = [run_of("classification", class_result(), environment={"precision": p}) for p in ("fp32", "bf16")]
    assert [row[0] for row in tables.compare("classification", types).rows][-2:] == ["ours (fp32)", "ours (bf16)"]


def test_best_figures_are_those_of_whole_sets_and_exact_logits():
    legacy = {"metrics": {"top1": 0.99, "mean_per_class": None}, "defects": []}
    runs = [run_of("classification", class_result(top1=0.9, legacy=legacy))]
    runs.append(run_of("classification", class_result(top1=0.95, samples=5), model="part"))
    table = tables.compare("classification", runs)
    (best,) = table.best
    assert table.rows[best[0]] == ["ours", "90.0"]
    assert ["ours (legacy)", "99.0"] in table.rows and ["part", "95.0*"] in table.rows
    assert r"\textbf{90.0}" in formats.latex(table) and formats.latex(table).count("textbf") == 1


def test_published_recall_stands_beside_the_whole_set_only():
    runs = [run_of("retrieval", pair_result(), pair_result("flickr30k", images=999), pair_result("mine"))]
    table = tables.compare("retrieval", runs)
    theirs = len([row for row in published.published_rows() if row.retrieval])
    assert [row[0] for row in table.rows] == ["coco"] * (theirs + 1) + ["flickr30k", "mine"]
    assert table.published == set(range(theirs)) and [row[1] for row in table.rows[theirs:]] == ["ours"] * 3


@pytest.mark.parametrize("name, recalls", [("MUGE", ["-"] * 3 + ["52.1", "76.7", "84.4", "-"]), ("coco-cn", None)])
def test_rows_of_chinese_sets(name, recalls):
    """For any number of pictures, as theirs is not printed, so nothing is called the best; MUGE has one direction."""
    table = tables.compare("retrieval", [run_of("retrieval", pair_result(name, images=7))])
    theirs = {row[1]: row[5:] for row in table.rows[:-1]}
    assert table.rows[-1][1] == "ours" and len(table.published) == len(theirs) >= 11 and not table.best
    assert recalls is None or theirs["CN-CLIP ViT-B/16 (published)"] == recalls
    assert any("31863c7" in note for note in table.notes) and any("number of pictures" in note for note in table.notes)
    assert not any("ALIP" in note for note in table.notes)


def test_recalls_of_chinese_sets_rise_with_k():
    for row in published.chinese_rows():
        assert "arXiv" in row.source and row.retrieval.keys() <= published.chinese_sets()
        for recalls in row.retrieval.values():
            known = [r for r in recalls if r is not None]
            assert len(recalls) == 6 and known[-3:] == sorted(known[-3:]) and known[:3] == sorted(known[:3])


def test_legacy_rows_and_their_defects_are_named():
    defects = [{"name": "odd", "says": "one thing", "reproduced": True, "effect": "did this"}]
    defects.append({"name": "even", "says": "other", "reproduced": False, "effect": "no seed"})
    legacy = {"metrics": {key: 0.25 for key in published.RECALLS} | {"mean_recall": 0.25}, "defects": defects}
    table = tables.compare("retrieval", [run_of("retrieval", pair_result("mine", legacy=legacy))])
    assert [(row[1], row[5]) for row in table.rows] == [("ours", "50.0"), ("ours (legacy)", "25.0")]
    assert "ours (legacy), mine: odd (one thing), reproduced: did this" in table.notes
    assert "ours (legacy), mine: even (other), not reproduced: no seed" in table.notes


def test_latex_is_escaped_and_balanced():
    run = run_of("classification", class_result("50%_$#&~^{}\\<>"), model="a_b & c")
    text = formats.latex(tables.compare("classification", [run]))
    body = text.splitlines()
    assert r"50\%\_\$\#\&\textasciitilde{}\textasciicircum{}\{\}\textbackslash{}\textless{}\textgreater{}" in text
    assert r"a\_b \& c & 50.0 \\" in body
    bare = re.sub(r"\\[\\%&#$_{}]", "", text)
    assert bare.count("{") == bare.count("}") and not re.search("[%#$_]", bare)
    rows = [line for line in body if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {1}


def test_worst_classes_against_a_plain_count():
    g = torch.Generator().manual_seed(0)
    weights = torch.nn.functional.normalize(torch.randn(15, 8, generator=g), dim=1)
    features = torch.nn.functional.normalize(torch.randn(3000, 8, generator=g), dim=1)
    labels = torch.randint(0, 14, (3000,), generator=g)  # the last class has no sample
    answers = (features.double() @ weights.double().T).argmax(1)
    names = [f"class {i}" for i in range(15)]
    worst = worst_classes(features, weights, labels, names)
    fractions = {c: float((answers[labels == c] == c).double().mean()) for c in range(14)}
    assert [entry["class"] for entry in worst] == sorted(fractions, key=lambda c: (fractions[c], c))[:10]
    for entry in worst:
        mine = answers[labels == entry["class"]]
        assert entry["samples"] == len(mine) and entry["right"] == int((mine == entry["class"]).sum())
        assert {label: count for label, _, count in entry["predicted"]} == {
            label: int((mine == label).sum()) for label in mine.unique().tolist()
        }
        counts = [count for *_, count in entry["predicted"]]
        assert counts == sorted(counts, reverse=True) and entry["name"] == names[entry["class"]]


def test_bars_are_as_high_as_the_figures(monkeypatch):
    """Every figure of the table has its bar, ours in color and published ones in grey."""
    from matplotlib.axes import Axes

    drawn, bar = [], Axes.bar
    monkeypatch.setattr(
        Axes, "bar", lambda self, x, y, *a, **n: drawn.append((y, n["color"])) or bar(self, x, y, *a, **n)
    )
    legacy = {"metrics": {"top1": 0.2, "mean_per_class": None}, "defects": []}
    table = tables.compare("classification", [run_of("classification", class_result(top1=0.3, legacy=legacy))])
    content = draw_bars(table, {"cifar10": 10.0})
    heights = [height for height, _ in drawn]
    assert heights == [float(row[1]) for row in table.rows] and heights[-2:] == [30.0, 20.0]
    colors = [color for _, color in drawn]
    assert all(0 <= float(color) <= 1 for color in colors[:-2]) and colors[-1] == colors[-2] == "#0072B2"
    with Image.open(io.BytesIO(content)) as picture:
        assert (0, 114, 178) in {color for _, color in picture.convert("RGB").getcolors(1 << 20)}


def test_bars_of_strange_names_are_drawn():
    run = run_of("classification", class_result("$x_{$ <b>\ud83d"), model="_$y^{$\udcff")
    assert draw_bars(tables.compare("classification", [run]))
    recall = run_of("retrieval", pair_result("$x_{$"), model="$y^{$")
    assert draw_bars(tables.compare("retrieval", [recall]))


def test_confusion_of_strange_names_is_drawn():
    predicted = [[3, "$x_{$ <b>\ud83d", 6], [0, "a" * 90, 3], *([i, f"other {i}", 1] for i in range(20, 45))]
    worst = [{"class": 0, "name": "a" * 90, "samples": 34, "right": 3, "predicted": predicted}]
    with Image.open(io.BytesIO(draw_confusion(worst, "set $\ud83d"))) as picture:
        assert 500 < picture.width < 2000
        assert (255, 127, 14) in {
            color for _, color in picture.convert("RGB").getcolors(1 << 20)
        }  # frames what is right


class Page(html.parser.HTMLParser):
    """What a page asks for, and whether its elements close."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.pictures, self.tags, self.words = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        self.pictures += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two sets for a stand-in model: captions, and classes of which one is always wrong."""
    model = SimpleNamespace(load_for_inference=lambda checkpoint, **_: loaded())
    monkeypatch.setitem(sys.modules, "rwkv_clip.factory", model)
    for color in COLORS:
        save_color(tmp_path / "classes" / color / "0.png", color if color != "teal" else "red")
    rows = [{"image": f"classes/{c}/0.png", "caption": f"{c} & <b>bold</b>"} for c in COLORS]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--checkpoint", "run", "--device", "cpu", "--logs", str(tmp_path / "logs"), "--legacy"]
    assert main(["retrieval", "--data", str(tmp_path / "set.jsonl"), "--name", "r", "--dataset", "<b>s", *common]) == 0
    assert main(["classification", "--data", str(tmp_path / "classes"), "--name", "c<i>", *common]) == 0
    return tmp_path


def test_from_runs_to_one_page(folder, capsys):
    """The whole way: two runs with --legacy, their own pages, and one report of both from the command line."""
    logs = folder / "logs"
    assert sorted(path.name for path in (logs / "r").iterdir()) == sorted(
        ["result.json", "table.md", "table.csv", "table.tex", "page.html", "bars.png", "retrieval.png"]
    )
    assert len(list((logs / "c<i>").glob("confusion-*.png"))) == 1
    capsys.readouterr()
    assert main(["report", str(logs / "r"), str(logs / "c<i>" / "result.json"), "--output", str(logs / "all")]) == 0
    shown = capsys.readouterr().out
    assert (logs / "all" / "table.md").read_text() in shown and "integer-logits" in shown and "unstable-sort" in shown
    runs = json.loads((logs / "all" / "runs.json").read_text())
    assert list(runs.values()) == [json.loads((logs / name / "result.json").read_text()) for name in ("r", "c<i>")]
    for path, count in ((logs / "r", 2), (logs / "c<i>", 2), (logs / "all", 4)):
        text = (path / "page.html").read_text()
        page = Page(text)
        assert not page.open and not page.tags & {"script", "link", "iframe", "b"} and "http" not in text
        assert len(page.pictures) == count
        for picture in page.pictures:
            kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", picture).groups()
            with Image.open(io.BytesIO(base64.b64decode(data))) as found:
                found.load()
                assert found.format.lower() == kind and found.width > 300
        assert "85.7" in page.words or path.name == "r"  # six of seven colors
        assert any("integer-logits" in word or "unstable-sort" in word for word in page.words)
    assert main(["report", str(logs), "--output", str(logs / "all")]) == 0  # a second one overwrites nothing
    assert (logs / "all-2" / "page.html").is_file()


def test_csv_and_markdown_of_a_report_hold_the_same(tmp_path):
    save(tmp_path / "a", run_of("retrieval", pair_result(), model='a "quoted", | name'))
    made, (table,) = collect([str(tmp_path / "a")], tmp_path / "out")
    rows = list(csv.reader((made / "table.csv").open()))
    assert rows == [table.header, *table.rows]
    lines = [line for line in (made / "table.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert [cells[0], *cells[2:]] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "result.json: not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "no 'schema'"),
        ({"schema": 1}, "no 'task'"),
        (run_of("retrieval") | {"schema": 2}, "schema 2, expected 1"),
        (run_of("other"), "task 'other'; valid names"),
        (run_of("retrieval", {"status": "done"}), "results lack 'dataset'"),
        (run_of("classification", class_result() | {"metrics": 3}), "results lack"),
        (run_of("classification", {"dataset": "a", "status": "skipped", "reason": "b"}), "nothing to compare"),
        (run_of("classification"), "nothing to compare"),
    ],
)
def test_damaged_results_are_named(tmp_path, capsys, content, message):
    save(tmp_path / "bad", content)
    assert main(["report", str(tmp_path / "bad"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "bad" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_places_without_results_are_named(tmp_path, capsys):
    for places, message in (([], "runs: none given"), ([str(tmp_path / "nowhere")], "no result.json")):
        assert main(["report", *places, "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
