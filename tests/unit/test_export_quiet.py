"""What is exported is written and opened without a word from ONNX Runtime; pictures of another size are possible."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rwkv_clip
from rwkv_clip import export as command
from rwkv_clip.config import ConfigError

pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
WIDTHS = {"narrow": 32, "wide": 128}  # products from 128 on become int8
VIT = {"kind": "open_clip", "image_size": 32, "layers": 1, "patch_size": 8, "head_width": 16}


def make(kind: str, width: int) -> dict:
    rwkv = {"image_size": [32, 32], "patch": 16, "width": width, "depth": 1, "heads": 2, "ffn_width": width}
    bert = {"kind": "bert", "context": 12, "width": width, "depth": 1, "heads": 2, "ffn_width": width}
    if kind == "RWKV":
        return {"image": rwkv, "text": {"context": 12, "width": width, "depth": 1, "heads": 2, "ffn_width": width}}
    return {"image": {**VIT, "width": width}, "text": bert, "embed_dim": 24}


@pytest.fixture(scope="module")
def pictures(new_folder) -> Path:
    folder = new_folder("pictures")
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def run(code: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("kind", "way", "width"),
    [
        *[("RWKV", "dynamic", "wide"), ("RWKV", "static", "wide"), ("RWKV", "static", "narrow")],
        *[("ViT and BERT", "static", "wide"), ("ViT and BERT", "dynamic", "narrow")],
    ],
)
def test_nothing_is_printed(kind, way, width, pictures, tmp_path):
    """By the command itself, and by a program that opens its files with ONNX Runtime's own settings."""
    model = rwkv_clip.create_model(make(kind, WIDTHS[width]))
    folder = rwkv_clip.save_pretrained(model, tmp_path / "model")
    options = ["--quantize", way, *(["--calibration", pictures] if way == "static" else [])]
    code = "import sys; from rwkv_clip.export import main; sys.exit(main())"
    done = run(code, "onnx", "--checkpoint", folder, "--output", tmp_path / "out", *options)
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 4
    files = sorted((tmp_path / "out").glob("*.onnx"))
    open_all = (
        "import sys, onnxruntime\n"
        "for file in sys.argv[1:]:\n"
        "    onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])"
    )
    done = run(open_all, *files)
    assert len(files) == 4 and (done.returncode, done.stdout, done.stderr) == (0, "", "")
    about = json.loads((tmp_path / "out" / "export.json").read_text())["files"]
    import onnx

    for file in files:
        if "int8" in file.name:
            kinds = [node.op_type for node in onnx.load(str(file)).graph.node]
            converted = kinds.count("MatMulInteger") + kinds.count("DequantizeLinear")
            assert bool(about[file.name]["products"]) == bool(converted) == (width == "wide")


def test_a_vit_of_another_size_is_another_model(tmp_path):
    """A file of any size is refused in a line; one of another size is made from a model of that size."""
    model = rwkv_clip.create_model(make("ViT and BERT", 32))
    folder = rwkv_clip.save_pretrained(model, tmp_path / "model")
    for size, remedy in (("any", "export a file for each size"), (48, "force_image_size")):
        with pytest.raises(
            ConfigError, match=f"VisionTransformer has positions for 32 x 32 only; .*{remedy}"
        ) as caught:
            command.export(folder, tmp_path / "out", command.Wanted("onnx", image_size=size))
        assert "\n" not in str(caught.value)
    larger = rwkv_clip.create_model(folder, force_image_size=48)
    other = rwkv_clip.save_pretrained(larger, tmp_path / "larger")
    command.export(other, tmp_path / "out", command.Wanted("onnx"))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "vision_model.onnx"))
    pixels = torch.randn(2, 3, 48, 48)
    (found,) = session.run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), larger.encode_image(pixels), rtol=1e-4, atol=1e-5)
