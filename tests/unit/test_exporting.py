"""`python -m rwkv_clip.export`: the model's features from files of standard operators; what has none is refused."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import rwkv_clip
from rwkv_clip import export as command
from rwkv_clip.checkpoint import save_checkpoint
from rwkv_clip.exporting import graphs, parts
from rwkv_clip.factory import Loaded, load_for_inference

RWKV_IMAGE = {"image_size": [32, 32], "patch": 16, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
RWKV_TEXT = {"context": 12, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
VIT = {"kind": "open_clip", "image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
RESNET = {"kind": "open_clip", "image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
BERT = {"kind": "bert", "context": 12, "width": 32, "depth": 2, "heads": 2, "ffn_width": 48, "positions": 20}
CLIP_TEXT = {"kind": "open_clip", "context_length": 12, "width": 32, "heads": 2, "layers": 2}
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
}
MODELS = {
    "rwkv": {"image": RWKV_IMAGE, "text": RWKV_TEXT},
    "rwkv, class token, projection": {
        "image": RWKV_IMAGE | {"class_token": True, "image_size": [48, 40]},
        "text": RWKV_TEXT,
        "embed_dim": 24,
    },
    "vit and bert": {"image": VIT | {"quick_gelu": True}, "text": BERT, "embed_dim": 24, "resize_mode": "squash"},
    "rwkv and bert": {"image": RWKV_IMAGE, "text": BERT, "embed_dim": 24},
    "resnet and clip": {"image": RESNET, "text": CLIP_TEXT, "embed_dim": 24},
    "open_clip": {"open_clip": OPEN_CLIP},
    "open_clip, custom text": {"open_clip": OPEN_CLIP | {"custom_text": True}},
}
TEXTS = ["a dog", "", "two cats on a very long sofa that does not end within twelve tokens of any tokenizer"]


def write(folder, spec):
    """A checkpoint of random weights."""
    torch.manual_seed(5)
    model = rwkv_clip.create_model(spec)
    state = {k: v + 0.05 * torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    facts = {"model": "mine", "spec": model.spec.to_json()}
    return save_checkpoint(folder / "checkpoints", 7, state, {}, facts, keep=2)


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["export", *map(str, arguments)])
    return command.main()


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
    pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    return pytest.importorskip("onnx", reason="needs the extra `onnx`")


@pytest.fixture(scope="module")
def exported(new_folder):
    """Name of a model -> (what `load_for_inference` gives, exported folder with int8 files); made once."""
    pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
    pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    made = {}

    def get(name):
        if name not in made:
            folder = new_folder("model")
            checkpoint = write(folder, MODELS[name])
            command.export(checkpoint, folder / "out", command.Wanted("onnx", quantize="dynamic"))
            made[name] = load_for_inference(checkpoint), folder / "out"
        return made[name]

    return get


def open_session(file):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def close(found, expected, least=0.99999):
    return torch.cosine_similarity(found.double(), expected.double()).min() > least


# ---- every family ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_files_give_the_models_features(exported, name):
    loaded, folder = exported(name)
    size, tokenizer = loaded.model.spec.image_size, loaded.tokenizer
    with torch.no_grad():
        for batch in (1, 2, 7):
            pictures = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
            assert close(open_session(folder / "vision_model.onnx")(pictures), loaded.model.encode_image(pictures))
        tokens = tokenizer(TEXTS)  # padded, empty, cut
        assert close(open_session(folder / "text_model.onnx")(tokens), loaded.model.encode_text(tokens))


@pytest.mark.parametrize("name", MODELS)
def test_only_standard_operators(exported, onnx, name):
    _, folder = exported(name)
    for file in folder.glob("*.onnx"):
        model = onnx.load(str(file))
        onnx.checker.check_model(model)
        found = [*model.graph.node, *(node for function in model.functions for node in function.node)]
        assert {node.domain for node in found} <= {""}
    assert {file.name for file in folder.iterdir()} == {
        *(f"{part}_model{kind}.onnx" for part in ("vision", "text") for kind in ("", "_int8")),
        "export.json",
    }


@pytest.mark.parametrize("name", ["rwkv", "vit and bert", "open_clip"])
def test_facts_make_the_right_inputs(exported, name):
    """What another program does with export.json alone: the picture is as large as the model wants it."""
    loaded, folder = exported(name)
    facts = json.loads((folder / "export.json").read_text())
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    about = facts["image"]
    values = (pixels * about["rescale"] - np.array(about["mean"])) / np.array(about["std"])
    picture = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)
    torch.testing.assert_close(picture, loaded.preprocess(Image.fromarray(pixels)), rtol=1e-4, atol=1e-5)
    assert about["size"] == [32, 32] and not facts["normalized"]
    row = loaded.tokenizer("")[0].tolist()
    text = facts["text"]
    assert row == [text["start"], text["end"]] + [text["padding"]] * (text["context"] - 2)
    assert facts["logit_scale"] == pytest.approx(loaded.model.logit_scale.exp().item())
    assert facts["files"]["vision_model.onnx"]["cosine"] > 0.99999


@pytest.mark.parametrize("name", ["rwkv", "rwkv, class token, projection"])
def test_any_size(tmp_path, onnx, name):
    checkpoint = write(tmp_path, MODELS[name])
    command.export(checkpoint, tmp_path / "out", command.Wanted("onnx", image_size="any"))
    model, run = load_for_inference(checkpoint).model, open_session(tmp_path / "out" / "vision_model.onnx")
    with torch.no_grad():
        for height, width in ((32, 32), (16, 16), (17, 50), (160, 170), (5, 400)):
            pictures = torch.randn(2, 3, height, width)
            assert close(run(pictures), model.encode_image(pictures)), (height, width)


@pytest.mark.parametrize("way", ["bicubic", "bilinear"])
def test_how_pictures_are_resized_is_what_the_model_says(way):
    model = rwkv_clip.create_model({"open_clip": OPEN_CLIP, "interpolation": way})
    loaded = Loaded(model, None, model.spec.tokenizer(), "mine", "", "fp32")
    assert command.collect_facts(loaded, None)["image"]["interpolation"] == way


def test_another_size(tmp_path, onnx):
    checkpoint = write(tmp_path, MODELS["rwkv"])
    command.export(checkpoint, tmp_path / "out", command.Wanted("onnx", image_size=72))
    pictures, model = torch.randn(2, 3, 72, 72), load_for_inference(checkpoint).model
    with torch.no_grad():
        assert close(open_session(tmp_path / "out" / "vision_model.onnx")(pictures), model.encode_image(pictures))


def test_bert_reads_shorter_rows(exported):
    loaded, folder = exported("vit and bert")
    tokens = loaded.tokenizer(["好", "两只狗"])
    run = open_session(folder / "text_model.onnx")
    torch.testing.assert_close(run(tokens[:, :6].contiguous()), run(tokens), rtol=1e-4, atol=1e-5)


def test_other_texts_must_have_the_whole_context(exported):
    _, folder = exported("rwkv")
    with pytest.raises(Exception, match="Got invalid dimensions for input: input_ids"):
        open_session(folder / "text_model.onnx")(torch.ones(1, 5, dtype=torch.int64))


# ---- torch.export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, size", [("rwkv", None), ("rwkv", "any"), ("vit and bert", None)])
def test_programs_of_torch_export(tmp_path, name, size):
    checkpoint = write(tmp_path, MODELS[name])
    lines = command.export(checkpoint, tmp_path / "out", command.Wanted("torch-export", image_size=size))
    assert len(lines) == 2 and "least cosine 1.0000" in lines[0]
    program = torch.export.load(str(tmp_path / "out" / "vision_model.pt2"))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "rwkv_clip" in target]
    model = load_for_inference(checkpoint).model
    with torch.no_grad():
        for batch, *shape in (
            ((3, 50, 70), (1, 16, 16), (2, 160, 170), (1, 5, 400)) if size else ((1, 32, 32), (3, 32, 32))
        ):
            pictures = torch.randn(batch, 3, *shape)
            assert close(program.module()(pictures), model.encode_image(pictures)), shape


# ---- int8 ------------------------------------------------------------------------------------------------------------


def wide(name):
    """The model with products that are worth converting."""
    return {"image": MODELS[name]["image"] | {"width": 128}, "text": MODELS[name]["text"] | {"width": 128}}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = [{"image": f"{i}.png", "captions": [f"picture number {i}", "noise"]} for i in range(6)]
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("way", ["dynamic", "static with texts", "static"])
def test_int8_runs_and_stays_near(tmp_path, onnx, pictures, way):
    checkpoint = write(tmp_path, wide("rwkv"))
    source = {"static": str(pictures), "static with texts": str(pictures / "set.jsonl")}.get(way)
    wanted = command.Wanted("onnx", quantize=way.split()[0], calibration=source)
    lines = command.export(checkpoint, tmp_path / "out", wanted)
    about = json.loads((tmp_path / "out" / "export.json").read_text())["files"]
    assert about["vision_model_int8.onnx"]["quantized"] == way.split()[0]
    assert about["text_model_int8.onnx"]["quantized"] == ("static" if way == "static with texts" else "dynamic")
    assert sum("products in int8" in line for line in lines) == 2
    loaded = load_for_inference(checkpoint)
    picture = torch.stack([loaded.preprocess(Image.open(pictures / f"{i}.png")) for i in range(3)])
    found = open_session(tmp_path / "out" / "vision_model_int8.onnx")(picture)
    with torch.no_grad():
        cosine = torch.cosine_similarity(found, loaded.model.encode_image(picture))
    assert cosine.min() > 0.98 and cosine.max() < 1 - 1e-7
    kinds = {node.op_type for node in onnx.load(str(tmp_path / "out" / "vision_model_int8.onnx")).graph.node}
    assert ("MatMulInteger" if way == "dynamic" else "QuantizeLinear") in kinds
    for part in ("vision", "text"):
        kinds = optimize(onnx, tmp_path / "out" / f"{part}_model_int8.onnx", tmp_path / "optimized.onnx")
        assert "DequantizeLinear" not in kinds  # ONNX Runtime has made a step in int8 of every one of them


def optimize(onnx, path, made):
    """Kinds of the steps that ONNX Runtime runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(made)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(str(made)).graph.node}


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            "vit and bert",
            ["torch-export", "--image-size", "any"],
            "image_size: any is not possible for RWKV-CLIP, whose",
        ),
        ("open_clip", ["torch-export", "--image-size", "64"], "VisionTransformer has positions for 32 x 32 only"),
        ("rwkv", ["torch-export", "--image-size", "0"], "image_size: '0' is neither a number of pixels"),
        ("rwkv", ["torch-export", "--quantize", "dynamic"], "quantize: torch-export has no int8"),
        ("rwkv", ["onnx", "--quantize", "static"], "calibration: missing"),
        ("rwkv", ["onnx", "--calibration", "x"], "calibration: only --quantize static reads it"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, model, arguments, message):
    checkpoint = write(tmp_path, MODELS[model])
    assert run_command(monkeypatch, *arguments, "--checkpoint", checkpoint, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_a_tower_that_cannot_be_recorded_is_named(tmp_path, monkeypatch, capsys):
    """A data-dependent branch, as some towers of other libraries have."""

    def encode_text(self, text, normalize=False):
        return self.text_model(text) if text.sum() > 0 else self.text_model(text + 1)

    monkeypatch.setattr("rwkv_clip.models.two_tower.RWKVCLIP.encode_text", encode_text)
    checkpoint = write(tmp_path, MODELS["vit and bert"])
    assert run_command(monkeypatch, "torch-export", "--checkpoint", checkpoint, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "text tower: torch.export cannot record it (" in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_files_that_differ_from_the_model_are_refused(tmp_path, monkeypatch, capsys):
    plan = parts.FlatTextTower.forward
    monkeypatch.setattr(parts.FlatTextTower, "forward", lambda self, input_ids: plan(self, input_ids.flip(1)))
    checkpoint = write(tmp_path, MODELS["rwkv"])
    assert run_command(monkeypatch, "torch-export", "--checkpoint", checkpoint, "--output", tmp_path / "out") == 2
    assert "text_model.pt2: its features are not the model's (least cosine" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_an_existing_folder_stays(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    assert run_command(monkeypatch, "torch-export", "--checkpoint", "x", "--output", tmp_path / "out") == 2
    assert "exists; name a new folder" in capsys.readouterr().err


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    checkpoint = write(tmp_path, MODELS["rwkv"])
    assert run_command(monkeypatch, "onnx", "--checkpoint", checkpoint, "--output", tmp_path / "out") == 2
    assert "pip install -e '.[onnx]'" in capsys.readouterr().err
    assert graphs.OPSET == 18 and os.listdir(tmp_path) == ["checkpoints"]
