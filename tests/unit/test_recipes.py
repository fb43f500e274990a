"""Every script in shell/, run as a user runs it, with a few steps on tiny data."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.ranks import run_ranks
from helpers.recipes import ROOT, needs_installation, script
from helpers.tiny import make_tiny
from rwkv_clip.checkpoint import read_weights
from rwkv_clip.config import parse, to_dict
from rwkv_clip.data.build import build_records
from rwkv_clip.dist import leave_world
from rwkv_clip.eval.main import main as evaluate
from rwkv_clip.factory import create_model
from rwkv_clip.training.main import read_command_line, run
from rwkv_clip.training.settings import Settings, load_settings

QUICK = ["--max-steps", "2", "--workers", "0", "--device", "cpu", "--precision", "fp32", "--batch-size", "4"]

pytestmark = needs_installation


def test_recipe_trains_and_both_test_scripts_evaluate(tmp_path, free_port):
    data = make_tiny(tmp_path)
    run = tmp_path / "logs" / "run"
    recipe = {"TRAIN_DATA": data["train_data"], "VAL_DATA": data["val_data"], "OUTPUT": str(run)}
    recipe |= {"NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port)}
    arguments = ["--model", data["model"], "--log-every-n-steps", "1", *QUICK]
    out = script("train_RWKV_CLIP_B32_YFCC15M.sh", *arguments, **recipe)
    assert "step 2/2" in out and (run / "training.png").exists()
    again = script("train_RWKV_CLIP_B32_YFCC15M.sh", *arguments, **recipe)
    assert "resumed at step 2" in again

    out = script("test_zero_shot_retrieval.sh", CHECKPOINT=str(run), DATA=data["val_data"])
    assert "mean recall" in out and list(run.glob("eval/*/retrieval.png"))
    classes = tmp_path / "classes"
    for i, name in enumerate(("stripes", "plain")):
        (classes / name).mkdir(parents=True)
        shutil.copy(tmp_path / "images" / f"{i}.jpg", classes / name)
    out = script("test_zero_shot_classificaiton.sh", CHECKPOINT=str(run), DATA_ROOT=str(classes))
    assert "top-1" in out and list(run.glob("eval/*classification*/result.json"))
    for part in ("train", "test"):
        shutil.copytree(classes, tmp_path / "probe" / part)
    out = script("test_linear_probe.sh", "--l2", "1", CHECKPOINT=str(run), DATA_ROOT=str(tmp_path / "probe"))
    assert "penalty" in out and list(run.glob("eval/*linear_probe*/result.json")) and list(run.glob("eval/cache/*/*"))


def test_demo_without_settings(tmp_path):
    """The stranger's command, but for the number of steps and where things go."""
    out = script(
        "train_RWKV_CLIP_B32_YFCC15M.sh",
        *("--max-steps", "2", "--batch-size", "8", "--workers", "0"),
        DEMO_DATA=str(tmp_path / "demo"),
        OUTPUT=str(tmp_path / "demo-run"),
    )
    assert "TRAIN_DATA is not set" in out and "classification/shape" in out and "To train the real thing" in out
    assert (tmp_path / "demo-run" / "training.png").exists() and (tmp_path / "demo-run" / "retrieval.png").exists()


# ---- in a copy of shell/ where torchrun and python only note what they are called with


@pytest.fixture
def clone(tmp_path) -> Path:
    copy = tmp_path / "clone"
    shutil.copytree(ROOT / "shell", copy / "shell")
    (copy / "shell" / "setup.sh").write_text('cd "$(dirname "${BASH_SOURCE[0]}")/.."\nexport PATH="$PWD/bin:$PATH"\n')
    for name in ("x.rec", "data/demo/retrieval.jsonl"):  # what the scripts look for before they install
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    (copy / "bin").mkdir()
    for name in ("torchrun", "python"):
        (copy / "bin" / name).write_text("""#!/usr/bin/env bash\n(IFS=$'\\x1f'; echo "$*") >> "$CALLS"\n""")
        (copy / "bin" / name).chmod(0o755)
    return copy


