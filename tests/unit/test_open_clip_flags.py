"""Command lines of open_clip's trainer: its parser and our table hold the same flags, and each gets its answer."""

import argparse
import shlex
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

import rwkv_clip.training
from rwkv_clip.config import ConfigError, flat_names, to_dict
from rwkv_clip.training.command_line import list_flags, read_command_line
from rwkv_clip.training.open_clip_command import describe, evaluation_commands, other_defaults, split_words, understand
from rwkv_clip.training.open_clip_flags import BY_NAME, ROWS, UNSET
from rwkv_clip.training.open_clip_page import make_page
from rwkv_clip.training.settings import Settings

params = pytest.importorskip("open_clip_train.params", reason="open_clip_torch comes with its trainer")

OWN = set(list_flags(Settings))


@pytest.fixture(scope="module")
def theirs():
    """open_clip's flags -> how many values each takes (None: one, 0: none)."""
    seen: list[argparse.ArgumentParser] = []
    real = argparse.ArgumentParser.parse_args

    def spy(self, *args, **kwargs):
        seen.append(self)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", spy)
        params.parse_args([])
    actions = [action for action in seen[0]._actions if action.dest != "help"]
    return {option.lstrip("-"): action.nargs for action in actions for option in action.option_strings}


def understood(command: str):
    words = split_words(shlex.split(command))
    return understand(words, OWN), words


def test_every_flag_has_a_row_and_every_row_is_a_flag(theirs):
    current = {name for row in ROWS if not row.versions for name in row.names.split()}
    assert set(theirs) - current == set(), "flags of open_clip without a row"
    assert current - set(theirs) == set(), "rows that are no flags of open_clip"
    assert len(BY_NAME) == sum(len(row.names.split()) for row in ROWS), "a name stands twice"
    assert all(row.text for row in ROWS if row.answer in ("not needed", "not there"))


def choices_of(name: str) -> tuple | None:
    """Values of one of our settings, where they are listed."""
    key = name.replace("-", "_")
    kind = get_type_hints(get_type_hints(Settings)[flat_names(Settings)[key]])[key]
    while get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    return get_args(kind) if "Literal" in str(get_origin(kind)) else None


def test_targets_are_settings_of_ours():
    for row in ROWS:
        for name in row.names.split():
            if row.answer in ("same", "renamed"):
                assert row.ours_of(name) in OWN, f"{name}: no --{row.ours_of(name)}"
            else:
                assert name not in OWN and not row.ours, f"{name} is a flag of ours"


def test_values_are_values_of_ours():
    for row in ROWS:
        name = row.ours_of(row.names.split()[0])
        if not (values := [*row.ours.split()[1:], *" ".join(row.becomes.values()).split()]):
            continue
        choices = choices_of(name)
        for value in values:
            assert value in choices, (name, value, choices)
        assert not set(row.refused) & set(choices), f"{name} is refused and there"


def test_each_flag_alone_is_answered(theirs):
    for name, count in theirs.items():
        given = [f"--{name}", *([] if count == 0 else ["1"])]
        found = understand(split_words(given), OWN)
        said = [text for _, text, _ in found.answers] + [text for text, _ in found.refused] + found.same
        assert len(said) == 1 and said[0].split()[0] == f"--{name}"
        assert found.theirs or BY_NAME[name].answer == "same", "its message is shown"
        assert bool(found.arguments) == (BY_NAME[name].answer in ("same", "renamed") and not found.refused)


@pytest.mark.parametrize("model", ["ViT-B-32", "RN50"])
def test_defaults_are_open_clips(model):
    """Of each row with a default, and of augmentation; what is the same in both is not told."""
    from open_clip.transform import AugmentationCfg, image_transform

    real = vars(params.parse_args(["--model", model]))
    told = other_defaults(split_words(["--model", model]), to_dict(Settings()))
    ours = to_dict(Settings())
    for row in ROWS:
        if row.default is not UNSET and row.names not in ("model", "image-interpolation"):
            key = row.ours_of(row.names).replace("-", "_")
            theirs = real[row.names.replace("-", "_")]
            flag = f"--{row.ours_of(row.names)}"
            assert (flag in told) == (theirs != ours[key]), flag
            if flag in told:
                value = told[told.index(flag) + 1]
                assert value == str(theirs) or float(value) == theirs, flag
    crop, *rest = image_transform(224, is_train=True).transforms
    assert crop.scale == AugmentationCfg().scale == (0.9, 1.0) and crop.ratio == pytest.approx((0.75, 1.3333), abs=1e-4)
    assert crop.interpolation.value == "bicubic" and not any("Flip" in type(part).__name__ for part in rest)
    assert shlex.join(told).endswith("--crop-area 0.9 1 --crop-aspect 0.75 1.3333 --flip 0")
    read = read_command_line(["--train-data", "x", *told])
    assert other_defaults(split_words(["--model", model]), to_dict(read)) == []


