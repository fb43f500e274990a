"""Collections that others wrote, exports, engines and the commands."""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.color_model import COLORS, save_color, use_color_model
from rwkv_clip.eval.main import main as evaluate
from rwkv_clip.files import DamagedError
from rwkv_clip.search import __main__ as command
from rwkv_clip.search.collection import Collection
from rwkv_clip.search.engines import EngineVectors, attach_engine
from rwkv_clip.search.pictures import NoPicture
from rwkv_clip.search.rows import MOST_VALUES, Fields, ListedRows, make_row
from rwkv_clip.search.settings import name_index, parse_conditions
from rwkv_clip.search.vectors import Vectors, map_matrix, write_vectors

NAMES = sorted(COLORS)


@pytest.fixture
def model(monkeypatch):
    return use_color_model(monkeypatch).model


def unit(count: int, width: int = 16, seed: int = 0) -> np.ndarray:
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors).numpy()


def make_collection(count: int = 400) -> Collection:
    """Random vectors; half of the rows are repeated, so that ties abound."""
    vectors = np.concatenate([unit(count // 2), unit(count // 2)])
    rows = [make_row(f"{i}.png", f"text {i}", {"year": 2000 + i % 3, "odd": bool(i % 2)}, {}) for i in range(count)]
    return Collection("made", ListedRows(rows, None), Vectors.of([vectors]), None)


def save_pictures(folder: Path) -> Path:
    for color in NAMES:
        save_color(folder / f"{color}.png", color)
    return folder


# ---- vectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 9000])
def test_vectors_on_disk_are_those_in_memory(tmp_path, count):
    matrix, queries = unit(count), unit(3, seed=1)
    write_vectors(tmp_path, [matrix[:4000], matrix[4000:]], count, 16)
    found = Vectors.open(tmp_path)
    assert (len(found), found.width) == (count, 16)
    for other in (Vectors.of([matrix]), Vectors.of([matrix[: count // 3], matrix[count // 3 :]])):
        for a, b in zip(found.search(queries, 7), other.search(queries, 7)):
            assert np.array_equal(a, b)
    assert np.array_equal(np.concatenate([*found.blocks(), matrix[:0]]), matrix)
    wanted = np.random.default_rng(0).integers(0, max(count, 1), 50) if count else np.empty(0, np.int64)
    assert np.array_equal(found.take(wanted), matrix[wanted])
    with pytest.raises(IndexError):
        found.take([count])


def test_half_precision_of_others_is_exact_in_itself(tmp_path):
    half = unit(3000).astype(np.float16)
    found = Vectors.of([half])
    rows, scores = found.search(unit(1, seed=2), 5)
    wanted = half.astype(np.float64) @ unit(1, seed=2)[0]
    assert rows[0].tolist() == np.argsort(-wanted, kind="stable")[:5].tolist()
    np.testing.assert_allclose(scores[0], np.sort(wanted)[::-1][:5], atol=1e-7)


@pytest.mark.parametrize(
    "array", [np.zeros(5, np.float32), np.zeros((5, 2), np.float64), np.zeros((2, 2, 2), np.float32)]
)
def test_other_matrices_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DamagedError):
        map_matrix(tmp_path / "a.npy")


# ---- fields ----------------------------------------------------------------------------------------------------------


def test_fields_with_few_values_narrow_a_search():
    rows = [{"fields": {"a": i % 2, "many": i, "one": 1, "mixed": [1, True, "1", 1.5][i % 4]}} for i in range(200)]
    found = Fields.survey(rows, len(rows))
    assert found.values == {"a": [0, 1], "mixed": [True, 1.5, 1, "1"]} or set(found.values) == {"a", "mixed"}
    assert found.select({"a": ["1"]}).sum() == found.select({"a": [1]}).sum() == 100
    assert found.select({"a": ["0"], "mixed": ["1.5"]}).sum() == 0
    assert found.select({"a": ["0", "1"]}).all() and not found.select({"a": []}).any()
    assert MOST_VALUES < 200 and "many" not in found.values


def test_conditions_of_the_command_line():
    assert parse_conditions(("a=1", "a=2", "b=x=y", "c=")) == {"a": ["1", "2"], "b": ["x=y"], "c": [""]}
    for entry in ("a", "=1"):
        with pytest.raises(ValueError, match="FIELD=VALUE"):
            parse_conditions((entry,))


def test_names_of_indices(tmp_path):
    assert name_index("a/b c.tar").startswith("b-c-") and name_index("x/p") != name_index("y/p")
    assert name_index("a/b c.tar") == name_index("./a/b c.tar") and "/" not in name_index("/")


# ---- features and clip-retrieval -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "npy", "jsonl"])
def test_features_of_the_evaluation_are_a_collection(tmp_path, model, form):
    save_pictures(tmp_path / "data" / "images")
    rows = [{"image": f"{c}.png", "captions": [c, f"a {c} thing"]} for c in NAMES]
    (tmp_path / "data" / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--data", str(tmp_path / "data" / "set.jsonl"), "--logs", str(tmp_path), "--name", "out"]
    arguments += ["--device", "cpu", "--form", form, "--checkpoint", "run"]
    assert evaluate(["features", *arguments]) == 0
    found = Collection.open(tmp_path / "out", device="cpu")
    for row, color in enumerate(NAMES):
        assert found.vectors.search(found.model.encode_text(color)[None], 1)[0].tolist() == [[row]]
        assert found.describe(row) == {"id": f"{color}.png", "text": f"{color}\na {color} thing", "fields": {}}
        assert found.picture(row) == (tmp_path / "data" / "images" / f"{color}.png").read_bytes()


def test_clip_retrievals_files_there_and_back(tmp_path, model):
    arrow = pytest.importorskip("pyarrow.parquet", reason="pip install -e '.[parquet]'")
    collection = make_collection()
    save_color(tmp_path / "pictures" / "3.png", "red")
    folder = tmp_path / "out"
    from rwkv_clip.search.clip_retrieval import write_clip_retrieval

    folder.mkdir()
    write_clip_retrieval(collection, folder)
    assert np.load(folder / "img_emb" / "img_emb_0.npy").dtype == np.float16
    assert arrow.read_table(folder / "metadata" / "metadata_0.parquet").column_names[:2] == ["image_path", "caption"]
    found = Collection.open(folder, images=tmp_path / "pictures")
    assert len(found) == len(collection) and found.model is None
    for row in (0, 3, 399):
        assert found.describe(row) == collection.describe(row)
    assert found.filters() == collection.filters() and found.picture(3)
    with pytest.raises(NoPicture):
        found.picture(4)
    rows, _ = found.vectors.search(collection.vectors.take([7]), 2)
    assert rows.tolist() == [[7, 207]]


def test_clip_retrievals_files_in_several_parts(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pip install -e '.[parquet]'")
    from pyarrow import parquet

    matrix = unit(33).astype(np.float16)
    for name in ("img_emb", "metadata", "text_emb"):
        (tmp_path / name).mkdir()
    for number in range(11):  # 10 comes after 9, not after 1
        rows = range(3 * number, 3 * number + 3)
        np.save(tmp_path / "img_emb" / f"img_emb_{number}.npy", matrix[rows])
        table = arrow.table(
            {"image_path": [f"/abs/{i}.jpg" for i in rows], "caption": [None] * 3, "key": [f"{i:09d}" for i in rows]}
        )
        parquet.write_table(table, tmp_path / "metadata" / f"metadata_{number}.parquet")
    found = Collection.open(tmp_path)
    for row in range(33):
        assert found.describe(row) == {"id": f"{row:09d}", "text": "", "fields": {}}
        assert found.vectors.search(matrix[[row]].astype(np.float32), 1)[0].tolist() == [[row]]
        with pytest.raises(NoPicture):
            found.picture(row)
    (tmp_path / "metadata" / "metadata_3.parquet").unlink()
    with pytest.raises(DamagedError, match="30 rows of metadata, 33"):
        Collection.open(tmp_path)


@pytest.mark.parametrize("files", [[], ["about.json"], ["images.npy"]])
def test_other_folders_are_refused(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=r"holds no index|is not of schema|is not a readable"):
        Collection.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Collection.open(tmp_path / "nowhere")


# ---- engines ---------------------------------------------------------------------------------------------------------


def make_engine(kind: str, collection: Collection, folder: Path) -> EngineVectors:
    package, extra = {
        "qdrant": ("qdrant_client", "qdrant"),
        "lancedb": ("lancedb", "lancedb"),
        "faiss": ("faiss", "faiss"),
        "usearch": ("usearch.index", "usearch"),
    }[kind]
    pytest.importorskip(package, reason=f"needs the extra `{extra}`")
    if kind in ("faiss", "usearch"):
        return attach_engine(collection.vectors, "faiss:Flat" if kind == "faiss" else kind, "made")
    if kind == "qdrant":
        from rwkv_clip.search.qdrant import write_qdrant as write
    else:
        from rwkv_clip.search.lancedb import write_lancedb as write
    write(collection, str(folder / "store"), "made")
    with pytest.raises(ValueError, match=r"has a (collection|table) 'made' already"):
        write(collection, str(folder / "store"), "made")
    with pytest.raises(ValueError, match=r"has no (collection|table) 'other'"):
        attach_engine(collection.vectors, f"{kind}:{folder / 'store'}", "other")
    return attach_engine(collection.vectors, f"{kind}:{folder / 'store'}", "made")


@pytest.mark.parametrize("kind", ["qdrant", "lancedb", "faiss", "usearch"])
def test_engines_find_what_the_exact_search_finds(tmp_path, kind):
    collection = make_collection()
    engine = make_engine(kind, collection, tmp_path)
    queries = unit(4, seed=5)
    for k, allowed in ((1, None), (10, None), (10, collection.select({"year": [2001]})), (500, None)):
        exact, scores = collection.vectors.search(queries, k, allowed)
        rows, found = engine.search(queries, k, allowed)
        assert rows.shape == exact.shape and rows.dtype == np.int64
        tolerance = 2e-3 if kind == "usearch" else 1e-5
        np.testing.assert_allclose(found, scores, atol=tolerance)  # equal ones in any order
        if allowed is not None:
            assert allowed[rows].all()


@pytest.mark.parametrize("kind", ["qdrant", "lancedb"])
def test_an_engine_that_is_not_there(tmp_path, kind):
    pytest.importorskip({"qdrant": "qdrant_client"}.get(kind, kind), reason=f"needs the extra `{kind}`")
    with pytest.raises(ValueError, match=rf"nowhere: no such folder; write it: search export --to {kind}"):
        attach_engine(make_collection(20).vectors, f"{kind}:{tmp_path / 'nowhere'}", "made")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Failed to obtain server version")
def test_a_server_that_does_not_answer_is_named_in_a_line(tmp_path, model, free_port, capsys):
    pytest.importorskip("qdrant_client", reason="needs the extra `qdrant`")
    save_pictures(tmp_path / "pictures")
    assert (
        run("index", "--images", str(tmp_path / "pictures"), "--checkpoint", "run", "--output", str(tmp_path / "i"))
        == 0
    )
    target = f"http://127.0.0.1:{free_port}"
    for arguments in (
        ["export", "--to", "qdrant", "--target", target],
        ["query", "--text", "a", "--engine", f"qdrant:{target}"],
    ):
        capsys.readouterr()
        assert run(*arguments, "--features", str(tmp_path / "i"), "--device", "cpu") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"search: qdrant: {target} does not do") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("engine", "name", "value"),
    [
        ("faiss:HNSW32", "efSearch", 256),
        ("faiss:HNSW32:efSearch=7", "efSearch", 7),
        ("faiss:IVF40,SQfp16", "nprobe", 32),
        ("faiss:IVF300,Flat", "nprobe", 37),
        ("faiss:PCA8,IVF40,Flat:nprobe=3", "nprobe", 3),
    ],
)
def test_how_widely_faiss_searches(engine, name, value):
    faiss = pytest.importorskip("faiss", reason="needs the extra `faiss`")
    index = attach_engine(Vectors.of([unit(400)]), engine, "")._engine._index
    found = faiss.try_extract_index_ivf(index) if name == "nprobe" else index.hnsw
    assert getattr(found, name) == value


def test_what_faiss_cannot_make_is_said_in_its_own_words():
    pytest.importorskip("faiss", reason="needs the extra `faiss`")
    vectors = make_collection(20).vectors
    for factory, reason in (
        ("Foo", "could not parse index string Foo"),
        ("IVF64,Flat", "Number of training points .*"),
    ):
        with pytest.raises(ValueError, match=rf"engine: faiss cannot make '{factory}' of 20 rows \({reason}\); try"):
            attach_engine(vectors, f"faiss:{factory}", "x")


@pytest.mark.parametrize("engine", ["", "exactly", "qdrant", "lancedb:", "pinecone:x"])
def test_unknown_engines(engine):
    with pytest.raises(ValueError, match=r"engine: .* is none of exact, faiss"):
        attach_engine(make_collection().vectors, engine, "x")


def test_too_few_allowed_are_asked_for_again():
    asked = []

    class Slow:
        """Knows the order, and counts."""

        def find(self, query, k):
            asked.append(k)
            return np.arange(min(k, 1000)) - 3, np.linspace(1, 0, min(k, 1000))

    vectors = Vectors.of([unit(900)])
    allowed = np.zeros(900, bool)
    allowed[[500, 700]] = True
    rows, _ = EngineVectors(vectors, Slow()).search(unit(1), 2, allowed)
    assert rows.tolist() == [[500, 700]] and asked == [2, 8, 32, 128, 512, 900]
    assert EngineVectors(vectors, Slow()).search(unit(1), 5)[0].tolist() == [[0, 1, 2, 3, 4]]  # rows below 0 are none


# ---- commands --------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    return command.main([*arguments])


def test_the_commands(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "pictures")
    assert run("index", "--images", "pictures", "--checkpoint", "run", "--device", "cpu") == 0
    folder = capsys.readouterr().out.split(": ")[1]
    assert Path(folder).parent == Path("logs/search") and (tmp_path / folder / "about.json").is_file()
    assert run("query", "--features", folder, "--text", "red", "--k", "2", "--json", "--device", "cpu") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["rank"] for line in lines] == [1, 2] and lines[0]["id"] == "red.png"
    both = ["--text", "red", "--picture", "pictures/blue.png"]
    assert run("query", "--features", folder, *both, "--weight", "1", "--device", "cpu") == 0
    assert capsys.readouterr().out.split()[2] == "blue.png"
    assert run("query", "--images", "pictures", "--checkpoint", "run", "--text", "teal", "--device", "cpu") == 0
    assert "0 encoded" in (out := capsys.readouterr().out) and "teal.png" in out.splitlines()[1]
    pytest.importorskip("pyarrow", reason="pip install -e '.[parquet]'")
    assert run("export", "--features", folder, "--to", "clip-retrieval", "--target", "out") == 0
    assert (tmp_path / "out" / "img_emb" / "img_emb_0.npy").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index"], "images: not set"),
        (["index", "--images", "x"], "checkpoint: not set"),
        (["index", "--images", "nothing", "--checkpoint", "run"], "names no file"),
        (["query", "--text", "a"], "--features FOLDER, one of the two"),
        (["query", "--features", "nothing"], "give --text or --picture"),
        (["query", "--features", "nothing", "--text", "a"], "nothing: no such folder"),
        (["query", "--features", "nothing", "--text", "a", "--where", "b"], "'b' is not FIELD=VALUE"),
        (["query", "--features", "nothing", "--text", "a", "--k", "0"], "k:"),
    ],
)
def test_mistakes_end_in_a_line(arguments, message, capsys, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("search: ") and error.count("\n") == 1


@pytest.mark.parametrize("name", ["qdrant_client", "lancedb", "faiss", "usearch"])
def test_without_a_package_its_extra_is_named(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    kind = name.removesuffix("_client")
    with pytest.raises(ImportError, match=rf"{kind}"):
        attach_engine(make_collection(20).vectors, f"{kind}:{tmp_path}", "x")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)])
def test_a_signal_is_said(number, code, monkeypatch, capsys, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt(number)

    monkeypatch.setattr("rwkv_clip.search.commands.index_pictures", stop)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        assert run("index", "--images", str(tmp_path), "--checkpoint", "run") == code
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert "goes on where it was" in capsys.readouterr().err


def test_hostile_texts_are_printed_on_one_line(tmp_path, model, capsys):
    Image.new("RGB", (8, 8), COLORS["red"]).save(tmp_path / "a\x1b[31m\nb.png")
    (tmp_path / "a\x1b[31m\nb.txt").write_text("one\ntwo\x07\u202e")
    arguments = ["--images", str(tmp_path), "--checkpoint", "run", "--output", str(tmp_path.parent / "index-h")]
    assert run("query", *arguments, "--text", "red", "--device", "cpu") == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 and shown[1].isprintable()