def called(clone: Path, name: str, *arguments: str, expect: int = 0, **environment: str) -> list[list[str]]:
    """What a script of the copy has called, each with the arguments; with `expect`, what it said instead."""
    names = ("CHECKPOINT", "DATA", "DATA_ROOT", "TRAIN_DATA", "OUTPUT", "NPROC_PER_NODE")
    own = {k: v for k, v in os.environ.items() if k not in names} | {"CALLS": str(clone / "calls")} | environment
    command = ["bash", str(clone / "shell" / name), *arguments]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=600)
    assert done.returncode == expect, done.stderr
    if expect:
        return [[done.stderr]]
    lines = (clone / "calls").read_text().splitlines()
    (clone / "calls").unlink()
    return [line.split("\x1f") for line in lines]


METHODS = {  # recipe -> preset, default run folder, beginning of its demo's, and losses that its log shows
    "train_RWKV_CLIP_B32_YFCC15M.sh": ("rwkv-clip-b32-yfcc15m", "RWKV_CLIP_B32_YFCC15M", "rwkv-clip", set()),
    "train_ALIP_B32_YFCC15M.sh": ("alip-b32-yfcc15m", "ALIP_B32_YFCC15M", "alip", {"raw_loss", "caption_loss"}),
    "train_CLIP_B32_YFCC15M.sh": ("clip-b32-yfcc15m", "CLIP_B32_YFCC15M", "clip", set()),
}
FINETUNES = {  # the same of fine-tuning, with the records' model and published numbers
    "finetune_CN_CLIP_B16_MUGE.sh": ("cn-clip-b16-muge", "CN_CLIP_B16_MUGE", 5e-5, 128, 3),
    "finetune_CN_CLIP_B16_Flickr30k_CN.sh": ("cn-clip-b16-flickr30k-cn", "CN_CLIP_B16_Flickr30k_CN", 5e-5, 128, 3),
    "finetune_CN_CLIP_B16_COCO_CN.sh": ("cn-clip-b16-coco-cn", "CN_CLIP_B16_COCO_CN", 3e-5, 1024, 20),
}
VIT = {  # for the records of `make_tiny`
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def train(arguments: list[str]) -> None:
    run(read_command_line(arguments))
    leave_world()


@pytest.mark.parametrize("recipe", list(METHODS)[1:])
def test_recipe_trains_on_two_ranks_resumes_and_is_evaluated(clone, tmp_path, recipe):
    """By its preset, fp16 and scaler included. What the scripts would start runs in processes that exist already."""
    data, folder = make_tiny(tmp_path), tmp_path / "logs" / "run"
    (tmp_path / "vit.json").write_text(json.dumps(VIT))
    arguments = ["--model", str(tmp_path / "vit.json"), "--log-every-n-steps", "1", "--max-steps", "2"]
    arguments += ["--workers", "0", "--device", "cpu", "--batch-size", "4"]
    own = {"TRAIN_DATA": data["train_data"], "VAL_DATA": data["val_data"], "OUTPUT": str(folder), "NPROC_PER_NODE": "2"}
    (call,) = called(clone, recipe, *arguments, **own)
    launch, settings = call[: call.index("--")], call[call.index("--") + 1 :]
    assert launch[launch.index("--nproc_per_node") + 1] == "2" and launch[-2:] == ["-m", "rwkv_clip.training.main"]
    run_ranks(2, tmp_path, train, settings)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [record for record in log if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2] and "val_mean_recall" in log[-1]
    assert METHODS[recipe][3] <= steps[0].keys()
    used = json.loads((folder / "settings.json").read_text())
    assert (used["precision"], used["decay"], used["cycle_beta1"]) == ("amp", "all", True)
    state = json.loads((folder / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["scaler"]["growth_interval"] == 200
    (folder / "log.jsonl").write_text("")
    settings[settings.index("--max-steps") + 1] = "4"
    run_ranks(2, tmp_path, train, [*settings, "--allow-change", "total_steps", "max_steps"])
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()][:2] == [3, 4]

    shutil.copytree(tmp_path / "images", tmp_path / "classes" / "stripes")
    evaluated = called(clone, "test_zero_shot_retrieval.sh", CHECKPOINT=str(folder), DATA=data["val_data"])
    evaluated += called(
        clone, "test_zero_shot_classificaiton.sh", CHECKPOINT=str(folder), DATA_ROOT=str(tmp_path / "classes")
    )
    for start, module, *rest in evaluated:
        assert (start, module) == ("-m", "rwkv_clip.eval.main") and evaluate(rest) == 0
    assert list(folder.glob("eval/*retrieval*/result.json")) and list(folder.glob("eval/*classification*/result.json"))


@pytest.mark.parametrize("recipe", METHODS)
def test_defaults_of_a_recipe(clone, recipe):
    preset, folder, demo, _ = METHODS[recipe]
    (call,) = called(
        clone, recipe, "--seed", "3", TRAIN_DATA="x", NNODES="2", NODE_RANK="1", MASTER_ADDR="a", MAX_RESTARTS="3"
    )
    launch, settings = call[: call.index("--")], read_command_line(call[call.index("--") + 1 :])
    for flag, value in {"nnodes": "2", "node_rank": "1", "master_addr": "a", "master_port": "29500"}.items():
        assert launch[launch.index(f"--{flag}") + 1] == value
    assert launch[launch.index("--max-restarts") + 1] == "3" and call[call.index("--preset") + 1] == preset
    changes = {"train_data": "x", "name": folder, "resume": "latest", "seed": 3}
    published = parse(Settings, to_dict(load_settings(preset)) | changes)
    assert settings == published

    (clone / "shell" / "train_demo.sh").write_text('set -u\npython "$OUTPUT" "$@"\n')
    (call,) = called(clone, recipe, "--seed", "3")
    assert re.fullmatch(rf"logs/demo-{demo}-\d{{8}}-\d{{6}}", call[0]) and call[-2:] == ["--seed", "3"]
    (call,) = called(clone, recipe, OUTPUT="mine")
    assert call[0] == "mine"


@pytest.mark.parametrize("recipe", FINETUNES)
def test_defaults_of_fine_tuning(clone, recipe):
    preset, folder, lr, batch, epochs = FINETUNES[recipe]
    own = {"TRAIN_DATA": "x", "VAL_DATA": "x.rec", "CHECKPOINT": "x.rec", "NPROC_PER_NODE": "8"}
    (call,) = called(clone, recipe, "--seed", "3", **own)
    settings = read_command_line(call[call.index("--") + 1 :])
    changes = {"train_data": "x", "val_data": "x.rec", "pretrained": "x.rec"}
    changes |= {"name": folder, "resume": "latest", "seed": 3}
    assert settings == parse(Settings, to_dict(load_settings(preset)) | changes)
    found = settings.optimizer
    assert (found.lr, settings.parallel.batch_size, found.epochs) == (lr, batch, epochs)
    assert (found.published.lr, found.published.batch) == (lr, 8 * batch)
    assert (found.wd, found.beta1, found.beta2, found.eps, found.grad_clip_norm) == (1e-3, 0.9, 0.98, 1e-6, None)
    assert (found.schedule, found.warmup) == ("cosine", 6 if "COCO" in recipe else 100)
    assert (settings.data.auto_augment, settings.data.interpolation) == ("original", "bicubic")
    assert settings.parallel.grad_checkpointing == ("COCO" in recipe) and settings.log.val_every_n_steps == 150

    (clone / "shell" / "train_demo.sh").write_text('set -u\npython "$OUTPUT" "$DEMO_LANGUAGE" "$NEEDED" "$@"\n')
    (call,) = called(clone, recipe, "--seed", "3", CHECKPOINT="not used")
    assert re.fullmatch(r"logs/demo-cn-clip-\d{8}-\d{6}", call[0])
    assert call[1:] == ["zh", "chinese", "--model", "CN-CLIP-Ti-8", "--lr", "1e-3", "--seed", "3"]


TINY_CHINESE = {  # an image tower of CLIP's kind and a BERT, as small as the pictures of `make_tiny`
    "embed_dim": 32,
    "resize_mode": "squash",
    "image": {"kind": "open_clip", "image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "quick_gelu": True},
    "text": {"kind": "bert", "context": 12, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
}


@pytest.mark.parametrize("recipe", FINETUNES)
def test_fine_tuning_starts_from_weights_trains_resumes_and_warns(clone, tmp_path, recipe, caplog):
    """By its preset, on a CPU, with a smaller model and batch."""
    pytest.importorskip("tokenizers", reason="needs the extra `chinese`")
    make_tiny(tmp_path)
    folder = tmp_path / "logs" / "run"
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    rows = [{"image": row["image"], "caption": f"条纹 {i % 7} 的图片"} for i, row in enumerate(rows)]
    (tmp_path / "chinese.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_records(str(tmp_path / "chinese.jsonl"), str(tmp_path / "chinese"), tokenizer="bert-chinese", context=12)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_CHINESE))
    torch.manual_seed(1)
    weights = create_model(TINY_CHINESE).state_dict()
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "weights.safetensors")

    own = {"TRAIN_DATA": str(tmp_path / "chinese"), "VAL_DATA": str(tmp_path / "chinese.jsonl"), "OUTPUT": str(folder)}
    own |= {"CHECKPOINT": str(tmp_path / "weights.safetensors")}
    changes = ["--model", str(tmp_path / "tiny.json"), "--batch-size", "16", "--workers", "0", "--device", "cpu"]
    (call,) = called(clone, recipe, *changes, "--max-steps", "6", "--positives", "mask", **own)
    settings = call[call.index("--") + 1 :]
    train(settings)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"val_loss", "val_image_to_text_acc", "val_mean_recall"} <= log[-1].keys()
    assert [record["step"] for record in log if "val_loss" in record] == [4, 6], "where the epoch of 60 ends, and last"
    assert {"duplicates", "image_to_text_acc", "text_to_image_acc"} <= log[-2].keys() and log[-2]["duplicates"] > 0.9
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert "was published for" in caplog.text and "16 with lr" in caplog.text
    trained = read_weights(folder / "checkpoints" / "step-00000006")
    moved = max(float((trained[key] - value).abs().max()) for key, value in weights.items())
    assert 0 < moved < 0.01, "it began where the weights are"
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    train(settings)
    again = read_weights(folder / "checkpoints" / "step-00000006")
    assert all(torch.equal(again[key], value) for key, value in trained.items())


@pytest.mark.parametrize("language", [None, "zh"])
def test_the_demo_speaks_the_language_of_its_recipe(clone, language):
    """Its set, its run and its evaluation; evaluated again alone, a run meets the set that it was trained on."""
    run = clone / "logs" / "demo-cn-clip-1"
    (run / "eval" / "retrieval").mkdir(parents=True)
    for path in (run / "eval" / "retrieval" / "retrieval.png", run / "log.jsonl"):
        path.touch()
    data = "data/demo" if language is None else "data/demo-zh"
    for name in ("retrieval.jsonl", "classification/shape/x"):
        (clone / data / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / data / name).touch()
    environment = {} if language is None else {"DEMO_LANGUAGE": language}
    made, trained, *evaluated = called(clone, "train_demo.sh", OUTPUT="logs/demo-cn-clip-1", **environment)
    assert made[-4:] == ["--output", data, "--language", language or "en"]
    assert trained[trained.index("--train-data") + 1] == f"{data}/train"
    assert [call[call.index("--data") + 1] for call in evaluated] == [
        f"{data}/retrieval.jsonl",
        f"{data}/classification/shape",
    ]
    (run / "settings.json").write_text(json.dumps({"train_data": f"{data}/train", "model": "x"}, indent=1))
    alone = called(clone, "test_zero_shot_retrieval.sh") + called(clone, "test_zero_shot_classificaiton.sh")
    assert alone[0][alone[0].index("--data") + 1] == f"{data}/retrieval.jsonl"
    assert alone[1][alone[1].index("--data") + 1] == f"{data}/classification/shape"


@pytest.mark.parametrize(
    "extras, needed, project",
    [
        (None, "", "."),
        (None, "chinese", ".[chinese]"),
        ("", "chinese", ".[chinese]"),
        ("dev", "", ".[dev]"),
        ("dev,dali", "chinese", ".[dev,dali,chinese]"),
        ("chinese", "chinese", ".[chinese]"),
    ],
)
def test_what_a_recipe_needs_is_installed(tmp_path, extras, needed, project):
    for name in ("requirements.txt", "setup.py"):
        (tmp_path / name).touch()
    shutil.copytree(ROOT / "shell", tmp_path / "shell")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\n[ "$2" != pip ] || echo "${@: -1}"\n')
    python.chmod(0o755)
    own = {k: v for k, v in os.environ.items() if k != "EXTRAS"} | {"NEEDED": needed}
    own |= {} if extras is None else {"EXTRAS": extras}
    command = ["bash", "-euc", f"source {tmp_path}/shell/setup.sh; source {tmp_path}/shell/setup.sh"]
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [project], "once"


@pytest.mark.parametrize("recipe", list(METHODS)[1:])
def test_demo_of_a_recipe(clone, tmp_path, recipe):
    """What its demo trains, for two steps, on other pictures."""
    data = make_tiny(tmp_path)
    build_records(str(tmp_path / "all.jsonl"), str(tmp_path / "wide"), context=32)
    (clone / "shell" / "train_demo.sh").write_text('python "$@"\n')
    (call,) = called(clone, recipe)
    arguments = ["--preset", "demo", *call, "--train-data", str(tmp_path / "wide"), "--logs", data["logs"]]
    folder = run(read_command_line([*arguments, "--max-steps", "2", "--batch-size", "8", "--device", "cpu"]))
    state = json.loads((folder / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["model"] == "ViT-Ti-8" and state["settings"]["objective"] in recipe.lower() + " infonce"
    assert (state["settings"]["objective"] == "alip") == ("ALIP" in recipe)


def test_the_newest_demo_run_is_evaluated(clone):
    """By when it was trained, not by its name; a folder without a run does not count."""
    for age, name in enumerate(("demo-clip-2", "demo-alip-3", "demo-rwkv-clip-1")):
        log = clone / "logs" / name / "log.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text("{}\n")
        os.utime(log, (1e9 - age, 1e9 - age))
    (clone / "logs" / "demo-x").mkdir()
    for name in ("test_zero_shot_retrieval.sh", "test_zero_shot_classificaiton.sh"):
        (call,) = called(clone, name)
        assert call[call.index("--checkpoint") + 1] == "logs/demo-clip-2"
        (call,) = called(clone, name, CHECKPOINT="logs/demo-alip-3/")
        assert call[call.index("--checkpoint") + 1] == "logs/demo-alip-3"


@pytest.mark.parametrize("task, message", [("retrieval", "DATA"), ("classificaiton", "DATA_ROOT")])
def test_evaluation_without_a_run_says_what_to_do(clone, task, message):
    ((said,),) = called(clone, f"test_zero_shot_{task}.sh", expect=2)
    assert "no demo run yet" in said and message in said


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"DATA": "x.rec"}, []),
        ({"DATA": "x.rec", "IMAGES": "data", "OUTPUT": "out"}, ["--images", "data"]),
        (
            {"DATA": "x.rec", "BASE_URL": "http://h/v1", "MODEL": "m"},
            ["--composer openai --base-url http://h/v1 --model m"],
        ),
    ],
)
def test_describing(clone, given, flags):
    (call,) = called(clone, "describe.sh", "--limit", "5", **given)
    assert call[:3] == ["-m", "rwkv_clip.describe", "run"] and call[-2:] == ["--limit", "5"]
    line = " ".join(call)
    assert all(
        part in line
        for part in (f"--input {given['DATA']}", f"--output {given.get('OUTPUT', 'logs/describe')}", *flags)
    )
    assert ("openai" in line) == ("BASE_URL" in given)


def test_describing_without_settings_draws_the_demo_rows_once(clone):
    drawn, described = called(clone, "describe.sh")
    assert drawn[:3] == ["-m", "rwkv_clip.describe", "demo"] and drawn[-1] == "data/describe-demo"
    assert "data/describe-demo/rows.jsonl" in described and "logs/describe_demo" in described
    (clone / "data" / "describe-demo").mkdir()
    (clone / "data" / "describe-demo" / "rows.jsonl").touch()
    assert len(called(clone, "describe.sh")) == 1


def test_search_takes_pictures_features_or_the_newest_demo_run(clone):
    for age, name in enumerate(("demo-rwkv-clip-1", "demo-rwkv-clip-2")):
        log = clone / "logs" / name / "log.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text("{}\n")
        os.utime(log, (1e9 - age, 1e9 - age))
    for name in ("photos", "index"):
        (clone / name).mkdir()
    serve, newest = ["-m", "rwkv_clip.search", "serve"], ["--checkpoint", "logs/demo-rwkv-clip-1", "--port", "8000"]
    drawn = [
        "-m",
        "rwkv_clip.demo",
        "--output",
        "data/demo-224",
        *["--size", "224", "--test", "1000", "--train", "1", "--per-class", "1", "--language"],
    ]
    pictures = ["--images", "data/demo-224/retrieval.jsonl", *newest]
    assert called(clone, "search.sh") == [[*drawn, "en"], [*serve, *pictures]]
    (clone / "data" / "demo").mkdir(parents=True, exist_ok=True)
    (clone / "data" / "demo" / "demo.json").write_text(json.dumps({"settings": {"language": "zh"}}, indent=1))
    assert called(clone, "search.sh")[0] == [*drawn, "zh"]
    assert called(clone, "search.sh", IMAGES="photos") == [[*serve, "--images", "photos", *newest]]
    own = {"IMAGES": "photos", "CHECKPOINT": "x.rec", "PORT": "9"}
    assert called(clone, "search.sh", **own) == [[*serve, "--images", "photos", "--checkpoint", "x.rec", "--port", "9"]]
    assert called(clone, "search.sh", FEATURES="index") == [[*serve, "--features", "index", "--port", "8000"]]


def test_search_without_a_demo_run_trains_one(clone):
    (clone / "shell" / "train_demo.sh").write_text("mkdir -p logs/demo-new; touch logs/demo-new/log.jsonl\n")
    call = called(clone, "search.sh")[-1]
    assert call[2] == "serve" and call[call.index("--checkpoint") + 1] == "logs/demo-new"


@pytest.mark.parametrize("recipe", list(METHODS)[1:])
def test_slurm_starts_any_recipe(clone, recipe):
    for name, text in (SLURM | {"srun": 'shift; for n in 0 1; do SLURM_NODEID=$n "$@"; done'}).items():
        (clone / "bin" / name).write_text(f"#!/usr/bin/env bash\nset -eu\n{text}\n")
        (clone / "bin" / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(clone), "SLURM_JOB_NODELIST": "n", "SLURM_NNODES": "2", "SLURM_JOB_ID": "4711"}
    job |= {"FAKE": str(clone / "bin"), "PATH": f"{clone / 'bin'}:{os.environ['PATH']}"}
    nodes = called(clone, "slurm_train.sh", "--seed", "3", RECIPE=recipe, TRAIN_DATA="x", **job)
    assert [call[call.index("--node_rank") + 1] for call in nodes] == ["0", "1"]
    for call in nodes:
        assert call[call.index("--preset") + 1] == METHODS[recipe][0] and call[-2:] == ["--seed", "3"]
        assert call[call.index("--nnodes") + 1] == "2" and call[call.index("--master_addr") + 1] == "127.0.0.1"


SLURM = {
    # Every node is this machine: one task per node, told its number, as srun starts them; scancel signals the tasks.
    "srun": """shift; for node in 0 1; do SLURM_NODEID=$node "$@" & echo $! >> "$FAKE/tasks"; done
code=0; for task in $(cat "$FAKE/tasks"); do wait "$task" || code=$?; done; exit $code""",
    "scancel": """[ "$*" = "--signal=TERM 4711" ]; kill -TERM $(cat "$FAKE/tasks")""",
    "scontrol": """echo "$*" >> "$FAKE/calls"; printf '127.0.0.1\\nnode1\\n'""",
}


def test_slurm_trains_on_two_nodes_saves_when_told_and_goes_on(tmp_path, free_port):
    data = make_tiny(tmp_path)
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\nset -eu\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "4711",
    }
    job |= {
        "FAKE": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "EXTRAS": "dev,dali",
        "NPROC_PER_NODE": "1",
    }
    job |= {"TRAIN_DATA": data["train_data"], "OUTPUT": str(tmp_path / "logs" / "run")}
    settings = ["--model", data["model"], "--log-every-n-steps", "1", *QUICK, "--max-steps", "100000"]
    with open(tmp_path / "out", "w") as out:
        command = ["bash", str(ROOT / "shell" / "slurm_train.sh"), *settings]
        batch = subprocess.Popen(command, env=os.environ | job, stdout=out, stderr=out)
    log = tmp_path / "logs" / "run" / "log.jsonl"
    until = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") > 3) and time.monotonic() < until:
        time.sleep(0.1)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(300) == 0, (tmp_path / "out").read_text()[-3000:]
    steps = log.read_text().count("\n")
    said = (tmp_path / "out").read_text()
    assert "on 2 x cpu" in said and f"stopped by SIGTERM after step {steps}" in said
    assert (tmp_path / "logs" / "run" / "checkpoints" / f"step-{steps:08}").is_dir()
    assert (tmp_path / "calls").read_text() == "show hostnames node[0-1]\nrequeue 4711\n"