def test_page_is_made_of_the_table():
    page = Path(rwkv_clip.training.__file__).with_name("README.md")
    again = "python -m rwkv_clip.training.open_clip_page > src/training/README.md"
    assert page.read_text() == make_page(), again


@pytest.mark.parametrize(
    "given, ours",
    [
        ("--lr-scheduler cosine", "--schedule cosine"),
        ("--lr-scheduler=cosine", "--schedule cosine"),
        ("--lr_scheduler cosine", "--schedule cosine"),
        ("--lr-scheduler const --warmup 7", "--schedule const-cooldown --epochs-cooldown 0 --warmup 7"),
        ("--lr-scheduler const-cooldown --epochs-cooldown 2", "--schedule const-cooldown --epochs-cooldown 2"),
        ("--skip-scheduler", "--schedule constant"),
        ("--siglip", "--objective siglip"),
        ("--fsdp", "--parallel fsdp"),
        ("--precision amp_bfloat16", "--precision amp_bf16"),
        ("--precision amp", "--precision amp"),
        ("--report-to wandb,tensorboard", "--report-to wandb tensorboard"),
        ("--report-to=tensorboard", "--report-to=tensorboard"),
        ("--report-to all", "--report-to tensorboard wandb"),
        ("--report-to wandb,all", "--report-to wandb tensorboard"),
        ("--report-to ''", ""),
        ("--image-interpolation bicubic", "--interpolation bicubic"),
        ("--aug-cfg 'scale=(0.4, 1.0)' ratio=[0.5,2] use_timm=True", "--crop-area 0.4 1 --crop-aspect 0.5 2"),
        ("--image-layer-decay 0.7 --text-layer-decay .65", "--layer-decay-image 0.7 --layer-decay-text .65"),
        ("--norm_gradient_clip 1.0", "--grad-clip-norm 1.0"),
        ("--gather-with-grad --local-loss --ddp-static-graph --save-most-recent", ""),
        ("--delete-previous-checkpoint --debug --train-num-samples 5 --dist-url=tcp://x:1", ""),
        ("--logs ./logs/ --resume latest --device cuda", "--logs ./logs/ --resume latest --device cuda"),
        ("--pretrained-image weights.pt", "--pretrained-image weights.pt"),
        ("--lr -1e-3 --gates.init 0.5 --no-lock-image", "--lr -1e-3 --gates.init 0.5 --no-lock-image"),
    ],
)
def test_translated(given, ours):
    found, _ = understood(given)
    assert found.arguments == shlex.split(ours) and not found.refused


@pytest.mark.parametrize(
    "given, why",
    [
        ("--lr-scheduler const --epochs-cooldown 2", "has no cool-down"),
        ("--lr-scheduler linear", "not one of cosine, const-cooldown"),
        ("--precision pure_bf16", "use --precision amp_bf16"),
        ("--precision fp16", "use --precision amp"),
        ("--warmup 0.1", "use --warmup-fraction 0.1"),
        ("--dataset-resampled", "each record comes once"),
        ("--pretrained-image", "needs the path"),
        ("--resume logs/x/checkpoints/epoch_3.pt", "--pretrained logs/x/checkpoints/epoch_3.pt"),
        ("--aug-cfg color_jitter=0.4 scale=(0.9,1)", "color_jitter not there"),
        ("--aug-cfg scale=__import__('os')", "not a range"),
        ("--train-data 'pipe:aws s3 cp s3://b/{0..9}.tar -'", "no command of a shell is run"),
        ("--model coca_ViT-L-14", "captioning is not trained"),
        ("--save-frequency 0", "last checkpoint is always saved"),
        ("--image-interpolation random", "use --interpolation"),
        ("--logs none", "leave it out"),
        ("--dataset-type synthetic", "rwkv_clip.demo"),
        ("--force-quick-gelu", "ViT-B-32-quickgelu"),
        (
            "--remote-sync s3://b/x --remote-sync-protocol s3",
            "--remote-sync s3://b/x, --remote-sync-protocol s3: not th",
        ),
        ("--batchsize 3", "--batchsize 3: unknown flag; did you mean --batch-size?"),
        ("--gather-with-grads", "did you mean open_clip's --gather-with-grad (not needed: every"),
        ("--lr-schedular x", "did you mean open_clip's --lr-scheduler (--schedule)?"),
        ("--train-d x", "did you mean --train-data?"),
        ("--zzz", "unknown flag; --help shows all"),
    ],
)
def test_refused(given, why):
    found, _ = understood(given)
    assert len(found.problems) == 1 and why in found.problems[0]
    assert given.split()[0].split("=")[0] not in found.arguments


