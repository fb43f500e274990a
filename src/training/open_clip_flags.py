"""What becomes of each flag of open_clip's trainer (open_clip_train/params.py): data, which open_clip_command.py reads.

Rows without `versions` are flags of open_clip 3.3.0; the other ones belong to earlier versions, or to 4.0 before its
release. `python -m rwkv_clip.training.open_clip_page` makes the README.md of this folder of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Answer = Literal["same", "renamed", "not needed", "not there"]
UNSET: Any = object()  # no default that matters: None is one


@dataclass(frozen=True)
class Row:
    """One flag, or several with one answer.

    names: without dashes, separated by spaces. ours: of a renamed one, our flag, and its value where theirs has none.
    text: what else is different (same, renamed), why (not needed), why not and what instead (not there).
    becomes: their value -> ours. refused: their value -> why, and what instead.
    default: theirs, as a value of our setting, where what is learned differs by it.
    """

    names: str
    answer: Answer
    text: str = ""
    ours: str = ""
    becomes: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    default: Any = UNSET
    versions: str = ""

    def ours_of(self, name: str) -> str:
        """Our name for one of its names; "" where there is none."""
        return self.ours.split()[0] if self.ours else name if self.answer == "same" else ""


def same(names: str, text: str = "", **more: Any) -> Row:
    return Row(names, "same", text, **more)


def renamed(names: str, ours: str, text: str = "", **more: Any) -> Row:
    return Row(names, "renamed", text, ours, **more)


def needless(names: str, text: str, **more: Any) -> Row:
    return Row(names, "not needed", text, **more)


def absent(names: str, text: str, **more: Any) -> Row:
    return Row(names, "not there", text, **more)


_NO_REPEATS = (
    "each record comes once per epoch, not at random with repetition; leave it out, and where --train-num-samples is "
    "not their number, end the run by --max-steps"
)
_ONE_LOSS = "every rank scores its own images against all texts, in chunks, with the exact gradients of one process"
_WEIGHTS = (
    "would be the type of the weights, which stay float32 in training; for autocast in that type use --precision {}"
)
_SIZE = "an image has one size in training; --force-image-size sets it"
_OLD_MODEL = "name an open_clip model that has this text tower, such as --model roberta-ViT-B-32"

ROWS: tuple[Row, ...] = (
    # ---- data
    same("train-data", "an epoch takes each record exactly once; none is left out or repeated"),
    same(
        "train-data-upsampling-factors",
        "how often an epoch takes each record of a source, exactly; there it is the odds of draws",
    ),
    same(
        "val-data",
        "a set for retrieval (JSONL, JSON, LMDB or records): recall and loss of the whole set",
    ),
    needless("train-num-samples", "records are counted; --max-steps ends a run earlier"),
    needless("val-num-samples", "the whole set is measured"),
    same(
        "dataset-type",
        refused={
            "synthetic": "there are no random pictures; `python -m rwkv_clip.demo` draws a set to try things with"
        },
    ),
    absent("dataset-resampled", _NO_REPEATS),
    same("csv-separator csv-img-key csv-caption-key"),
    same("imagenet-val imagenet-v2"),
    absent("cache-dir", "the hub's variable HF_HOME says where downloads are kept"),
    # ---- run
    same(
        "logs",
        refused={name: "a run always has a folder, for its checkpoints; leave it out" for name in ("none", "None")},
    ),
    needless("log-local", "the main rank logs for all, and errors name their rank"),
    same("name"),
    same("workers"),
    same("seed"),
    same("resume", "latest, or a run or checkpoint folder of ours; it goes on in mid-epoch, with the same bits"),
    same("epochs"),
    same("batch-size", default=64),
    same("accum-freq"),
    # ---- optimizer
    same("lr", default=5e-4),
    same("beta1", default=0.9),
    same("beta2", default=0.98),
    same("eps", default=1e-6),
    same("wd", default=0.2),
    same("momentum"),
    same("warmup", default=10000),
    same("opt"),
    same("use-bn-sync"),
    renamed("skip-scheduler", "schedule constant"),
    renamed(
        "lr-scheduler",
        "schedule",
        "`const` is `const-cooldown`, with --epochs-cooldown 0",
        becomes={"cosine": "cosine", "const-cooldown": "const-cooldown"},
    ),
    same("epochs-cooldown lr-cooldown-end lr-cooldown-power"),
    same("grad-clip-norm", default=None),
    # ---- checkpoints, evaluation
    same(
        "save-frequency",
        "epochs, besides --save-every-n-steps; the newest --keep-checkpoints (2) are kept, not all",
        refused={"0": "leave it out; the last checkpoint is always saved"},
    ),
    needless("save-most-recent", "the newest checkpoint is always kept"),
    needless("delete-previous-checkpoint", "the newest --keep-checkpoints (2) are kept, and older ones are deleted"),
    same("zeroshot-frequency"),
    same("val-frequency", refused={"0": "counts epochs, from 1; leave --val-data out"}),
    # ---- model
    same("model", default="RN50"),
    same("pretrained"),
    same("pretrained-image", "is followed by weights of the image tower; theirs is a switch, for timm's of ImageNet"),
    same("lock-image lock-image-unlocked-groups lock-image-freeze-bn-stats"),
    same("lock-text lock-text-unlocked-layers lock-text-freeze-layer-norm"),
    absent("image-mean image-std", 'the model says it: put "pixels": [[mean], [std]] into a model JSON'),
    renamed(
        "image-interpolation",
        "interpolation",
        "of training; evaluation takes the model's",
        becomes={"bilinear": "bilinear", "bicubic": "bicubic"},
        refused={"random": "one kind for the whole run; use --interpolation bicubic or bilinear"},
        default="bicubic",
    ),
    absent("image-resize-mode", 'the model says how evaluation resizes: put "resize_mode" into a model JSON'),
    renamed("aug-cfg", "crop-area", "for its scale, --crop-aspect for its ratio; the rest is not there"),
    same("grad-checkpointing"),
    same("force-context-length force-image-size"),
    absent("force-quick-gelu", "say it by the model's name, --model ViT-B-32-quickgelu"),
    same("force-patch-dropout"),
    needless("force-custom-text", "names of weights differ by it, and files of either kind load"),
    needless("torchscript", "for speed use --torchcompile"),
    absent("trace", "a run cannot train a traced model; `python -m rwkv_clip.export onnx` or torch-export makes one"),
    same("torchcompile"),
    absent("use-bnb-linear", "int8 is for inference (`python -m rwkv_clip.export onnx --quantize dynamic`)"),
    # ---- objective
    needless("local-loss gather-with-grad", _ONE_LOSS),
    needless("loss-dist-impl", "there is one, which is exact and chunked"),
    renamed("siglip", "objective siglip"),
    same("distill-model distill-pretrained"),
    absent(
        "coca-caption-loss-weight coca-contrastive-loss-weight",
        "CoCa's captioning is not trained here; leave them out and name a model without it, such as ViT-L-14",
    ),
    # ---- devices and ranks
    same(
        "precision",
        becomes={"amp_bfloat16": "amp_bf16"},
        refused={
            **dict.fromkeys(("bf16", "pure_bf16"), _WEIGHTS.format("amp_bf16")),
            **dict.fromkeys(("fp16", "pure_fp16"), _WEIGHTS.format("amp")),
        },
        default="amp",
    ),
    same("device"),
    needless("dist-url dist-backend", "torchrun says where the ranks meet; they use NCCL on GPUs and gloo elsewhere"),
    absent("horovod", "start with torchrun: torchrun --nproc_per_node 8 -m rwkv_clip.training.main -- .."),
    needless("ddp-static-graph", "gradients are computed once and reduced once"),
    absent("no-set-device-rank", "name the device of every process, --device cuda:0"),
    # ---- log
    same("report-to", becomes={"all": "tensorboard wandb"}),
    same("wandb-project-name wandb-notes"),
    needless("debug", "log.jsonl has everything that is measured"),
    needless("copy-codebase", "checkpoints note the version, and ranks compare their code; keep yours in git"),
    same("log-every-n-steps"),
    absent(
        "remote-sync remote-sync-frequency remote-sync-protocol",
        "leave it out and run `aws s3 sync` or rclone on the run folder: a checkpoint gets its name when it is whole",
    ),
    # ---- earlier versions
    absent("C", "`python -m rwkv_clip.eval.main linear-probe` fits it by a search", versions="0.1 to 1.3"),
    absent("dp multigpu gpu", "start with torchrun, one process for each GPU", versions="0.1"),
    needless("skip-aggregate", _ONE_LOSS, versions="0.1"),
    absent("openai-pretrained", "use --pretrained openai", versions="0.1, 0.2"),
    absent("regression-frequency", "run `python -m rwkv_clip.eval.main linear-probe` afterwards", versions="0.1, 0.2"),
    renamed("norm-gradient-clip", "grad-clip-norm", versions="2.0"),
    absent("hf-model-name hf-tokenizer-name", _OLD_MODEL, versions="2.3"),
    renamed("train-data-weights", "train-data-upsampling-factors", versions="2.13"),
    # ---- version 4.0, in its repository since 2026
    renamed("fsdp", "parallel fsdp", versions="4.0"),
    needless("fsdp-checkpoint", "checkpoints are whole, and the same for any number of ranks", versions="4.0"),
    absent("fsdp-no-reshard-after-forward fsdp-offload-cpu", "leave it out, or use --parallel hsdp", versions="4.0"),
    renamed("image-layer-decay visual-layer-decay", "layer-decay-image", versions="4.0"),
    renamed("text-layer-decay", "layer-decay-text", versions="4.0"),
    absent("text-pooler-own-group", "layers are grouped in one way; leave it out", versions="4.0"),
    same("opt-kwargs", versions="4.0"),
    absent("opt-fallback-list", "leave it out; --opt-kwargs go to the optimizer", versions="4.0"),
    absent("wd-exclude", "tensors of one dimension have no weight decay; leave it out", versions="4.0"),
    absent("torchcompile-strategy torchcompile-backend torchcompile-mode", "use --torchcompile alone", versions="4.0"),
    absent(
        "image-key text-key json-text-key json-text-key-probs",
        "use --csv-img-key and --csv-caption-key, and --text-probs for several captions",
        versions="4.0",
    ),
    absent(
        "max-image-pixels",
        "pictures of any size are read; build records with data2rec.py --max-side 512",
        versions="4.0",
    ),
    needless(
        "val-retrieval-chunk-size val-retrieval-precision", "ranks are exact and counted in chunks", versions="4.0"
    ),
    needless("log-metric-every-n-steps", "--log-every-n-steps counts for all that is logged", versions="4.0"),
    needless("train-loss-ema-samples", "log.jsonl has the loss itself", versions="4.0"),
    needless(
        "length-bucketing bucket-pool bucket-chunk bucket-prefetch-pools",
        "the order of samples is random alone",
        versions="4.0",
    ),
    absent("text-pad-multiple", "texts are padded to the context; leave it out", versions="4.0"),
    absent("use-naflex force-naflex-vision naflex-num-train-image-tokens naflex-patch-sizes", _SIZE, versions="4.0"),
    absent("naflex-patch-size-probs naflex-seq-lens naflex-seq-len-probs naflex-loss-scale", _SIZE, versions="4.0"),
    absent("naflex-max-tokens-per-batch naflex-max-text-tokens naflex-batch-divisor", _SIZE, versions="4.0"),
    absent("naflex-pad-multiple", _SIZE, versions="4.0"),
    absent(
        "audio-ext audio-fill audio-fusion audio-int16-normalize audio-layer-decay audio-multiprocessing-context "
        "audio-trunc audio-zeroshot-audio-key audio-zeroshot-class-key audio-zeroshot-dataset audio-zeroshot-split "
        "audio-zeroshot-multiprocessing-context audio-zeroshot-target-key audio-zeroshot-template "
        "audio-zeroshot-workers pretrained-audio",
        "there is no tower for sound",
        versions="4.0",
    ),
)

BY_NAME: dict[str, Row] = {name: row for row in ROWS for name in row.names.split()}