def test_recipes_are_short_and_safe():
    for path in (ROOT / "shell").glob("*.sh"):
        subprocess.run(["bash", "-n", str(path)], check=True)
        lines = path.read_text().splitlines()
        assert len(lines) <= 30, path
        assert path.name in ("setup.sh", "needs.sh") or "set -euo pipefail" in lines, path  # sourced after that line


@pytest.mark.parametrize(
    "data, given, prefix",
    [
        ("x.rec", {}, "a photo of "),
        ("valid_texts.jsonl", {}, ""),
        ("lmdb/valid", {}, ""),
        ("valid_texts.jsonl", {"PREFIX": "一张"}, "一张"),
        ("x.rec", {"PREFIX": ""}, ""),
    ],
)
def test_no_english_prefix_before_chinese_texts(clone, data, given, prefix):
    (clone / "valid_texts.jsonl").touch()
    (clone / "lmdb" / "valid" / "pairs").mkdir(parents=True)
    (call,) = called(clone, "test_zero_shot_retrieval.sh", CHECKPOINT="x.rec", DATA=data, **given)
    assert call[call.index("--prefix") + 1] == prefix


@pytest.mark.parametrize(
    "place", ["open_clip:ViT-B-32:openai", "hf-hub:me/mine@v1", "local-dir:export", "ViT-B-32:alip"]
)
@pytest.mark.parametrize("name, more", [("test_zero_shot_retrieval.sh", "DATA"), ("search.sh", "IMAGES")])
def test_checkpoints_have_every_name_that_the_commands_take(clone, name, more, place):
    (call,) = called(clone, name, CHECKPOINT=place, **{more: "x.rec"})
    assert call[call.index("--checkpoint") + 1] == place