README = [  # of open_clip 3.3.0: command, what the message holds, what is refused
    (
        "--save-frequency 1 --zeroshot-frequency 1 --report-to tensorboard --train-data=/path/to/train_data.csv "
        "--val-data=/path/to/validation_data.csv --csv-img-key filepath --csv-caption-key title "
        "--imagenet-val=/path/to/imagenet/root/val/ --warmup 10000 --batch-size=128 --lr=1e-3 --wd=0.1 --epochs=30 "
        "--workers=8 --model RN50",
        ["the newest --keep-checkpoints (2) are kept", "--beta2 0.999", "a set for retrieval"],
        [],
    ),
    (
        "--train-data '/data/cc12m/cc12m-train-{0000..2175}.tar' --train-num-samples 10968539 --dataset-type "
        "webdataset --batch-size 320 --precision amp --workers 4 --imagenet-val /data/imagenet/validation/",
        ["--train-num-samples 10968539: records are counted", "--lr 0.0005", "--model RN50"],
        [],
    ),
    (
        "--save-frequency 1 --report-to tensorboard --train-data=/data/LAION-400M/{00000..41455}.tar --warmup 2000 "
        "--batch-size=256 --epochs=32 --workers=8 --model ViT-B-32 --name ViT-B-32-Vanilla --seed 0 --local-loss "
        "--gather-with-grad",
        ["--local-loss, --gather-with-grad: every rank", "--grad-clip-norm None", "--eps 1e-06"],
        [],
    ),
    (
        "--train-data=/path/to/train_data.csv --val-data=/path/to/validation_data.csv --resume /path/epoch_K.pt",
        [],
        ["--resume /path/epoch_K.pt: a file of weights starts a new run"],
    ),
    (
        "--dataset-type csv --train-data train2014.csv --warmup 1000 --batch-size 128 --lr 1e-5 --wd 0.1 --epochs 1 "
        "--workers 3 --model coca_ViT-L-14 --report-to wandb --coca-contrastive-loss-weight 0 "
        "--coca-caption-loss-weight 1 --log-every-n-steps 100",
        ["without what is refused below"],
        ["--model coca_ViT-L-14", "--coca-contrastive-loss-weight 0, --coca-caption-loss-weight 1"],
    ),
    (
        "--train-data='pipe:aws s3 cp s3://s-mas/cc3m/{00000..00329}.tar -' --train-num-samples 3000000 "
        "--val-num-samples 10000 --dataset-type webdataset --batch-size 256 --warmup 2000 --epochs 10 --lr 5e-4 "
        "--precision amp --workers 6 --model roberta-ViT-B-32 --lock-text --lock-text-unlocked-layers 10 "
        "--name 10_unfrozen --report-to tensorboard",
        ["--val-num-samples 10000: the whole set is measured"],
        ["no command of a shell"],
    ),
    (
        "--train-data x.tar --dataset-type webdataset --model ViT-B-32 --use-bnb-linear SwitchBackLinearGlobal",
        [],
        ["--use-bnb-linear SwitchBackLinearGlobal: not there; int8 is for inference"],
    ),
    (
        "--train-data x.tar --model ViT-B-32 --remote-sync s3://bucket/runs --remote-sync-frequency 600 "
        "--delete-previous-checkpoint --distill-model ViT-L-14 --distill-pretrained openai --accum-freq 4",
        ["--delete-previous-checkpoint: the newest", "the same: --model --distill-model --distill-pretrained --accum"],
        ["--remote-sync s3://bucket/runs, --remote-sync-frequency 600: not there"],
    ),
    (
        "--train-data a.tar::b.tar --train-data-upsampling-factors 1::2 --dataset-resampled --train-num-samples 9000 "
        "--siglip --opt timm/lion --lr-scheduler const-cooldown --epochs-cooldown 2",
        ["--siglip -> --objective siglip", "how often an epoch takes each record", "--batch-size 64 --warmup 10000"],
        ["--dataset-resampled: not there; each record comes once"],
    ),
]


@pytest.mark.parametrize("command, said, refused", README, ids=[case[0][:30] for case in README])
def test_commands_of_its_readme(command, said, refused):
    found, words = understood(command)
    message = " ".join(describe(found, words, to_dict(Settings())).split())
    assert all(part in message for part in said), message
    assert len(found.problems) == len(refused)
    assert all(any(part in problem for problem in found.problems) for part in refused), found.problems


@pytest.mark.parametrize(
    "command, commands",
    [
        (
            "--val-data=/path/to/validation_data.csv --model RN101 --pretrained /path/epoch_K.pt",
            [
                "python data2rec.py /path/to/validation_data.csv out/val",
                "python -m rwkv_clip.eval.main retrieval --checkpoint /path/epoch_K.pt --model RN101 "
                "--data out/val.rec",
            ],
        ),
        (
            "--imagenet-val /path/to/imagenet/validation --model ViT-B-32-quickgelu --pretrained laion400m_e32",
            [
                "python -m rwkv_clip.eval.main classification --checkpoint open_clip:ViT-B-32-quickgelu:laion400m_e32 "
                "--dataset imagenet --data /path/to/imagenet/validation",
            ],
        ),
        (
            "--imagenet-val /data/imagenet/val/ --model RWKV-CLIP-B-32 --resume logs/run --batch-size 32",
            [
                "python -m rwkv_clip.eval.main classification --checkpoint logs/run --model RWKV-CLIP-B-32 --dataset "
                "imagenet --data /data/imagenet/val/ --batch-size 32"
            ],
        ),
    ],
)
def test_evaluation_alone_has_its_command(command, commands):
    assert evaluation_commands(split_words(shlex.split(command))) == commands
    with pytest.raises(ConfigError) as error:
        read_command_line(shlex.split(command))
    assert [line.strip() for line in error.value.problems[1:]] == commands


PASTED = (
    "--train-data x --lr-scheduler cosine --gather-with-grad --lr 1 --lr=5e-4 --report-to wandb,tensorboard --flip .5"
)


def test_a_pasted_command_trains(capsys):
    """The last of several counts, as with argparse; one message, of the main rank alone."""
    read = read_command_line(PASTED.split())
    assert read.optimizer.lr == 5e-4 and read.optimizer.schedule == "cosine"
    assert read.log.report_to == ("wandb", "tensorboard")
    said = capsys.readouterr()
    assert not said.out and said.err.count("--gather-with-grad") == 1 and "--schedule cosine" in said.err
    ours = said.err.strip().splitlines()[-1].split("rwkv_clip.training.main ")[1]
    assert read_command_line(shlex.split(ours)) == read and not capsys.readouterr().err, "what is told is complete"


def test_other_ranks_are_silent(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    read_command_line(PASTED.split())
    assert "torchrun .. -m rwkv_clip.training.main -- --train-data" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "3")
    read_command_line(PASTED.split())
    assert not capsys.readouterr().err


def test_our_own_commands_say_nothing(capsys):
    own = "--preset rwkv-clip-b32-yfcc15m --train-data x --save-frequency 1 --resume latest --name y --warmup 5"
    read_command_line(own.split())
    assert not capsys.readouterr().err


def test_all_mistakes_at_once(capsys):
    line = "--horovod --batchsize 3 --lr -1 --precision fp16 --epochs 0"
    with pytest.raises(ConfigError) as error:
        read_command_line(line.split())
    said = "\n".join(error.value.problems)
    parts = (
        "--horovod: not there",
        "--batchsize 3: unknown",
        "use --precision amp",
        "lr: -1.0",
        "epochs: 0",
        "train_data",
    )
    assert all(part in said for part in parts) and len(error.value.problems) == len(parts)
    assert "--train-data" not in capsys.readouterr().err


def test_tasks_of_srun_without_torchrun_are_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ConfigError, match="srun: 8 tasks would train the same model each"):
        read_command_line(["--train-data", "x"])
    monkeypatch.setenv("WORLD_SIZE", "8")
    read_command_line(["--train-data", "x"])