MISTAKES = [
    ("test_zero_shot_retrieval.sh", {"CHECKPOINT": "none", "DATA": "x.rec"}, "CHECKPOINT=none: no such file"),
    ("test_zero_shot_retrieval.sh", {"CHECKPOINT": "x.rec", "DATA": "none"}, "DATA=none: none names no file"),
    ("test_zero_shot_classificaiton.sh", {"CHECKPOINT": "none", "DATA_ROOT": "data"}, "CHECKPOINT=none"),
    ("test_zero_shot_classificaiton.sh", {"CHECKPOINT": "x.rec", "DATA_ROOT": "none"}, "DATA_ROOT=none"),
    ("test_linear_probe.sh", {"DATA_ROOT": "data"}, "CHECKPOINT is not set"),
    ("test_linear_probe.sh", {"CHECKPOINT": "x.rec"}, "DATA_ROOT is not set"),
    ("train_Flickr8k_small.sh", {}, "FLICKR8K is not set"),
    ("train_Flickr8k_small.sh", {"FLICKR8K": "none"}, "FLICKR8K=none"),
    ("compare_ALIP_Flickr8k.sh", {"FLICKR8K": "none"}, "FLICKR8K=none"),
    ("compare_third_text_Flickr8k.sh", {}, "FLICKR8K is not set"),
    ("finetune_Flickr8k.sh", {"FLICKR8K": "none"}, "FLICKR8K=none"),
    ("describe.sh", {"BASE_URL": "http://h/v1"}, "MODEL is not set"),
    ("describe.sh", {"DATA": "x.rec", "IMAGES": "none"}, "IMAGES=none"),
    ("search.sh", {"IMAGES": "none"}, "IMAGES=none"),
    ("search.sh", {"FEATURES": "none"}, "FEATURES=none"),
    ("train_RWKV_CLIP_B32_YFCC15M.sh", {"TRAIN_DATA": "x,none"}, "TRAIN_DATA=x,none: none names no file"),
    ("train_CLIP_B32_YFCC15M.sh", {"TRAIN_DATA": "x", "VAL_DATA": "none"}, "VAL_DATA=none"),
    ("finetune_CN_CLIP_B16_MUGE.sh", {"TRAIN_DATA": "x"}, "CHECKPOINT is not set; set it to the weights to start from"),
    ("finetune_CN_CLIP_B16_MUGE.sh", {"TRAIN_DATA": "x", "CHECKPOINT": "none"}, "CHECKPOINT=none: no such file"),
]


@pytest.mark.parametrize("name, variables, message", MISTAKES)
def test_mistakes_are_said_before_anything_is_installed(clone, name, variables, message):
    (clone / "shell" / "setup.sh").write_text("echo installing >&2\n")
    ((said,),) = called(clone, name, expect=2, **variables)
    assert message in said and said.startswith("error: ") and "installing" not in said


@pytest.mark.parametrize("broken", ["too old", "does not start", "half made"])
def test_a_wrong_python_is_named(tmp_path, broken):
    for name in ("requirements.txt", "setup.py"):
        (tmp_path / name).touch()
    shutil.copytree(ROOT / "shell", tmp_path / "shell")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    if broken == "does not start":
        python.symlink_to(tmp_path / "gone")
    elif broken == "too old":
        python.write_text('#!/usr/bin/env bash\n[ "$1" = --version ] && echo Python 3.6.9\nexit 1\n')
        python.chmod(0o755)
    done = subprocess.run(["bash", str(tmp_path / "shell" / "run_tests.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "rm -r .venv" in done.stderr and "installing" not in done.stdout
    if broken == "too old":
        shutil.rmtree(tmp_path / ".venv")
        old = tmp_path / "python"
        old.write_text('#!/usr/bin/env bash\n[ "$1" = --version ] && echo Python 3.6.9\nexit 1\n')
        old.chmod(0o755)
        own = os.environ | {"PYTHON": str(old)}
        command = ["bash", str(tmp_path / "shell" / "run_tests.sh")]
        done = subprocess.run(command, env=own, capture_output=True, text=True)
        assert done.returncode == 2 and "Python 3.6.9, Python 3.10 or later is needed" in done.stderr
